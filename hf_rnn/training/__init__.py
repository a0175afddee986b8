"""Helpers for training, which no checkpoint needs."""

from .alignments import AlignmentCollator, read_alignment
from .carried_state import CarriedStateTrainer, StreamBlocks
from .labelled_tokens import ids_without_label
from .scheduled_sampling import ScheduledSampling
from .word_vectors import WordVectors, place_word_vectors, read_word_vectors, words_of_tokens
from .words import first_continuation_id, fold_word, frequent_words, make_word_tokenizer, set_word_table, whole_words


__all__ = [
    "AlignmentCollator",
    "CarriedStateTrainer",
    "ScheduledSampling",
    "StreamBlocks",
    "WordVectors",
    "first_continuation_id",
    "fold_word",
    "frequent_words",
    "ids_without_label",
    "make_word_tokenizer",
    "place_word_vectors",
    "read_alignment",
    "read_word_vectors",
    "set_word_table",
    "whole_words",
    "words_of_tokens",
]
