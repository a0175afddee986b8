"""Several texts in one row, told by positions that begin again at 0: where they begin, and how each comes into a row of
its own and back. Imports the padding."""

from functools import cached_property

import torch

from .recurrent_padding import Padding


def text_starts(position_ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """
    Where texts begin behind the first one of a row.

    Args:
        position_ids (`torch.Tensor` of shape `(batch, seq)` or `(1, seq)`): The position of each token in its text.
        mask (`torch.Tensor` of shape `(batch, seq)`, *optional*):
            Non-zero where there is a token. Positions at padding say nothing.

    Returns:
        `torch.BoolTensor` of shape `(batch, seq)` (`(1, seq)` without a mask for positions of that shape): True at a
        token with the position 0 that is not the first one of its row.
    """
    is_first = position_ids == 0
    if mask is None:
        return is_first & (torch.arange(is_first.shape[1], device=is_first.device) > 0)
    mask = mask.bool()
    return is_first & mask & (mask.cumsum(1) > 1)


def find_text_starts(
    position_ids: torch.Tensor | None, batch: int, seq: int, mask: torch.Tensor | None = None
) -> torch.Tensor | None:
    """
    [`text_starts`] `(batch, seq)` of positions that are checked, or None where each row is known to be one text. In the
    graph of a compiler or an exporter, which sees no values, that is known of single tokens only. On a device other
    than the CPU this waits for the positions; where none are given, it does nothing.

    Raises:
        `ValueError`: `position_ids` has another shape, or the positions of a text go down.
    """
    if position_ids is None:
        return None
    shape = tuple(position_ids.shape)
    if len(shape) != 2 or shape[0] not in (1, batch) or shape[1] != seq:
        raise ValueError(f"`position_ids` must have the shape ({batch}, {seq}) or (1, {seq}), got {shape}.")
    if seq < 2:
        return None
    if torch.compiler.is_compiling():
        return text_starts(position_ids, mask).expand(batch, seq)
    if not (position_ids[:, 1:] <= position_ids[:, :-1]).any():
        return None
    starts = text_starts(position_ids, mask)
    goes_down = (position_ids[:, 1:] < position_ids[:, :-1]) & (position_ids[:, 1:] != 0)
    if mask is not None:
        goes_down = goes_down & mask[:, 1:].bool() & mask[:, :-1].bool()
    has_starts, is_wrong = torch.stack([starts.any(), goes_down.any()]).tolist()
    if is_wrong:
        row, column = goes_down.nonzero()[0].tolist()
        row = min(row, shape[0] - 1)
        before, after = position_ids[row, column : column + 2].tolist()
        raise ValueError(
            f"`position_ids` must go up within a text and begin again at 0 with the next one, got {before} followed by "
            f"{after} in row {row}."
        )
    return starts.expand(batch, seq) if has_starts else None


def refuse_packed_texts(
    position_ids: torch.Tensor | None, batch: int, seq: int, mask: torch.Tensor | None = None
) -> None:
    """
    For models that say one thing of a row; does nothing in the graph of a compiler or an exporter.

    Raises:
        `ValueError`: `position_ids` begin again at 0 within a row, or are wrong as in [`find_text_starts`].
    """
    starts = find_text_starts(position_ids, batch, seq, mask)
    if starts is not None and not torch.compiler.is_compiling():
        raise ValueError(
            "`position_ids` must not begin again at 0 within a row: this model has one result for each row. Give every "
            "text a row of its own."
        )


def refuse_other_boundaries(position_ids: torch.Tensor | None, arguments: dict) -> None:
    """
    Raises:
        `ValueError`: Arguments for other kinds of models say where texts begin, and `position_ids` do not.
    """
    if position_ids is not None:
        return
    for name in ("cu_seq_lens_q", "seq_idx"):
        if arguments.get(name) is not None:
            raise ValueError(f"`position_ids` must be given with `{name}`: they say where the texts of a row begin.")


class PackedPadding(Padding):
    """
    Where the tokens lie in a batch whose rows hold several texts. Padding belongs to the text before it, at the
    beginning of a row to the one behind it.

    Args:
        starts (`torch.Tensor` of shape `(batch, seq)`): True where a text begins behind the first one of its row.
        mask (`torch.Tensor` of shape `(batch, seq)`, *optional*): True where there is a token; everywhere if None.
    """

    def __init__(self, starts: torch.Tensor, mask: torch.Tensor | None = None):
        super().__init__(torch.ones_like(starts) if mask is None else mask)
        self.starts = starts
        self.has_padding = mask is not None

    @cached_property
    def _first(self) -> torch.Tensor:
        """The place of the first position of each text `[texts]` among all `batch * seq`."""
        starts = torch.cat([torch.ones_like(self.starts[:, :1]), self.starts[:, 1:]], dim=1)
        return starts.flatten().nonzero().squeeze(1)

    @cached_property
    def _row(self) -> torch.Tensor:
        """The row in which each text stands `[texts]`."""
        return self._first.div(self.starts.shape[1], rounding_mode="floor")

    @cached_property
    def _layout(self) -> tuple[torch.Tensor, int]:
        """The place of each position `[batch * seq]` among those of the rows of single texts, and their length."""
        places = torch.arange(self.starts.numel(), device=self.starts.device)
        text = torch.searchsorted(self._first, places, right=True) - 1
        offset = places - self._first[text]
        longest = int(offset.max()) + 1
        return text * longest + offset, longest

    def split(self, features: torch.Tensor) -> torch.Tensor:
        """`features` `[batch, seq, size]` with one text in a row `[texts, longest, size]`, and zeros behind it."""
        index, longest = self._layout
        rows = features.new_zeros(len(self._first) * longest, features.shape[-1])
        return rows.index_copy(0, index, features.flatten(0, 1)).unflatten(0, (-1, longest))

    def join(self, features: torch.Tensor) -> torch.Tensor:
        """`features` `[texts, longest, size]` back in their rows `[batch, seq, size]`."""
        return features.flatten(0, 1).index_select(0, self._layout[0]).unflatten(0, self.starts.shape)

    def for_texts(self, tensors) -> tuple[torch.Tensor, ...]:
        """`tensors` that have one entry for each row `[batch, ...]` with one for each text `[texts, ...]`."""
        return tuple(tensor.index_select(0, self._row) for tensor in tensors)

    def of_last_texts(self, tensors) -> tuple[torch.Tensor, ...]:
        """`tensors` that have one entry for each text `[texts, ...]` with the one of each row's last text alone."""
        rows = torch.arange(self.starts.shape[0], device=self.starts.device)
        last = torch.searchsorted(self._row, rows, right=True) - 1
        return tuple(tensor.index_select(0, last) for tensor in tensors)

    @cached_property
    def of_texts(self) -> Padding | None:
        """Where the tokens lie in the rows of single texts; None where nothing is known to be padding."""
        mask = self.split(self.mask.unsqueeze(-1)).squeeze(-1)
        if self.has_padding:
            return Padding.from_attention_mask(mask, mask)
        return Padding(mask, is_right_padded=True) if mask.numel() > self.mask.numel() else None
