"""The subcommands of `data-prep`, by topic: modules with `add(commands)`, which load nothing heavy.

`execution` has the options that the long ones share.
"""

import argparse
from typing import TypeAlias

Subcommands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What `ArgumentParser.add_subparsers` returns."""
