"""The optimizer of a stage: parameter groups, AdamW or Muon, the learning-rate schedule, norms of updates."""

from stage_trainer.optim.build import build_optimizer
from stage_trainer.optim.muon import Muon
from stage_trainer.optim.schedule import schedule, set_rates

__all__ = ["Muon", "build_optimizer", "schedule", "set_rates"]
