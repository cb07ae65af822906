"""The subcommands of `stage-trainer`: one module each, with `add(commands)`. Importing them loads nothing heavy."""
