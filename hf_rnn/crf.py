"""A linear-chain conditional random field over the labels of a sequence. Imports its operators, the fast paths and the
padding.

The chain has the tokens that a mask names, in their order, wherever they lie: those left out are skipped, and the ones
to the left and to the right of them are neighbours.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .crf_operators import best_paths_in_scan, chain_best_paths, chain_sums, run_best, run_sums, sums_in_scan
from .fast_paths import transforms_are_active
from .recurrent_padding import reading_order


# The score of a step that is not allowed, in nats: no probability in any floating type. It is finite, so that labels
# which take such a step all the same have a finite loss.
FORBIDDEN_SCORE = -1e4
# The same when paths are compared: so low that no emissions make up for it, many of them far from the lowest number.
FORBIDDEN_PATH_SCORE = -1e30
IGNORED_LABEL = -100


class Chain:
    """
    Where the tokens of the chains of a batch lie, and how to move them to the left and back.

    Args:
        mask (`torch.BoolTensor` of shape `(batch, seq)`): True at the tokens of the chain.
        starts (`torch.BoolTensor` of shape `(batch, seq)`, *optional*):
            True where a text begins behind the first one of its row; the position itself may be out of the chain.
    """

    def __init__(self, mask: torch.Tensor, starts: torch.Tensor | None = None):
        self.mask = mask
        self.lengths = mask.sum(dim=1)  # [batch]
        self.steps = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        _, self.place, self.order = reading_order(mask)
        self.text = None if starts is None else starts.long().cumsum(dim=1).gather(1, self.order)  # of each step

    def backwards(self) -> torch.Tensor:
        """For each step `[batch, seq]` the one from the other end of the chain, which is its own inverse."""
        last = self.lengths[:, None] - 1
        return torch.where(self.steps <= last, last - self.steps, self.steps)

    def starts(self, backwards: bool = False) -> torch.Tensor | None:
        """True at the steps `[batch, seq]` that begin a text behind the first one, in either direction."""
        if self.text is None:
            return None
        text = self.text.gather(1, self.backwards()) if backwards else self.text
        return text != self.before(text)

    def before(self, values: torch.Tensor) -> torch.Tensor:
        """For each step `[batch, seq]` the value of the one before; of the first its own."""
        return values.gather(1, (self.steps - 1).clamp(min=0))

    def to_steps(self, values: torch.Tensor) -> torch.Tensor:
        """Values of positions `[batch, seq, ...]` in the order of the steps."""
        return _take(values, self.order)

    def to_positions(self, values: torch.Tensor) -> torch.Tensor:
        """The way back."""
        return _take(values, self.place)


def _take(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    if values.dim() == 3:
        index = index.unsqueeze(-1).expand_as(values)
    return values.gather(1, index)


def _seen_through(operator: Callable, function: Callable) -> Callable:
    """An operator; where a transformation of `torch.func` is active, which it would stop, the function that it runs."""
    return function if not torch.compiler.is_compiling() and transforms_are_active() else operator


def _relative(emissions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Emissions such that the highest of each step is zero, and what was taken off, as a constant. Sums over long texts
    are more exact with them, and the probability of a path is the same.
    """
    if emissions.numel() == 0:
        return emissions, emissions[..., :0]
    highest = emissions.detach().amax(dim=-1, keepdim=True)
    return emissions - highest, highest


class LinearChainCRF(nn.Module):
    r"""
    p(y | x) = exp(score(x, y)) / sum over all y' of exp(score(x, y')), with the score of a path of labels y

    start[y_1] + sum_t emissions[t, y_t] + sum_t transitions[y_{t-1}, y_t] + end[y_last]

    ([Lafferty et al., 2001](https://dl.acm.org/doi/10.5555/645530.655813);
    [Lample et al., 2016](https://aclanthology.org/N16-1030/) on a recurrent network). All sums are in float32, or in
    float64 where the emissions are.

    Every method takes

    - emissions (`torch.Tensor` of shape `(batch, seq, num_labels)`): scores of the labels at each position;
    - mask (`torch.BoolTensor` of shape `(batch, seq)`, *optional*): which positions are in the chain, all by default.
      It may have holes anywhere, whose neighbours follow each other in the chain; what lies outside of it has no
      influence and gets no gradient. A row may have no position at all: its only path has the score 0 and the
      probability 1;
    - starts (`torch.BoolTensor` of shape `(batch, seq)`, *optional*): where a text begins behind the first one of its
      row. Texts are independent: between two of them stand `end` and `start` in the place of a transition.

    Args:
        num_labels (`int`): Number of labels.
        forbidden (tuple of nested lists of `bool`, *optional*):
            What is not allowed: transitions `[from][to]`, labels at the start, labels at the end. Such a step has the
            score -10000 in place of a learned one, and so no probability. Labels that take it nevertheless cost about
            10000 nats for each such step, which changes the loss but no gradient.
    """

    def __init__(self, num_labels: int, forbidden: tuple[Sequence, Sequence, Sequence] | None = None):
        super().__init__()
        self.num_labels = num_labels
        self.transitions = nn.Parameter(torch.zeros(num_labels, num_labels))  # [from, to]
        self.start_transitions = nn.Parameter(torch.zeros(num_labels))
        self.end_transitions = nn.Parameter(torch.zeros(num_labels))
        # No buffers, which loading from a checkpoint leaves empty: the tables follow from the configuration.
        self.forbidden = None if forbidden is None else tuple(torch.tensor(table, device="cpu") for table in forbidden)

    def extra_repr(self) -> str:
        return f"{self.num_labels}, constrained={self.forbidden is not None}"

    def init_weights(self, config) -> None:
        """Initialises what no checkpoint has filled: all scores at zero, with which labels are independent."""
        init.zeros_(self.transitions)
        init.zeros_(self.start_transitions)
        init.zeros_(self.end_transitions)

    def forward(self, run: Callable[["LinearChainCRF"], Any]) -> Any:
        """Calls `run(self)` and returns its result, for the same reasons as a recurrent cell."""
        return run(self)

    def _scores(self, dtype: torch.dtype, forbidden_score: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scores = [self.transitions, self.start_transitions, self.end_transitions]
        scores = [score.to(dtype) for score in scores]
        if self.forbidden is not None:
            tables = [table.to(scores[0].device) for table in self.forbidden]
            scores = [score.masked_fill(table, forbidden_score) for score, table in zip(scores, tables, strict=True)]
        return tuple(scores)

    def _prepare(self, emissions, mask, starts) -> tuple[torch.Tensor, Chain]:
        """The emissions in the order of the steps and in a type that is wide enough, and the chain."""
        shape = tuple(emissions.shape)
        if len(shape) != 3 or shape[-1] != self.num_labels:
            raise ValueError(f"`emissions` must have the shape (batch, seq, {self.num_labels}), got {shape}.")
        for name, tensor in {"mask": mask, "starts": starts}.items():
            if tensor is not None and tuple(tensor.shape) != shape[:2]:
                raise ValueError(f"`{name}` must have the shape {shape[:2]}, got {tuple(tensor.shape)}.")
        mask = emissions.new_ones(shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        chain = Chain(mask, starts)
        # Whatever stands outside of the chain, no number included, is gone with its gradient.
        emissions = emissions.masked_fill(~mask.unsqueeze(-1), 0)
        return chain.to_steps(emissions.to(torch.promote_types(emissions.dtype, torch.float32))), chain

    def log_partition(
        self, emissions: torch.Tensor, mask: torch.Tensor | None = None, starts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Returns:
            `torch.Tensor` of shape `(batch,)`: the logarithm of the sum of exp(score) over all paths.
        """
        steps, chain = self._prepare(emissions, mask, starts)
        relative, highest = _relative(steps)
        return self._log_partition(relative, chain) + highest.sum(dim=(1, 2))

    def _log_partition(self, emissions: torch.Tensor, chain: Chain) -> torch.Tensor:
        if emissions.shape[1] == 0:
            return emissions.sum(dim=(1, 2))
        transitions, start, end = self._scores(emissions.dtype, FORBIDDEN_SCORE)
        run = _seen_through(chain_sums, run_sums)
        sums, constant = run(emissions, chain.lengths, chain.starts(), transitions, start, end)
        # The constant cancels out of every derivative.
        return ((sums[:, -1] + end).logsumexp(dim=-1) + constant.detach()).masked_fill(chain.lengths == 0, 0)

    def path_score(
        self,
        emissions: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor | None = None,
        starts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            labels (`torch.LongTensor` of shape `(batch, seq)`): A path; outside of the chain whatever there is.

        Returns:
            `torch.Tensor` of shape `(batch,)`: its score.
        """
        emissions, chain = self._prepare(emissions, mask, starts)
        return self._path_score(emissions, chain, chain.to_steps(labels.masked_fill(~chain.mask, 0)))

    def _path_score(self, emissions: torch.Tensor, chain: Chain, labels: torch.Tensor) -> torch.Tensor:
        if emissions.shape[1] == 0:
            return emissions.sum(dim=(1, 2))
        transitions, start, end = self._scores(emissions.dtype, FORBIDDEN_SCORE)
        before = chain.before(labels)
        steps = transitions[before, labels]
        if chain.text is not None:
            steps = torch.where(chain.starts(), end[before] + start[labels], steps)
        scores = emissions.gather(2, labels.unsqueeze(-1)).squeeze(-1)
        scores = scores + torch.where(chain.steps == 0, start[labels], steps)
        scores = torch.where(chain.steps == chain.lengths[:, None] - 1, scores + end[labels], scores)
        return scores.masked_fill(chain.steps >= chain.lengths[:, None], 0).sum(dim=1)

    def log_likelihood(
        self,
        emissions: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor | None = None,
        starts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            labels (`torch.LongTensor` of shape `(batch, seq)`): A path; outside of the chain whatever there is.

        Returns:
            `torch.Tensor` of shape `(batch,)`: the logarithm of its probability.
        """
        emissions, chain = self._prepare(emissions, mask, starts)
        emissions, _ = _relative(emissions)
        labels = chain.to_steps(labels.masked_fill(~chain.mask, 0))
        return self._path_score(emissions, chain, labels) - self._log_partition(emissions, chain)

    def log_marginals(
        self, emissions: torch.Tensor, mask: torch.Tensor | None = None, starts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Returns:
            `torch.Tensor` of shape `(batch, seq, num_labels)`: log p(y_t = label | x). Outside of the chain those of
            the emissions by themselves.
        """
        return self._log_marginals(emissions, *self._prepare(emissions, mask, starts))

    def _log_marginals(self, emissions: torch.Tensor, steps: torch.Tensor, chain: Chain) -> torch.Tensor:
        transitions, start, end = self._scores(steps.dtype, FORBIDDEN_SCORE)
        backwards = chain.backwards()
        run = _seen_through(chain_sums, run_sums)
        forward, _ = run(steps, chain.lengths, chain.starts(), transitions, start, end)
        backward, _ = run(
            _take(steps, backwards), chain.lengths, chain.starts(backwards=True), transitions.t(), end, start
        )
        sums = chain.to_positions(forward + _take(backward, backwards) - steps)
        return torch.where(chain.mask.unsqueeze(-1), sums, emissions.to(sums.dtype)).log_softmax(dim=-1)

    def marginals(
        self, emissions: torch.Tensor, mask: torch.Tensor | None = None, starts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Returns:
            `torch.Tensor` of shape `(batch, seq, num_labels)`: p(y_t = label | x), as in
            [`~LinearChainCRF.log_marginals`].
        """
        return self.log_marginals(emissions, mask, starts).exp()

    def viterbi(
        self, emissions: torch.Tensor, mask: torch.Tensor | None = None, starts: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Returns:
            `torch.LongTensor` of shape `(batch, seq)`: the best path, -100 outside of the chain; and its score
            `(batch,)`, which has derivatives.
        """
        paths, scores = self.best_paths(emissions, mask, starts)
        return paths.squeeze(1), scores.squeeze(1)

    def best_paths(
        self,
        emissions: torch.Tensor,
        mask: torch.Tensor | None = None,
        starts: torch.Tensor | None = None,
        num_paths: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            num_paths (`int`, *optional*, defaults to 1): How many.

        Returns:
            `torch.LongTensor` of shape `(batch, num_paths, seq)`: the paths with the highest scores, the best one
            first, -100 outside of the chain; and the scores `(batch, num_paths)`, which have derivatives. Where there
            are fewer paths that are allowed, the score is -inf and the labels are -100; the first path is always
            there, even if none is allowed.

        Raises:
            `ValueError`: `num_paths` is less than 1.
        """
        if num_paths < 1:
            raise ValueError(f"`num_paths` must be an integer of at least 1, got {num_paths}.")
        steps, chain = self._prepare(emissions, mask, starts)
        paths, compared = self._best_paths(steps, chain, num_paths)
        is_there = (compared > FORBIDDEN_PATH_SCORE / 2) & (chain.lengths > 0)[:, None]
        is_there = is_there | (torch.arange(num_paths, device=paths.device) == 0)
        scores = torch.stack([self._path_score(steps, chain, path) for path in paths.unbind(1)], dim=1)
        paths = paths.gather(2, chain.place.unsqueeze(1).expand_as(paths))
        outside = ~(chain.mask.unsqueeze(1) & is_there.unsqueeze(-1))
        return paths.masked_fill(outside, IGNORED_LABEL), scores.masked_fill(~is_there, -torch.inf)

    def _best_paths(self, emissions: torch.Tensor, chain: Chain, num_paths: int) -> list[torch.Tensor]:
        """The labels of the steps `[batch, num_paths, seq]`, and what the paths were compared by."""
        scores = (score.detach() for score in self._scores(emissions.dtype, FORBIDDEN_PATH_SCORE))
        run = _seen_through(chain_best_paths, run_best)
        return run(emissions.detach(), chain.lengths, chain.starts(), *scores, num_paths)

    def path_logits(
        self, emissions: torch.Tensor, mask: torch.Tensor | None = None, starts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        What software that takes the largest logit of each token finds the best path in, and probabilities behind a
        softmax.

        Returns:
            `torch.Tensor` of shape `(batch, seq, num_labels)` in the type of the emissions: the logarithms of the
            marginals, in which the label of the best path is raised just above the others where another label is at
            least as probable.
        """
        steps, chain = self._prepare(emissions, mask, starts)
        path = chain.to_positions(self._best_paths(steps, chain, 1)[0].squeeze(1))
        logits = self._log_marginals(emissions, steps, chain)
        dtype, wide = emissions.dtype, logits.dtype
        logits = logits.clamp(min=torch.finfo(dtype).min).to(dtype).to(wide)
        labels = torch.arange(self.num_labels, device=logits.device)
        on_path = (path.unsqueeze(-1) == labels) & chain.mask.unsqueeze(-1)
        highest = logits.masked_fill(on_path, torch.finfo(dtype).min).amax(dim=-1, keepdim=True)
        # Enough to survive the rounding to this type, and that of a softmax in float32.
        margin = 4 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        raised = highest + margin * (1 + highest.abs())
        return torch.where(on_path & (logits < raised), raised, logits).to(dtype)


# Exporters for runtimes that know no such operators: as for the one of the recurrent layers.
with contextlib.suppress(ImportError):
    from transformers.exporters.utils import register_patch

    register_patch("executorch", f"{__name__}.chain_sums")(lambda operator: sums_in_scan)
    register_patch("executorch", f"{__name__}.chain_best_paths")(lambda operator: best_paths_in_scan)
    register_patch("openvino", f"{__name__}.chain_sums")(lambda operator: run_sums)
    register_patch("openvino", f"{__name__}.chain_best_paths")(lambda operator: run_best)
