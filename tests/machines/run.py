"""Training on several machines that are network namespaces of this one: do they start, fail and go on as they should?

    sudo .venv/bin/python tests/machines/run.py                          # 2, 4 and 8 machines, all trials
    sudo .venv/bin/python tests/machines/run.py --machines 2 --only cut,cold --out runs/machines

Every machine has an address, a disk and an ssh server of its own (`network.py`) and runs one process with tiny towers;
data come over HTTP from a store that counts what each machine fetches. A trial passes if losses are those of one
process (relative 1e-4, since sums over more processes are rounded otherwise), and

    hostfile   `deepspeed` with a hostfile, through pdsh and ssh, trains to the end; each machine fetches its part
    slurm      so does launch/slurm.sh, with stand-ins for srun and scontrol that start on each machine
    cut        a machine loses its power in the middle: the command ends by itself, and says why
    return     after that, with the machine back, the same command goes on from the last checkpoint
    cold       a machine with an empty cache joins others that have all: it alone fetches shards
    lost-disk  a machine comes back with an empty disk: it gets a copy of the checkpoint
    slow-disk  each fsync and each shard of one machine takes its time: nothing changes but that
    clock      a machine's clock is a day behind: nothing changes

It needs root, Linux, and the programs in `network.NEEDED`. A link has --rate, and --delay where the kernel has netem.
`slow-disk` and `clock` are Python's alone, put in by a sitecustomize. The exit status is 1 if a trial fails.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(ROOT), str(ROOT / "tests/support")]

from tests.machines.network import Network, has_delay, store  # noqa: E402

STEPS = 12
SETTINGS = (
    f"steps={STEPS}", "warmup_steps=2", "evaluation.every=0", "log_every=1", "resolution=[[0, 32]]",
    "checkpoint={every: 4, keep: 3}", "workers=1", "data.lanes=8",
)  # fmt: skip
SHARED = 0.06
"""Of the data: the shards that two machines' lanes share, at both ends of a machine's lanes."""
PATIENCE = 300.0
"""Seconds after which a command that should have ended hangs."""
TELLING = ("is lost", "sign of life", "killed", "not reached")
HOOKS = {
    "clock": "import time\nnow = time.time\ntime.time = lambda: now() - 86400\n",
    "slow-disk": """
import builtins, io, os, time
fsync, opened = os.fsync, io.open
def slow_fsync(file):
    time.sleep(0.3)
    return fsync(file)
def slow_open(file, *arguments, **options):
    if str(file).endswith(".tar"):
        time.sleep(0.3)
    return opened(file, *arguments, **options)
os.fsync, builtins.open, io.open = slow_fsync, slow_open, slow_open
""",
}
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
tasks=()
for node in {nodes}; do
    . {places}/$node.sh
    SLURM_NODEID=$node "${{enter[@]}}" env $(cat {places}/$node.env) "$@" & tasks+=($!)
done
for task in "${{tasks[@]}}"; do wait "$task" || {{ kill "${{tasks[@]}}" 2> /dev/null; exit 1; }}; done
"""


class Failed(Exception):
    """A trial has not gone as it should."""


class Trials:
    """The trials on one network.

    Args:
        network: its machines. url: of the corpus. sent: bytes of shards by address. tokenizer: its file. losses: of
            one process, by step.
    """

    def __init__(self, network: Network, url: str, sent: Counter[str], tokenizer: Path, losses: Mapping[int, float]):
        self.network, self.url, self.sent, self.losses = network, url, sent, losses
        self.tokenizer, self.folder = tokenizer, network.folder
        self.hosts = self.folder / "hosts"
        self.hosts.write_text("".join(f"{machine.name} slots=1\n" for machine in network.machines))

    def hostfile(self) -> dict[str, Any]:
        self.sent.clear()
        self._end(self._start("hostfile"), 0)
        self._compare("hostfile")
        total = self._bytes_of_corpus()
        parts = {m.name: round(self.sent[m.address] / total, 3) for m in self.network.machines}
        if max(parts.values()) > 1.1 / self.network.count + SHARED:
            raise Failed(f"of the data the machines fetched {parts}, instead of their lanes' shards alone")
        return {"fetched": parts}

    def slurm(self) -> dict[str, Any]:
        self._end(self._slurm("slurm"), 0)
        self._compare("slurm")
        return {}

    def cut(self) -> dict[str, Any]:
        process = self._start("cut")
        self._wait(lambda: self._checkpoints("cut", 0), process)
        self.network.machines[-1].cut_power()
        begun = time.monotonic()
        said = self._end(process, None)
        if process.returncode == 0 or not any(word in said for word in TELLING):
            raise Failed(f"exit status {process.returncode}, and it said:\n{said[-1500:]}")
        left = [f"{m.name}: {len(m.processes())}" for m in self.network.machines if m.processes()]
        if left:
            raise Failed(f"processes are left after the command has ended: {', '.join(left)}")
        return {"seconds_to_the_end": round(time.monotonic() - begun, 1)}

    def return_(self) -> dict[str, Any]:
        for machine in self.network.machines:
            machine.return_()
        before = self._checkpoints("cut", 0)
        if not before:
            raise Failed("`cut` has left no checkpoint; run it before")
        said = self._end(self._start("cut"), 0)
        if f"step {int(before[-1].name[5:])}" not in said and "resum" not in said:
            raise Failed(f"it did not go on from {before[-1].name}:\n{said[-1500:]}")
        self._compare("cut")
        return {"went_on_from": before[-1].name}

    def cold(self) -> dict[str, Any]:
        self._end(self._start("warm"), 0)
        shutil.rmtree(self.network.machines[-1].disk / "cache")
        self.sent.clear()
        self._end(self._start("cold"), 0)
        self._compare("cold")
        fetched = {machine.name for machine in self.network.machines if self.sent[machine.address]}
        if fetched != {self.network.machines[-1].name}:
            raise Failed(
                f"{', '.join(sorted(fetched)) or 'nobody'} fetched, and only {self.network.machines[-1].name} should"
            )
        return {}

    def lost_disk(self) -> dict[str, Any]:
        self._end(self._start("lost", "steps=8"), 0)
        last = self.network.machines[-1]
        for path in last.disk.iterdir():
            shutil.rmtree(path)
        for machine in self.network.machines[:-1]:  # the end of a stage, of which nothing is to be gone on from
            shutil.rmtree(machine.disk / "lost/stage1/step-0000008", ignore_errors=True)
        self._end(self._start("lost", "steps=8"), 0)
        return {"copied": [path.name for path in self._checkpoints("lost", -1)]}

    def clock(self) -> dict[str, Any]:
        return self._hooked("clock")

    def slow_disk(self) -> dict[str, Any]:
        return self._hooked("slow-disk")

    def _hooked(self, name: str) -> dict[str, Any]:
        """A run under Slurm in which the last machine has one of HOOKS."""
        hook = self.folder / "hooks" / name
        hook.mkdir(parents=True, exist_ok=True)
        (hook / "sitecustomize.py").write_text(HOOKS[name])
        begun = time.monotonic()
        self._end(self._slurm(name, {self.network.count - 1: f"PYTHONPATH={hook}"}), 0)
        self._compare(name)
        return {"seconds": round(time.monotonic() - begun, 1)}

    def _words(self, output: str, *settings: str) -> list[str]:
        data = (f"corpus={self.url}", f"remote.cache={self.network.disk}/cache", f"model.tokenizer={self.tokenizer}")
        recipe = ("--recipe", str(ROOT / "launch/recipes/drawn.yaml"), f"output={self.network.disk}/{output}")
        return [*recipe, *data, *SETTINGS, *settings]

    def _start(self, output: str, *settings: str) -> subprocess.Popen[str]:
        """`bash launch/stage1.sh` with a hostfile, on the first machine."""
        options = f"--hostfile {self.hosts} --master_addr {self.network.machines[0].address}"
        words = ["bash", str(ROOT / "launch/stage1.sh"), *self._words(output, *settings)]
        return self._begin(self.network.machines[0].words(*words), output, DEEPSPEED_OPTIONS=options)

    def _slurm(self, output: str, environments: Mapping[int, str] = {}) -> subprocess.Popen[str]:
        """launch/slurm.sh; `environments` are NAME=value of single machines."""
        places, programs = self.folder / "slurm", self.folder / "slurm-bin"
        for path in (places, programs):
            path.mkdir(exist_ok=True)
        for machine in self.network.machines:
            (places / f"{machine.number}.sh").write_text(f"enter=({shlex.join(machine.words())})\n")
            (places / f"{machine.number}.env").write_text(environments.get(machine.number, "") + "\n")
        names = "".join(f"{machine.name}\\n" for machine in self.network.machines)
        nodes = " ".join(str(machine.number) for machine in self.network.machines)
        scripts = {"scontrol": f"#!/bin/bash\nprintf '{names}'\n", "srun": SRUN.format(nodes=nodes, places=places)}
        for name, script in scripts.items():
            (programs / name).write_text(script)
            (programs / name).chmod(0o755)
        job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "all", "SLURM_JOB_ID": "7"}
        words = ["bash", str(ROOT / "launch/slurm.sh"), "1", *self._words(output)]
        return self._begin(words, output, programs, **job)

    def _begin(self, words: list[str], output: str, programs: Path | None = None, **more: str) -> subprocess.Popen[str]:
        path = [str(p) for p in (programs, self.network.ssh, Path(sys.executable).parent) if p]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": ":".join([*path, os.environ["PATH"]]), **more}
        self.log = self.folder / f"log-{output}-{len(list(self.folder.glob('log-*')))}"
        with self.log.open("w") as log:
            return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log, text=True)

    def _end(self, process: subprocess.Popen[str], status: int | None) -> str:
        """Waits for a command's end; what it said.

        Raises:
            Failed: it hangs, or has another exit status than `status`.
        """
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            for machine in self.network.machines:
                machine.cut_power()
                machine.return_()
            process.kill()
            raise Failed(f"it has not ended after {PATIENCE:.0f} s:\n{self.log.read_text()[-1500:]}") from None
        said = self.log.read_text()
        if status is not None and process.returncode != status:
            raise Failed(f"exit status {process.returncode} instead of {status}:\n{said[-1500:]}")
        return said

    def _wait(self, condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
        while not condition():
            if process.poll() is not None:
                raise Failed(
                    f"it ended with {process.returncode} before the disturbance:\n{self.log.read_text()[-1500:]}"
                )
            time.sleep(0.05)

    def _checkpoints(self, output: str, machine: int) -> list[Path]:
        disk = self.network.machines[machine].disk
        return sorted(path for path in (disk / output / "stage1").glob("step-*") if path.name[5:].isdigit())

    def _compare(self, output: str) -> None:
        found = losses(self.network.machines[0].disk / output / "stage1")
        if found.keys() != self.losses.keys():
            raise Failed(f"losses of steps {sorted(found)}; expected {sorted(self.losses)}")
        for step, expected in self.losses.items():
            if not math.isclose(found[step], expected, rel_tol=1e-4):
                raise Failed(f"step {step} has loss {found[step]}; one process has {expected}")

    def _bytes_of_corpus(self) -> int:
        return sum(path.stat().st_size for path in (self.folder.parent / "corpus/train").rglob("*.tar") if used(path))


def used(path: Path) -> bool:
    return path.parent.parent.name in ("image-short", "text-pairs")


def losses(stage: Path) -> dict[int, float]:
    """The loss of each step, from TensorBoard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(stage), size_guidance={"scalars": 0})
    events.Reload()
    return {
        e.step: a.value + e.value
        for a, e in zip(events.Scalars("loss/text"), events.Scalars("loss/image_text"), strict=True)
    }


def make_corpus(folder: Path) -> tuple[Path, Path]:
    """The drawn corpus in shards of 10 samples; its folder and its tokenizer."""
    from data_prep.shards import Dataset, DatasetWriter

    drawn, corpus = folder / "drawn", folder / "corpus"
    subprocess.run(
        [Path(sys.executable).with_name("data-prep"), "corpus", str(drawn), "--drawn"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    for kind in ("image-short", "text-pairs"):
        whole = Dataset.open(drawn / "train" / kind / "drawn")
        with DatasetWriter(
            corpus / "train" / kind / "drawn", kind=kind, source="drawn", samples_per_shard=10
        ) as writer:
            for index in range(len(whole)):
                row = whole.row(index)
                writer.write(row.key, whole.read(index), languages=row.languages, tokens=row.tokens)
    shutil.copytree(drawn / "validation", corpus / "validation")
    return corpus, drawn / "tokenizer.model"


def one_process(folder: Path, corpus: Path, tokenizer: Path) -> dict[int, float]:
    """The losses that every trial must have."""
    trainer, recipe = Path(sys.executable).with_name("stage-trainer"), ROOT / "launch/recipes/drawn.yaml"
    places = (f"output={folder}/alone", f"corpus={corpus}", f"model.tokenizer={tokenizer}")
    words = [str(trainer), "train", "--stage", "1", "--recipe", str(recipe), *places, *SETTINGS]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return losses(folder / "alone/stage1")


TRIALS: dict[str, Callable[[Trials], dict[str, Any]]] = {
    "hostfile": Trials.hostfile, "slurm": Trials.slurm, "cut": Trials.cut, "return": Trials.return_,
    "cold": Trials.cold, "lost-disk": Trials.lost_disk, "slow-disk": Trials.slow_disk, "clock": Trials.clock,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", default="2,4,8", help="how many, one network after another")
    parser.add_argument("--only", default=",".join(TRIALS), help=", ".join(TRIALS))
    parser.add_argument("--rate", default="1gbit", help="of each link, in tc's words")
    parser.add_argument("--delay", default="1ms", help="of each link, one way")
    parser.add_argument("--out", type=Path, help="a folder that stays, for logs, disks and results.json")
    options = parser.parse_args()
    if unknown := set(options.only.split(",")) - TRIALS.keys():
        parser.error(f"no trial {', '.join(sorted(unknown))}; there are {', '.join(TRIALS)}")
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.out or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(ROOT)
        try:
            delay = options.delay if has_delay() else ""
        except OSError as error:
            print(f"machines: {error}", file=sys.stderr)
            return 2
        print(f"links of {options.rate}, {f'{delay} each way' if delay else 'no delay: this kernel has no netem'}")
        corpus, tokenizer = make_corpus(folder)
        expected = one_process(folder, corpus, tokenizer)
        for count in map(int, options.machines.split(",")):
            with Network(folder / str(count), count, options.rate, delay) as network, store(corpus) as (url, sent):
                trials = Trials(network, url, sent, tokenizer, expected)
                for name in (name for name in TRIALS if name in options.only.split(",")):
                    results.append({"machines": count, "trial": name, **tried(TRIALS[name], trials)})
                    print(
                        f"{count} machines, {name}: "
                        + ", ".join(f"{k} {v}" for k, v in results[-1].items() if k not in ("machines", "trial")),
                        flush=True,
                    )
        (folder / "results.json").write_text(
            json.dumps({"rate": options.rate, "delay": delay, "trials": results}, indent=1)
        )
    return int(any(result["outcome"] != "passed" for result in results))


def tried(trial: Callable[[Trials], dict[str, Any]], trials: Trials) -> dict[str, Any]:
    begun = time.monotonic()
    try:
        found = {"outcome": "passed", **trial(trials)}
    except Failed as error:
        found = {"outcome": "failed", "reason": str(error)}
    return {**found, "took": round(time.monotonic() - begun, 1)}


if __name__ == "__main__":
    sys.exit(main())
