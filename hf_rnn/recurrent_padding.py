"""Where the tokens of a padded batch lie, and how to move them together and back. Imports nothing of the package."""

from functools import cached_property
from typing import NamedTuple

import torch


class DirectionIndex(NamedTuple):
    """How one direction reads a padded batch: its tokens moved to the left, in the order of reading."""

    gather: torch.Tensor | None  # [batch * seq], where the tokens lie; None if they lie at the left in reading order
    scatter: torch.Tensor | None  # [batch * seq], the step whose output each position shows; None as above
    started: torch.Tensor | None  # [batch, seq, 1], False where nothing was read yet; None as above


def reading_order(mask: torch.Tensor, reverse: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    How to read the tokens of rows one behind the other and the padding behind them, each in its own order.

    Args:
        mask (`torch.BoolTensor` of shape `(batch, seq)`): True where there is a token.
        reverse (`bool`): Whether tokens are read from right to left.

    Returns:
        `token_step`: the step that reads the token at a position, at padding that of the token before it, which is -1
        in front of the first (from right to left that of the token behind it plus one); `place`: the step that reads
        each position; and `order`: the position that each step reads, all `(batch, seq)`.
    """
    positions = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    lengths = mask.sum(dim=1, keepdim=True)
    tokens_until = mask.long().cumsum(dim=1)  # at or before the position
    token_step = lengths - tokens_until if reverse else tokens_until - 1
    place = torch.where(mask, token_step, lengths + positions - tokens_until)
    return token_step, place, torch.empty_like(place).scatter(1, place, positions)


class Padding:
    """
    Where the tokens of a batch lie, prepared once and shared by all layers.

    Args:
        mask (`torch.Tensor` of shape `(batch, seq)`): True where there is a token.
        is_right_padded (`bool`): Whether all padding is known to lie at the end.
    """

    def __init__(self, mask: torch.Tensor, is_right_padded: bool = False):
        self.mask = mask
        self.is_right_padded = is_right_padded
        self._directions: dict[bool, DirectionIndex] = {}
        self.segments: dict = {}  # kept here by what runs the batch in pieces

    @cached_property
    def lengths(self) -> torch.Tensor:
        """Number of tokens `[batch]`."""
        return self.mask.sum(dim=1)

    @cached_property
    def last(self) -> torch.Tensor:
        """The last step that reads a token `[batch, 1, 1]`; 0 in rows without one."""
        return (self.lengths - 1).clamp(min=0)[:, None, None]

    @cached_property
    def valid(self) -> torch.Tensor:
        """True at the first `lengths` steps `[batch, seq]`."""
        return torch.arange(self.mask.shape[1], device=self.mask.device) < self.lengths[:, None]

    @classmethod
    def from_attention_mask(
        cls, attention_mask: torch.Tensor | None, inputs: torch.Tensor, has_past: bool = False
    ) -> "Padding | None":
        """
        Args:
            attention_mask (`torch.Tensor` of shape `(batch, seq)`, *optional*): Non-zero where there is a token.
            inputs (`torch.Tensor` of shape `(batch, seq, ...)`): What the mask belongs to.
            has_past (`bool`): Whether the mask may begin with columns of earlier tokens, which are left out.

        Returns:
            `Padding`, or None where nothing is known to be padding.

        Raises:
            `ValueError`: The mask has another shape.
        """
        if attention_mask is None:
            return None
        batch, seq = inputs.shape[:2]
        shape = tuple(attention_mask.shape)
        if len(shape) != 2 or shape[0] != batch or shape[1] < seq or (shape[1] > seq and not has_past):
            wanted = f"({batch}, {'past + ' if has_past else ''}{seq})"
            raise ValueError(f"`attention_mask` must have the shape {wanted}, got {shape}.")
        mask = attention_mask[:, shape[1] - seq :].bool()
        # Looking at the values costs nothing on a CPU; elsewhere it would wait for the device.
        if mask.device.type != "cpu" or torch.compiler.is_compiling():
            return cls(mask)
        if mask.all():
            return None
        return cls(mask, is_right_padded=bool((mask[:, 1:] <= mask[:, :-1]).all()))

    def direction(self, reverse: bool) -> DirectionIndex:
        """The index for reading from left to right, or from right to left."""
        if reverse not in self._directions:
            self._directions[reverse] = self._make_direction(reverse)
        return self._directions[reverse]

    def _make_direction(self, reverse: bool) -> DirectionIndex:
        if self.is_right_padded and not reverse:
            return DirectionIndex(None, None, None)
        batch, seq = self.mask.shape
        offset = torch.arange(batch, device=self.mask.device)[:, None] * seq
        token_step, _, order = reading_order(self.mask, reverse)
        # At or before the position, from right to left at or after it.
        tokens_read = token_step + (self.mask.long() if reverse else 1)
        scatter = (tokens_read - 1).clamp(min=0) + offset
        return DirectionIndex((order + offset).flatten(), scatter.flatten(), (tokens_read > 0)[:, :, None])

    def at_last(self, outputs: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
        """The output `[batch, size]` of the last step that read a token; `initial` for rows without one."""
        last = outputs.gather(1, self.last.expand(-1, 1, outputs.shape[-1])).squeeze(1)
        return torch.where((self.lengths == 0)[:, None], initial.to(last.dtype), last)

    def spread(self, outputs: torch.Tensor, initial: torch.Tensor, reverse: bool) -> torch.Tensor:
        """
        Outputs of tokens that were moved to the left in the order of the text, back at their positions, with the last
        one that was read repeated at padding.

        Args:
            outputs (`torch.Tensor` of shape `(batch, seq, size)`): The outputs, the first token's first.
            initial (`torch.Tensor` of shape `(batch, size)`): What stands where nothing was read yet.
            reverse (`bool`): Whether tokens were read from right to left.
        """
        batch, seq = self.mask.shape
        tokens_until = self.mask.long().cumsum(dim=1)  # at or before the position
        index = tokens_until - self.mask.long() if reverse else tokens_until - 1
        is_read = index < self.lengths[:, None] if reverse else index >= 0
        offset = torch.arange(batch, device=self.mask.device)[:, None] * seq
        spread = gather_positions(outputs, (index.clamp(0, seq - 1) + offset).flatten())
        return torch.where(is_read[:, :, None], spread, initial.to(outputs.dtype).unsqueeze(1))


def gather_positions(features: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows `index` `[batch * seq]` of `features` `[batch, seq, size]` taken as `[batch * seq, size]`, same shape."""
    return features.flatten(0, 1).index_select(0, index).view_as(features)
