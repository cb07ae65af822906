"""A run computes on the CPU where the recipe means it, and never because a GPU cannot be used."""

import os
from pathlib import Path

import pytest
import torch
from stage_trainer.errors import UserError
from stage_trainer.recipe.read import load
from stage_trainer.run import device
from stage_trainer.run.device import uses_gpu


@pytest.fixture
def machine(monkeypatch):
    """One whose GPU PyTorch cannot use, for want of a newer driver, say."""

    def execute(gpu=True, works=False, driver="470.82.01", built="13.2", visible=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: works)
        monkeypatch.setattr(device, "_nvidia_gpu", lambda: gpu)
        monkeypatch.setattr(device, "_driver", lambda: driver)
        monkeypatch.setattr(device, "_said_by_cuda", lambda: "unknown error")
        monkeypatch.setattr(torch.version, "cuda", built)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return execute


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({}, r"driver 470.82.01.*CUDA 13.2, which needs driver 580.65 or later; install one, or .* CUDA 11"),
        ({"driver": "550.54", "built": "13.0"}, "a PyTorch that was built for CUDA 12"),
        ({"built": None}, "built without CUDA"),
        ({"driver": "580.95", "visible": ""}, "CUDA_VISIBLE_DEVICES is ''; unset it"),
        ({"driver": "580.95"}, "CUDA says: unknown error"),
        ({"driver": None}, "driver unknown.*CUDA says: unknown error"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_refused_with_the_reason(machine, precision, found, reason):
    machine(**found)
    with pytest.raises(UserError, match=f"{reason}.*set device=cpu or precision=auto"):
        uses_gpu("auto", precision)


def test_bf16_without_a_gpu_is_refused_and_fp32_is_not(machine):
    machine(gpu=False)
    with pytest.raises(UserError, match="precision: bf16, and this machine has no GPU.*precision=auto or device=cpu"):
        uses_gpu("auto", "bf16")
    assert uses_gpu("auto", "fp32") is False


def test_precision_auto_takes_the_cpu_and_says_so_beside_a_gpu(machine):
    said = []
    machine(gpu=False)
    assert uses_gpu("auto", "auto", said.append) is False
    assert not said
    machine()
    assert uses_gpu("auto", "auto", said.append) is False
    assert "training on the CPU, as precision: auto allows; this machine has an NVIDIA GPU" in said[0]


def test_device_cpu_hides_gpus_that_work(machine):
    machine(works=True)
    assert uses_gpu("auto", "bf16") is True
    assert uses_gpu("cpu", "bf16") is False
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    "text",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version: 12.2.0",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.104.05  Release Build  (dvs-builder@U16)\n",
    ],
)
def test_the_drivers_version_is_read_from_what_it_says_of_itself(monkeypatch, text):
    monkeypatch.setattr(Path, "read_text", lambda _: text)
    assert device._driver() == "535.104.05"


def test_the_shipped_recipes_for_laptops_mean_the_cpu_too(recipes, machine):
    machine(gpu=False)
    for name in ("laptop", "drawn", "masked-lm", "finetune", "finetune-small"):
        recipe = load(recipes / f"{name}.yaml").recipe
        assert uses_gpu(recipe.device, recipe.precision) is False
    recipe = load(recipes / "jina-clip-v2.yaml").recipe
    with pytest.raises(UserError):
        uses_gpu(recipe.device, recipe.precision)
