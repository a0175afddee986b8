"""Attention: scores, and what they share: masking, softmax, context. Imports nothing of the package.

A new score is a subclass of [`AttentionScore`] and one line in `ATTENTION_SCORES`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init


State = tuple[torch.Tensor, ...]

# Above as many numbers under the tanh of an additive score they are computed again in the backward instead of kept: a
# decoder that runs step by step would keep them for each step. So are keys that the state of the attention changes.
MOST_TANH_KEPT = 2**18
# As many are computed at a time, on a CPU such that they stay in its cache.
TANH_AT_ONCE = {"cpu": 2**19}
TANH_AT_ONCE_ELSEWHERE = 2**25


class AttentionMemory(NamedTuple):
    """What is attended to: prepared once per source, handed to every step, kept by no module."""

    keys: torch.Tensor  # [batch, heads, source, key_size / heads]
    values: torch.Tensor  # [batch, heads, source, value_size / heads]
    mask: torch.Tensor | None  # [batch, 1, 1, source], True where there is a token
    for_plain_queries: bool = False  # whether the keys are compared with queries as they are, see `AttentionScore`
    are_values_mapped: bool = False  # whether they are what the one map that reads the context made of the features

    def change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "AttentionMemory":
        """The same with `change(part)` for each tensor."""
        keys, values, mask = (None if part is None else change(part) for part in self[:3])
        return self._replace(keys=keys, values=values, mask=mask)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (batch, source, value_size) of the features that it was made of."""
        batch, heads, source, size = self.values.shape
        return batch, source, heads * size

    @property
    def positions(self) -> torch.Tensor:
        """The place `[batch or 1, 1, 1, source]` of each token among the tokens of its row: 0, 1, 2, ..."""
        if self.mask is None:
            return torch.arange(self.keys.shape[2], device=self.keys.device).view(1, 1, 1, -1)
        # Padding before the first token stands at its place.
        return (self.mask.long().cumsum(-1) - 1).clamp(min=0)

    @property
    def lengths(self) -> torch.Tensor | int:
        """The number of tokens `[batch, 1, 1, 1]` of each row, or of all rows."""
        return self.keys.shape[2] if self.mask is None else self.mask.sum(-1, keepdim=True)


class CrossAttentions(nn.Identity):
    """The place where attention weights `[batch, heads, target, source]` are recorded for `output_attentions`."""


def split_heads(features: torch.Tensor, num_heads: int) -> torch.Tensor:
    """`[batch, length, size]` to `[batch, heads, length, size / heads]`."""
    batch, length, size = features.shape
    return features.view(batch, length, num_heads, size // num_heads).transpose(1, 2)


def merge_heads(features: torch.Tensor) -> torch.Tensor:
    """`[batch, heads, length, size / heads]` to `[batch, length, size]`."""
    return features.transpose(1, 2).flatten(2)


def call_module(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """`module(inputs)`."""
    return module(inputs)


def no_transposed(module: nn.Linear, inputs: torch.Tensor) -> None:
    """Stands for `inputs @ module.weight` where nobody says that no more than a product happens in the module."""
    return None


class AttentionScore(nn.Module):
    r"""
    How well a query and a key fit. The base class is the dot product; subclasses change the projections of queries and
    keys before the heads are split, or the comparison after.

    Args:
        query_size (`int`): Width of the queries.
        key_size (`int`): Width of the keys.
        num_heads (`int`): Number of heads, which divides `query_size` and `key_size`.
    """

    # Whether the score reads the weights of the position before, by `weight_features`; positions then come one by one.
    needs_previous_weights = False
    # How the linear maps of a score are called; whoever knows a faster way sets it.
    apply_linear = staticmethod(call_module)
    # Likewise what stands for `torch.tanh_`, which may use the memory of its argument.
    tanh_ = staticmethod(torch.tanh_)
    apply_transposed = staticmethod(no_transposed)

    def __init__(self, query_size: int, key_size: int, num_heads: int = 1):
        super().__init__()
        self.query_size = query_size
        self.key_size = key_size
        self.num_heads = num_heads

    @classmethod
    def from_config(cls, config, query_size: int, key_size: int) -> "AttentionScore":
        """The score with what the configuration says of it."""
        return cls(query_size, key_size, config.num_attention_heads)

    @property
    def compared_size(self) -> int:
        """Width of what [`~AttentionScore.project_keys`] returns."""
        return self.query_size

    def init_weights(self, config) -> None:
        """Initialises parameters that belong to no submodule."""

    def project_queries(self, queries: torch.Tensor) -> torch.Tensor:
        """`[batch, target, query_size]` to the space of the comparison."""
        return queries

    def project_keys(self, keys: torch.Tensor) -> torch.Tensor:
        """`[batch, source, key_size]` to the space of the comparison."""
        return keys

    def keys_for_plain_queries(self, keys: torch.Tensor) -> torch.Tensor | None:
        """
        `[batch, source, query_size]` for comparisons with queries that [`~AttentionScore.project_queries`] has not
        seen, where there is such a thing: a decoder that goes step by step then has less to do at each.
        """
        return None

    def weight_features(self, weights: torch.Tensor, memory: AttentionMemory) -> torch.Tensor:
        """
        What a score that `needs_previous_weights` adds to the projected keys: features `(batch, heads, source, size)`
        of the weights `(batch, heads, source)` of the position before.
        """
        raise NotImplementedError

    def forward(self, queries: torch.Tensor, memory: AttentionMemory) -> torch.Tensor:
        """
        As [`~AttentionScore.compare`] with the keys of the memory; hooks on modules, such as those that bring offloaded
        weights, act here.
        """
        return self.compare(queries, memory.keys)

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
        return keys if self.key is None else self.apply_linear(self.key, keys)


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

    @property
    def compared_size(self):
        return self.key_size

    def project_queries(self, queries):
        return self.apply_linear(self.query, queries)

    def keys_for_plain_queries(self, keys):
        # (W_q q) . k = q . (W_q^T k); a head would need keys as wide as all queries.
        is_own = type(self).project_queries is GeneralScore.project_queries
        return self.apply_transposed(self.query, keys) if is_own and self.num_heads == 1 else None


class LocalScore(GeneralScore):
    r"""
    Bilinear score in a window around a predicted position, local-p of
    [Luong et al., 2015](https://huggingface.co/papers/1508.04025) (equations 9 and 10), for a source of S tokens at the
    positions s = 0, 1, ..., S - 1 and a window of D tokens to each side:

        p(q) = S sigmoid(v_p . tanh(W_p q))
        score(q, k_s) = q W k_s - (s - p)^2 / (2 (D / 2)^2)    for |s - p| <= D, no weight elsewhere

    The paper multiplies the softmax of q W k by the Gaussian; here the product is normalised again, so that the weights
    sum to one as those of every score do. Every head predicts a position of its own, from its part of W_p and v_p.

    Args:
        query_size, key_size, num_heads: As in [`AttentionScore`].
        window (`int`): D, the number of tokens to each side of the predicted position.
    """

    def __init__(self, query_size: int, key_size: int, num_heads: int = 1, window: int = 10):
        super().__init__(query_size, key_size, num_heads)
        self.window = window
        self.position = nn.Linear(query_size, query_size, bias=False)
        self.vector = nn.Parameter(torch.empty(query_size))

    @classmethod
    def from_config(cls, config, query_size, key_size):
        return cls(query_size, key_size, config.num_attention_heads, config.attention_window)

    def init_weights(self, config):
        _init_vector(self.vector, self.num_heads)

    def project_queries(self, queries):
        parts = (self.apply_linear(self.query, queries), torch.tanh(self.apply_linear(self.position, queries)))
        # The parts of a head lie side by side, where `split_heads` leaves them together.
        return torch.cat([part.unflatten(-1, (self.num_heads, -1)) for part in parts], dim=-1).flatten(-2)

    def forward(self, queries, memory):
        sizes = [self.key_size // self.num_heads, self.query_size // self.num_heads]
        queries, features = queries.split(sizes, dim=-1)
        scores = self.compare(queries, memory.keys)
        wide = torch.promote_types(scores.dtype, torch.float32)
        # Positions of long sources have more digits than narrow types.
        predicted = features.to(wide) @ self.vector.to(wide).view(1, self.num_heads, -1, 1)
        center = memory.lengths * torch.sigmoid(predicted)  # [batch, heads, target, 1]
        distance = memory.positions - center
        scores = scores.to(wide) - distance.square() * (2 / self.window**2)
        return scores.masked_fill(distance.abs() > self.window, torch.finfo(wide).min)


def additive_comparison(
    queries: torch.Tensor, keys: torch.Tensor, vector: torch.Tensor, tanh_: Callable = torch.tanh_
) -> torch.Tensor:
    """
    Args:
        queries (`torch.Tensor` of shape `(batch, heads, target, size)`): The queries q.
        keys (`torch.Tensor` of shape `(batch, heads, source, size)`): The keys k.
        vector (`torch.Tensor` of shape `(heads, size)`): The vector v of each head.
        tanh_: What stands for `torch.tanh_`.

    Returns:
        v . tanh(q + k) of shape `(batch, heads, target, source)`. A graph of a compiler is left to fuse it for itself.
    """
    vector = vector.to(queries.dtype)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _compare(queries, keys, vector, tanh_)
    per_query = keys.numel()
    needs_gradient = torch.is_grad_enabled() and any(part.requires_grad for part in (queries, keys, vector))
    most = TANH_AT_ONCE.get(keys.device.type, TANH_AT_ONCE_ELSEWHERE)
    if queries.shape[2] * per_query <= (MOST_TANH_KEPT if needs_gradient else most):
        return _compare(queries, keys, vector, tanh_)
    step = max(1, most // max(1, per_query))
    return _AdditiveComparison.apply(queries, keys, vector, step, tanh_)


def _tanh(queries: torch.Tensor, keys: torch.Tensor, tanh_: Callable) -> torch.Tensor:
    # In place: where large tensors overlap, the heap does not use their memory again.
    return tanh_(queries.unsqueeze(3) + keys.unsqueeze(2))  # [batch, heads, target, source, size]


def _compare(queries: torch.Tensor, keys: torch.Tensor, vector: torch.Tensor, tanh_: Callable) -> torch.Tensor:
    return (_tanh(queries, keys, tanh_) @ vector[None, :, None, :, None]).squeeze(-1)


class _AdditiveComparison(torch.autograd.Function):
    """A few queries at a time, whose tanh is computed anew in the backward."""

    @staticmethod
    def forward(queries, keys, vector, step, tanh_):
        # Written to where they belong: small tensors kept between large ones would keep these from being used again.
        scores = queries.new_empty(*queries.shape[:3], keys.shape[2])
        for part, part_scores in zip(queries.split(step, dim=2), scores.split(step, dim=2)):
            part_scores.copy_(_compare(part, keys, vector, tanh_))
        return scores

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.step, ctx.tanh_ = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, gradient):
        queries, keys, vector = tensors = ctx.saved_tensors  # a checkpoint gives them once
        if torch.is_grad_enabled():
            # Second derivatives are asked for, which need the graph of the first: all at once, and under names of their
            # own, because queries may have been computed from keys.
            tensors = [tensor.view_as(tensor) for tensor in tensors]
            needed = [tensor for tensor, is_needed in zip(tensors, ctx.needs_input_grad) if is_needed]
            scores = _compare(*tensors, ctx.tanh_)
            found = iter(torch.autograd.grad(scores, needed, gradient, create_graph=True))
            return *(next(found) if is_needed else None for is_needed in ctx.needs_input_grad[:3]), None, None
        wide = torch.promote_types(keys.dtype, torch.float32)
        of_queries, of_keys, of_vector = torch.empty_like(queries), 0, 0
        parts = (tensor.split(ctx.step, dim=2) for tensor in (queries, gradient, of_queries))
        for part, part_gradient, of_part in zip(*parts):
            tanh = _tanh(part, keys, ctx.tanh_)
            part_gradient = part_gradient.to(tanh.dtype).unsqueeze(-1)
            weighed = (part_gradient.transpose(-1, -2) @ tanh).squeeze(-2)  # [batch, heads, target, size]
            of_vector = of_vector + weighed.sum((0, 2), dtype=wide)
            inner = part_gradient * (1 - tanh.square())
            of_part.copy_(inner.sum(3))
            of_keys = of_keys + inner.sum(2, dtype=wide)
        # The factor v is the same for all of a head.
        of_queries = of_queries * vector[None, :, None]
        of_keys = (of_keys * vector[None, :, None]).to(keys.dtype)
        return of_queries, of_keys, of_vector.to(vector.dtype), None, None


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
        _init_vector(self.vector, self.num_heads)

    def project_queries(self, queries):
        return self.apply_linear(self.query, queries)

    def project_keys(self, keys):
        return self.apply_linear(self.key, keys)

    def weighing_vector(self) -> torch.Tensor:
        """The vector v `[heads, size / heads]`."""
        return self.vector.view(self.num_heads, -1)

    def compare(self, queries, keys):
        return additive_comparison(queries, keys, self.weighing_vector(), self.tanh_)


class NormalizedAdditiveScore(AdditiveScore):
    r"""
    Additive score with weight normalisation ([Salimans and Kingma, 2016](https://huggingface.co/papers/1602.07868)) of
    v, and a bias: score(q, k) = g v / ||v|| . tanh(W_q q + W_k k + b)

    It is the score of the second version of GNMT in MLPerf and TensorFlow's NMT. Every head has a g of its own, which
    starts as 1 / sqrt(size of the head).
    """

    def __init__(self, query_size: int, key_size: int, num_heads: int = 1):
        super().__init__(query_size, key_size, num_heads)
        self.query = nn.Linear(query_size, query_size)
        self.gain = nn.Parameter(torch.empty(num_heads))

    def init_weights(self, config):
        super().init_weights(config)
        init.constant_(self.gain, (self.query_size // self.num_heads) ** -0.5)

    def weighing_vector(self):
        vector = super().weighing_vector()
        # In half precision the squares would leave its range.
        wide = vector.to(torch.promote_types(vector.dtype, torch.float32))
        return (self.gain.unsqueeze(-1) * wide / wide.norm(dim=-1, keepdim=True)).to(vector.dtype)


class LocationScore(AdditiveScore):
    r"""
    Location-aware score ([Chorowski et al., 2015](https://huggingface.co/papers/1506.07503), equations 8 and 9), for
    the weights alpha of the position before, zero before the first:

        f = F * alpha    (a convolution along the source)
        score(q, k_j) = v . tanh(W_q q + W_k k_j + U f_j + b)

    The convolution passes over the tokens as if no padding lay between them. Every head has its own filters, which
    read its own weights.

    Args:
        query_size, key_size, num_heads: As in [`AttentionScore`].
        filters (`int`): Number of filters F of each head.
        width (`int`): Width of a filter, an odd number.
    """

    needs_previous_weights = True

    def __init__(self, query_size: int, key_size: int, num_heads: int = 1, filters: int = 32, width: int = 31):
        super().__init__(query_size, key_size, num_heads)
        self.query = nn.Linear(query_size, query_size)
        convolve = {"groups": num_heads, "bias": False}
        self.location = nn.Conv1d(num_heads, num_heads * filters, width, padding=width // 2, **convolve)
        self.feature = nn.Conv1d(num_heads * filters, query_size, 1, **convolve)

    @classmethod
    def from_config(cls, config, query_size, key_size):
        heads, filters, width = config.num_attention_heads, config.location_filters, config.location_width
        return cls(query_size, key_size, heads, filters, width)

    def weight_features(self, weights, memory):
        weights = weights.to(memory.keys.dtype)
        if not torch.compiler.is_compiling() and weights.shape[-1] == 0:
            # A convolution refuses a source without a single position.
            return torch.zeros_like(memory.keys)
        if memory.mask is None:
            features = self.feature(self.location(weights))
        else:
            places = memory.positions.squeeze(1)  # [batch, 1, source]
            # Padding has no weight to add to that of a token.
            together = torch.zeros_like(weights).scatter_add(-1, places.expand_as(weights), weights)
            features = self.feature(self.location(together))  # [batch, query_size, source]
            features = features.gather(-1, places.expand_as(features))
        return features.unflatten(1, (self.num_heads, -1)).transpose(2, 3)


def _init_vector(vector: torch.Tensor, num_heads: int) -> None:
    """Such that the product of a head's part with numbers from a uniform distribution in [-1, 1] has variance 1/3."""
    bound = (3 / (vector.numel() // num_heads)) ** 0.5
    init.uniform_(vector, -bound, bound)


ATTENTION_SCORES: dict[str, type[AttentionScore]] = {
    "dot": DotScore,
    "scaled_dot": ScaledDotScore,
    "general": GeneralScore,
    "local": LocalScore,
    "additive": AdditiveScore,
    "normalized_additive": NormalizedAdditiveScore,
    "location": LocationScore,
}


class CoverageFeatures(nn.Module):
    r"""
    What coverage adds to a projected key: w c_j, for the coverage c_j of position j, the sum of the weights that it got
    so far. Under the tanh of an additive score that is equation 11 of
    [See et al., 2017](https://huggingface.co/papers/1704.04368), and the coverage of
    [Tu et al., 2016](https://huggingface.co/papers/1601.04811) with one number per source position. A dot product then
    reads q . (k_j + w c_j). Every head has its own coverage and its own w.

    Args:
        size (`int`): Width of the projected keys.
        num_heads (`int`): Number of heads.
    """

    def __init__(self, size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.weight = nn.Parameter(torch.empty(size))

    def init_weights(self, config) -> None:
        """As a linear map from one number."""
        bound = (6 / (1 + self.weight.numel() // self.num_heads)) ** 0.5
        init.uniform_(self.weight, -bound, bound)

    def forward(self, coverage: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """The keys `[batch, heads, source, size / heads]` with what a coverage `[batch, heads, source]` adds."""
        weight = self.weight.to(keys.dtype).view(1, self.num_heads, 1, -1)
        return torch.addcmul(keys, coverage.to(keys.dtype).unsqueeze(-1), weight)


class Attention(nn.Module):
    r"""
    Attention of a sequence of queries to a memory:

        e_ij = score(q_i, k_j)
        alpha_i = softmax_j(e_ij)    over the unpadded j
        o_i = sum_j alpha_ij v_j

    Keys and values are the same features before the score projects the keys. A query with nothing but padding to
    attend to gets weights and a context of zero.

    Where the score reads the weights of earlier positions, or their sum, they are the state of the attention, with the
    last context, which padding shows again: tensors `[batch, heads, size]` in float32 or wider, which a position takes
    and [`~Attention.next_state`] makes for the next. Then [`~Attention.walk`] goes through the positions one by one.

    Args:
        score (`AttentionScore`): The score.
        coverage (`bool`): Whether the sum of the weights so far is added to the keys, see [`CoverageFeatures`].
    """

    def __init__(self, score: AttentionScore, coverage: bool = False):
        super().__init__()
        self.score = score
        self.coverage = CoverageFeatures(score.compared_size, score.num_heads) if coverage else None

    @property
    def state_names(self) -> list[str]:
        """
        What the state consists of, if there is one: `"weights"` of the position before, `"coverage"`, which is the sum
        of all before, and `"context"`.
        """
        names = ["weights"] * self.score.needs_previous_weights + ["coverage"] * (self.coverage is not None)
        return [*names, "context"] if names else []

    def state_sizes(self, memory: AttentionMemory) -> list[int]:
        """The last dimension of each part of the state."""
        return [memory.values.shape[3 if name == "context" else 2] for name in self.state_names]

    def initial_state(self, memory: AttentionMemory) -> State:
        """The state before the first position: zeros."""
        dtype = torch.promote_types(memory.values.dtype, torch.float32)
        sizes = self.state_sizes(memory)
        return tuple(memory.values.new_zeros(*memory.values.shape[:2], size, dtype=dtype) for size in sizes)

    def next_state(
        self, state: State, weights: torch.Tensor, context: torch.Tensor, is_token: torch.Tensor | None = None
    ) -> State:
        """
        Args:
            state (`tuple` of `torch.Tensor` of shape `(batch, heads, size)`): The state that a position had.
            weights (`torch.Tensor` of shape `(batch, heads, 1, source)`): Its weights.
            context (`torch.Tensor` of shape `(batch, 1, key_size)`): Its context.
            is_token (`torch.Tensor` of shape `(batch, 1)`, *optional*): False in rows where it is padding.

        Returns:
            The state for the next position.
        """
        context = split_heads(context, self.score.num_heads)
        new_state = []
        for name, old in zip(self.state_names, state):
            new = (context if name == "context" else weights).squeeze(2).to(old.dtype)
            new = old + new if name == "coverage" else new
            new_state.append(new if is_token is None else torch.where(is_token.unsqueeze(-1), new, old))
        return tuple(new_state)

    def keys_for_steps(self, features: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """
        The keys of features `[batch, source, key_size]` that will be attended to at many calls, and whether they are
        those for plain queries; for [`~Attention.prepare`].
        """
        # What a state adds to the keys belongs to those of projected queries.
        keys = None if self.state_names else self.score.keys_for_plain_queries(features)
        return (self.score.project_keys(features), False) if keys is None else (keys, True)

    def prepare(
        self,
        features: torch.Tensor,
        mask: torch.Tensor | None,
        keys: torch.Tensor | None = None,
        for_plain_queries: bool = False,
    ) -> AttentionMemory:
        """
        Args:
            features (`torch.Tensor` of shape `(batch, source, key_size)`): What to attend to.
            mask (`torch.Tensor` of shape `(batch, source)`, *optional*): Non-zero where there is a token.
            keys, for_plain_queries: What [`~Attention.keys_for_steps`] returned for the features, if it was asked.

        Raises:
            `ValueError`: The mask has another shape.
        """
        if mask is not None and mask.shape != features.shape[:2]:
            raise ValueError(
                f"`attention_mask` must have the shape {tuple(features.shape[:2])} of the source, got "
                f"{tuple(mask.shape)}."
            )
        keys = self.score.project_keys(features) if keys is None else keys
        mask = None if mask is None else mask.bool()[:, None, None]
        heads = self.score.num_heads
        return AttentionMemory(split_heads(keys, heads), split_heads(features, heads), mask, for_plain_queries)

    def _scores_with_state(self, queries: torch.Tensor, memory: AttentionMemory, state: State) -> torch.Tensor:
        """The scores with what the state adds to the keys of the memory."""
        keys = memory.keys
        for name, values in zip(self.state_names, state):
            if name == "weights":
                keys = keys + self.score.weight_features(values, memory)
            elif name == "coverage":
                keys = self.coverage(values, keys)
        return self.score(queries, memory._replace(keys=keys))

    def _scores(self, queries: torch.Tensor, memory: AttentionMemory, state: State) -> torch.Tensor:
        """The scores `[batch, heads, target, source]`."""
        if not self.state_names:
            return self.score(queries, memory)
        state = state or self.initial_state(memory)
        in_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if in_graph or not torch.is_grad_enabled() or memory.keys.numel() <= MOST_TANH_KEPT:
            return self._scores_with_state(queries, memory, state)

        # A position has keys of its own, which would be kept for each.
        def scores(queries, memory, state):
            # Written to what was there before them, as in `_AdditiveComparison`.
            size, dtype = memory.keys.shape[2], torch.promote_types(memory.keys.dtype, torch.float32)
            place = memory.keys.new_empty(*queries.shape[:3], size, dtype=dtype)
            return place.copy_(self._scores_with_state(queries, memory, state))

        return checkpoint(scores, queries, memory, state, use_reentrant=False, preserve_rng_state=False)

    def forward(
        self, queries: torch.Tensor, memory: AttentionMemory, state: State = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            queries (`torch.Tensor` of shape `(batch, target, query_size)`): The queries.
            memory (`AttentionMemory`): What [`~Attention.prepare`] returned, for as many rows or, where the attention
                has no state, for fewer: then rows that follow each other share one.
            state (`tuple` of `torch.Tensor` of shape `(batch, heads, size)`): What all these queries take for the state
                of the attention; that before the first position where not given.

        Returns:
            The context `(batch, target, key_size)` and the weights `(batch, heads, target, source)`.
        """
        batch, target, _ = queries.shape
        if not memory.for_plain_queries:
            queries = self.score.project_queries(queries)
        shared = memory.keys.shape[0] != batch
        if shared:  # as positions of one row
            queries = queries.reshape(memory.keys.shape[0], -1, queries.shape[-1])
        queries = split_heads(queries, self.score.num_heads)
        scores = self._scores(queries, memory, state)  # [batch, heads, target, source]
        if memory.mask is not None:
            scores = scores.masked_fill(~memory.mask, torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        if memory.mask is not None:
            # A row without a single token would spread its weight evenly over the padding.
            weights = weights * memory.mask
        weights = weights.to(memory.values.dtype)
        context = merge_heads(weights @ memory.values)
        if shared:
            context = context.view(batch, target, -1)
            weights = weights.unflatten(2, (-1, target)).transpose(1, 2).flatten(0, 1)
        return context, weights

    def walk(
        self,
        queries: torch.Tensor,
        memory: AttentionMemory,
        state: State = (),
        target_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, list[State]]:
        """
        All positions of a target; at once where the attention has no state.

        Args:
            queries, memory: As above.
            state (`tuple` of `torch.Tensor` of shape `(batch, heads, size)`): The state before the first of them.
            target_mask (`torch.Tensor` of shape `(batch, target)`, *optional*): False at padding, which leaves the
                state as it is.

        Returns:
            Context and weights as above, and the state after each position (none where there is no state).
        """
        length = queries.shape[1]
        if not self.state_names or length == 0:
            return *self(queries, memory), []
        is_token = [None] * length if target_mask is None else target_mask.unsqueeze(-1).unbind(1)
        state = state or self.initial_state(memory)
        contexts, weights, states = [], [], []
        for position in range(length):
            context, weight = self(queries[:, position : position + 1], memory, state)
            state = self.next_state(state, weight, context, is_token[position])
            contexts.append(state[-1].flatten(1).to(context.dtype))
            weights.append(weight)
            states.append(state)
        return torch.stack(contexts, dim=1), torch.cat(weights, dim=2), states
