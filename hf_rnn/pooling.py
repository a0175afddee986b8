"""How a sequence becomes one vector. Imports nothing of the package."""

import torch
from torch import nn


class SequencePooling(nn.Module):
    r"""
    Pools the outputs of recurrent layers over the tokens of a sequence; padding never takes part, and a sequence
    without a single token gives zeros (`"last"`: the initial state).

    `"last"`: the final hidden state of each direction, that is, the output of the last token read; `"mean"`; `"max"`;
    `"concat"`: the three before side by side; `"attention"`: a mean with weights softmax(w . h_t), after
    [Yang et al. (2016)](https://aclanthology.org/N16-1174/).

    Args:
        pooling (`str`): One of the above.
        input_size (`int`): Width of the outputs.
        bidirectional (`bool`): Whether the second half of the features was read from right to left.
    """

    def __init__(self, pooling: str, input_size: int, bidirectional: bool):
        super().__init__()
        self.pooling = pooling
        self.bidirectional = bidirectional
        self.output_size = input_size * (3 if pooling == "concat" else 1)
        self.score = nn.Linear(input_size, 1, bias=False) if pooling == "attention" else None

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, seq, input_size)`): The outputs.
            attention_mask (`torch.Tensor` of shape `(batch, seq)`, *optional*): Non-zero where there is a token.

        Returns:
            `torch.Tensor` of shape `(batch, output_size)`.
        """
        if hidden_states.shape[1] == 0:
            return hidden_states.new_zeros(hidden_states.shape[0], self.output_size)
        if attention_mask is None:
            attention_mask = hidden_states.new_ones(hidden_states.shape[:2])
        mask = attention_mask.bool().unsqueeze(-1)
        if self.pooling == "concat":
            return torch.cat([getattr(self, name)(hidden_states, mask) for name in ("last", "mean", "max")], dim=-1)
        return getattr(self, self.pooling)(hidden_states, mask)

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

    def attention(self, hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = self.score(hidden_states).masked_fill(~mask, torch.finfo(hidden_states.dtype).min)
        weights = torch.softmax(scores, dim=1, dtype=torch.promote_types(scores.dtype, torch.float32))
        weights = weights.to(hidden_states.dtype) * mask
        return (weights * hidden_states).sum(1)
