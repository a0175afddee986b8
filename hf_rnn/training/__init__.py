"""Helpers for training, which no checkpoint needs."""

from .carried_state import CarriedStateTrainer, StreamBlocks
from .scheduled_sampling import ScheduledSampling
from .words import first_continuation_id, fold_word, frequent_words, make_word_tokenizer, set_word_table, whole_words


__all__ = [
    "CarriedStateTrainer",
    "ScheduledSampling",
    "StreamBlocks",
    "first_continuation_id",
    "fold_word",
    "frequent_words",
    "make_word_tokenizer",
    "set_word_table",
    "whole_words",
]
