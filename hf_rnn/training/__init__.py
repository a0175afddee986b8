"""Helpers for training, which no checkpoint needs."""

from .carried_state import CarriedStateTrainer, StreamBlocks
from .scheduled_sampling import ScheduledSampling
from .word_vectors import WordVectors, place_word_vectors, read_word_vectors, words_of_tokens


__all__ = [
    "CarriedStateTrainer",
    "ScheduledSampling",
    "StreamBlocks",
    "WordVectors",
    "place_word_vectors",
    "read_word_vectors",
    "words_of_tokens",
]
