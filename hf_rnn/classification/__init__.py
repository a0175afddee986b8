"""Helpers for classifiers, which no checkpoint needs."""

from .long_texts import classify_in_chunks


__all__ = ["classify_in_chunks"]
