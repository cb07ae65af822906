"""How the ranks of a run find each other, without meeting another run on the same machine."""

from __future__ import annotations

import datetime
import errno
import os
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

# torch.distributed exports these names too, but not in a way that type checkers accept.
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from stage_trainer.errors import UserError
from stage_trainer.files import write_whole
from stage_trainer.run.agreement import check_same_recipe

LONGEST_WAIT = datetime.timedelta(days=1)
"""Of a collective call: the recipe's `limits` end a run before."""
_DEFAULT_PORT = "29500"
"""DeepSpeed's launcher sets it where the user names none."""


def initialize_distributed(
    run: str = "",
    *,
    cuda: bool | None = None,
    recipe: Mapping[str, object] | None = None,
    refusal: UserError | None = None,
) -> tuple[int, int, torch.device]:
    """(rank, world size, device); a single process needs no launcher. NCCL on GPUs, gloo elsewhere.

    Under DeepSpeed's launcher on one machine the ranks meet at a free port, unless --master_port names one.

    Args:
        run: the run's folder, which also prefixes the keys by which ranks find each other.
        cuda: whether to compute on GPUs (None: if there are any).
        recipe: what all ranks have to agree on before anything else.
        refusal: why this rank cannot start, for all to hear.

    Raises:
        UserError: the requested port is taken; the launcher did not say where rank 0 is; on rank 0, a rank has another
            recipe or a refusal.
        SystemExit: on another rank, in the latter case.
    """
    import deepspeed
    from deepspeed.constants import default_pg_timeout

    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(name, value)
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    cuda = torch.cuda.is_available() if cuda is None else cuda
    if refusal and (world == 1 or dist.is_initialized()):
        raise refusal
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if not dist.is_initialized():
        store = _store(rank, world, run, default_pg_timeout)
        if isinstance(store, PrefixStore) and recipe is not None:
            told = {**recipe, "computes on": "GPUs" if cuda else "the CPU"}
            below = store.underlying_store  # another recipe may name another run
            check_same_recipe(below, rank, world, told, refusal)
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=store,
            rank=rank,
            world_size=world,
            timeout=LONGEST_WAIT,
            device_id=device if cuda and world > 1 else None,
        )
    # No op of DeepSpeed's is built here: the list is filled by trying a C compiler, and the one op that would be built,
    # for shared memory, takes a minute; gloo does the same work.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    return rank, world, device


def let_groups_wait() -> None:
    """Gives groups that DeepSpeed has made the limit of ours: NCCL's own, ten minutes, is less than a slow disk or a
    batch may take on another rank."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(LONGEST_WAIT, group)


def leave_distributed() -> None:
    """Ends NCCL in an orderly way when a run is complete: PyTorch's own end may hang, where ranks leave one after
    another, and warns. gloo needs none of it."""
    if dist.get_backend() == "nccl":
        dist.barrier()
        torch.cuda.synchronize()
        dist.destroy_process_group()


def _store(rank: int, world: int, run: str, timeout: datetime.timedelta) -> Store:
    """Where the ranks exchange their addresses. The run's name prefixes its keys: ranks that reach the port of another
    run by mistake do not disturb it."""
    if world == 1:
        return HashStore()
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not address or not port:
        raise UserError(
            f"WORLD_SIZE is {world}, and MASTER_ADDR and MASTER_PORT do not say where rank 0 is; set them, or start "
            "the ranks with deepspeed or torchrun"
        )
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's own process serves the store
        store = TCPStore(address, int(port), world, is_master=False, timeout=timeout)
    elif (meeting := _meeting_point(run)) is not None:
        store = _meet(meeting, rank, world, 0 if port == _DEFAULT_PORT else int(port), timeout)
    else:
        store = _serve(address, int(port), world, timeout) if rank == 0 else _join(address, int(port), world, timeout)
    return PrefixStore(f"trilith {run}", store)


def _meet(meeting: Path, rank: int, world: int, port: int, timeout: datetime.timedelta) -> TCPStore:
    """On one machine: rank 0 writes its port to a file, and the others wait for that: at a port of their own choice
    they might find another run."""
    if rank == 0:
        store = _serve("127.0.0.1", port, world, timeout)
        write_whole(meeting, str(store.port))
        while store.add("here", 0) < world - 1:  # in Python, where signals are handled
            time.sleep(0.02)
        meeting.unlink()
        return store
    end = time.monotonic() + timeout.total_seconds()
    while not meeting.exists():
        if time.monotonic() > end:
            raise UserError(f"rank 0 has not said within {timeout} where it is ({meeting})")
        time.sleep(0.02)
    store = _join("127.0.0.1", int(meeting.read_text()), world, timeout)
    store.add("here", 1)
    return store


def _meeting_point(run: str) -> Path | None:
    """A file that only the ranks of this launcher share; None if they are not all on one machine, or if the system does
    not tell launchers apart."""
    if not run or os.environ.get("CROSS_SIZE") != "1":
        return None
    try:
        began = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return Path(run) / f".port-{boot}-{os.getppid()}-{began}"  # process numbers are reused


def _serve(address: str, port: int, world: int, timeout: datetime.timedelta) -> TCPStore:
    try:
        return TCPStore(address, port, world, is_master=True, wait_for_workers=False, timeout=timeout)
    except dist.DistNetworkError as error:
        if f"code: -{errno.EADDRINUSE}" not in str(error):
            raise
        raise UserError(
            f"port {port} is taken, by another run perhaps; name a free one: --master_port N for the deepspeed command "
            "(on one machine, leave it out and a free one is found), or MASTER_PORT=N"
        ) from error


def _join(address: str, port: int, world: int, timeout: datetime.timedelta) -> TCPStore:
    return TCPStore(address, port, world, is_master=False, wait_for_workers=False, timeout=timeout)
