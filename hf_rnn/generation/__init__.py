"""Helpers around what `generate` reads and returns, which no checkpoint needs."""

from .alignment import align, replace_unknowns
from .copied_words import decode_with_copies, encode_with_copies
from .gnmt_score import GNMTScore


__all__ = ["GNMTScore", "align", "decode_with_copies", "encode_with_copies", "replace_unknowns"]
