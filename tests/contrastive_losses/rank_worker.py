"""One of four processes: `python rank_worker.py RANK FOLDER` reads FOLDER/cases.pt, writes FOLDER/rankRANK.pt."""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from contrastive_losses import matryoshka_info_nce

# The group of each size leaves out rank 0 where it can, so that a rank of the group is not its global rank.
GROUPS = {1: [1], 2: [2, 3], 4: [0, 1, 2, 3]}
BY_ROW = ("negatives", "query_ids", "target_ids", "sample_weights")


def main(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4, timeout=timedelta(seconds=60)
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
    loss, stats = matryoshka_info_nce(
        queries, targets, temperature=parameters["temperature"], group=group, return_stats=True, **options
    )
    (case["upstream"] * loss).backward()
    gradients = {}
    for name, value in parameters.items():
        assert value.grad is not None, f"{name} has no gradient on rank {rank}"
        gradients[name] = value.grad.clone()
        dist.all_reduce(gradients[name], group=group)
        gradients[name] /= len(split)
    own_temperature_gradient = parameters["temperature"].grad
    return {
        "loss": loss.detach(),
        "gradients": gradients,
        "own_temperature_gradient": own_temperature_gradient,
        "accuracy": stats.query_to_target_accuracy,
    }


def error_of(arguments: dict, group: dist.ProcessGroup) -> str:
    arguments = dict(arguments)
    try:
        matryoshka_info_nce(arguments.pop("queries"), arguments.pop("targets"), group=group, **arguments)
    except ValueError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]))
