"""Copying from the source: a mixture of a distribution over the vocabulary and one over the source's words.

Imports nothing of the package.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


class CopyGate(nn.Linear):
    r"""
    Whether to generate or to copy ([See et al., 2017](https://huggingface.co/papers/1704.04368), equation 8), from the
    context c_t, the decoder's top output s_t and its input x_t: g_t = w . [c_t; s_t; x_t] + b, p_gen = sigmoid(g_t)

    Args:
        size (`int`): Width of the three together.
    """

    def __init__(self, size: int):
        super().__init__(size, 1)


def without_extended_ids(
    input_ids: torch.Tensor | None, vocab_size: int, unk_token_id: int | None
) -> torch.Tensor | None:
    """The tokens with the unknown token for each id that the vocabulary lacks; as they are where that is None."""
    if input_ids is None or unk_token_id is None:
        return input_ids
    return input_ids.masked_fill(input_ids >= vocab_size, unk_token_id)


def mixture_log_probabilities(
    logits: torch.Tensor, gates: torch.Tensor, weights: torch.Tensor, source_ids: torch.Tensor, num_ids: int
) -> torch.Tensor:
    r"""
    The final distribution of a pointer-generator ([See et al., 2017](https://huggingface.co/papers/1704.04368),
    equation 9): P(w) = p_gen P_vocab(w) + (1 - p_gen) sum of alpha_i over the positions i of w in the source.

    Args:
        logits (`torch.Tensor` of shape `(batch, target, vocab_size)`): The logits of P_vocab.
        gates (`torch.Tensor` of shape `(batch, target, 1)`): p_gen before its sigmoid.
        weights (`torch.Tensor` of shape `(batch, target, source)`): The attention alpha. Where a source has no token,
            so that they are all zero, nothing is copied.
        source_ids (`torch.LongTensor` of shape `(batch, source)`): The words of the source, those that the vocabulary
            lacks as ids from `vocab_size` on.
        num_ids (`int`): Number of ids, `vocab_size` and those for words that it lacks.

    Returns:
        log P of shape `(batch, target, num_ids)` in float32 or wider: finite, at least the logarithm of the smallest
        normal number.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    smallest = torch.finfo(dtype).tiny
    weights, gates = weights.to(dtype), gates.to(dtype)
    # A sigmoid of exactly one, without an infinity.
    gates = torch.where(weights.sum(-1, keepdim=True) > 0, gates, 1e4)
    generated = F.logsigmoid(gates) + torch.log_softmax(logits.to(dtype), dim=-1)
    generated = F.pad(generated, (0, num_ids - logits.shape[-1]), value=math.log(smallest))
    copied = torch.zeros_like(generated).scatter_add(
        -1, source_ids.unsqueeze(1).expand(-1, weights.shape[1], -1), weights
    )
    log_copied = F.logsigmoid(-gates) + copied.clamp(min=smallest).log()
    mixed = torch.where(copied > 0, torch.logaddexp(generated, log_copied), generated)
    return mixed.clamp(min=math.log(smallest))


def repeat_at_padding(values: torch.Tensor, target_mask: torch.Tensor | None) -> torch.Tensor:
    """`[batch, target, size]` with that of the last token repeated at padding `[batch, target]` behind it."""
    if target_mask is None:
        return values
    mask = target_mask[:, target_mask.shape[1] - values.shape[1] :].bool()
    steps = torch.arange(values.shape[1], device=values.device).expand(mask.shape)
    last = torch.where(mask, steps, torch.zeros_like(steps)).cummax(dim=1).values
    return values.gather(1, last.unsqueeze(-1).expand_as(values))
