"""Puts one fault into one module of this process, and of every Python process that a test starts: tests/faults.py sets
PYTHONPATH to this folder. Nothing on disk is touched, so that several faults can be tried at once."""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
from pathlib import Path

FAULT = "TRILITH_FAULT"
"""The environment variable: JSON of `module`, the `file` that it stands in, and the `text` to run in its place."""


class _Faulty(importlib.machinery.SourceFileLoader):
    def __init__(self, module: str, file: str, text: str):
        super().__init__(module, file)
        self.text = text

    def get_code(self, fullname):
        return compile(Path(self.text).read_bytes(), self.path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, module: str, file: str, text: str):
        self.module, self.file, self.text = module, file, text

    def find_spec(self, name, path, target=None):
        if name != self.module:
            return None
        loader = _Faulty(self.module, self.file, self.text)
        return importlib.util.spec_from_file_location(name, self.file, loader=loader)


def install() -> None:
    """Takes the fault that the environment names, if it names one."""
    if FAULT in os.environ:
        sys.meta_path.insert(0, _Finder(**json.loads(os.environ[FAULT])))


install()
if "COVERAGE_PROCESS_START" in os.environ:
    import coverage

    coverage.process_startup()
