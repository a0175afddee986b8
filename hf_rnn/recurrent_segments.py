"""Padded batches in pieces of time, so that a row costs little more than its tokens. Imports the padding.

A kernel over a whole padded batch goes on for every row until the longest one ends. Here the rows are sorted by length,
time is cut at some of the lengths, and a piece runs the rows that are not yet at their end. Each piece is one more call
of the kernel, so that few cuts, well chosen, are best: a small dynamic programme finds them.
"""

from bisect import bisect_right
from typing import NamedTuple

import torch

from .fast_paths import may_take, transforms_are_active
from .recurrent_padding import Padding


# What a call costs beside its steps, in rows times steps, because the weights are brought into order for it; and the
# operations that take the time of a call, and of sorting a batch into pieces at all. Found by measurement.
CALL_COST = 70
CALL_OPERATIONS = 1e7
SORTING_OPERATIONS = 8e7
# What a cut costs a loop over the steps, which makes new views of what it reads.
LOOP_CUT_COST = 4
# More places to cut are not looked at.
MOST_CUTS = 32


class Piece(NamedTuple):
    """The steps from `start` to `stop` of the first `rows` rows; `first` numbers its first row of the first step."""

    start: int
    stop: int
    rows: int
    first: int


class DirectionSteps(NamedTuple):
    """How one direction goes through a padded batch: numbers of positions `[batch * seq]` and of steps of rows."""

    read: torch.Tensor  # [steps], the position that each step reads
    read_by: torch.Tensor  # [batch * seq], the step that reads a position; -1 where none does
    shown: torch.Tensor  # [batch * seq], the step whose output is shown at a position; 0 where nothing was read yet
    shown_at: torch.Tensor  # [steps], the position of the token that a step reads; -1 for steps over padding
    repeated_at: torch.Tensor  # the padded positions that show the output of an earlier token
    started: torch.Tensor  # [batch, seq, 1], False where nothing was read yet


class Segments:
    """
    A padded batch in pieces of time.

    Args:
        padding (`Padding`): Where the tokens lie.
        cuts (`list[int]`): The steps at which pieces end, the last of them the greatest length.
    """

    def __init__(self, padding: Padding, cuts: list[int]):
        self.padding = padding
        self.order = padding.lengths.argsort(descending=True, stable=True)
        self.rank = self.order.argsort()
        lengths = sorted(padding.lengths.tolist())
        self.pieces: list[Piece] = []
        start, first = 0, 0
        for stop in cuts:
            rows = len(lengths) - bisect_right(lengths, start)
            self.pieces.append(Piece(start, stop, rows, first))
            start, first = stop, first + (stop - start) * rows
        self.num_steps = first
        self._directions: dict[bool, DirectionSteps] = {}
        # The number of each step of each row, time before rows in each piece; -1 for steps that no piece has.
        batch, seq = padding.mask.shape
        number = torch.full((batch, seq), -1)
        for start, stop, rows, first in self.pieces:
            number[:rows, start:stop] = torch.arange(first, first + (stop - start) * rows).view(-1, rows).t()
        self.number = number[self.rank]

    @property
    def last_steps(self) -> torch.Tensor:
        """The number of the step that reads the last token of each row `[batch]`; 0 in rows without one."""
        last = self.number.gather(1, self.padding.last.squeeze(-1)).squeeze(1)
        return last.clamp(min=0)

    def direction(self, reverse: bool) -> DirectionSteps:
        """The numbers for reading from left to right, or from right to left."""
        if reverse not in self._directions:
            self._directions[reverse] = self._make_direction(reverse)
        return self._directions[reverse]

    def _make_direction(self, reverse: bool) -> DirectionSteps:
        mask, valid, number = self.padding.mask, self.padding.valid, self.number.flatten()
        index = self.padding.direction(reverse)
        if index.gather is None:
            seq = mask.shape[1]
            positions = torch.arange(mask.numel())
            shown = torch.where(valid, positions.view_as(mask), self.padding.last.squeeze(-1) + positions[::seq, None])
            shown, started = shown.flatten(), (self.padding.lengths > 0)[:, None, None].expand(*mask.shape, 1)
        else:
            positions, shown, started = index.gather, index.scatter, index.started
        taken = number >= 0
        read_by = torch.full_like(number, -1).index_copy(0, positions, number)
        read = torch.empty(self.num_steps, dtype=torch.long).index_copy(0, number[taken], positions[taken])
        shown_at = torch.full_like(read, -1).index_copy(0, number[valid.flatten()], positions[valid.flatten()])
        shown = number[shown].clamp(min=0)
        repeated_at = (started.squeeze(-1) & ~mask).flatten().nonzero().squeeze(1)
        return DirectionSteps(read, read_by, shown, shown_at, repeated_at, started)


class _Take(torch.autograd.Function):
    """
    Rows of a matrix by their numbers. The gradient is taken by numbers too: `back` says where each row went, or -1,
    and `repeated` which of the places hold a row that went elsewhere already.
    """

    @staticmethod
    def forward(ctx, features, index, back, repeated):
        ctx.numbers = index, back, repeated
        return features.index_select(0, index)

    @staticmethod
    def backward(ctx, gradient):
        index, back, repeated = ctx.numbers
        of_features = gradient.index_select(0, back.clamp(min=0)).masked_fill((back < 0).unsqueeze(-1), 0)
        if repeated is not None:
            of_repeated = gradient.index_select(0, repeated)
            if of_repeated.any():  # mostly nobody asks for what is shown at padding
                of_features = of_features.index_add(0, index[repeated], of_repeated)
        return of_features, None, None, None


def read_steps(features: torch.Tensor, steps: DirectionSteps) -> torch.Tensor:
    """What the steps read `[steps, size]` of features `[batch, seq, size]`."""
    return _Take.apply(features.flatten(0, 1), steps.read, steps.read_by, None)


def show_steps(outputs: torch.Tensor, steps: DirectionSteps, initial: torch.Tensor) -> torch.Tensor:
    """
    The outputs `[steps, size]` at their positions `[batch, seq, size]`, the last one repeated at padding, and `initial`
    `[batch, size]` where nothing was read yet.
    """
    shown = _Take.apply(outputs, steps.shown, steps.shown_at, steps.repeated_at)
    shown = shown.view(*steps.started.shape[:2], -1)
    return torch.where(steps.started, shown, initial.to(shown.dtype).unsqueeze(1))


def choose_cuts(lengths: list[int], call_cost: float, sorting_cost: float = 0) -> list[int]:
    """
    Where to cut time.

    Args:
        lengths (`list[int]`): The lengths of the rows.
        call_cost (`float`): What a piece costs beside its steps, in rows times steps.
        sorting_cost (`float`): What it costs to have more than one piece.

    Returns:
        The steps at which pieces end, of which the last is the greatest length: the cheapest of all choices, where a
        step costs its rows. Empty where no row has a token.
    """
    lengths = sorted(length for length in lengths if length > 0)
    if not lengths:
        return []
    thinned = lengths[:: -(-len(lengths) // MOST_CUTS)] + lengths[-1:]
    bounds = [0, *sorted(set(thinned))]
    rows = [len(lengths) - bisect_right(lengths, bound) for bound in bounds]
    best, begins = [0.0], [0]
    for stop in range(1, len(bounds)):
        costs = [best[start] + call_cost + (bounds[stop] - bounds[start]) * rows[start] for start in range(stop)]
        begins.append(min(range(stop), key=costs.__getitem__))
        best.append(costs[begins[-1]])
    if best[-1] + sorting_cost >= call_cost + bounds[-1] * rows[0]:
        return bounds[-1:]
    cuts, stop = [], len(bounds) - 1
    while stop > 0:
        cuts.append(bounds[stop])
        stop = begins[stop]
    return cuts[::-1]


def _segments(padding: Padding, call_cost: float, sorting_cost: float) -> Segments | None:
    """The cheapest pieces at these costs, or None where it is the whole. `padding` keeps them."""
    if padding.mask.device.type != "cpu" or torch.compiler.is_compiling() or transforms_are_active():
        return None
    if not may_take("segments"):
        return None
    costs = call_cost, sorting_cost
    if costs not in padding.segments:
        cuts = choose_cuts(padding.lengths.tolist(), *costs)
        padding.segments[costs] = Segments(padding, cuts) if len(cuts) > 1 else None
    return padding.segments[costs]


def find_segments(padding: Padding, input_size: int, gate_rows: int) -> Segments | None:
    """
    The pieces in which a kernel is to run over a padded batch, or None where it had better run over the whole.

    Args:
        padding (`Padding`): Where the tokens lie. It keeps what was found.
        input_size (`int`): Width of the inputs.
        gate_rows (`int`): Rows of the weights of the cell, of all gates.
    """
    passes = 3 if torch.is_grad_enabled() else 1  # the backward has twice the products
    operations = 2 * passes * gate_rows * (input_size + gate_rows // 4)
    return _segments(padding, round(CALL_COST + CALL_OPERATIONS / operations), round(SORTING_OPERATIONS / operations))


def find_loop_segments(padding: Padding | None) -> Segments | None:
    """The pieces for a loop over the steps, where a cut costs no more than a view; None where there is one piece."""
    return None if padding is None else _segments(padding, LOOP_CUT_COST, 0)
