"""The cross-entropy of a projection to a vocabulary, without all logits in memory at once.

Imports the fast paths and the products.
"""

import math

import torch

from .fast_paths import asks_for_numbers, graph_is_freed, saved_tensors_are_watched
from .large_products import large_linear, takes_onednn


# A chunk of logits holds as many numbers as the weight (whose gradient needs that memory anyway), but at least these;
# elsewhere than on a CPU, where starting the work on a chunk may take longer than the work, at least those, and there
# are no more chunks than that.
MIN_CHUNK_SIZE, MIN_CHUNK_SIZE_ELSEWHERE, MOST_CHUNKS_ELSEWHERE = 2**22, 2**24, 32
# But no chunk is longer than this: kernels count in 32 bits, and a sum over rows has to be a number of float16.
MOST_LOGITS, MOST_NARROW_ROWS = 2**30, 2**15
# So many logits go through the softmax at a time elsewhere than on a CPU. It writes up to two numbers of four bytes
# beside each that it reads, which take little memory that way, and stay in the caches of a GPU.
LOGITS_AT_ONCE_ELSEWHERE = 2**22
# Words whose gradients oneDNN makes at a time, because it cannot add to what is there.
WORDS_AT_ONCE = 1024


def is_on_cpu(tensor: torch.Tensor) -> bool:
    """
    What is chosen by. There rows without a label are left out, which elsewhere would be to wait for the device; there
    memory that is used again is worth more than few kernels.
    """
    return tensor.device.type == "cpu"


def chunk_length(num_rows: int, weight: torch.Tensor, dtype: torch.dtype) -> int:
    """
    How many rows of logits to compute at a time, with products in `dtype`, such that the chunks of `num_rows` rows are
    about equal.
    """
    smallest = MIN_CHUNK_SIZE if is_on_cpu(weight) else MIN_CHUNK_SIZE_ELSEWHERE
    number = math.ceil(num_rows / max(1, max(weight.numel(), smallest) // weight.shape[0]))
    if not is_on_cpu(weight):
        number = min(number, MOST_CHUNKS_ELSEWHERE)
    longest = max(1, MOST_LOGITS // weight.shape[0])
    if dtype == torch.float16:
        longest = min(longest, MOST_NARROW_ROWS)
    return math.ceil(num_rows / max(1, number, math.ceil(num_rows / longest)))


def pays(num_rows: int, weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """
    Whether to compute the loss of `num_rows` rows, with products in `dtype`, here: elsewhere than on a CPU not where
    it takes one chunk and the functions of torch have no copies in other types to make.
    """
    is_narrow = dtype.itemsize < 4
    return is_on_cpu(weight) or is_narrow or chunk_length(num_rows, weight, dtype) < num_rows


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
    is_label = labels != ignore_index
    if is_on_cpu(labels):
        kept = is_label.nonzero().squeeze(-1)
        if len(kept) < len(labels):
            hidden_states, labels = hidden_states[kept], labels[kept]
        is_label = None
    else:
        labels = labels.where(is_label, 0)
    if is_on_cpu(labels) and len(labels) > 0:
        lowest, highest = (label.item() for label in labels.aminmax())
        if lowest < 0 or highest >= len(weight):
            wrong = lowest if lowest < 0 else highest
            raise IndexError(f"`labels` must be {ignore_index} or from 0 to {len(weight) - 1}, got {wrong}.")
    if not torch.is_grad_enabled():
        hidden_states, weight = hidden_states.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    return _LinearCrossEntropy.apply(
        *(hidden_states, weight, bias, labels, is_label),
        *(hidden_states.dtype if dtype is None else dtype, reduction == "mean"),
    )


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients of a sum of losses beside that sum; the backward scales them."""

    @staticmethod
    def forward(ctx, hidden_states, weight, bias, labels, is_label, dtype, mean):
        # Under autocast `dtype` says already what to multiply in.
        with torch.autocast(hidden_states.device.type, enabled=False):
            total, gradients = _sum_and_gradients(
                hidden_states, weight, bias, labels, is_label, dtype, ctx.needs_input_grad[:3]
            )
        count = total.new_tensor(len(labels)) if is_label is None else is_label.sum()
        ctx.save_for_backward(*gradients, count)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden_states, weight, bias)]
        ctx.mean, ctx.is_watched = mean, saved_tensors_are_watched()
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
        scale = torch.where(count > 0, grad_loss / count if ctx.mean else grad_loss, 1)
        # In their memory where nobody sees them any more: that of the weight may be the largest tensor of all.
        multiply = torch.mul
        if graph_is_freed() and asks_for_numbers(grad_loss) and not ctx.is_watched:
            multiply = torch.Tensor.mul_

        def scaled(gradient, dtype):
            # A GPU would bring the scale to a narrow type first.
            wide = gradient.to(torch.promote_types(gradient.dtype, scale.dtype))
            return multiply(wide, scale).to(dtype)

        gradients = [
            None if gradient is None else scaled(gradient, dtype) for gradient, dtype in zip(gradients, ctx.dtypes)
        ]
        return *gradients, None, None, None, None


def _sum_and_gradients(hidden_states, weight, bias, labels, is_label, dtype, needs_gradient):
    """
    The sum of the losses, and its gradients with respect to hidden states, weight and bias where they are needed; of
    the rows where `is_label` is True, or of all.
    """
    num_rows = len(labels)
    wide = torch.promote_types(dtype, torch.float32)
    step = chunk_length(num_rows, weight, dtype)
    total = hidden_states.new_zeros((), dtype=wide)
    grad_hidden = torch.empty_like(hidden_states) if needs_gradient[0] else None
    grad_weight = torch.zeros_like(weight, dtype=wide) if needs_gradient[1] else None
    grad_bias = torch.zeros_like(bias, dtype=wide) if needs_gradient[2] else None
    narrow_weight = weight.to(dtype)
    narrow_bias = None if bias is None else bias.to(dtype)
    labels = labels.unsqueeze(-1)
    ignored = None if is_label is None else ~is_label.unsqueeze(-1)

    def add_rows(rows: slice) -> None:
        """What some rows add; whatever has the size of their logits is gone afterwards."""
        features = hidden_states[rows].to(dtype)
        if ignored is not None:  # of zeros, whatever is there
            features = features.masked_fill(ignored[rows], 0)
        logits = large_linear(features, narrow_weight, narrow_bias)
        losses, grad_logits = _losses_and_gradient(logits, labels[rows], any(needs_gradient))
        total.add_((losses if ignored is None else losses.masked_fill(ignored[rows], 0)).sum())
        if grad_logits is None:
            return
        if grad_bias is not None and is_label is None:
            grad_bias.add_(grad_logits.sum(dim=0))
        elif grad_bias is not None:
            grad_bias.add_(grad_logits.t().mv(is_label[rows].to(grad_logits.dtype)))
        grad_logits = grad_logits.to(dtype)
        if grad_hidden is not None:
            grad_hidden[rows] = large_linear(grad_logits, narrow_weight.t())
        if grad_weight is not None:
            _add_of_weight(grad_weight, grad_logits, features)

    for start in range(0, num_rows, max(1, step)):
        add_rows(slice(start, start + step))
    if grad_hidden is not None and ignored is not None:
        grad_hidden.masked_fill_(ignored, 0)
    return total, (grad_hidden, grad_weight, grad_bias)


def _losses_and_gradient(logits, labels, needs_gradient):
    """
    The losses `[rows, 1]` of labels `[rows, 1]`, in float32 or wider, and the gradient of their sum with respect to
    `logits` `[rows, vocab_size]`, None where it is not needed. On a CPU it is as wide as the losses; elsewhere, where
    the way to the memory is what takes the time, it is as narrow as the logits and lies where they were.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    if is_on_cpu(logits):
        wide_logits = logits.to(wide)
        highest = wide_logits.amax(dim=-1, keepdim=True)
        of_labels = wide_logits.gather(-1, labels)
        exponentials = wide_logits.sub_(highest).exp_()
        sums = exponentials.sum(dim=-1, keepdim=True)
        losses = sums.log() + (highest - of_labels)
        gradient = exponentials.div_(sums) if needs_gradient else None
    else:
        parts, losses = max(1, math.ceil(logits.numel() / LOGITS_AT_ONCE_ELSEWHERE)), []
        for part, labels_of_part in zip(logits.chunk(parts), labels.chunk(parts)):
            log_probabilities = torch.log_softmax(part, dim=-1, dtype=wide)
            losses.append(-log_probabilities.gather(-1, labels_of_part))
            if needs_gradient:
                torch.exp(log_probabilities, out=part)
            del log_probabilities  # before the next ones
        losses, gradient = torch.cat(losses), logits if needs_gradient else None
    if needs_gradient:
        # Not `probability - 1` of a probability that is rounded to few bits already.
        gradient.scatter_(-1, labels, torch.expm1(-losses).to(gradient.dtype))
    return losses, gradient


def _add_of_weight(total, grad_logits, features):
    """Adds the product of `grad_logits` `[rows, vocab_size]`, transposed, and `features` `[rows, size]`."""
    if takes_onednn(grad_logits.t(), features.t()):
        for part, words in zip(total.split(WORDS_AT_ONCE), grad_logits.t().split(WORDS_AT_ONCE)):
            part += large_linear(words, features.t())
    elif total.dtype == grad_logits.dtype:
        total.addmm_(grad_logits.t(), features)
    else:
        total += grad_logits.t() @ features
