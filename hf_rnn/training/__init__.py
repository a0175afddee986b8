"""Helpers for training, which no checkpoint needs."""

from .carried_state import CarriedStateTrainer, StreamBlocks


__all__ = ["CarriedStateTrainer", "StreamBlocks"]
