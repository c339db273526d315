"""Checkpoints: training state, weights of any format, initialisation from other runs."""

from checkpoint.reading import load_model
from checkpoint.training_state import save
from common.tensor_files import load

__all__ = ["load", "load_model", "save"]
