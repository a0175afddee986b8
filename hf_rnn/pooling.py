"""How a sequence becomes one vector. Imports nothing of the package."""

from typing import NamedTuple

import torch
from torch import nn


class PoolingState(NamedTuple):
    """What is kept of the tokens read so far, so that a text of any length can be pooled; None where not needed."""

    count: torch.Tensor  # [batch, 1], tokens read
    last: torch.Tensor | None  # [batch, size]
    total: torch.Tensor | None  # [batch, size], the sum
    highest: torch.Tensor | None  # [batch, size]
    top_score: torch.Tensor | None  # [batch, heads, 1], the highest score of attention
    norm: torch.Tensor | None  # [batch, heads, 1], the sum of exp(score - top_score)
    context: torch.Tensor | None  # [batch, heads, size], the sum of exp(score - top_score) h


class SequencePooling(nn.Module):
    r"""
    Pools the outputs of recurrent layers over the tokens of a sequence; padding never takes part, and a sequence
    without a single token gives zeros (`"last"`: the initial state).

    `"last"`: the final hidden state of each direction, that is, the output of the last token read; `"mean"`; `"max"`;
    `"concat"`: the three before side by side; `"attention"`: a mean with weights softmax(w . h_t), or with `score_size`
    softmax(w . tanh(W h_t + b)) as in [Yang et al. (2016)](https://aclanthology.org/N16-1174/); with several heads as
    many means side by side, each with a w of its own, as in [Lin et al. (2017)](https://huggingface.co/papers/1703.03130).

    Args:
        pooling (`str`): One of the above.
        input_size (`int`): Width of the outputs.
        bidirectional (`bool`): Whether the second half of the features was read from right to left.
        num_heads (`int`): Number of weighted means, for `"attention"`.
        score_size (`int`, *optional*):
            Width of the tanh layer before the scores of `"attention"`; none where not given.
    """

    def __init__(
        self, pooling: str, input_size: int, bidirectional: bool, num_heads: int = 1, score_size: int | None = None
    ):
        super().__init__()
        self.pooling = pooling
        self.bidirectional = bidirectional
        self.num_heads = num_heads
        self.output_size = input_size * {"concat": 3, "attention": num_heads}.get(pooling, 1)
        self.projection = self.score = None
        if pooling == "attention":
            self.projection = None if score_size is None else nn.Linear(input_size, score_size)
            self.score = nn.Linear(input_size if score_size is None else score_size, num_heads, bias=False)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, seq, input_size)`): The outputs.
            attention_mask (`torch.Tensor` of shape `(batch, seq)`, *optional*): Non-zero where there is a token.

        Returns:
            The pooled outputs `(batch, output_size)`, and for `"attention"` the weights `(batch, heads, 1, seq)`, zero
            at padding, else None.
        """
        batch, seq = hidden_states.shape[:2]
        if seq == 0:
            weights = hidden_states.new_zeros(batch, self.num_heads, 1, 0) if self.pooling == "attention" else None
            return hidden_states.new_zeros(batch, self.output_size), weights
        mask = token_mask(hidden_states, attention_mask)
        if self.pooling == "attention":
            weights = self.weights(self.scores(hidden_states), mask)
            return (weights @ hidden_states).flatten(1), weights.unsqueeze(2)
        names = ("last", "mean", "max") if self.pooling == "concat" else (self.pooling,)
        return torch.cat([getattr(self, name)(hidden_states, mask) for name in names], dim=-1), None

    def last(self, hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        # Layers repeat their last output at padding, so that it stands at the end of the reading whatever is there.
        if not self.bidirectional:
            return hidden_states[:, -1]
        size = hidden_states.shape[-1] // 2
        return torch.cat([hidden_states[:, -1, :size], hidden_states[:, 0, size:]], dim=-1)

    def mean(self, hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (hidden_states * mask).sum(1) / mask.sum(1).clamp(min=1)

    def max(self, hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        lowest = torch.finfo(hidden_states.dtype).min
        return hidden_states.masked_fill(~mask, lowest).amax(1).masked_fill(~mask.any(1), 0)

    def scores(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The scores of attention `(batch, heads, seq)`."""
        if self.projection is not None:
            hidden_states = torch.tanh(self.projection(hidden_states))
        return self.score(hidden_states).transpose(1, 2)

    def weights(self, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The weights `(batch, heads, seq)` of attention, for scores of this shape and a mask `(batch, seq, 1)`."""
        mask = mask.transpose(1, 2)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        return weights.to(scores.dtype) * mask

    def read(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        state: PoolingState | None = None,
        scores: torch.Tensor | None = None,
    ) -> PoolingState:
        """
        The next part of a text that is pooled piece by piece, in memory that does not grow with the text: attention by
        the online softmax of [Milakov and Gimelshein (2018)](https://huggingface.co/papers/1805.02867).

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, seq, input_size)`): The outputs, in one direction.
            attention_mask (`torch.Tensor` of shape `(batch, seq)`, *optional*): Non-zero where there is a token.
            state (`PoolingState`, *optional*): What this returned for the part before.
            scores (`torch.Tensor` of shape `(batch, heads, seq)`, *optional*): What `scores` returned, if it was asked.

        Returns:
            `PoolingState`: To be given with the next part, and to [`~SequencePooling.pooled`] in the end.

        Raises:
            `ValueError`: The outputs are of two directions, of which one begins at the end of the text.
        """
        if self.bidirectional:
            raise ValueError("`bidirectional` must be False for a text that is pooled piece by piece, got True.")
        # Sums over a long text need more precision than its outputs have.
        hidden_states = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        mask = token_mask(hidden_states, attention_mask)
        if state is None:
            state = self._nothing_read(hidden_states)
        if hidden_states.shape[1] == 0:
            return state
        count, last, total, highest, top_score, norm, context = state
        lowest = torch.finfo(hidden_states.dtype).min
        count = count + mask.sum(1)
        if last is not None:
            last = self.last(hidden_states, mask)
        if total is not None:
            total = total + (hidden_states * mask).sum(1)
        if highest is not None:
            highest = torch.maximum(highest, hidden_states.masked_fill(~mask, lowest).amax(1))
        if context is not None:
            scores = (self.scores(hidden_states.to(self.score.weight.dtype)) if scores is None else scores).to(
                hidden_states.dtype
            )
            scores = scores.masked_fill(~mask.transpose(1, 2), lowest)
            new_top = torch.maximum(top_score, scores.amax(-1, keepdim=True))
            shrink = torch.exp(top_score - new_top)
            weights = torch.exp(scores - new_top) * mask.transpose(1, 2)
            norm = norm * shrink + weights.sum(-1, keepdim=True)
            context = context * shrink + weights @ hidden_states
            top_score = new_top
        return PoolingState(count, last, total, highest, top_score, norm, context)

    def _nothing_read(self, hidden_states: torch.Tensor) -> PoolingState:
        batch, _, size = hidden_states.shape
        lowest = torch.finfo(hidden_states.dtype).min
        parts = dict.fromkeys(PoolingState._fields)
        parts["count"] = hidden_states.new_zeros(batch, 1, dtype=torch.long)
        if self.pooling in ("last", "concat"):
            parts["last"] = hidden_states.new_zeros(batch, size)
        if self.pooling in ("mean", "concat"):
            parts["total"] = hidden_states.new_zeros(batch, size)
        if self.pooling in ("max", "concat"):
            parts["highest"] = hidden_states.new_full((batch, size), lowest)
        if self.pooling == "attention":
            parts["top_score"] = hidden_states.new_full((batch, self.num_heads, 1), lowest)
            parts["norm"] = hidden_states.new_zeros(batch, self.num_heads, 1)
            parts["context"] = hidden_states.new_zeros(batch, self.num_heads, size)
        return PoolingState(**parts)

    def pooled(self, state: PoolingState) -> torch.Tensor:
        """The vector `(batch, output_size)` of the whole text, of whose parts [`~SequencePooling.read`] was told."""
        parts = []
        if state.last is not None:
            parts.append(state.last)
        if state.total is not None:
            parts.append(state.total / state.count.clamp(min=1))
        if state.highest is not None:
            parts.append(state.highest.masked_fill(state.count == 0, 0))
        if state.context is not None:
            parts.append((state.context / state.norm.clamp(min=1)).flatten(1))
        return torch.cat(parts, dim=-1)


def token_mask(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """True `(batch, seq, 1)` where `hidden_states` `(batch, seq, size)` are those of a token."""
    if attention_mask is None:
        attention_mask = hidden_states.new_ones(hidden_states.shape[:2])
    return attention_mask.bool().unsqueeze(-1)
