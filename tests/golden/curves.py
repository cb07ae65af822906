"""Golden curves: losses, temperatures and gradient norms of 20 steps of the drawn recipe, float32, one thread.

    python tests/golden/curves.py record [NAME …]      # writes curves.json anew, or some of its curves
    python tests/golden/curves.py compare OLD NEW      # two commits, bit for bit, on this machine

A change of numbers is a decision: record in a commit of its own, whose message says why. curves.json has a recording
for each kind of machine, with its processor and versions. There, test_curves.py holds the curves bit-equal; on other
kinds, and of curves that were not recorded there, to `CLOSE` of another recording. `record` replaces this machine's; of
numbers that changed a recording has to be made anew on each kind.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
CLOSE = {"loss": 1e-5, "temperature": 1e-5, "gradient_norm": 1e-4}
"""How near another kind of machine comes, relative. A norm grows what the losses round: after ten steps of the unified
loss an Intel's is 3e-5 from an AMD's, where the losses are equal to 5e-7."""
GOLDEN = Path(__file__).with_name("curves.json")
STEPS = 20
TAGS = ("loss/", "temperature/", "gradient_norm/")
COMMON = (
    f"steps={STEPS}", "warmup_steps=4", "evaluation.every=0", "log_every=1", "precision=fp32", "checkpoint.keep=9",
)  # fmt: skip
DRAWN = ("model.text.dropout=0.1", "patch_dropout=[[0, 0.5]]", "checkpoint.every=5")
HIDDEN_WORDS = (
    "model.text={vocab_size: 386, width: 64, layers: 1, heads: 2, mlp_width: 256, max_length: 128, dropout: 0.1}",
    "data.masked_lm=[text-pairs/drawn]", "batch.masked_lm=32", "max_tokens=32", "lr.text=1e-3",
)  # fmt: skip
TEXTS = ("resolution=[[0, 32]]", "patch_dropout=[[0, 0]]", "batch={text: 24}", "model.text.dropout=0.1")
TAUGHT = (*TEXTS, "teacher={model: {folder}/teacher/stage1, folder: {folder}/said, language: en, loss: relational}")
SHOWN = (
    *DRAWN, "resolution=[[0, 32]]", "batch={image_text: 24}",
    "teacher={model: {folder}/teacher/stage1, folder: {folder}/said, of: [images, captions], language: en}",
    "teacher.loss=relational",
)  # fmt: skip
SCORED = (*TEXTS, "data.text=[{path: text-triplets/scored}]", "teacher={loss: margin_mse, weight: 0.1}")
ADAMW = ("optimizer={name: adamw}",)
CACHED = ("gradient_cache={images: 5, tokens: 60}",)


class Curve(NamedTuple):
    """What is trained: a recipe with settings, by so many ranks; with `resumed`, once more from step 5; `taught` by
    what the recipe's model says after a few steps."""

    settings: tuple[str, ...]
    ranks: int = 1
    recipe: str = "drawn"
    resumed: bool = False
    taught: bool = False


def _curves() -> dict[str, Curve]:
    one_resolution = (*DRAWN, "resolution=[[0, 32]]")
    changing = (*DRAWN, "resolution=[[0, 32], [10, 40]]")
    kinds = {
        "muon": Curve(one_resolution),
        "muon, cached": Curve((*one_resolution, *CACHED)),
        "adamw": Curve((*one_resolution, *ADAMW)),
        "unified": Curve((*one_resolution, "loss.kind=unified", "lr={image: 2e-4, text: 2e-4}")),
        "two resolutions": Curve(changing),
        "two resolutions, resumed": Curve(changing, resumed=True),
        "masked language model": Curve(HIDDEN_WORDS, recipe="masked-lm"),
        "distillation": Curve(TAUGHT, taught=True),
        "distillation of images": Curve(SHOWN, taught=True),
        "margins of scores": Curve(SCORED),
        "image adapter": Curve((*one_resolution, "model.vision.lora_rank=4", "trainable.image=adapters")),
        "projector": Curve((*one_resolution, "model.vision.projector=64", "trainable.image=projector")),
        "text projector": Curve((*one_resolution, "model.text.projector=64", "trainable.text=projector")),
    }
    curves = kinds | {f"{name}, two ranks": curve._replace(ranks=2) for name, curve in kinds.items()}
    for zero in (1, 2, 3):
        for ranks, of_ranks in ((1, ""), (2, ", two ranks")):
            for cache, cached in (((), ""), (CACHED, ", cached")):
                options = (*one_resolution, *ADAMW, f"deepspeed={{zero_optimization: {{stage: {zero}}}}}", *cache)
                curves[f"adamw, ZeRO {zero}{cached}{of_ranks}"] = Curve(options, ranks)
    return curves


CURVES = _curves()
EVERYDAY = [name for name, curve in CURVES.items() if curve.ranks == 1 and "ZeRO" not in name]
"""The rest takes longer: two ranks, and ZeRO."""


def machine() -> dict[str, str]:
    """What the last bits of a curve depend on."""
    import torch

    processor = {}
    with contextlib.suppress(OSError):
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()]
        processor = {key.strip(): value.strip() for key, _, value in lines}
    return {
        "processor": " ".join(processor.get(key, "?") for key in ("vendor_id", "cpu family", "model")),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        **{name: version(name) for name in ("torch", "deepspeed", "numpy", "pillow")},
    }


def train(names: list[str], corpus: Path, folder: Path) -> dict[str, dict[str, list[float]]]:
    """The curves, by name and tag, as rank 0 sees them. Libraries are imported once, ranks are forked.

    None of our own modules is imported here: their names differ between commits."""
    for library in ("deepspeed", "torch.utils.tensorboard"):
        import_module(library)
    found = {}
    for number, name in enumerate(names):
        curve, output = CURVES[name], folder / str(number)
        here = (f"corpus={corpus}", f"model.tokenizer={corpus}/tokenizer.model")
        recipe = ["--stage", "1", "--recipe", str(ROOT / f"launch/recipes/{curve.recipe}.yaml"), *here, *COMMON]
        settings = [setting.replace("{folder}", str(folder)) for setting in curve.settings]
        words = ["train", *recipe, f"output={output}", *settings]
        with (folder / f"{number}.log").open("w") as log:
            if curve.taught:
                first = ("steps=5", "resolution=[[0, 32]]", "patch_dropout=[[0, 0]]", f"output={folder}/teacher")
                _run(["train", *recipe, *first], 1, log.fileno(), f"{name}, its teacher: see {log.name}")
                _run(["embed", *recipe, *settings], 1, log.fileno(), f"{name}, what it says: see {log.name}")
            _run(words, curve.ranks, log.fileno(), f"{name}: see {log.name}")
            if curve.resumed:
                for saved in sorted((output / "stage1").glob("step-*"))[1:]:
                    shutil.rmtree(saved)
                _run(words, curve.ranks, log.fileno(), f"{name}, resumed: see {log.name}")
        found[name] = _scalars(output / "stage1")
    return found


def _run(words: list[str], ranks: int, log: int, what: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [os.fork() or _rank(words, rank, ranks, port, log) for rank in range(ranks)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    if any(codes):
        raise SystemExit(f"{what}: ended with {codes}\n{Path(os.readlink(f'/proc/self/fd/{log}')).read_text()[-3000:]}")


def _rank(words: list[str], rank: int, ranks: int, port: int, log: int) -> int:
    """Is one rank, and does not return."""
    code = 1
    try:
        for stream in (1, 2):
            os.dup2(log, stream)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        from stage_trainer.cli import main

        code = main(words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _scalars(stage: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(stage), size_guidance={"scalars": 0})
    events.Reload()
    curves = {}
    for tag in sorted(t for t in events.Tags()["scalars"] if t.startswith(TAGS)):
        by_step = {event.step: event.value for event in events.Scalars(tag)}
        assert list(by_step) == list(range(STEPS)), f"{stage}, {tag}: {list(by_step)}"
        curves[tag] = list(by_step.values())
    return curves


def draw_corpus(folder: Path) -> Path:
    """The drawn corpus, and triplets with scores."""
    corpus, rows = folder / "corpus", folder / "scored.jsonl"
    data_prep = Path(sys.executable).with_name("data-prep")
    subprocess.run([data_prep, "corpus", corpus, "--drawn"], check=True, stdout=subprocess.DEVNULL)
    colors, shapes = ("red", "blue", "green", "yellow", "black", "white"), ("circle", "square", "star", "cross")
    things = [f"{color} {shape}" for color in colors for shape in shapes]
    rows.write_text("".join(f"{json.dumps(_scored(things, i))}\n" for i in range(len(things))))
    out = ["--name", "scored", "--negatives", "3", "--language", "en", "--out", corpus / "train"]
    subprocess.run([data_prep, "import", "hf", rows, *out], check=True, stdout=subprocess.DEVNULL)
    return corpus


def _scored(things: list[str], i: int) -> dict[str, Any]:
    """A query with scores of its target and of three others."""
    others = [things[(i + step) % len(things)] for step in (1, 4, 9)]
    query, target = f"a {things[i]}", f"this is a {things[i]}"
    return {"query": query, "pos": [target], "neg": others, "pos_scores": [9.5], "neg_scores": [4.0, i / 8, -3.0]}


def record(names: list[str]) -> None:
    recordings = json.loads(GOLDEN.read_text())
    here = next((each for each in recordings if each["machine"] == machine()), None)
    if here is None:
        recordings.append(here := {"machine": machine(), "curves": {}})
    with tempfile.TemporaryDirectory() as folder:
        found = train(names or list(CURVES), draw_corpus(Path(folder)), Path(folder))
    here["curves"] = {**(here["curves"] if names else {}), **found}
    lines = json.dumps(recordings, indent=1)
    # One curve a line: a change of numbers is then a diff that can be read.
    GOLDEN.write_text(_one_line_a_list(lines) + "\n")
    print(f"wrote {GOLDEN}")


def recorded(name: str) -> tuple[dict[str, list[float]], bool]:
    """(a curve as it was recorded, whether that was on this kind of machine)."""
    recordings = [each for each in json.loads(GOLDEN.read_text()) if name in each["curves"]]
    here = [each for each in recordings if each["machine"] == machine()]
    return (here or recordings)[0]["curves"][name], bool(here)


def _one_line_a_list(text: str) -> str:
    import re

    return re.sub(r"\[\n\s+([^\]]+?)\n\s+\]", lambda m: "[" + re.sub(r",\n\s+", ", ", m[1]) + "]", text)


@contextlib.contextmanager
def _checkout(commit: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "worktree", "add", "-q", "--detach", folder, commit], cwd=ROOT, check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=ROOT, check=True)


def _curves_of(commit: str) -> list[str]:
    """Those that a commit had recorded: what a newer one can do besides, it cannot."""
    show = ["git", "show", f"{commit}:{GOLDEN.relative_to(ROOT).as_posix()}"]
    found = json.loads(subprocess.run(show, cwd=ROOT, check=True, capture_output=True).stdout)
    return [name for name in CURVES if any(name in each["curves"] for each in found)]


def _of_commit(commit: str, names: list[str], corpus: Path) -> dict[str, Any]:
    """The curves that a commit's source gives, with this file, this corpus and this environment."""
    with _checkout(commit) as tree, tempfile.TemporaryDirectory() as folder:
        sources = [*sorted(map(str, tree.glob("packages/*/src"))), str(tree / "data_prep/src")]
        out = Path(folder) / "curves.json"
        subprocess.run(
            [sys.executable, __file__, "train", "--corpus", corpus, "--folder", folder, "--out", out, *names],
            check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sources)},
        )  # fmt: skip
        return json.loads(out.read_text())


def compare(old: str, new: str, names: list[str]) -> int:
    """Prints where two commits differ; 1 if they do. Without names, in the curves that the old one had."""
    names = names or _curves_of(old)
    with tempfile.TemporaryDirectory() as folder:
        corpus = draw_corpus(Path(folder))
        before, after = (_of_commit(commit, names, corpus) for commit in (old, new))
    lines = list(differences(before, after))
    print("\n".join(lines) or f"{len(before)} curves, bit-equal")
    return bool(lines)


def differences(expected: dict[str, Any], found: dict[str, Any], *, same_machine: bool = True) -> Iterator[str]:
    """A line for every curve of `expected` that `found` leaves: where first, and by how much at most."""
    for name, tags in expected.items():
        if found[name].keys() != tags.keys():
            yield f"{name}: {sorted(found[name])} where {sorted(tags)} was expected"
            continue
        for tag, values in tags.items():
            relative = 0.0 if same_machine else CLOSE[tag.partition("/")[0]]
            pairs = list(zip(values, found[name][tag], strict=True))
            off = [step for step, (a, b) in enumerate(pairs) if not (a == b or abs(a - b) <= relative * abs(a))]
            if off:
                a, b = pairs[off[0]]
                most = max(abs(a - b) / max(abs(a), 1e-30) for a, b in pairs)
                yield f"{name}, {tag}: from step {off[0]} on ({a!r}, now {b!r}), by {most:.1e} of its value at most"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("record").add_argument("names", nargs="*", metavar="NAME")
    of_two = commands.add_parser("compare")
    of_two.add_argument("old")
    of_two.add_argument("new")
    of_two.add_argument("names", nargs="*", metavar="NAME")
    training = commands.add_parser("train", help="writes curves as JSON; what the others and the test call")
    for option in ("--corpus", "--folder", "--out"):
        training.add_argument(option, type=Path, required=True)
    training.add_argument("names", nargs="+", metavar="NAME")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(CURVES):
        parser.error(f"unknown curves {sorted(unknown)}; there are {list(CURVES)}")
    os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch is imported
    if arguments.command == "record":
        record(arguments.names)
    elif arguments.command == "compare":
        return compare(arguments.old, arguments.new, arguments.names)
    else:
        arguments.out.write_text(json.dumps(train(arguments.names, arguments.corpus, arguments.folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
