"""The commands that tests/chaos.py disturbs: what they are given, and what has to come out."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.captions.ledger import RequestLedger
from data_prep.shards import Dataset, DatasetWriter, ShardError

from tests.data_prep.captions.conftest import KEY, Asked, Reply, SeerService, good
from tests.data_prep.execute.conftest import write_img2dataset
from tests.integration.conftest import arguments, command
from tests.stage_trainer.remote.conftest import Server

GENERAL = ("kill", "stop", "disk", "shm", "descriptors", "damage", "clock")


class Task:
    """A command that is disturbed. It runs in a folder of its own and writes to ./out.

    Args:
        shared: a folder for what all trials share; nobody changes it.

    Attributes:
        name: as it is shown. faults: those that make sense here. damages: what may be done to a file.
    """

    name = ""
    faults: tuple[str, ...] = GENERAL
    damages: tuple[str, ...] = ("flipped", "zeroed", "cut off", "empty", "gone")

    def __init__(self, shared: Path):
        self.shared = shared

    def begin(self, folder: Path, out: Path) -> None:
        """Lays the inputs into `folder`, and into `out` what has to be there before."""

    def words(self) -> list[str]:
        raise NotImplementedError

    def damageable(self, folder: Path, out: Path) -> list[Path]:
        """Files and folders that may be damaged while nothing runs: by default, all that was written."""
        return [path for path in sorted(out.rglob("*")) if path.is_file()]

    def watches(self, processes: list[int]) -> bool:
        """Whether the command promises to end if these stop for ever."""
        return False

    def must_say(self, damaged: Path) -> str:
        """What the next run has to name if this is damaged; empty for nothing."""
        return ""

    def shards(self, folder: Path) -> list[Path]:
        """Input shards, of which two may be swapped."""
        return []

    def misbehave(self, draw: random.Random) -> str:
        """Makes the server misbehave; says how."""
        raise NotImplementedError

    def behave(self) -> None: ...

    def result(self, out: Path, run: Callable[..., int]) -> dict[str, Any]:
        """What is compared, by name, after the last run; `run(*words)` runs another command in the folder. By default,
        all files by their bytes, but for the folder's name, which lists of dropped rows and receipts have."""
        files = {str(path.relative_to(out)): path for path in sorted(out.rglob("*")) if path.is_file()}
        folder = str(out.parent).encode()
        found: dict[str, Any] = {
            name: hashlib.sha256(path.read_bytes().replace(folder, b"")).hexdigest() for name, path in files.items()
        }
        for name in [name for name in files if name.endswith("receipt.json")]:
            receipt = json.loads(files[name].read_text())
            found[name] = {part: receipt[part] for part in ("came_in", "went_out", "dropped", "notes")}
        return found

    def excuse(self, out: Path) -> str:
        """What explains another result after damage, or nothing. By default: a checksum finds the damage."""
        for manifest in out.rglob("manifest.json"):
            try:
                Dataset.open(manifest.parent, verify=True)
            except ShardError as error:
                return f"found by checksums: {error}"
        return ""

    def end(self) -> None:
        """Undoes what `begin` did."""


class Training(Task):
    """Stage 1 of the drawn recipe, with a change of resolution and an evaluation; the drawn corpus in small shards."""

    faults = (*GENERAL, "swap")
    settings: tuple[str, ...] = (
        "steps=16", "warmup_steps=2", "log_every=1", "resolution=[[0, 32], [9, 40]]", "batch={image_text: 8, text: 8}",
        "checkpoint={every: 2, keep: 2, best: 'validation_recall_at_5_drawn/text to image'}",
        "evaluation={every: 8, pools: [image-short/drawn]}",
    )  # fmt: skip

    def __init__(self, shared: Path, ranks: int = 1, workers: int = 0):
        super().__init__(shared)
        self.name = "train, " + (f"{ranks} ranks" if ranks > 1 else f"{workers} workers")
        self.ranks, self.workers = ranks, workers
        self.corpus = shared / "corpus"
        if not self.corpus.exists():
            _small_shards(self.corpus, _drawn(shared))

    def begin(self, folder: Path, out: Path) -> None:
        shutil.copytree(self.corpus, folder / "corpus", copy_function=os.link)

    def words(self) -> list[str]:
        return arguments(Path("corpus"), 1, (*self.settings, f"workers={self.workers}"), "out/run", self.ranks)

    def damageable(self, folder: Path, out: Path) -> list[Path]:
        stage = out / "run/stage1"
        saved = sorted(path for path in stage.glob("step-*") if "." not in path.name)
        others = [path for path in stage.glob("*") if path.is_file()]
        if len(saved) < 2:  # the last one of all may be asked for by hand
            return [*others, *self.shards(folder)]
        newest = [path for path in saved[-1].rglob("*") if path.is_file()]
        return [*newest, saved[-1], *others, *self.shards(folder)[::8]]

    def watches(self, processes: list[int]) -> bool:
        """A loader's worker, or one of several ranks."""
        (one, *others), proc = processes, Path("/proc")
        worker = (proc / f"{one}/comm").read_text() == "pt_data_worker\n"
        return not others and (worker or b"\0RANK=" in (proc / f"{one}/environ").read_bytes())

    def must_say(self, damaged: Path) -> str:
        return next((part for part in damaged.parts if part.startswith("step-")), "")

    def shards(self, folder: Path) -> list[Path]:
        return sorted((folder / "corpus/train").glob("*/drawn/*.tar"))

    def result(self, out: Path, run: Callable[..., int]) -> dict[str, Any]:
        stage = out / "run/stage1"
        last = max(path for path in stage.glob("step-*") if path.name.endswith("16"))
        found = super().result(last, run)
        state = json.loads((last / "state.json").read_text())
        found["state.json"] = [state[name] for name in ("step", "skipped", "best", "texts_drawn", "texts_cut")]
        return {**found, "curves": _curves(stage)}

    def excuse(self, out: Path) -> str:
        ledger = out / "run/stage1/corrupt.jsonl"
        count = len(ledger.read_text().splitlines()) if ledger.exists() else 0
        return f"{count} samples replaced, as corrupt.jsonl says" if count else ""


class RemoteTraining(Training):
    """The same, with the corpus behind a URL."""

    faults = ("network", "kill", "disk", "descriptors", "clock")

    def __init__(self, shared: Path):
        super().__init__(shared, workers=1)
        self.name = "train from a URL"

    def begin(self, folder: Path, out: Path) -> None:
        self.server = Server(self.corpus)

    def words(self) -> list[str]:
        remote = "remote={cache: out/cache, timeout: 2, retries: 3}"
        return [*super().words(), f"corpus={self.server.url}", f"model.tokenizer={self.corpus}/tokenizer.model", remote]

    def misbehave(self, draw: random.Random) -> str:
        kinds = [503, 404, (429, {"Retry-After": "1"}), (302, {"Location": "/loop"}), "hang up", "silence", "cut",
                 "hold", "wrong bytes", "too short", "too long", "slow"]  # fmt: skip
        names = sorted({path.name for path in self.corpus.rglob("*") if path.suffix in (".tar", ".jsonl", ".json")})
        everything = draw.random() < 0.3
        for name in names if everything else draw.sample(names, draw.randint(1, 4)):
            passing = [None] * (draw.random() < 0.7)
            self.server.faults[name] = [draw.choice(kinds) for _ in range(draw.randint(1, 2))] + passing
        return f"the server's answers: {'faults everywhere' if everything else self.server.faults}"

    def behave(self) -> None:
        self.server.faults = {}

    def end(self) -> None:
        self.server.released.set()
        self.server.shutdown()
        self.server.server_close()


def _drawn(shared: Path) -> Path:
    """The drawn corpus."""
    drawn = shared / "drawn"
    if not drawn.exists():
        subprocess.run([command("data-prep"), "corpus", str(drawn), "--drawn"], check=True, capture_output=True)
    return drawn


def _small_shards(target: Path, drawn: Path) -> None:
    """The drawn corpus, its training sets in shards of 40 samples."""
    for folder in (Path("train/image-short/drawn"), Path("train/text-pairs/drawn")):
        whole = Dataset.open(drawn / folder)
        with DatasetWriter(target / folder, kind=whole.kind, source="drawn", samples_per_shard=40) as writer:
            for index in range(len(whole)):
                row = whole.row(index)
                writer.write(row.key, whole.read(index), languages=row.languages, tokens=row.tokens)
    shutil.copytree(drawn / "validation", target / "validation")
    shutil.copy(drawn / "tokenizer.model", target)


def _curves(stage: Path) -> dict[str, dict[int, float]]:
    """Losses and validation by step, from the TensorBoard files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(stage), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(("loss/", "validation"))]
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in tags}


class Import(Task):
    name = "import img2dataset"

    def __init__(self, shared: Path):
        super().__init__(shared)
        self.source = shared / "downloads"
        if not self.source.exists():
            write_img2dataset(self.source, shards=40, images=40)

    def words(self) -> list[str]:
        words = [command("data-prep"), "import", "img2dataset", str(self.source), "--out", "out"]
        return [*words, "--image-size", "64", "--workers", "2"]


class Corpus(Task):
    name = "corpus --drawn"
    faults = tuple(fault for fault in GENERAL if fault != "damage")  # it begins anew after a kill

    def words(self) -> list[str]:
        return [command("data-prep"), "corpus", "out/corpus", "--drawn"]


class Dedup(Task):
    """Curation: text pairs in forty shards, of which many nearly repeat one another."""

    name = "dedup"
    faults = (*GENERAL, "swap")

    def __init__(self, shared: Path):
        super().__init__(shared)
        self.pairs = shared / "pairs"
        if self.pairs.exists():
            return
        draw = random.Random(0)
        words = [f"word{number}" for number in range(500)]
        texts = [" ".join(draw.choices(words, k=12)) for _ in range(400)]
        with DatasetWriter(self.pairs, kind="text-pairs", source="made", samples_per_shard=50) as writer:
            for number in range(2000):
                sides = {side: [{"text": draw.choice(texts) + "s" * draw.randint(0, 1), "language": "en"}]
                         for side in ("query", "target")}  # fmt: skip
                content = json.dumps({**sides, "source": "made", "item": f"item-{number}"}).encode()
                writer.write(f"k{number}", {"json": content}, languages=["en"], tokens=None)

    def begin(self, folder: Path, out: Path) -> None:
        shutil.copytree(self.pairs, folder / "pairs", copy_function=os.link)

    def words(self) -> list[str]:
        return [command("data-prep"), "dedup", "pairs", "--out", "out", "--name", "clean", "--workers", "2"]

    def damageable(self, folder: Path, out: Path) -> list[Path]:
        return [*super().damageable(folder, out), *self.shards(folder)[:6]]

    def shards(self, folder: Path) -> list[Path]:
        return sorted((folder / "pairs").glob("*.tar"))


class Captions(Task):
    """Captions bought from a service on loopback, which counts what it was paid for."""

    name = "captions run"
    faults = (*GENERAL, "network")
    damages = ("zeroed", "cut off", "empty", "gone")  # SQLite has no checksums: a bit that flips in a text stays unseen
    images, languages = 24, ("en", "de", "fr")

    def __init__(self, shared: Path):
        super().__init__(shared)
        self.planned = shared / "ledger.sqlite"
        if self.planned.exists():
            return
        images = str(_drawn(shared) / "train/image-short/drawn")
        plan = [command("data-prep"), "captions", "plan", str(self.planned), images, "--images", str(self.images)]
        options = ["--model", "seer-1", "--languages", *self.languages, "--max-tokens", "500"]
        subprocess.run([*plan, *options], check=True, capture_output=True)

    def begin(self, folder: Path, out: Path) -> None:
        os.environ["OPENAI_API_KEY"] = KEY
        shutil.copy(self.planned, out / "ledger.sqlite")
        self.service = SeerService()
        self.behave()
        self.thread = threading.Thread(target=self.service.serve_forever, args=(0.01,))
        self.thread.start()

    def words(self) -> list[str]:
        words = [command("data-prep"), "captions", "run", "out/ledger.sqlite", "--concurrency", "6"]
        return [*words, "--url", self.service.url]

    def misbehave(self, draw: random.Random) -> str:
        share, slow = draw.uniform(0.05, 1), draw.uniform(0, 0.3)
        kinds = draw.sample((429, 500, 503, "drop", "no JSON", "slow"), draw.randint(1, 3))

        def behave(asked: Asked) -> Reply:
            kind = draw.choice(kinds) if draw.random() < share else "good"
            if isinstance(kind, int):
                return Reply(status=kind, body=b"{}", headers={"Retry-After": "1"} if kind == 429 else {})
            body = b"\xff\x00 no JSON" if kind == "no JSON" else good(asked).body
            return Reply(body=body, seconds=20 * slow if kind == "slow" else slow, drop=kind == "drop")

        self.service.behave = behave
        return f"the service's answers: {kinds}, {share:.0%} of them"

    def behave(self) -> None:
        self.service.behave = lambda asked: Reply(body=good(asked).body, seconds=0.1)

    def result(self, out: Path, run: Callable[..., int]) -> dict[str, Any]:
        """Captions by request, after what may have been paid, and answers that were rejected, are asked for again."""
        twice = self.service.computed.total() - len(self.service.computed)
        ledger = RequestLedger(out / "ledger.sqlite")
        open_ones = "SELECT DISTINCT coalesce(reason, 'perhaps-paid') FROM request WHERE state IN ('sent', 'rejected')"
        for (what,) in ledger.db.execute(open_ones).fetchall():
            run(*self.words(), "--resend", what)
        captions = dict(ledger.db.execute("SELECT id, caption FROM request WHERE state = 'accepted'").fetchall())
        ledger.close()
        return {"captions": captions, "captions paid for twice": twice}

    def end(self) -> None:
        self.service.shutdown()
        self.thread.join()
        self.service.server_close()


SIDES: dict[str, list[Callable[[Path], Task]]] = {
    "training": [
        lambda shared: Training(shared, workers=2),
        lambda shared: Training(shared),
        lambda shared: Training(shared, ranks=2, workers=1),
        RemoteTraining,
    ],
    "preparation": [Import, Corpus, Dedup, Captions],
}
