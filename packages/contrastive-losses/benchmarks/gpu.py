"""On a GPU: time of one step in bfloat16 at 16,384 pairs, and the largest batch that each loss can hold.

python benchmarks/gpu.py                                    # an H200: 16,384 pairs, then as many as fit
python benchmarks/gpu.py --device cpu --rows 256 --most 512 # the same code in a small size, anywhere
"""

import argparse
from pathlib import Path

import torch
from contrastive_losses.plain import plain_info_nce
from losses import LOSSES
from measure import RESULTS, draw, median_seconds, seconds_of, step, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128, 256, 512, 768, 1024])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--most", type=int, default=2**20, help="the largest batch that is tried")
    parser.add_argument("--seconds", type=float, default=20.0, help="no larger batch is tried after such a step")
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu.json")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU; `--device cpu --rows 256 --most 512` shows that this runs")
    device, dims, names = options.device, tuple(options.dims), [name for name in LOSSES if "statistics" not in name]

    errors = error_against_float64(min(1024, options.rows), device, dims)
    print(f"relative errors of bfloat16 against float64: {errors}")

    inputs = draw(options.rows, max(dims), device, torch.bfloat16)
    seconds = median_seconds(names, inputs, dims, options.repeats)
    peaks = {name: peak_bytes(name, inputs, dims) for name in names}
    del inputs
    largest = {name: largest_batch(name, device, dims, options) for name in names}

    print(f"{options.rows} pairs, dims {dims}, bfloat16 on {device}, forward and backward")
    results = {}
    for name in names:
        results[name] = {
            "milliseconds": 1e3 * seconds[name],
            "time_ratio": seconds[name] / seconds[names[0]],
            "peak_bytes": peaks[name],
            **largest[name],
        }
        print(f"  {name:24s} {1e3 * seconds[name]:9.2f} ms ({results[name]['time_ratio']:5.2f}x)  {largest[name]}")
    settings = {"rows": options.rows, "dims": dims, "repeats": options.repeats, "most": options.most}
    write(options.results, device, settings, {"errors": errors, "losses": results})


def error_against_float64(rows: int, device: str, dims: tuple[int, ...]) -> dict[str, float]:
    inputs = draw(rows, max(dims), device, torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    loss = step("contrastive_losses", inputs, dims)
    expected = plain_info_nce(exact[0], exact[1], temperature=exact[2], dims=dims)
    expected.backward()
    errors = {"loss": float((loss - expected.detach()).abs() / expected.detach())}
    for name, ours, theirs in zip(("queries", "targets", "temperature"), inputs, exact, strict=True):
        errors[name] = float((ours.grad - theirs.grad).norm() / theirs.grad.norm())
    return errors


def peak_bytes(name: str, inputs: list[torch.Tensor], dims: tuple[int, ...]) -> int | None:
    """Above the inputs; None where the device does not tell."""
    if inputs[0].device.type != "cuda":
        return None
    for tensor in inputs:
        tensor.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(name, inputs, dims)
    return torch.cuda.max_memory_allocated() - before


def largest_batch(name: str, device: str, dims: tuple[int, ...], options: argparse.Namespace) -> dict[str, object]:
    """Doubles the batch until it does not fit, a step takes too long, or `--most` is reached; then halves the gap."""
    fits, fails, stopped_by = 0, None, "memory"
    rows = options.rows
    while fails is None or fails - fits > fits // 16:
        try:
            inputs = draw(rows, max(dims), device, torch.bfloat16)
            seconds = seconds_of(lambda inputs=inputs: step(name, inputs, dims))
        except torch.OutOfMemoryError:
            fails = rows
        else:
            fits = rows
            if fails is None and (2 * rows > options.most or seconds > options.seconds):
                stopped_by = "limit of the search"
                break
        finally:
            inputs = None
            if device == "cuda":
                torch.cuda.empty_cache()
        rows = 2 * rows if fails is None else (fits + fails) // 2
    return {"largest_batch": fits, "stopped_by": stopped_by}


if __name__ == "__main__":
    main()
