"""Helpers for what `generate` returns, which no checkpoint needs."""

from .alignment import align, replace_unknowns


__all__ = ["align", "replace_unknowns"]
