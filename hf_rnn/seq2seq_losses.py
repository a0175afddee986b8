"""Losses of encoder-decoders beside the plain cross-entropy. Imports nothing of the package.

All are sums over the positions that have a label, divided by their number or, where gradients of several batches are
added up, by the number in all of them.
"""

import torch


IGNORED = -100


def mean_over_labels(
    values: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """
    Args:
        values (`torch.Tensor` of shape `(batch, target)`): One number for each position.
        labels (`torch.LongTensor` of shape `(batch, target)`): -100 where the position does not count.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*): What to divide by; the number of labels if not given.

    Returns:
        The mean in float32 or wider; zero where there is nothing to count.
    """
    has_label = (labels != IGNORED).to(values.device)
    values = values.to(torch.promote_types(values.dtype, torch.float32)).masked_fill(~has_label, 0)
    number = has_label.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return values.sum() / (number.to(values.device) if torch.is_tensor(number) else number)


def coverage_loss(weights: torch.Tensor, target_mask: torch.Tensor | None = None) -> torch.Tensor:
    r"""
    How much each position attends to what was attended to before
    ([See et al., 2017](https://huggingface.co/papers/1704.04368), equation 12), for the coverage c, the sum of the
    weights of earlier positions: sum_j min(alpha_tj, c_tj). Of several heads the mean.

    Args:
        weights (`torch.Tensor` of shape `(batch, heads, target, source)`): Attention weights.
        target_mask (`torch.Tensor` of shape `(batch, target)`, *optional*): Zero at padding, which covers nothing.

    Returns:
        `torch.Tensor` of shape `(batch, target)`.
    """
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    if target_mask is not None:
        weights = weights * target_mask.to(weights.dtype)[:, None, :, None]
    coverage = weights.cumsum(dim=2).roll(1, dims=2)
    coverage = torch.cat([torch.zeros_like(coverage[:, :, :1]), coverage[:, :, 1:]], dim=2)
    return torch.minimum(weights, coverage).sum(-1).mean(1)


def guided_alignment_loss(weights: torch.Tensor, alignments: torch.Tensor) -> torch.Tensor:
    r"""
    Cross-entropy of the attention weights and given alignments
    ([Chen et al., 2016](https://huggingface.co/papers/1607.01628)): -sum_j A_tj log alpha_tj, where the alignments of a
    position are divided by their sum, so that several source words share it. Positions without any count as zero. Of
    several heads the mean of the weights is what is guided.

    Args:
        weights (`torch.Tensor` of shape `(batch, heads, target, source)`): Attention weights.
        alignments (`torch.Tensor` of shape `(batch, target, source)`): Zero or more for each pair of positions.

    Returns:
        `torch.Tensor` of shape `(batch, target)`.

    Raises:
        `ValueError`: `alignments` has another shape.
    """
    wanted = (weights.shape[0], *weights.shape[2:])
    if alignments.shape != wanted:
        raise ValueError(f"`alignments` must have the shape {tuple(wanted)}, got {tuple(alignments.shape)}.")
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32)).mean(1)
    alignments = alignments.to(weights)
    shares = alignments / alignments.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return -(shares * weights.clamp(min=torch.finfo(weights.dtype).tiny).log()).sum(-1)


def uniform_loss(logits: torch.Tensor, num_tokens: int) -> torch.Tensor:
    r"""
    The cross-entropy with a uniform distribution over the first `num_tokens` tokens, which label smoothing mixes in
    ([Szegedy et al., 2016](https://huggingface.co/papers/1512.00567)): -mean_v log p(v).

    Args:
        logits (`torch.Tensor` of shape `(batch, target, vocab_size)`): Logits.
        num_tokens (`int`): Over how many tokens to spread.

    Returns:
        `torch.Tensor` of shape `(batch, target)`.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.logsumexp(-1) - logits[..., :num_tokens].mean(-1)
