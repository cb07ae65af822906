"""A run computes on the CPU where the recipe means it, and never because a GPU cannot be used."""

import contextlib
import os
from pathlib import Path

import pytest
import torch
from stage_trainer.errors import UserError
from stage_trainer.recipe.read import load
from stage_trainer.run import device
from stage_trainer.run.device import check_fp8, uses_gpu


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


@pytest.mark.parametrize(
    ("wanted", "where", "found", "reason"),
    [
        (True, "cpu", {}, r"capability 8.9 \(Ada\), 9.0 \(Hopper\) or later, and this run is on a CPU; .*'emulate'"),
        (True, "cuda", {"capability": (8, 0)}, "capability 8.9 .*, and NVIDIA A100 has 8.0; leave 'fp8' out"),
        (True, "cuda", {"capability": (8, 9), "torch": "2.11.0+cu130"}, r"needs PyTorch 2.12 or later.*pytorch#177651"),
        (True, "cuda", {"hip": "7.0"}, "AMD's have another format"),
        ("emulate", "cuda", {}, "'emulate', which is for CPUs.*set it to true"),
        (True, "cuda", {"precision": "fp32"}, "precision: auto is fp32 on this machine"),
        (True, "cuda", {"capability": (8, 9), "torch": "2.12.0"}, ""),
        (True, "cuda", {"torch": "2.11.0+cu130"}, ""),
        ("emulate", "cpu", {}, ""),
        (False, "cuda", {"capability": (7, 0), "precision": "fp32"}, ""),
    ],
)
def test_products_in_8_bits_are_refused_where_they_cannot_be_had(monkeypatch, wanted, where, found, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: found.get("capability", (9, 0)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    monkeypatch.setattr(torch.version, "hip", found.get("hip"))
    monkeypatch.setattr(torch, "__version__", found.get("torch", "2.15.0"))
    refused = pytest.raises(UserError, match=reason) if reason else contextlib.nullcontext()
    with refused:
        check_fp8(wanted, found.get("precision", "bf16"), torch.device(where))
