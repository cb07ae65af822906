"""Runs a task's objective and its optimizer under DeepSpeed."""

from stage_trainer.engine.base import Engine, Objective
from stage_trainer.engine.make import make_engine

__all__ = ["Engine", "Objective", "make_engine"]
