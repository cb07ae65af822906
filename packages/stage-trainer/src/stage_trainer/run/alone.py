"""One run at a time in a folder. Imports nothing heavy, so that a second one is refused at once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from data_prep.shards import InUse, alone

from stage_trainer.errors import UserError


@contextlib.contextmanager
def hold_folder(folder: Path, rank: int) -> Iterator[UserError | None]:
    """Rank 0 locks the run's `folder` until the end. Yields the reason why it cannot, if ranks on other
    machines have to be told first; else None.

    Raises:
        UserError: another run uses the folder, or it cannot be written.
    """
    with contextlib.ExitStack() as held:
        refusal = None
        try:
            if rank == 0:
                held.enter_context(alone(folder / ".lock", f"the run's folder {folder}"))
        except InUse as error:
            refusal = UserError(f"{error} (output=…){_without_ranks()}")
        except OSError as error:
            refusal = UserError(f"{folder} cannot be written ({error.strerror}); name another place (output=…)")
        # On one machine the launcher ends the other ranks.
        if refusal and int(os.environ.get("WORLD_SIZE", 1)) == int(os.environ.get("LOCAL_SIZE", 1)):
            raise refusal
        yield refusal


def _without_ranks() -> str:
    """Another possible cause: a launcher that started several processes and did not tell them their ranks."""
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if tasks == "1" or "RANK" in os.environ:
        return ""
    return (
        f". Slurm has started {tasks} tasks (SLURM_NTASKS), and nothing tells them that they are ranks of one run: "
        "RANK and WORLD_SIZE are not set, so each is a run of its own. See launch/slurm.sh for one run of many "
        "processes"
    )
