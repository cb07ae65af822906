"""What CONTRIBUTING.md speaks of is there: rooms, modules, files, dependencies; and it speaks of every room."""

import re
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / ".github/CONTRIBUTING.md").read_text(encoding="utf-8")
TRAINER, DATA_PREP = ROOT / "packages/stage-trainer/src/stage_trainer", ROOT / "data_prep/src/data_prep"
NO_FILES = {"tasks/uniformity.py", "config.json", "tokenizer.json", "loss/NAME"}
"""What the reader writes, what others write, a tag of TensorBoard's."""
NO_MODULES = {"onnx", "train_step"}
"""A folder, a function."""


def table(head: str) -> list[list[str]]:
    """The cells of each row."""
    rows = TEXT.partition(f"{head}\n| --- ")[2].partition("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in row.removeprefix("|").removesuffix("|").split(" | ")] for row in rows]


def rooms(head: str) -> dict[str, str]:
    """{room: what the table says of it}."""
    return {room.rstrip("/"): says for named, says in table(head) for room in re.findall(r"`([^`]+)`", named)}


FLOORS = rooms("| floor | what it does |")


def test_every_room_is_on_the_map_and_nothing_else():
    for folder, mapped in ((TRAINER, FLOORS), (DATA_PREP, rooms("| room | what it does |"))):
        modules = {path.stem for path in folder.glob("*.py")}
        assert {path.parent.name for path in folder.glob("*/__init__.py")} == mapped.keys() - modules
    assert {path.stem for path in TRAINER.glob("*.py")} - {"__init__"} <= FLOORS.keys()


def test_every_module_that_the_map_names_is_there():
    there = [f".{'.'.join(path.relative_to(TRAINER).with_suffix('').parts)}" for path in TRAINER.rglob("*.py")]
    named = {name for says in FLOORS.values() for name in re.findall(r"`([a-z_0-9.*]+)`", says)} - NO_MODULES
    assert len(named) > 60
    assert [name for name in sorted(named) if not any(fnmatch(each, f"*.{name}") for each in there)] == []


def test_every_file_that_the_text_names_is_there():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    there = [f"/{name}" for path in tracked for name in (path, path.removesuffix(".py"), str(Path(path).parent))]
    quoted = {name.rstrip("/") for name in re.findall(r"`([\w./*-]+)`", TEXT)}
    named = {name for name in quoted if "/" in name or name.endswith((".py", ".sh", ".md", ".json", ".yaml", ".txt"))}
    assert len(named) > 30
    assert [name for name in sorted(named - NO_FILES) if not any(fnmatch(each, f"*/{name}") for each in there)] == []


def test_the_table_has_what_each_package_needs():
    package, said = "", dict[str, str]()
    for name, needs, *_ in table("| package | needs | why; what it replaces |"):
        package = name or package
        said[package] = f"{said.get(package, '')}, {needs}"
    for path in (*ROOT.glob("packages/*/pyproject.toml"), DATA_PREP.parents[1] / "pyproject.toml"):
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        extras = project.get("optional-dependencies", {})
        row = said[path.parent.name.replace("_", "-")]
        assert set(re.findall(r"`\[([\w-]+)\]`", row)) <= extras.keys()
        wanted = {re.split(r"[\s\[<>=;]", each)[0] for each in sum(extras.values(), project["dependencies"])}
        lacking = [each for each in wanted if not each.startswith("trilith-") and not re.search(rf"\b{each}\b", row)]
        assert lacking == [], path.parent.name
