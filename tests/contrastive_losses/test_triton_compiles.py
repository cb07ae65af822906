"""What a machine without a GPU can tell about the Triton path: what it computes, and what its compiler makes of it."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
HERE = Path(__file__).parent
PREFIXES = (64, 128, 256, 512, 768, 1024)


def environment(**changes):
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | changes


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_triton_tiles.py has run on the GPU")
def test_the_kernels_are_right_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "test_triton_tiles.py")]
    done = subprocess.run(
        command, env=environment(TRITON_INTERPRET="1"), cwd=HERE.parents[1], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


def compiled(*cases):
    """For each (kernel, shape, dtype) its registers, bytes of stack, of shared memory, and PTX for Hopper.
    In a process of its own: with TRITON_INTERPRET set here, there would be no compiler."""
    done = subprocess.run(
        [sys.executable, __file__, repr(cases)], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout)


FULL = pytest.mark.full  # half a minute where nothing is in the compiler's cache


@pytest.mark.parametrize("shape", ["16 bits", pytest.param("tf32", marks=FULL), pytest.param("ieee", marks=FULL)])
def test_kernels_compile_for_hopper_and_do_not_spill(shape):
    dtypes = {"16 bits": "bf16", "tf32": "fp32", "ieee": "fp32"}
    cases = [(kernel, shape, dtypes[shape]) for kernel in ("sums_kernel", "derivative_kernel")]
    for name, (registers, stack, shared, atomics, tensor_cores) in zip(cases, compiled(*cases), strict=True):
        assert registers <= 255
        assert stack == 0, f"{name} spills"
        assert shared <= 227 * 1024  # what a block of an H200 can have
        assert not atomics
        assert tensor_cores or shape == "ieee"


def _compile(kernel_name, shape, dtype):
    import tempfile

    import triton
    from contrastive_losses import triton_kernels
    from contrastive_losses.triton_panels import SHAPES
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.knobs import nvidia

    kernel, (tile, chunk, warps, stages) = getattr(triton_kernels, kernel_name), SHAPES[shape]
    constants = {
        "ENDS": tuple(dim // chunk for dim in PREFIXES),
        "OF_TARGETS": True,
        "MAXIMA": False,
        "PRECISION": "tf32" if shape == "tf32" else "ieee",
        "BLOCK_M": tile,
        "BLOCK_N": tile,
        "BLOCK_K": chunk,
    }
    absent = ("row_limit", "column_limit", "row_max", "column_max", "target_ids", "own_target_ids")
    types = dict.fromkeys(("queries", "columns_of", "derivative"), f"*{dtype}")
    types |= {"query_ids": "*i64", "own_query_ids": "*i64"}
    strides = ("query_width", "column_width", "row_stride", "column_stride")
    types |= dict.fromkeys((*strides, *triton_kernels.SIZES), "i32")
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants or name in absent:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
            continue
        signature[name] = types.get(name, "*fp32")
        if signature[name].startswith("*") or name in strides:
            attributes[position,] = [["tt.divisibility", 16]]
    given = {name: value for name, value in constants.items() if name in kernel.arg_names}
    binary = triton.compile(
        ASTSource(kernel, signature, given, attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        command = [nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    ptx = binary.asm["ptx"]
    return registers, stack, binary.metadata.shared, bool(re.search(r"\b(atom|red)\.", ptx)), "wgmma.mma_async" in ptx


if __name__ == "__main__":
    print([_compile(*case) for case in ast.literal_eval(sys.argv[1])])
