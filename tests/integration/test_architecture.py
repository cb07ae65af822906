"""Who imports whom, and how long things are: the arrows and measures of the house, read from the code."""

import ast
import graphlib
import io
import re
import tokenize
from pathlib import Path

import pytest
from stage_trainer.recipe.kinds import OTHERS

ROOT = Path(__file__).parents[2]
SOURCES = {
    "contrastive_losses": ROOT / "packages/contrastive-losses/src/contrastive_losses",
    "text_tower": ROOT / "packages/text-tower/src/text_tower",
    "vision_tower": ROOT / "packages/vision-tower/src/vision_tower",
    "stage_trainer": ROOT / "packages/stage-trainer/src/stage_trainer",
    "data_prep": ROOT / "data_prep/src/data_prep",
}
FLOORS = (
    "errors files hub metrics",
    "recipe data.http data.download",
    "batch data.stateless_rng",
    "dual_encoder formats encoding",
    "data",
    "weights build",
    "optim",
    "engine",
    "evaluation.measures evaluation.held_out evaluation.ranks evaluation.retrieval evaluation.text_retrieval "
    "evaluation.picture "
    "evaluation.tables evaluation.sets evaluation.measured evaluation.models evaluation.cross_modal",
    "plan",
    "tasks",
    "checkpoint",
    "evaluation formats.history formats.snippets formats.card formats.onnx.examples bulk",
    "pages",
    "run",
    "trainer commands",
    "cli",
)
"""The trainer's modules, from the ground up. A floor imports from itself and from those below."""
MODELS = {"contrastive_losses", "text_tower", "vision_tower"}


def imports(folder: Path, *, top_level_only: bool = False):
    """(file, imported module) of every import below `folder` that is not relative."""
    for file in folder.rglob("*.py"):
        tree = ast.parse(file.read_text())
        for node in tree.body if top_level_only else ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from ((file, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield file, node.module


def siblings(name: str, **options):
    return [(f, m) for f, m in imports(SOURCES[name], **options) if m.split(".")[0] in set(SOURCES) - {name}]


def modules_of(name: str) -> dict[str, set[str]]:
    """{module of a package: the modules of that package that it imports anywhere}."""
    folder = SOURCES[name]
    names = {file: ".".join([name, *file.relative_to(folder).with_suffix("").parts]) for file in folder.rglob("*.py")}
    names = {file: module.removesuffix(".__init__") for file, module in names.items()}
    found: dict[str, set[str]] = {module: set() for module in names.values()}
    for file, module in names.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found[module] |= {alias.name for alias in node.names} & found.keys()
            elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == name:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found[module] |= {full if full in found else node.module for full in names}
    return found


def floor_of(module: str) -> int:
    """The floor of the longest name that the module begins with."""
    inside = module.removeprefix("stage_trainer.") + "."
    names = {name: number for number, floor in enumerate(FLOORS) for name in floor.split()}
    fitting = [name for name in names if inside.startswith(f"{name}.")]
    assert fitting, f"{module} has no floor; add it to FLOORS"
    return names[max(fitting, key=len)]


def test_no_import_of_the_trainer_runs_up():
    modules = {m: of for m, of in modules_of("stage_trainer").items() if m != "stage_trainer"}
    upward = [(m, i) for m, of in modules.items() for i in of - {"stage_trainer"} if floor_of(i) > floor_of(m)]
    assert upward == []


def test_no_imports_of_the_trainer_go_in_a_circle():
    modules = modules_of("stage_trainer")
    del modules["stage_trainer"]  # it imports the model when asked for it
    graphlib.TopologicalSorter({m: of - {"stage_trainer"} for m, of in modules.items()}).prepare()


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_model_packages_know_nobody_of_the_house(name):
    assert siblings(name) == []


def test_the_trainer_takes_the_shard_format_alone_from_data_prep():
    found = {m for _, m in siblings("stage_trainer") if m.startswith("data_prep")}
    assert found == {"data_prep.shards"}


def test_data_prep_imports_a_tower_lazily_or_not_at_all():
    assert siblings("data_prep", top_level_only=True) == []
    assert all(m.split(".")[0] in MODELS for _, m in siblings("data_prep"))


def test_the_shard_format_needs_numpy_alone():
    import sys

    outside = {m.split(".")[0] for _, m in imports(SOURCES["data_prep"] / "shards")} - set(sys.stdlib_module_names)
    assert outside <= {"numpy", "data_prep"}
    inside = {m for _, m in imports(SOURCES["data_prep"] / "shards") if m.startswith("data_prep")}
    assert all(m.startswith("data_prep.shards") for m in inside)


def test_losses_need_torch_alone():
    import sys

    outside = {m.split(".")[0] for _, m in imports(SOURCES["contrastive_losses"])} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "contrastive_losses", "triton"}


def test_only_a_kinds_rules_and_task_know_of_it():
    """Everything else asks `Stage.kind`; the exceptions compute with what it is made of."""
    rooms, exceptions = ("recipe/", "tasks/", "data/"), {"batch.py", "evaluation/measures.py", "optim/groups.py"}
    words = "|".join(rf"(of_)?{kind.task.partition('_')[0]}(?!_fill)\w*" for kind in OTHERS)
    found = set()
    for file in SOURCES["stage_trainer"].rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            named = getattr(node, "id", getattr(node, "attr", getattr(node, "value", None)))
            if isinstance(named, str) and re.fullmatch(words, named.lower()):
                found.add(file.relative_to(SOURCES["stage_trainer"]).as_posix())
    assert {name for name in found if not name.startswith(rooms)} == exceptions


def test_the_top_level_holds_the_rooms_and_nothing_else():
    import subprocess

    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    top = {name.split("/")[0] for name in tracked if not name.startswith(".")}
    assert top <= {"pyproject.toml", "README.md", "LICENSE", "packages", "launch", "data_prep", "tests"}


def lines_of_code(source: str, tree: ast.Module) -> set[int]:
    """Numbers of the lines that hold more than comments and docstrings."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in skipped]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return lines


def parameters(function: ast.FunctionDef) -> int:
    of = function.args
    names = [each.arg for each in (*of.posonlyargs, *of.args, *of.kwonlyargs, of.vararg, of.kwarg) if each]
    return len([name for name in names if name not in ("self", "cls")])


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_files_and_functions_are_short(name):
    """Files of at most 350 lines; functions of at most 50 lines of code and 8 parameters."""
    long = []
    for file in SOURCES[name].rglob("*.py"):
        source = file.read_text(encoding="utf-8")
        tree = ast.parse(source)
        lines, code = len(source.splitlines()), lines_of_code(source, tree)
        long += [f"{file.name}: {lines} lines"] * (lines > 350)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                size, given = len(code & set(range(node.lineno, node.end_lineno + 1))), parameters(node)
                long += [f"{file.stem}.{node.name}: {size} lines, {given} parameters"] * (size > 50 or given > 8)
    if name == "contrastive_losses":  # public losses, and what computes them
        kernels_and_losses = r"(triton_kernels|ring|fused|plain|module)\.(?!py)|\w+\.(matryoshka|unified)_"
        long = [each for each in long if not re.match(kernels_and_losses, each)]
    assert long == []
