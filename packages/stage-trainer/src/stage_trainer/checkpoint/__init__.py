"""Checkpoints: `step-NNNNNNN/{model/, optimizer.safetensors, state.json}`, whole or absent.

- `model/` is a directory that the model itself writes and reads (`DualEncoder`, `MaskedLM`), so a checkpoint can be
  evaluated or exported as it is.
- `optimizer.safetensors` holds the optimizer's state by parameter name ("NAME|KEY"), so a run can go on with another
  world size, ZeRO stage or resolution.
- `state.json` holds `RunState`, under "files" the sha256 of every other file, by which a checkpoint is verified, and
  under "sha256" its own, without that line.

Beside the checkpoints of a stage, `best.json` says which one is the best: {"metric", "value", "step"}.
"""
