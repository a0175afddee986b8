"""Helpers for training, which no checkpoint needs."""

from .carried_state import CarriedStateTrainer, StreamBlocks
from .scheduled_sampling import ScheduledSampling


__all__ = ["CarriedStateTrainer", "ScheduledSampling", "StreamBlocks"]
