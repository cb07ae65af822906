"""One of four processes: `python rank_worker.py RANK FOLDER` reads FOLDER/cases.pt, writes FOLDER/rankRANK.pt."""

import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from contrastive_losses import (
    UnifiedInfoNCE,
    matryoshka_cosent,
    matryoshka_info_nce,
    matryoshka_margin_mse,
    matryoshka_sigmoid,
    torch_tiles,
)
from storages import Memory

# The group of each size leaves out rank 0 where it can, so that a rank of the group is not its global rank.
GROUPS = {1: [1], 2: [2, 3], 4: [0, 1, 2, 3]}
SIDES = ("query", "target")
BY_ROW = ("scores", "negatives", "query_ids", "target_ids", "sample_weights")


def main(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4, timeout=timedelta(seconds=500)
    )
    groups = {size: dist.new_group(members) for size, members in GROUPS.items()}
    cases = torch.load(folder / "cases.pt")
    written: dict = {"loss": {}, "errors": {}}
    for size, members in GROUPS.items():
        if rank in members:
            group_rank = members.index(rank)
            for name, case in cases["loss"].items():
                written["loss"][name, size] = one_step(case, case["splits"][size], group_rank, groups[size])
    for name, per_rank in cases["errors"].items():
        written["errors"][name] = error_of(per_rank[rank], groups[4])
    written["unified error"] = unified_error(rank, groups[4])
    written["nan"] = loss_with_a_nan(rank, groups[4])
    written["without gradient"] = step_of_which_one_rank_needs_no_gradient(cases["loss"]["even"], rank, groups[4])
    written["unified"] = {
        (made, size): unified_step(cases["unified"], GROUPS[size].index(rank), size, groups[size], made)
        for size in (2, 4)
        for made in ("images", "images and texts")
        if rank in GROUPS[size]
    }
    written["memory"] = {
        (exchange, size): memory_of(exchange, GROUPS[size].index(rank), groups[size])
        for exchange in ("gather", "ring")
        for size in (2, 4)
        if rank in GROUPS[size]
    }
    written["unified ids"] = unified_error_of_ids(rank, groups[4])
    if rank == 0:
        try:
            matryoshka_info_nce(torch.ones(2, 2), torch.ones(2, 2), temperature=1.0, group=groups[1])
        except ValueError as error:
            written["outsider"] = str(error)
    # Refused batches must leave the ranks in step: the next good batch still works.
    case = cases["loss"]["all at once"]
    written["after errors"] = one_step(case, case["splits"][4], rank, groups[4])
    dist.barrier()
    torch.save(written, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def one_step(case: dict, split: list[int], rank: int, group: dist.ProcessGroup) -> dict:
    """A training step as DDP takes it: own rows through the encoders, backward, gradients averaged over ranks."""
    start = sum(split[:rank])
    mine = slice(start, start + split[rank])
    parameters = {name: value.clone().requires_grad_() for name, value in case["parameters"].items()}
    queries = case["query_inputs"][mine] @ parameters["query_encoder"]
    targets = case["target_inputs"][mine] @ parameters["target_encoder"]
    options = dict(case["options"])
    for name in BY_ROW:
        if name in options:
            options[name] = options[name][mine]
    if "negatives" in options:
        options["negatives"] = options["negatives"] @ parameters["target_encoder"]
    if "bias" in parameters:
        options["bias"] = parameters["bias"]
    options |= {"temperature": parameters["temperature"], "group": group}
    if "scores" in options:
        without_stats = matryoshka_margin_mse if "negatives" in options else matryoshka_cosent
        loss, stats = without_stats(queries, targets, **options), SimpleNamespace()
    else:
        pair_loss = matryoshka_sigmoid if "bias" in parameters else matryoshka_info_nce
        loss, stats = pair_loss(queries, targets, return_stats=True, **options)
    (case["upstream"] * loss).backward()
    gradients = {}
    for name, value in parameters.items():
        assert value.grad is not None, f"{name} has no gradient on rank {rank}"
        gradients[name] = value.grad.clone()
        dist.all_reduce(gradients[name], group=group)
        gradients[name] /= len(split)
    return {
        "loss": loss.detach(),
        "gradients": gradients,
        "own_temperature_gradient": parameters["temperature"].grad,
        "stats": vars(stats),
    }


def error_of(arguments: dict, group: dist.ProcessGroup) -> str:
    arguments = dict(arguments)
    grad_enabled = arguments.pop("grad_enabled", True)
    try:
        with torch.set_grad_enabled(grad_enabled):
            matryoshka_info_nce(arguments.pop("queries"), arguments.pop("targets"), group=group, **arguments)
    except ValueError as error:
        return str(error)
    return ""


def unified_error(rank: int, group: dist.ProcessGroup) -> str:
    rows = torch.ones(2, 4)
    try:
        UnifiedInfoNCE()((rows, rows), (rows, rows[:, : 4 - (rank == 1)]), group=group)
    except ValueError as error:
        return str(error)
    return ""


def loss_with_a_nan(rank: int, group: dist.ProcessGroup) -> dict:
    queries, targets = torch.eye(4, requires_grad=True), torch.eye(4)
    if rank == 2:
        targets[0, 0] = torch.nan
    loss = matryoshka_info_nce(queries, targets, temperature=0.1, group=group)
    loss.backward()
    return {"loss": loss.detach(), "gradient": queries.grad}


def step_of_which_one_rank_needs_no_gradient(case: dict, rank: int, group: dist.ProcessGroup) -> dict:
    """Rank 1's encoders are frozen; its loss.backward() must work and let the others have their gradients."""
    mine = slice(2 * rank, 2 * rank + 2)
    queries, targets = (case[f"{side}_inputs"][mine] @ case["parameters"][f"{side}_encoder"] for side in SIDES)
    if rank != 1:
        queries.requires_grad_()
    loss = matryoshka_info_nce(queries, targets, temperature=0.2, group=group)
    loss.backward()
    return {"queries": queries.detach(), "targets": targets, "gradient": queries.grad}


def memory_of(exchange: str, rank: int, group: dist.ProcessGroup) -> dict:
    """Bytes, at most at a time and of the largest storage, of a step with 256 pairs of its own for each rank."""
    torch_tiles.CPU_TILE, before = (32, 32), torch_tiles.CPU_TILE
    generator = torch.Generator().manual_seed(rank)
    try:
        with Memory() as memory:
            queries, targets = (torch.randn(256, 64, generator=generator).requires_grad_() for _ in range(2))
            ids = torch.arange(256) + 256 * rank
            options = {"dims": (32, 64), "query_ids": ids, "exchange": exchange, "return_stats": True}
            loss, _ = matryoshka_info_nce(queries, targets, temperature=0.1, group=group, **options)
            loss.backward()
    finally:
        torch_tiles.CPU_TILE = before
    return {"peak": memory.peak, "largest": memory.largest}


def unified_error_of_ids(rank: int, group: dist.ProcessGroup) -> str:
    rows = torch.eye(4)
    try:
        UnifiedInfoNCE()((rows, rows), (rows, rows), image_ids=torch.arange(4) if rank == 1 else None, group=group)
    except ValueError as error:
        return str(error)
    return ""


def unified_step(case: dict, rank: int, size: int, group: dist.ProcessGroup, made: str) -> dict:
    """Each rank holds its rows of every part; ids of images, or of all, are made."""
    module = UnifiedInfoNCE(dims=(3, 6), temperature=0.2)
    parts = {
        name: tuple(side.tensor_split(size)[rank].clone().requires_grad_() for side in pairs)
        for name, pairs in case["parts"].items()
    }
    text_ids = case["text_ids"].tensor_split(size)[rank] if made == "images" else None
    loss = module(**parts, text_ids=text_ids, group=group)
    loss.backward()
    return {
        "loss": loss.detach(),
        "gradients": {name: [side.grad / size for side in pairs] for name, pairs in parts.items()},
        "log_scale": module.log_scale.grad,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]))
