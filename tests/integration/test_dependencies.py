"""What each package imports, at the top or inside a function, it declares; what the READMEs say to install exists."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = sorted([*ROOT.glob("packages/*/pyproject.toml"), ROOT / "data_prep/pyproject.toml"])
READMES = [ROOT / "README.md", *(path.with_name("README.md") for path in PACKAGES)]
BRINGS = packages_distributions()
OURS = {path.parent.name.replace("-", "_"): f"trilith-{path.parent.name.replace('_', '-')}" for path in PACKAGES}
IMPORTERS = ("import_module", "find_spec", "needs")


def canonical(requirement: str) -> str:
    """The name in a requirement: "Fsspec[http]>=1; …" is fsspec."""
    return re.split(r"[\s\[<>=!~;(]", requirement.strip(), maxsplit=1)[0].lower().replace("_", "-").replace(".", "-")


def declared(pyproject: Path) -> tuple[set[str], dict[str, set[str]]]:
    """(dependencies, those of each extra)."""
    project = tomllib.loads(pyproject.read_text())["project"]
    extras = project.get("optional-dependencies", {})
    return set(map(canonical, project["dependencies"])), {name: set(map(canonical, of)) for name, of in extras.items()}


def imports(file: Path) -> set[tuple[str, str | None]]:
    """(module, the extra that `needs` names for it) of every import in a file, also of those by a string."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    tables = {  # NAME = {key: "module"}, for import_module(NAME[…])
        node.targets[0].id: [value.value for value in node.value.values if isinstance(value, ast.Constant)]
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Dict)
    }
    found: set[tuple[str, str | None]] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name, None) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "", None))
        elif isinstance(node, ast.Call) and node.args:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            what = node.args[0]
            if name not in IMPORTERS:
                continue
            extra = next((k.value.value for k in node.keywords if k.arg == "extra"), None)  # type: ignore[attr-defined]
            if isinstance(what, ast.Constant):
                found.add((what.value, extra))
            elif isinstance(what, ast.Subscript) and isinstance(what.value, ast.Name):
                found |= {(module, None) for module in tables.get(what.value.id, [])}
    return {(module.partition(".")[0], extra) for module, extra in found}


def distributions(module: str) -> set[str]:
    """What brings a module; of one that is not installed here (flash_attn) its own name."""
    return {canonical(name) for name in BRINGS.get(module, ())} | {OURS.get(module, canonical(module))}


@pytest.mark.parametrize("pyproject", PACKAGES, ids=lambda path: path.parent.name)
def test_every_import_is_declared(pyproject):
    always, extras = declared(pyproject)
    anything = always.union(*extras.values())
    undeclared, elsewhere = {}, {}
    for file in sorted((pyproject.parent / "src").rglob("*.py")):
        own = file.relative_to(pyproject.parent / "src").parts[0]
        for module, extra in imports(file):
            if module in sys.stdlib_module_names or module == own:
                continue
            brought = distributions(module)
            if not brought & anything:
                undeclared[f"{file.name}: {module}"] = brought
            elif extra is not None and not brought & (always | extras.get(extra, set())):
                elsewhere[f"{file.name}: {module}"] = extra
    assert not undeclared, "imported and neither a dependency nor of an extra"
    assert not elsewhere, "`needs` names an extra that does not bring it"


@pytest.mark.parametrize("pyproject", PACKAGES, ids=lambda path: path.parent.name)
def test_what_is_imported_with_the_package_is_no_extra(pyproject):
    always, _ = declared(pyproject)
    found = {}
    for file in sorted((pyproject.parent / "src").rglob("*.py")):
        own = file.relative_to(pyproject.parent / "src").parts[0]
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
            for module in (name.partition(".")[0] for name in names):
                if module not in sys.stdlib_module_names and module != own and not distributions(module) & always:
                    found[file.name] = module
    for name in ("triton_kernels.py", "mteb_model.py", "mteb_run.py"):
        found.pop(name, None)  # which nobody imports where there is no triton, no mteb
    assert not found


def install_lines() -> list[tuple[str, list[str]]]:
    """(README, what it installs) of every `pip install` of our packages in a README."""
    found = []
    for readme in READMES:
        for line in re.findall(r"pip install ([^`#\n]+)", readme.read_text(encoding="utf-8")):
            words = [quoted or bare for quoted, bare in re.findall(r"'([^']+)'|(\S+)", line)]
            places = [word for word in words if word.startswith("./")]
            if places:
                found.append((readme.relative_to(ROOT).as_posix(), places))
    return found


def test_every_extra_that_a_readme_names_exists():
    lines = install_lines()
    assert len(lines) > 10
    for readme, places in lines:
        for place in places:
            folder, _, extras = place.partition("[")
            _, known = declared(ROOT / folder / "pyproject.toml")
            assert set(filter(None, extras.rstrip("]").split(","))) <= known.keys(), f"{readme}: {place}"
    for readme, pyproject in zip(READMES[1:], PACKAGES, strict=True):  # an extra nobody is told of is of no use
        text = readme.read_text(encoding="utf-8") + READMES[0].read_text(encoding="utf-8")
        _, known = declared(pyproject)
        for name in known.keys() - {"test"}:
            assert re.search(rf"[\[,`]{name}[\],`]", text), f"{readme}: does not say what [{name}] is for"


@pytest.mark.full
@pytest.mark.parametrize("places", sorted({tuple(places) for _, places in install_lines()}), ids=" ".join)
def test_what_a_readme_installs_can_be_installed(places, tmp_path):
    uv = shutil.which("uv") or pytest.fail("uv is missing; bash launch/environment.sh installs it")
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "env"], check=True)
    python = tmp_path / "env/bin/python"
    constraint = ["--constraint", ROOT / "launch/constraints.txt"]
    command = [uv, "pip", "install", "--dry-run", "--quiet", "--python", python, *constraint, *places]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
