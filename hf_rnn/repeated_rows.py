"""Rows that are there several times, as after a step of a search with beams: what is made of them, once for each.

A beam goes on from the state of some beam before it, and several of them from the same one. What a layer makes of
that state alone, its recurrent product, is the same for these. Imports nothing of the package but the choice of paths.
"""

import weakref
from typing import NamedTuple

import torch

from .fast_paths import may_take


# Share of different rows above which nothing is gained, and numbers in all rows below which nothing is.
MOST_DIFFERENT, FEWEST_NUMBERS = 0.9, 2**15
# As many rows that belong to nobody are added as it takes to have a multiple of this: oneDNN prepares itself for every
# number of rows that it meets.
MULTIPLE = 8


class DifferentRows(NamedTuple):
    """The different rows of a tensor `[batch, size]`, and the place `[batch]` of each row among them."""

    rows: torch.Tensor
    places: torch.Tensor


_known: dict[int, tuple[weakref.ref, int, DifferentRows]] = {}
# The last index and what was found of it: the layers of a model are reordered one after the other.
_last: tuple[weakref.ref, int, tuple | None] | None = None


def select_rows(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`states.index_select(0, index)`, for which [`different_rows`] then knows which of its rows are the same."""
    selected = states.index_select(0, index)
    remembers = (
        selected.device.type == "cpu"
        and selected.dim() == 2
        and selected.numel() >= FEWEST_NUMBERS
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not (selected.is_inference() or index.is_inference())  # such tensors do not count their versions
        and may_take("repeated_rows")
    )
    if remembers and (found := _different(index)) is not None:
        different, places = found
        key = id(selected)
        reference = weakref.ref(selected, lambda _: _known.pop(key, None))
        _known[key] = reference, selected._version, DifferentRows(states.index_select(0, different), places)
    return selected


def _different(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The different numbers of an index and the places of all in them; None where too many are different."""
    global _last
    if _last is not None:
        reference, version, found = _last
        if reference() is index and version == index._version:
            return found
    places: dict[int, int] = {}
    of_rows = [places.setdefault(row, len(places)) for row in index.tolist()]
    different, found = list(places), None
    if len(different) <= MOST_DIFFERENT * len(of_rows):
        different += different[-1:] * (-len(different) % MULTIPLE)
        found = tuple(torch.tensor(rows, device="cpu") for rows in (different, of_rows))
    _last = weakref.ref(index), index._version, found
    return found


def different_rows(selected: torch.Tensor) -> DifferentRows | None:
    """What is known of the rows of a tensor that [`select_rows`] returned and nobody has changed since."""
    known = _known.get(id(selected))
    if known is None or not may_take("repeated_rows"):
        return None
    reference, version, different = known
    return different if reference() is selected and version == selected._version else None
