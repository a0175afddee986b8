"""What a chain of labels needs a loop over time for, as operators that a graph (`torch.compile`, `torch.export`) does
not look into: the sums over all paths with their gradient, and the best paths. In ONNX they become a
[Scan](https://onnx.ai/onnx/operators/onnx__Scan.html). Imports the names of the fast paths and
the derivatives of higher order.

All of them take chains that lie at the left of their rows. The score of a path y is
start[y_1] + sum_t emissions[t, y_t] + sum_t transitions[y_{t-1}, y_t] + end[y_last]; where a new text begins within a
row, end[y_{t-1}] + start[y_t] stands in the place of the transition.
"""

import contextlib
import hashlib
from typing import NamedTuple

import torch

from .fast_paths import may_take, transforms_are_active
from .higher_derivatives import gradients_with_graph


# A checkpoint that brings its own copy of this file brings its own operators.
_NAMESPACE = "hf_rnn" if __package__ == "hf_rnn" else f"hf_rnn_{hashlib.sha256(__name__.encode()).hexdigest()[:16]}"


class _Steps(NamedTuple):
    """The chains of a batch, time first, without the steps at the end at which no row has a token."""

    emissions: torch.Tensor  # [steps, batch, labels]
    is_token: torch.Tensor  # [steps, batch, 1]
    starts: torch.Tensor | None  # [steps, batch, 1], True where a text begins behind the first one


def _may_look(tensor: torch.Tensor) -> bool:
    """
    Whether to look at values, which costs nothing on a CPU; elsewhere it would wait for the device. A transformation of
    `torch.func` may show none.
    """
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not transforms_are_active()


def _steps(emissions: torch.Tensor, lengths: torch.Tensor, starts: torch.Tensor | None) -> _Steps:
    longest = emissions.shape[1]
    if _may_look(lengths) and lengths.numel() > 0:
        longest = max(1, int(lengths.max()))
    steps = torch.arange(longest, device=lengths.device)
    return _Steps(
        emissions[:, :longest].transpose(0, 1),
        (steps[:, None] < lengths).unsqueeze(-1),
        None if starts is None else starts[:, :longest].transpose(0, 1).unsqueeze(-1),
    )


# Sums over all paths.


def _sum_step(now: torch.Tensor, transitions: torch.Tensor) -> torch.Tensor:
    """The logarithms `[batch, labels]` of the sums over the label before."""
    return (now.unsqueeze(-1) + transitions).logsumexp(dim=-2)


def run_sums(emissions, lengths, starts, transitions, start, end) -> list[torch.Tensor]:
    if emissions.numel() == 0:
        return [torch.zeros_like(emissions), emissions.new_zeros(len(emissions))]
    with torch.autocast(emissions.device.type, enabled=False):
        steps = _steps(emissions, lengths, starts)
        sums = None
        if may_take("crf_products") and _may_look(emissions):
            sums = _sums_by_products(steps, transitions, start, end)
        if sums is None:
            sums = _sums(steps, start, end, lambda now: _sum_step(now, transitions))
    sums, highest = sums
    missing = emissions.shape[1] - len(sums)
    return [torch.stack([*sums, *sums[-1:] * missing], dim=1), torch.cat(highest, dim=-1).sum(dim=-1)]


def _sums(steps: _Steps, start, end, sum_step) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The sums after each step less the highest of them, and what was taken off `[batch, 1]`."""
    now, highest = _relative(start + steps.emissions[0])
    all_sums, all_highest = [now], [highest]
    for step in range(1, len(steps.emissions)):
        summed = sum_step(now)
        if steps.starts is not None:
            summed = torch.where(steps.starts[step], start + (now + end).logsumexp(-1, keepdim=True), summed)
        now, highest = _relative(torch.where(steps.is_token[step], summed + steps.emissions[step], now))
        all_sums.append(now)
        all_highest.append(highest)
    return all_sums, all_highest


def _relative(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores such that the highest is zero, so that they are as exact at the end of a long text as at its beginning."""
    highest = scores.amax(dim=-1, keepdim=True).detach()
    return scores - highest, highest


def _lowest_sum(transitions: torch.Tensor) -> float:
    """Above it a sum of as many products as there are labels lost nothing that rounding would have kept."""
    info = torch.finfo(transitions.dtype)
    return len(transitions) * info.tiny / info.eps


def _sums_by_products(steps: _Steps, transitions, start, end) -> tuple[list[torch.Tensor], list[torch.Tensor]] | None:
    """
    [`_sums`] with a product of matrices for the sum over the label before; None where scores are so far apart that
    numbers get too small.
    """
    highest = transitions.max()
    factors = (transitions - highest).exp()
    products = []

    def sum_step(now):
        products.append(now.exp() @ factors)
        return products[-1].log() + highest

    sums = _sums(steps, start, end, sum_step)
    # Not `min < lowest`, so that what is not a number goes the other way.
    return sums if not products or torch.stack(products).min() >= _lowest_sum(transitions) else None


def run_sums_backward(grad_sums, sums, emissions, lengths, starts, transitions, start, end) -> list[torch.Tensor]:
    """The gradients of emissions, transitions, start and end."""
    if emissions.numel() == 0:
        return [torch.zeros_like(tensor) for tensor in (emissions, transitions, start, end)]
    with torch.autocast(emissions.device.type, enabled=False):
        steps = _steps(emissions, lengths, starts)
        longest = len(steps.emissions)
        grads, before = grad_sums.transpose(0, 1), sums.transpose(0, 1)[: longest - 1]
        # Behind the last token of all rows the sums are repeated.
        grads = torch.cat([grads[: longest - 1], grads[longest - 1 :].sum(dim=0, keepdim=True)])
        is_sum = steps.is_token[1:] if steps.starts is None else steps.is_token[1:] & ~steps.starts[1:]
        backward = None
        if longest > 1 and may_take("crf_products") and _may_look(emissions):
            backward = _backward_by_products(before, is_sum, transitions)
        if backward is None:
            backward = _backward_by_sums(before, is_sum, transitions)
        step_back, grad_transitions = backward
        is_start = None if steps.starts is None else steps.is_token & steps.starts
        of_last = None if is_start is None else (before + end).softmax(dim=-1)
        now, grad_end = grads[-1], torch.zeros_like(end)
        of_steps = [now]
        for step in range(longest - 1, 0, -1):
            passed = step_back(step - 1, now)
            if is_start is not None:
                ended = of_last[step - 1] * now.sum(dim=-1, keepdim=True) * is_start[step]
                grad_end = grad_end + ended.sum(dim=0)
                passed = passed + ended
            now = grads[step - 1] + torch.where(steps.is_token[step], passed, now)
            of_steps.append(now)
        grad_tokens = torch.stack(of_steps[::-1]) * steps.is_token
        grad_start = grad_tokens[0].sum(dim=0)
        if is_start is not None:
            grad_start = grad_start + (grad_tokens[1:] * is_start[1:]).sum(dim=(0, 1))
        grad_emissions = torch.zeros_like(emissions)
        grad_emissions[:, :longest] = grad_tokens.transpose(0, 1)
        return [grad_emissions, grad_transitions(grad_tokens[1:]), grad_start, grad_end]


def _backward_by_sums(before, is_sum, transitions):
    """
    A function from the step and the gradient of the sums behind it `[batch, labels]` to that of the sums before it, and
    one from the gradients of all sums behind a step to that of the transitions.
    """

    def of_before(step):
        return (before[step].unsqueeze(-1) + transitions).softmax(dim=-2) * is_sum[step].unsqueeze(-1)

    def step_back(step, grad):
        return (of_before(step) * grad.unsqueeze(-2)).sum(dim=-1)

    def grad_transitions(grads):
        total = torch.zeros_like(transitions)
        for step, grad in enumerate(grads):
            total += (of_before(step) * grad.unsqueeze(-2)).sum(dim=0)
        return total

    return step_back, grad_transitions


def _backward_by_products(before, is_sum, transitions):
    """[`_backward_by_sums`] with products of matrices; None where numbers get too small, as in the forward."""
    factors = (transitions - transitions.max()).exp()
    parts = before.exp()
    products = parts @ factors
    if not products.min() >= _lowest_sum(transitions):
        return None
    shares = is_sum / products
    factors_back = factors.t().contiguous()

    def step_back(step, grad):
        return ((grad * shares[step]) @ factors_back) * parts[step]

    def grad_transitions(grads):
        return factors * (parts.flatten(0, 1).t() @ (grads * shares).flatten(0, 1))

    return step_back, grad_transitions


@torch.library.custom_op(f"{_NAMESPACE}::chain_sums", mutates_args=())
def chain_sums(
    emissions: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor | None,
    transitions: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
) -> list[torch.Tensor]:
    """
    The logarithm of the sum of exp(score) over all paths up to a position that end there with a label, the `end`
    scores of the last one left out: the forward variables of
    [Rabiner (1989)](https://doi.org/10.1109/5.18626). Has derivatives of any order.

    Args:
        emissions (`torch.Tensor` of shape `(batch, seq, labels)`): Scores of the labels, those of the tokens first.
        lengths (`torch.LongTensor` of shape `(batch,)`): The number of tokens.
        starts (`torch.BoolTensor` of shape `(batch, seq)`, *optional*):
            True where a text begins behind the first one of its row.
        transitions (`torch.Tensor` of shape `(labels, labels)`): Scores of a label (first) followed by another.
        start, end (`torch.Tensor` of shape `(labels,)`): Scores of the first and of the last label of a text.

    Returns:
        The logarithms `(batch, seq, labels)`, at each position less the highest of them; behind the last token its
        values are repeated. And all that was taken off until there `(batch,)`, which is to be seen as a constant: it
        has no derivative.
    """
    return run_sums(emissions, lengths, starts, transitions, start, end)


@chain_sums.register_fake
def _shape_of_sums(emissions, lengths, starts, transitions, start, end):
    return [emissions.new_empty(emissions.shape), emissions.new_empty(emissions.shape[:1])]


@torch.library.custom_op(f"{_NAMESPACE}::chain_sums_backward", mutates_args=())
def chain_sums_backward(
    grad_sums: torch.Tensor,
    sums: torch.Tensor,
    emissions: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor | None,
    transitions: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
) -> list[torch.Tensor]:
    """The gradients of `emissions`, `transitions`, `start` and `end` for those of what [`chain_sums`] returned."""
    gradients = run_sums_backward(grad_sums, sums, emissions, lengths, starts, transitions, start, end)
    return [gradient.contiguous() for gradient in gradients]


@chain_sums_backward.register_fake
def _shapes_of_gradients(grad_sums, sums, emissions, lengths, starts, transitions, start, end):
    return [tensor.new_empty(tensor.shape) for tensor in (emissions, transitions, start, end)]


def _keep_for_backward(ctx, inputs, output):
    emissions, lengths, starts, transitions, start, end = inputs
    ctx.save_for_backward(output[0], emissions, lengths, starts, transitions, start, end)


def _backward(ctx, grads):
    sums, emissions, lengths, starts, *scores = ctx.saved_tensors
    tensors, needed = (emissions, *scores), (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:])
    if torch.is_grad_enabled() and emissions.numel() > 0:

        def sums_of(emissions, *scores):
            return run_sums(emissions, lengths, starts, *scores)[0]

        of_emissions, *of_scores = gradients_with_graph(sums_of, tensors, needed, grads[0])
    else:
        of_emissions, *of_scores = chain_sums_backward(grads[0], sums, emissions, lengths, starts, *scores)
    return of_emissions, None, None, *of_scores


chain_sums.register_autograd(_backward, setup_context=_keep_for_backward)


# Best paths.


def _first(tensor: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `number` largest along the last but one dimension, and where they are."""
    if number == 1:
        return tensor.max(dim=-2, keepdim=True)
    return tensor.topk(number, dim=-2)


def _begin_paths(emissions: torch.Tensor, start: torch.Tensor, number: int) -> torch.Tensor:
    """Scores `[batch, number, labels]` of the paths of one label, of which there is one for each label."""
    now = (start + emissions).unsqueeze(-2)
    # Far below everything that there is, and far enough from the end of the numbers.
    absent = torch.full_like(now, torch.finfo(now.dtype).min / 2).expand(-1, number - 1, -1)
    return torch.cat([now, absent], dim=-2)


def _best_step(now, steps, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The best `number` paths with each next label `[batch, number, labels]`, and which of the `number * labels` paths
    before they go on with. `steps` `[batch or 1, labels, labels]` are the scores of label after label.
    """
    scores = (now.unsqueeze(-1) + steps.unsqueeze(-3)).flatten(-3, -2)  # [batch, number * labels, labels]
    return _first(scores, number)


def run_best(emissions, lengths, starts, transitions, start, end, number: int) -> list[torch.Tensor]:
    batch, seq, num_labels = emissions.shape
    paths = lengths.new_zeros(batch, number, seq)
    if emissions.numel() == 0:
        scores = emissions.new_full((batch, number), torch.finfo(emissions.dtype).min / 2)
        return [paths, scores.index_fill(1, lengths.new_zeros(1), 0)]
    steps = _steps(emissions, lengths, starts)
    same = torch.arange(number * num_labels, device=lengths.device).view(number, num_labels)
    now, pointers = _begin_paths(steps.emissions[0], start, number), []
    total = emissions.new_zeros(batch)
    over_start = (end[:, None] + start).unsqueeze(0)
    for step in range(1, len(steps.emissions)):
        between = transitions.unsqueeze(0)
        if steps.starts is not None:
            between = torch.where(steps.starts[step].unsqueeze(-1), over_start, between)
        # As exact at the end of a long text as at its beginning.
        highest = now[:, :1].amax(dim=-1, keepdim=True)
        total = total + highest.flatten()
        now = now - highest
        best, pointer = _best_step(now, between, number)
        is_token = steps.is_token[step].unsqueeze(-1)
        now = torch.where(is_token, best + steps.emissions[step].unsqueeze(-2), now)
        pointers.append(torch.where(is_token, pointer, same).flatten(1))
    scores, place = _first((now + end).flatten(1).unsqueeze(-1), number)
    scores, place = scores.squeeze(-1), place.squeeze(-1)
    labels = [place]
    for pointer in reversed(pointers):
        place = pointer.gather(1, place)
        labels.append(place)
    paths[:, :, : len(labels)] = torch.stack(labels[::-1], dim=-1) % num_labels
    return [paths, scores + total[:, None]]


@torch.library.custom_op(f"{_NAMESPACE}::chain_best_paths", mutates_args=())
def chain_best_paths(
    emissions: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor | None,
    transitions: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    number: int,
) -> list[torch.Tensor]:
    """
    The best paths ([Viterbi, 1967](https://doi.org/10.1109/TIT.1967.1054010)), the best one first. Has no derivatives.

    Args:
        emissions, lengths, starts, transitions, start, end: As in [`chain_sums`].
        number (`int`): How many.

    Returns:
        The labels `(batch, number, seq)`, of which those behind the last token mean nothing, and the scores
        `(batch, number)`: where there are fewer paths, below a quarter of the lowest number.
    """
    return run_best(emissions, lengths, starts, transitions, start, end, number)


@chain_best_paths.register_fake
def _shapes_of_paths(emissions, lengths, starts, transitions, start, end, number):
    batch, seq = emissions.shape[:2]
    return [lengths.new_empty(batch, number, seq), emissions.new_empty(batch, number)]


# Exports.


def _scan(step, initial, inputs, reverse: bool = False):
    from torch._dynamo import config
    from torch._higher_order_ops import scan  # has no public door

    # The number of inputs, which differs from scan to scan, would become a variable of the graph.
    with config.patch(automatic_dynamic_shapes=False):
        return scan(step, initial, inputs, reverse=reverse)


def sums_in_scan(emissions, lengths, starts, transitions, start, end) -> list[torch.Tensor]:
    """The operator [`chain_sums`] as a `scan`. Each row is one text: `starts` are ignored."""
    steps = torch.arange(emissions.shape[1], device=emissions.device)

    def step(now, inputs):
        emissions, is_token, is_first = inputs
        summed = torch.where(is_first, start, _sum_step(now, transitions)) + emissions
        new, highest = _relative(torch.where(is_token, summed, now))
        return new, (new.clone(), highest)

    is_token = (steps[:, None] < lengths).unsqueeze(-1)
    inputs = emissions.transpose(0, 1), is_token, (steps == 0).view(-1, 1, 1)
    _, (sums, highest) = _scan(step, torch.zeros_like(emissions[:, 0]), inputs)
    return [sums.transpose(0, 1), highest.sum(dim=(0, 2))]


def best_paths_in_scan(emissions, lengths, starts, transitions, start, end, number: int) -> list[torch.Tensor]:
    """
    The operator [`chain_best_paths`] as two `scan`s. Each row is one text: `starts` are ignored.

    Raises:
        `ValueError`: More than the best path is asked for.
    """
    if number != 1:
        raise ValueError(f"Only the best path can be exported, got {number} paths.")
    labels = torch.arange(emissions.shape[2], device=emissions.device)
    steps = torch.arange(emissions.shape[1], device=emissions.device)

    def step(now, inputs):
        emissions, is_token, is_first = inputs
        now, highest = _relative(now)
        best, pointer = (now.unsqueeze(-1) + transitions).max(dim=-2)
        best = torch.where(is_first, start, best) + emissions
        pointer = torch.where(is_token & ~is_first, pointer, labels)
        return torch.where(is_token, best, now), (pointer, highest)

    def step_back(label, pointer):
        return pointer.gather(1, label.unsqueeze(1)).squeeze(1), label.clone()

    is_token = (steps[:, None] < lengths).unsqueeze(-1)
    inputs = emissions.transpose(0, 1), is_token, (steps == 0).view(-1, 1, 1)
    now, (pointers, highest) = _scan(step, torch.zeros_like(emissions[:, 0]), inputs)
    scores, last = (now + end).max(dim=-1)
    _, path = _scan(step_back, last, pointers, reverse=True)
    return [path.t().unsqueeze(1), (scores + highest.sum(dim=(0, 2))).unsqueeze(1)]


def _decompose_sums(*arguments) -> list[torch.Tensor]:
    # Others ask for the decomposition too, in order to see the shapes.
    return sums_in_scan(*arguments) if torch.onnx.is_in_onnx_export() else _shape_of_sums(*arguments)


def _decompose_best_paths(*arguments) -> list[torch.Tensor]:
    return best_paths_in_scan(*arguments) if torch.onnx.is_in_onnx_export() else _shapes_of_paths(*arguments)


# As for the operator of the recurrent layers.
with contextlib.suppress(ImportError):
    from torch._decomp import register_decomposition

    register_decomposition(getattr(torch.ops, _NAMESPACE).chain_sums.default)(_decompose_sums)
    register_decomposition(getattr(torch.ops, _NAMESPACE).chain_best_paths.default)(_decompose_best_paths)
