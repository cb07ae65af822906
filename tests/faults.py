"""Do the tests notice? Puts small faults into the code, one at a time, and runs the tests that execute the line.

    uv pip install cosmic-ray coverage
    python tests/faults.py --seed 0 --sample 200

The faults are cosmic-ray's (https://cosmic-ray.readthedocs.io): another operator, another number, `not`, no loop, no
decorator. They are drawn evenly over the rooms below, in each evenly over the places where something can be changed,
by a hash of seed, file and line, so that an edit elsewhere leaves the sample as it is. Results stand in runs/faults; a
run that was stopped goes on, and what was found with other code or other tests counts no more (with --keep-caught: a
fault that was caught stays so). Listed by hand in tests/faults.json: faults that change nothing that can be seen, and
survivors that we live with, each with the reason.

Hangs and more than 8 GiB count as caught. Linux alone; no GPU: what only runs on one is left out.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WORK = ROOT / "runs/faults"
LISTED = ROOT / "tests/faults.json"


@dataclass(frozen=True)
class Room:
    """Sources, and the tests that shall notice a fault in them: patterns from the repository's root."""

    sources: tuple[str, ...]
    tests: tuple[str, ...]


LOSSES, TEXT, VISION, TRAINER, DATA = (
    "packages/contrastive-losses/src/contrastive_losses",
    "packages/text-tower/src/text_tower",
    "packages/vision-tower/src/vision_tower",
    "packages/stage-trainer/src/stage_trainer",
    "data_prep/src/data_prep",
)
OF_TRAINER = ("tests/stage_trainer/test_*.py", "tests/stage_trainer/remote/test_batches.py")
ROOMS = {
    "losses": Room((f"{LOSSES}/*.py",), ("tests/contrastive_losses",)),
    "text tower": Room((f"{TEXT}/*.py",), ("tests/text_tower",)),
    "vision tower": Room((f"{VISION}/*.py",), ("tests/vision_tower",)),
    "step": Room(tuple(f"{TRAINER}/{name}.py" for name in ("batch", "dual_encoder", "tasks/*")), OF_TRAINER),
    "sampler": Room(
        tuple(
            f"{TRAINER}/{name}.py"
            for name in (
                "data/lanes",
                "data/sampler",
                "data/stateless_rng",
                "data/batches",
                "data/samples",
                "data/masked",
                "data/texts",
                "run/ledger",
                "run/loader",
            )
        ),
        OF_TRAINER,
    ),
    "optimizer": Room((f"{TRAINER}/optim/*.py", f"{TRAINER}/engine/*.py"), OF_TRAINER),
    "checkpoint": Room((f"{TRAINER}/files.py", f"{TRAINER}/checkpoint/*.py"), OF_TRAINER),
    "curation": Room(
        (f"{DATA}/groups.py", f"{DATA}/curation/*.py", f"{DATA}/negatives/*.py"),
        ("tests/data_prep/curation", "tests/data_prep/negatives"),
    ),
}
LEFT_OUT = {
    f"{LOSSES}/triton_check.py": "runs on a GPU alone",
    f"{LOSSES}/triton_kernels.py": "runs on a GPU alone; without one the tests only compile it",
    f"{LOSSES}/triton_panels.py": "runs on a GPU alone; without one the tests only compile it",
    f"{LOSSES}/triton_tiles.py": "runs on a GPU alone; without one the tests only compile it",
}


@dataclass(frozen=True)
class Fault:
    """One change of one file.

    Attributes:
        id: of file, line and change: the same as long as these are.
        before, after: the line.
        operator, occurrence: cosmic-ray's names for the change.
        first, last: lines of the statement (of a block: of its head) that it is in.
        in_function: whether that runs when it is called, not at import.
    """

    id: str
    room: str
    file: str
    line: int
    before: str
    after: str
    operator: str
    occurrence: int
    first: int
    last: int
    in_function: bool


def sources_of(room: Room) -> list[Path]:
    return [path for path in _matching(room.sources) if str(path.relative_to(ROOT)) not in LEFT_OUT]


def _matching(patterns: tuple[str, ...]) -> list[Path]:
    found: list[Path] = []
    for pattern in patterns:
        here = sorted(ROOT.glob(pattern))
        if not here:
            sys.exit(f"{pattern}: no such file; mend the rooms in tests/faults.py")
        found += here
    return list(dict.fromkeys(found))


def tests_of(room: Room) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in _matching(room.tests)]


def state_of(room: Room) -> str:
    """A hash of all that a result depends on: the code of all packages and the room's tests."""
    digest = hashlib.sha256()
    packages = [*ROOT.glob("packages/*/src/**/*.py"), *ROOT.glob("data_prep/src/**/*.py")]
    tests = [p for path in _matching(room.tests) for p in ([path] if path.is_file() else path.rglob("*.py"))]
    for path in sorted([*packages, *tests, *ROOT.glob("tests/**/conftest.py")]):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def draw(name: str, room: Room, count: int, seed: int) -> list[Fault]:
    """`count` faults of a room, or all places if there are not so many."""

    def rank(*parts: object) -> str:
        return hashlib.sha256(repr((seed, *parts)).encode()).hexdigest()

    places = {}
    for path in sources_of(room):
        source, file = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
        lines, seen = source.splitlines(), Counter[tuple[str, int]]()
        for (start, _), changes in sorted(places_of(source).items()):
            before = lines[start[0] - 1]
            number = seen[before, start[1]]
            seen[before, start[1]] += 1
            places[rank(file, before, start[1], number)] = file, source, before, start, number, changes
    faults = []
    for place in sorted(places):
        if len(faults) == count:
            break
        file, source, before, start, number, changes = places[place]
        for operator, occurrence, index in sorted(changes, key=lambda c: rank(place, c[0], c[2])):
            if (changed := _mutated(source, operator, occurrence)) is None:
                continue
            after = changed.splitlines()[start[0] - 1] if "RemoveDecorator" not in operator else ""
            identity = hashlib.sha256(repr((file, before, start[1], number, operator, index)).encode()).hexdigest()[:12]
            statement = _statement(source, start[0])
            faults.append(
                Fault(identity, name, file, start[0], before.strip(), after.strip(), operator, occurrence, *statement)
            )
            break
    return faults


def places_of(source: str) -> dict[tuple, list[tuple[str, int, int]]]:
    """{(start, end): (operator, its occurrence in the file, its number at this place)} of what can be changed."""
    import parso.python.tree
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    nodes, spared = list(ast_nodes(get_ast(source))), list(_spared(ast.parse(source)))
    binary = {"arith_expr", "term", "shift_expr", "and_expr", "xor_expr", "expr", "power"}
    places: dict[tuple, list[tuple[str, int, int]]] = {}
    for name in operator_names():
        if get_operator(name).arguments():  # wants the names of variables
            continue
        operator, occurrence = get_operator(name)(), 0
        for node in nodes:
            for index, (start, end) in enumerate(operator.mutation_positions(node)):
                # cosmic-ray takes `*` in a signature and `**` in a dict for operators.
                signature = isinstance(node, parso.python.tree.Operator) and node.parent.type not in binary
                if not signature and not any(a <= start < b for a, b in spared):
                    places.setdefault((start, end), []).append((name, occurrence, index))
                occurrence += 1
    return places


def _spared(tree: ast.AST) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where a change means nothing: annotations, messages, what only a type checker reads, guards against ourselves."""
    for node in ast.walk(tree):
        parts: list[ast.AST | None] = []
        if isinstance(node, ast.arg | ast.AnnAssign):
            parts = [node.annotation]
        elif isinstance(node, ast.FunctionDef):
            parts = [node.returns]
        elif isinstance(node, ast.Raise):
            parts = [node.exc]
        elif isinstance(node, ast.Assert):
            parts = [node]
        elif isinstance(node, ast.keyword) and node.arg in ("strict", "frozen"):
            parts = [node.value]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            parts = [node]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called.endswith(("Error", "Warning", "warn", "print", "say")):
                parts = [node]
        for part in parts:
            if part is not None:
                yield (part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)


def _mutated(source: str, operator: str, occurrence: int) -> str | None:
    """The changed source; None if it is no Python, or means the same."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    changed = mutate_code(source, get_operator(operator)(), occurrence)
    try:
        same = changed is None or ast.dump(ast.parse(changed)) == ast.dump(ast.parse(source))
    except SyntaxError:
        return None
    return None if same else changed


def _statement(source: str, line: int) -> tuple[int, int, bool]:
    """(first line, last line, whether in a function) of the statement that holds a line; of a block its head."""
    found, in_function = (line, line), False
    for node in ast.walk(ast.parse(source)):  # outer ones first
        if not isinstance(node, ast.stmt):
            continue
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        body = getattr(node, "body", None)
        head = body[0].lineno - 1 if body else (node.end_lineno or node.lineno)
        if isinstance(node, ast.FunctionDef) and node.lineno <= line <= (node.end_lineno or 0) and line > head:
            in_function = True
        if first <= line <= max(head, node.lineno):
            found = first, max(head, node.lineno)
    return *found, in_function


def listed() -> dict[tuple[str, str, str], dict[str, Any]]:
    """What tests/faults.json says, by (file, line, changed line)."""
    entries = json.loads(LISTED.read_text(encoding="utf-8")) if LISTED.exists() else []
    return {(entry["file"], entry["before"], entry["after"]): entry for entry in entries}


def results(states: dict[str, str], keep_caught: bool) -> dict[str, dict[str, Any]]:
    """The last result of each fault, of those that still hold."""
    path, found = WORK / "results.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else ():
        result = json.loads(line)
        if result["state"] == states.get(result["room"]) or (keep_caught and result["outcome"] == "caught"):
            found[result["id"]] = result
        elif found.get(result["id"], {}).get("outcome") != "caught":
            found.pop(result["id"], None)
    return found


def report(faults: list[Fault], found: dict[str, dict[str, Any]]) -> bool:
    """Prints what was caught, room by room, and who survived; whether 95 % were caught."""
    known = listed()
    print(f"\n{'room':14}{'faults':>8}{'caught':>8}{'change nothing':>16}{'survived':>10}")
    survivors, totals = [], Counter[str]()
    for name in ROOMS:
        count = Counter[str]()
        for fault in (f for f in faults if f.room == name and f.id in found):
            entry = known.get((fault.file, fault.before, fault.after), {})
            outcome = found[fault.id]["outcome"]
            if outcome == "survived" and entry.get("equivalent"):
                outcome = "equivalent"
            elif outcome == "survived":
                survivors.append((fault, entry.get("reason", "not looked at yet")))
            count[outcome] += 1
        totals.update(count)
        if count:
            row = [count.total(), count["caught"], count["equivalent"], count["survived"]]
            print(f"{name:14}{row[0]:8}{row[1]:8}{row[2]:16}{row[3]:10}")
    for fault, reason in survivors:
        print(f"\n{fault.id}  {fault.file}:{fault.line}  ({found[fault.id]['tests']} tests execute it)")
        print(f"  - {fault.before}\n  + {fault.after}\n  {reason}")
    real = totals["caught"] + totals["survived"]
    share = totals["caught"] / max(1, real)
    print(f"\n{totals['caught']} of {real} faults that change behaviour were caught: {100 * share:.1f} %")
    if missing := sum(fault.id not in found for fault in faults):
        print(f"{missing} were not tried")
    for file, before, _ in known:
        if not (ROOT / file).exists() or before not in map(str.strip, (ROOT / file).read_text().splitlines()):
            print(f"{LISTED.name} lists a line that is gone: {file}: {before}")
    return share >= 0.95 and not missing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, default=200, help="faults, evenly over the rooms")
    parser.add_argument("--workers", type=int, default=2, help="rooms at a time (default: 2)")
    parser.add_argument("--room", action="append", choices=ROOMS, help="these alone; may come several times")
    parser.add_argument("--fault", action="append", default=[], metavar="ID", help="these alone, anew")
    parser.add_argument("--keep-caught", action="store_true", help="what was caught before some edit is not tried anew")
    parser.add_argument("--whole", action="store_true", help="run survivors on all tests of their room")
    parser.add_argument("--show", action="store_true", help="run nothing; show what was found")
    options = parser.parse_args()
    try:
        import cosmic_ray
        import coverage  # noqa: F401
    except ImportError as error:
        sys.exit(f"{error.name} is missing: uv pip install cosmic-ray coverage")
    del cosmic_ray
    chosen = options.room or list(ROOMS)
    share, rest = divmod(options.sample, len(ROOMS))
    counts = {name: share + (number < rest) for number, name in enumerate(ROOMS)}
    faults = [fault for name in chosen for fault in draw(name, ROOMS[name], counts[name], options.seed)]
    states = {name: state_of(ROOMS[name]) for name in chosen}
    found = results(states, options.keep_caught)
    if not options.show:
        WORK.mkdir(parents=True, exist_ok=True)

        def to_do(fault: Fault) -> bool:
            if options.fault:
                return fault.id in options.fault
            return fault.id not in found or (options.whole and found[fault.id]["outcome"] == "survived")

        _run_rooms([f for f in faults if to_do(f)], states, options.workers, options.whole)
        found = results(states, options.keep_caught)
    return 0 if report(faults, found) else 1


def _run_rooms(faults: list[Fault], states: dict[str, str], workers: int, whole: bool) -> None:
    waiting = [name for name in states if any(fault.room == name for fault in faults)]
    running: list[subprocess.Popen] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        _watch(waiting, running, faults, states, workers, whole)
    finally:
        for process in running:  # each ends what it started
            process.terminate()
            process.wait()


def _watch(
    waiting: list[str], running: list[subprocess.Popen], faults: list[Fault], states: dict[str, str], workers: int,
    whole: bool,
) -> None:  # fmt: skip
    while waiting or running:
        for process in [p for p in running if p.poll() is not None]:
            running.remove(process)
            if process.returncode:
                print(f"a room ended with code {process.returncode}", flush=True)
        if waiting and len(running) < workers:
            name = waiting.pop(0)
            file = WORK / f"{name.replace(' ', '-')}-to-do.json"
            # Rooms with the same tests share the look at which of them execute what.
            together = [room for room in ROOMS.values() if room.tests == ROOMS[name].tests]
            content = {"state": states[name], "tests": tests_of(ROOMS[name]), "whole": whole,
                       "sources": [str(path) for room in together for path in sources_of(room)],
                       "faults": [asdict(fault) for fault in faults if fault.room == name]}  # fmt: skip
            file.write_text(json.dumps(content))
            running.append(subprocess.Popen([sys.executable, str(ROOT / "tests/faults_room.py"), str(file)]))
        else:
            time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main())
