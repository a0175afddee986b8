"""The cross-entropy of a projection to a vocabulary, without all logits in memory at once.

Imports the products.
"""

import math

import torch

from .large_products import large_linear, takes_onednn


# A chunk of logits holds as many numbers as the weight (whose gradient needs that memory anyway), but at least these;
# elsewhere than on a CPU, where starting the work on a chunk takes longer than the work, at least those.
MIN_CHUNK_SIZE, MIN_CHUNK_SIZE_ELSEWHERE = 2**22, 2**24
# Words whose gradients oneDNN makes at a time, because it cannot add to what is there.
WORDS_AT_ONCE = 1024


def chunk_length(num_rows: int, weight: torch.Tensor) -> int:
    """How many rows of logits to compute at a time, such that the chunks of `num_rows` rows are about equal."""
    smallest = MIN_CHUNK_SIZE if weight.device.type == "cpu" else MIN_CHUNK_SIZE_ELSEWHERE
    longest = max(1, max(weight.numel(), smallest) // weight.shape[0])
    return math.ceil(num_rows / max(1, math.ceil(num_rows / longest)))


def looks_at_labels(labels: torch.Tensor) -> bool:
    """Whether rows without a label are left out; elsewhere than on a CPU finding them would wait for the device."""
    return labels.device.type == "cpu"


def linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    r"""
    `cross_entropy(linear(hidden_states, weight, bias), labels)` and its gradients, exact but for rounding: the logits
    of a chunk of rows become the gradient with respect to them in place, and this is multiplied into the gradients of
    the arguments at once. Rows that are ignored take no part. No second derivatives.

    Args:
        hidden_states (`torch.Tensor` of shape `(rows, size)`): What is projected.
        weight (`torch.Tensor` of shape `(vocab_size, size)`): The projection.
        bias (`torch.Tensor` of shape `(vocab_size,)`, *optional*): Its bias.
        labels (`torch.LongTensor` of shape `(rows,)`): Token ids; `ignore_index` where there is none.
        ignore_index (`int`): The label of a row that is ignored.
        reduction (`str`): `"mean"` over the labels (nan where there are none) or `"sum"`.
        dtype (`torch.dtype`, *optional*): What to multiply in; by default the type of `hidden_states`. Sums,
            exponentials and logarithms are in float32 or, for float64, in float64.

    Returns:
        The loss in that wider type.

    Raises:
        `IndexError`: On a CPU, a label that is no token id.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"`reduction` must be 'mean' or 'sum', got {reduction!r}.")
    ignored = labels == ignore_index
    if looks_at_labels(labels):
        kept = ignored.logical_not().nonzero().squeeze(-1)
        if len(kept) < len(labels):
            hidden_states, labels = hidden_states[kept], labels[kept]
        ignored = None
    else:
        labels = labels.masked_fill(ignored, 0)
    if labels.device.type == "cpu" and len(labels) > 0:
        lowest, highest = (label.item() for label in labels.aminmax())
        if lowest < 0 or highest >= len(weight):
            wrong = lowest if lowest < 0 else highest
            raise IndexError(f"`labels` must be {ignore_index} or from 0 to {len(weight) - 1}, got {wrong}.")
    if not torch.is_grad_enabled():
        hidden_states, weight = hidden_states.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    return _LinearCrossEntropy.apply(
        *(hidden_states, weight, bias, labels, ignored),
        *(hidden_states.dtype if dtype is None else dtype, reduction == "mean"),
    )


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients of a sum of losses beside that sum; the backward scales them."""

    @staticmethod
    def forward(ctx, hidden_states, weight, bias, labels, ignored, dtype, mean):
        # Under autocast `dtype` says already what to multiply in.
        with torch.autocast(hidden_states.device.type, enabled=False):
            total, gradients, count = _sum_and_gradients(
                hidden_states, weight, bias, labels, ignored, dtype, ctx.needs_input_grad[:3]
            )
        ctx.save_for_backward(*gradients, count)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden_states, weight, bias)]
        ctx.mean = mean
        return total / count if mean else total

    @staticmethod
    def backward(ctx, grad_loss):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The loss of a model in training mode has no second derivatives (`create_graph=True`). Set "
                "`HF_RNN_WITHOUT=chunked_loss` or the context `hf_rnn.without_fast_paths('chunked_loss')` around the "
                "forward to have them."
            )
        # Without any label the gradients are zeros, as they are for the stock loss, though the mean is nan, and so is
        # the quotient of a sum and a number of labels that is zero.
        *gradients, count = ctx.saved_tensors
        scale = (grad_loss / count if ctx.mean else grad_loss).masked_fill(count == 0, 1)
        gradients = [
            None if gradient is None else (gradient * scale).to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes)
        ]
        return *gradients, None, None, None, None


def _sum_and_gradients(hidden_states, weight, bias, labels, ignored, dtype, needs_gradient):
    """
    The sum of the losses of the rows that are not `ignored` (None for all of them), the gradients of the sum with
    respect to hidden states, weight and bias where they are needed, and the number of these rows.
    """
    num_rows = len(labels)
    wide = torch.promote_types(dtype, torch.float32)
    step = max(1, chunk_length(num_rows, weight))
    total = hidden_states.new_zeros((), dtype=wide)
    grad_hidden = torch.empty_like(hidden_states) if needs_gradient[0] else None
    make = torch.empty_like if num_rows > 0 else torch.zeros_like
    grad_weight = make(weight, dtype=wide) if needs_gradient[1] else None
    grad_bias = make(bias, dtype=wide) if needs_gradient[2] else None
    narrow_weight = weight.to(dtype)
    narrow_bias = None if bias is None else bias.to(dtype)

    def add_rows(start: int) -> None:
        """What some rows add; whatever has the size of their logits is gone afterwards."""
        rows = slice(start, start + step)
        features, row_labels = hidden_states[rows].to(dtype), labels[rows].unsqueeze(-1)
        logits = large_linear(features, narrow_weight, narrow_bias).to(wide)
        is_ignored = None if ignored is None else ignored[rows].unsqueeze(-1)
        loss, grad_logits = _loss_in_place(logits, row_labels, is_ignored, any(needs_gradient))
        total.add_(loss)
        if grad_logits is None:
            return
        if grad_bias is not None:
            _put(grad_bias, grad_logits.sum(dim=0), start == 0)
        grad_logits = grad_logits.to(dtype)
        if grad_hidden is not None:
            grad_hidden[rows] = large_linear(grad_logits, narrow_weight.t())
        if grad_weight is not None:
            _put_of_weight(grad_weight, grad_logits, features, start == 0)

    for start in range(0, num_rows, step):
        add_rows(start)
    count = total.new_tensor(num_rows) if ignored is None else ignored.logical_not().sum()
    return total, (grad_hidden, grad_weight, grad_bias), count


def _loss_in_place(logits, labels, ignored, needs_gradient):
    """
    The sum of the losses of logits `[rows, vocab_size]` for labels `[rows, 1]`, of the rows that are not `ignored`
    `[rows, 1]`, and in place of the logits the gradient of that sum with respect to them, if it is needed.
    """
    highest = logits.amax(dim=-1, keepdim=True)
    of_labels = logits.gather(-1, labels)
    probabilities = logits.sub_(highest).exp_()
    sums = probabilities.sum(dim=-1, keepdim=True)
    losses = sums.log() + highest - of_labels
    of_label = torch.full_like(sums, -1)
    if ignored is not None:
        for part, nothing in ((losses, 0), (sums, math.inf), (of_label, 0)):
            part.masked_fill_(ignored, nothing)
    loss = losses.sum()
    if not needs_gradient:
        return loss, None
    return loss, probabilities.div_(sums).scatter_add_(-1, labels, of_label)


def _put(total, added, is_first: bool) -> None:
    """Adds to what is there already, which is nothing at first."""
    (total.copy_ if is_first else total.add_)(added)


def _put_of_weight(total, grad_logits, features, is_first: bool) -> None:
    """Likewise the product of `grad_logits` `[rows, vocab_size]`, transposed, and `features` `[rows, size]`."""
    if takes_onednn(grad_logits.t(), features.t()):
        for part, words in zip(total.split(WORDS_AT_ONCE), grad_logits.t().split(WORDS_AT_ONCE)):
            _put(part, large_linear(words, features.t()), is_first)
    elif total.dtype == grad_logits.dtype:
        torch.addmm(total, grad_logits.t(), features, beta=0 if is_first else 1, out=total)
    else:
        _put(total, grad_logits.t() @ features, is_first)
