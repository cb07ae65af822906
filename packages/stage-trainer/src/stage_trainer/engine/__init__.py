"""Runs a task's objective and its optimizer under DeepSpeed."""

from stage_trainer.engine.make import make_engine
from stage_trainer.engine.protocol import Engine, Objective

__all__ = ["Engine", "Objective", "make_engine"]
