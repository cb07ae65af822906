"""The subcommands of `data-prep`: a module each, with `add(commands)`, which loads nothing heavy.

`execution` has the options that the long ones share.
"""
