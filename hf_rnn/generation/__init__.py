"""Helpers around what `generate` reads and returns, which no checkpoint needs."""

from .alignment import align, replace_unknowns
from .copied_words import decode_with_copies, encode_with_copies


__all__ = ["align", "decode_with_copies", "encode_with_copies", "replace_unknowns"]
