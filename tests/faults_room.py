"""The faults of one room, one after another; started by tests/faults.py.

This process imports what the tests import, but for our own packages, and forks for each fault: the child has the fault
put into its modules (faults_hook) and runs pytest on those tests that execute the line, likely and quick ones first.
Which these are is found once, by running the room as it is under coverage, processes that tests start included.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WORK = ROOT / "runs/faults"
HOOK = ROOT / "tests/faults_hook"
OURS = ("contrastive_losses", "text_tower", "vision_tower", "stage_trainer", "data_prep", "tests", "conftest", "test_")
NOT_BEFORE_A_FORK = ("ray", "coverage", "sitecustomize", "__main__", "faults")
OPTIONS = [
    "-q",
    "-m",
    "not full",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:xdist",
    "--hypothesis-seed=0",
    "--no-header",
]
BYTES = 8 * 2**30


class Selection:
    """A pytest plugin: runs some tests in a given order, and notes the first that fails, how long each took, and which
    was at work when a line ran."""

    def __init__(self, wanted: list[str] | None, switch: Callable[[str], None] = lambda context: None):
        self.wanted = None if wanted is None else {name: place for place, name in enumerate(wanted)}
        self.switch = switch
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: dict[str, str] = {}
        self.ran = 0

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        if self.wanted is not None:
            items[:] = sorted((i for i in items if i.nodeid in self.wanted), key=lambda i: self.wanted[i.nodeid])

    def pytest_runtest_setup(self, item: Any) -> None:
        self.switch(f"{item.nodeid} (setup)")

    def pytest_runtest_call(self, item: Any) -> None:
        self.switch(f"{item.nodeid} (call)")

    def pytest_runtest_teardown(self, item: Any) -> None:
        self.switch(f"{item.nodeid} (teardown)")

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration
        self.ran += report.when == "call"
        if report.failed:
            self.failed[report.nodeid] = str(report.longrepr)[-1500:]

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed[report.nodeid] = str(report.longrepr)[-1500:]


def forked(body: Callable[[Path], Any], seconds: float, log: Path) -> Any:
    """What `body` returns (JSON) in a child of its own, which ends with all that it started; None if it took longer, or
    died."""
    temporary = Path(tempfile.mkdtemp(prefix="f", dir="/tmp"))
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
            os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(temporary / "hypothesis")
            resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
            found = body(temporary)
            (temporary / "found.json").write_text(json.dumps(found))
            sys.stdout.flush()
            code = 0
        os._exit(code)
    end = time.monotonic() + seconds
    try:
        while os.waitpid(child, os.WNOHANG) == (0, 0) and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        _end_descendants()
    found = temporary / "found.json"
    result = json.loads(found.read_text()) if found.exists() else None
    shutil.rmtree(temporary, ignore_errors=True)
    return result


def _end_descendants() -> None:
    """Those whose parents are gone become this process's children: see `main`."""
    while children := Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        for child in map(int, children):
            with contextlib.suppress(OSError):
                os.kill(child, signal.SIGKILL)
            with contextlib.suppress(OSError):
                os.waitpid(child, 0)


def run_pytest(tests: list[str], selection: Selection, temporary: Path, *more: str) -> int:
    import pytest

    os.chdir(ROOT)
    return int(pytest.main([*OPTIONS, f"--basetemp={temporary / 'tests'}", *more, *tests], plugins=[selection]))


def survey(tests: list[str], sources: list[str], log: Path) -> dict[str, Any]:
    """The room as it is: {"lines": {file: {line: tests}}, "seconds": {test: s}, "modules": what was imported}."""

    def body(temporary: Path) -> dict[str, Any]:
        import coverage

        lines = ["[run]", "parallel = true", f"data_file = {temporary / 'lines'}", "core = ctrace", "patch = _exit",
                 "concurrency = thread,multiprocessing", "context = ${PYTEST_CURRENT_TEST-import}",
                 "include =", *(f"    {source}" for source in sources)]  # fmt: skip
        settings = temporary / "coveragerc"
        settings.write_text("\n".join(lines) + "\n")
        os.environ["COVERAGE_PROCESS_START"] = str(settings)
        measured = coverage.Coverage(config_file=str(settings))
        measured.start()
        selection = Selection(None, measured.switch_context)
        code = run_pytest(tests, selection, temporary)
        measured.stop()
        measured.save()
        measured.combine()
        data = measured.get_data()
        executed: dict[str, dict[int, set[str]]] = {}
        for source in sources:
            by_line = executed.setdefault(str(Path(source).relative_to(ROOT)), {})
            for line, contexts in data.contexts_by_lineno(source).items():
                by_line[line] = {c.removeprefix("import|") or "import" for c in contexts}
        modules = [
            name
            for name, m in sys.modules.items()
            if not name.startswith((*OURS, *NOT_BEFORE_A_FORK))
            and (getattr(m, "__file__", None) is None or "site-packages" in m.__file__ or "/lib/" in m.__file__)
        ]
        names = list(selection.seconds)
        return {
            "code": code, "failed": selection.failed, "seconds": selection.seconds, "modules": modules,
            "lines": {file: {line: _tests_of(contexts, names) for line, contexts in by_line.items()}
                      for file, by_line in executed.items()},
        }  # fmt: skip

    found = forked(body, 7200, log)
    if found is None or found["code"] or found["failed"]:
        failed = found and "\n".join(f"{name}\n{text}" for name, text in found["failed"].items())
        sys.exit(f"The tests of this room fail as they are; see {log}\n{failed}")
    return found


def _tests_of(contexts: set[str], names: list[str]) -> list[str]:
    """The tests of coverage's contexts; what ran in a fixture counts for all tests of its file, which may share it."""
    found: set[str] = set()
    for context in contexts:
        name, _, phase = context.rpartition(" ")
        if context == "import":  # called while modules are imported: whoever imports them
            found.update(names)
        elif phase == "(call)":
            found.add(name)
        elif phase in ("(setup)", "(teardown)"):
            file = name.partition("::")[0]
            found.update(other for other in names if other.partition("::")[0] == file)
    return sorted(found)


def tests_for(fault: dict[str, Any], room: dict[str, Any], whole: bool) -> list[str]:
    by_line = room["lines"].get(fault["file"], {})
    if whole:
        return list(room["seconds"])
    if fault["in_function"]:
        return sorted({t for n in range(fault["first"], fault["last"] + 1) for t in by_line.get(str(n), ())})
    return sorted({test for tests in by_line.values() for test in tests})  # at import: whoever uses the module


def in_order(tests: list[str], seconds: dict[str, float], kills: Counter[str]) -> list[str]:
    """Quick ones first, and before them those that have caught faults of the file; tests of a file stay together, for
    they share fixtures."""
    cost = {t: seconds[t] / (1 + 4 * kills[t]) for t in tests}
    files: dict[str, list[float]] = defaultdict(list)
    for test in tests:
        files[test.partition("::")[0]].append(cost[test])
    of_file = {file: sum(costs) / len(costs) ** 0.5 for file, costs in files.items()}
    return sorted(tests, key=lambda t: (of_file[t.partition("::")[0]], t.partition("::")[0], cost[t]))


def attempt(fault: dict[str, Any], tests: list[str], seconds: float, log: Path) -> dict[str, Any]:
    """Runs the tests with the fault in place."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    file = ROOT / fault["file"]
    changed = mutate_code(file.read_text(encoding="utf-8"), get_operator(fault["operator"])(), fault["occurrence"])
    module = fault["file"].split("/src/")[1].removesuffix(".py").replace("/", ".").removesuffix(".__init__")

    def body(temporary: Path) -> dict[str, Any]:
        import sitecustomize

        text = temporary / "changed.py"
        text.write_text(changed, encoding="utf-8")
        os.environ[sitecustomize.FAULT] = json.dumps({"module": module, "file": str(file), "text": str(text)})
        sitecustomize.install()
        selection = Selection(tests)
        code = run_pytest(sorted({test.partition("::")[0] for test in tests}), selection, temporary, "-x")
        return {"code": code, "failed": selection.failed, "ran": selection.ran}

    found = forked(body, seconds, log)
    if found is None:
        return {"outcome": "caught", "by": "a hang or a crash", "ran": 0}
    if found["code"] == 0 and found["ran"] == len(tests):
        return {"outcome": "survived", "by": "", "ran": found["ran"]}
    if found["code"] == 5 or (found["code"] == 0 and found["ran"] == 0):
        return {"outcome": "survived", "by": "no test ran", "ran": 0}
    by = next(iter(found["failed"]), "") if found["code"] else ""
    if found["code"] == 0:  # skipped ones
        return {"outcome": "survived", "by": "", "ran": found["ran"]}
    return {"outcome": "caught", "by": by or f"pytest's code {found['code']}", "ran": found["ran"],
            "why": found["failed"].get(by, "")[-400:]}  # fmt: skip


def main(to_do: Path) -> None:
    job = json.loads(to_do.read_text())
    name = to_do.name.removesuffix("-to-do.json")
    # A process whose parent is gone becomes a child of this one, not of init: nothing outlives a fault.
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    stored, log = WORK / f"survey-{job['state']}.json", WORK / f"{name}.log"
    began = time.monotonic()
    with (WORK / f"lock-{job['state']}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # for a room beside this one may have the same tests
        if not stored.exists():
            print(f"{name}: the tests as they are …", flush=True)
            import pytest  # noqa: F401

            stored.write_text(json.dumps(survey(job["tests"], job["sources"], log)))
    room = json.loads(stored.read_text())
    for module in room["modules"]:
        with contextlib.suppress(BaseException):
            importlib.import_module(module)
    print(f"{name}: {len(room['seconds'])} tests, {sum(room['seconds'].values()):.0f} s; after "
          f"{time.monotonic() - began:.0f} s ready for {len(job['faults'])} faults", flush=True)  # fmt: skip
    kills: dict[str, Counter[str]] = defaultdict(Counter)
    for number, fault in enumerate(job["faults"], 1):
        start = time.monotonic()
        tests = in_order(tests_for(fault, room, job["whole"]), room["seconds"], kills[fault["file"]])
        limit = 60 + 8 * sum(room["seconds"][test] for test in tests)
        nothing = {"outcome": "survived", "by": "", "ran": 0}
        result = attempt(fault, tests, limit, log) if tests else nothing
        kills[fault["file"]][result["by"]] += 1
        result |= {"id": fault["id"], "room": fault["room"], "state": job["state"], "tests": len(tests),
                   "seconds": round(time.monotonic() - start, 1)}  # fmt: skip
        with (WORK / "results.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")
        where = f"{fault['file'].split('/')[-1]}:{fault['line']}"
        print(f"{name} {number}/{len(job['faults'])} {result['outcome']} {result['seconds']} s {where}",
              fault["after"], f"[{result['by'][-60:]}]", flush=True)  # fmt: skip


if __name__ == "__main__":
    # Before what is installed comes what stands here, in this process and in those that tests start.
    searched = os.pathsep.join(map(str, [HOOK, *ROOT.glob("packages/*/src"), ROOT / "data_prep/src"]))
    if os.environ.get("PYTHONPATH") != searched:
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, **one_thread, "PATH": path, "PYTHONPATH": searched}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    main(Path(sys.argv[1]))
