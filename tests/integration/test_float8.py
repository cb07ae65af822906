"""A stage in FP8, emulated on a CPU: it learns as in bfloat16, and leaves the same kind of checkpoint."""

from pathlib import Path

import pytest
from safetensors import safe_open

STEPS = 12
HERE = (
    f"steps={STEPS}", "warmup_steps=0", "resolution=[[0, 32]]", "evaluation.every=0", "log_every=1", "precision=bf16",
    "device=cpu",
)  # fmt: skip
CHUNKS = "gradient_cache={images: 16, tokens: 512}"


def losses(scalars, output):
    return [scalars(f"{output}/stage1", f"loss/{task}") for task in ("image_text", "text")]


def shapes(folder: Path):
    found = {}
    for path in sorted(folder.glob(f"stage1/step-{STEPS:07d}/model/*/*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {
                (path.parent.name, n): (file.get_slice(n).get_dtype(), file.get_slice(n).get_shape())
                for n in file.keys()  # noqa: SIM118  # it is no mapping
            }
    return found


def test_a_stage_learns_as_in_bfloat16(train, scalars, tmp_path):
    """Losses stay within 2 % of bfloat16's, in chunks and at once."""
    train(1, *HERE, output="bf16")
    train(1, *HERE, "fp8=emulate", output="fp8")
    train(1, *HERE, "fp8=emulate", CHUNKS, output="chunks")
    expected = losses(scalars, "bf16")
    for output in ("fp8", "chunks"):
        found = losses(scalars, output)
        assert found != expected
        for values, of_bf16 in zip(found, expected, strict=True):
            assert values == pytest.approx(of_bf16, rel=0.02)
            assert values[max(values)] < values[min(values)]
    assert shapes(tmp_path / "fp8") == shapes(tmp_path / "bf16") != {}


def test_without_a_gpu_of_that_kind_it_is_refused(train):
    done = train(1, *HERE, "fp8=true", fails=True)
    assert (
        "'fp8' needs a GPU of compute capability 8.9 (Ada), 9.0 (Hopper) or later, and this run is on a CPU"
        in done.stderr
    )
    assert "Traceback" not in done.stderr
