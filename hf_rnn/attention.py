"""Attention: scores, and what they share: masking, softmax, context. Imports nothing of the package.

A new score is a subclass of [`AttentionScore`] and one line in `ATTENTION_SCORES`.
"""

import weakref
from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init


class AttentionMemory(NamedTuple):
    """What is attended to: prepared once per source, handed to every step, kept by no module."""

    keys: torch.Tensor  # [batch, heads, source, key_size / heads]
    values: torch.Tensor  # [batch, heads, source, value_size / heads]
    mask: torch.Tensor | None  # [batch, 1, 1, source], True where there is a token

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (batch, source, value_size) of the features that it was made of."""
        batch, heads, source, size = self.values.shape
        return batch, source, heads * size


class CrossAttentions(nn.Identity):
    """The place where attention weights `[batch, heads, target, source]` are recorded for `output_attentions`."""


def split_heads(features: torch.Tensor, num_heads: int) -> torch.Tensor:
    """`[batch, length, size]` to `[batch, heads, length, size / heads]`."""
    batch, length, size = features.shape
    return features.view(batch, length, num_heads, size // num_heads).transpose(1, 2)


def merge_heads(features: torch.Tensor) -> torch.Tensor:
    """`[batch, heads, length, size / heads]` to `[batch, length, size]`."""
    return features.transpose(1, 2).flatten(2)


class AttentionScore(nn.Module):
    r"""
    How well a query and a key fit. The base class is the dot product; subclasses change the projections of queries and
    keys before the heads are split, or the comparison after.

    Args:
        query_size (`int`): Width of the queries.
        key_size (`int`): Width of the keys.
        num_heads (`int`): Number of heads, which divides `query_size` and `key_size`.
    """

    def __init__(self, query_size: int, key_size: int, num_heads: int = 1):
        super().__init__()
        self.query_size = query_size
        self.key_size = key_size
        self.num_heads = num_heads

    def init_weights(self, config) -> None:
        """Initialises parameters that belong to no submodule."""

    def project_queries(self, queries: torch.Tensor) -> torch.Tensor:
        """`[batch, target, query_size]` to the space of the comparison."""
        return queries

    def project_keys(self, keys: torch.Tensor) -> torch.Tensor:
        """`[batch, source, key_size]` to the space of the comparison."""
        return keys

    def forward(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """As [`~AttentionScore.compare`]; hooks on modules, such as those that bring offloaded weights, act here."""
        return self.compare(queries, keys)

    def compare(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """
        Args:
            queries (`torch.Tensor` of shape `(batch, heads, target, size)`): Projected queries.
            keys (`torch.Tensor` of shape `(batch, heads, source, size)`): Projected keys.

        Returns:
            `torch.Tensor` of shape `(batch, heads, target, source)`.
        """
        return queries @ keys.transpose(-1, -2)


class DotScore(AttentionScore):
    r"""
    Dot product ([Luong et al., 2015](https://huggingface.co/papers/1508.04025)): score(q, k) = q . k

    Where the widths differ, as with a bidirectional encoder, a learned map without bias brings the keys to the width
    of the queries: score(q, k) = q . (W k).
    """

    def __init__(self, query_size: int, key_size: int, num_heads: int = 1):
        super().__init__(query_size, key_size, num_heads)
        self.key = nn.Linear(key_size, query_size, bias=False) if key_size != query_size else None

    def project_keys(self, keys):
        return keys if self.key is None else self.key(keys)


class ScaledDotScore(DotScore):
    r"""
    Scaled dot product ([Vaswani et al., 2017](https://huggingface.co/papers/1706.03762)), for d features per head:
    score(q, k) = q . k / sqrt(d)
    """

    def project_queries(self, queries):
        return queries * (self.query_size // self.num_heads) ** -0.5


class GeneralScore(AttentionScore):
    r"""
    Bilinear score ([Luong et al., 2015](https://huggingface.co/papers/1508.04025)): score(q, k) = q W k
    """

    def __init__(self, query_size: int, key_size: int, num_heads: int = 1):
        super().__init__(query_size, key_size, num_heads)
        self.query = nn.Linear(query_size, key_size, bias=False)

    def project_queries(self, queries):
        return self.query(queries)


class AdditiveScore(AttentionScore):
    r"""
    Additive score ([Bahdanau et al., 2015](https://huggingface.co/papers/1409.0473)), compared in the width of the
    queries: score(q, k) = v . tanh(W_q q + W_k k)

    Several heads divide v and the features under the tanh.
    """

    def __init__(self, query_size: int, key_size: int, num_heads: int = 1):
        super().__init__(query_size, key_size, num_heads)
        self.query = nn.Linear(query_size, query_size, bias=False)
        self.key = nn.Linear(key_size, query_size, bias=False)
        self.vector = nn.Parameter(torch.empty(query_size))

    def init_weights(self, config):
        bound = (3 / (self.query_size // self.num_heads)) ** 0.5
        init.uniform_(self.vector, -bound, bound)

    def project_queries(self, queries):
        return self.query(queries)

    def project_keys(self, keys):
        return self.key(keys)

    def compare(self, queries, keys):
        features = torch.tanh(queries.unsqueeze(3) + keys.unsqueeze(2))  # [batch, heads, target, source, size]
        vector = self.vector.view(1, self.num_heads, 1, -1, 1)
        return (features @ vector).squeeze(-1)


ATTENTION_SCORES: dict[str, type[AttentionScore]] = {
    "dot": DotScore,
    "scaled_dot": ScaledDotScore,
    "general": GeneralScore,
    "additive": AdditiveScore,
}


class _Keys(NamedTuple):
    """Projected keys, and what they were made of."""

    features: weakref.ref
    made_of: tuple
    keys: torch.Tensor


_known_keys: dict[int, _Keys] = {}


def _keys_of(score: AttentionScore, features: torch.Tensor) -> torch.Tensor:
    """`score.project_keys(features)`, kept for the next call with the same features and weights."""
    tensors = (features, *score.parameters())
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or any(tensor.is_inference() for tensor in tensors):
        return score.project_keys(features)
    made_of = (id(score), *((id(tensor), tensor.data_ptr(), tensor._version) for tensor in tensors))
    place = id(features)
    known = _known_keys.get(place)
    if known is None or known.features() is not features or known.made_of != made_of:
        keys = score.project_keys(features)
        if keys is features:
            return keys
        known = _Keys(weakref.ref(features, lambda _: _known_keys.pop(place, None)), made_of, keys)
        _known_keys[place] = known
    return known.keys


class Attention(nn.Module):
    r"""
    Attention of a sequence of queries to a memory:

        e_ij = score(q_i, k_j)
        alpha_i = softmax_j(e_ij)    over the unpadded j
        o_i = sum_j alpha_ij v_j

    Keys and values are the same features before the score projects the keys. A query with nothing but padding to
    attend to gets weights and a context of zero.

    Args:
        score (`AttentionScore`): The score.
    """

    def __init__(self, score: AttentionScore):
        super().__init__()
        self.score = score

    def prepare(self, features: torch.Tensor, mask: torch.Tensor | None, again: bool = False) -> AttentionMemory:
        """
        Args:
            features (`torch.Tensor` of shape `(batch, source, key_size)`): What to attend to.
            mask (`torch.Tensor` of shape `(batch, source)`, *optional*): Non-zero where there is a token.
            again (`bool`): Whether the same features will be attended to at further calls, as in decoding. Their
                projected keys are then kept until the features are gone.

        Raises:
            `ValueError`: The mask has another shape.
        """
        if mask is not None and mask.shape != features.shape[:2]:
            raise ValueError(
                f"`attention_mask` must have the shape {tuple(features.shape[:2])} of the source, got "
                f"{tuple(mask.shape)}."
            )
        heads = self.score.num_heads
        keys = split_heads(_keys_of(self.score, features) if again else self.score.project_keys(features), heads)
        return AttentionMemory(keys, split_heads(features, heads), None if mask is None else mask.bool()[:, None, None])

    def forward(self, queries: torch.Tensor, memory: AttentionMemory) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            queries (`torch.Tensor` of shape `(batch, target, query_size)`): The queries.
            memory (`AttentionMemory`): What [`~Attention.prepare`] returned.

        Returns:
            The context `(batch, target, key_size)` and the weights `(batch, heads, target, source)`.
        """
        queries = split_heads(self.score.project_queries(queries), self.score.num_heads)
        scores = self.score(queries, memory.keys)  # [batch, heads, target, source]
        if memory.mask is not None:
            scores = scores.masked_fill(~memory.mask, torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        if memory.mask is not None:
            # A row without a single token would spread its weight evenly over the padding.
            weights = weights * memory.mask
        weights = weights.to(memory.values.dtype)
        return merge_heads(weights @ memory.values), weights
