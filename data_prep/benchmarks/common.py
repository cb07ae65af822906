"""What the benchmarks share: the machine they ran on, and where results go."""

import importlib.metadata
import json
import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine(*packages: str) -> dict[str, Any]:
    """Processor, cores, date and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "date": date.today().isoformat(),
        "cpu": model,
        "cpus": os.cpu_count(),
        "threads": 1,
        "python": platform.python_version(),
        "versions": versions,
    }


def write(name: str, machine: dict[str, Any], settings: dict[str, Any], results: dict[str, Any]) -> None:
    """Write results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    content = {"machine": machine, "settings": settings, "results": results}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    print(f"wrote {RESULTS / f'{name}.json'}")
