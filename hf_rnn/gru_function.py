"""A GRU over a whole sequence as one autograd function, on CPUs. Imports the products of oneDNN.

Torch's own GRU goes through autograd step by step there, and through the slower of two libraries for its products.
"""

import torch

from .fast_paths import may_take
from .large_products import large_linear
from .packed_linear import can_pack, multiply, pack


class _GRU(torch.autograd.Function):
    """Time comes first here, so that each step lies in one piece."""

    @staticmethod
    def forward(ctx, projected, hidden, weight, bias):
        seq, batch, _ = projected.shape
        size = hidden.shape[-1]
        packed = pack(weight)
        hiddens = projected.new_empty(seq + 1, batch, size)
        hiddens[0] = hidden
        gates = projected.new_empty(seq, batch, 2 * size)  # reset, update
        news = projected.new_empty(seq, batch, size)
        recurrent_news = projected.new_empty(seq, batch, size)  # what the reset gate lets through or not
        for step in range(seq):
            recurrent = multiply(hiddens[step], packed, bias)
            torch.add(projected[step, :, : 2 * size], recurrent[:, : 2 * size], out=gates[step])
            reset, update = gates[step].sigmoid_().chunk(2, dim=-1)
            recurrent_news[step] = recurrent[:, 2 * size :]
            torch.addcmul(projected[step, :, 2 * size :], reset, recurrent_news[step], out=news[step])
            torch.lerp(news[step].tanh_(), hiddens[step], update, out=hiddens[step + 1])
        ctx.save_for_backward(hiddens, gates, news, recurrent_news, weight)
        return hiddens[1:].clone() if ctx.needs_input_grad[1] else hiddens[1:]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        hiddens, gates, news, recurrent_news, weight = ctx.saved_tensors
        seq, batch, size = news.shape
        packed = pack(weight.detach().t().contiguous())
        resets, updates = gates.chunk(2, dim=-1)
        # What does not wait for the gradient of the next step: how the three gates pass on that of the hidden state.
        to_new = (1 - updates) * (1 - news.square())
        to_update = (hiddens[:-1] - news) * updates * (1 - updates)
        to_reset = recurrent_news * resets * (1 - resets)
        of_recurrent = torch.empty(seq, batch, 3 * size, dtype=news.dtype)
        of_news = torch.empty_like(news)
        of_hidden = torch.zeros_like(news[0])
        for step in reversed(range(seq)):
            of_hidden = of_hidden + gradient[step]
            of_reset, of_update, of_recurrent_new = of_recurrent[step].chunk(3, dim=-1)
            torch.mul(of_hidden, to_new[step], out=of_news[step])
            torch.mul(of_news[step], to_reset[step], out=of_reset)
            torch.mul(of_hidden, to_update[step], out=of_update)
            torch.mul(of_news[step], resets[step], out=of_recurrent_new)
            of_hidden = torch.addcmul(multiply(of_recurrent[step], packed), of_hidden, updates[step])
        of_projected = torch.cat([of_recurrent[..., : 2 * size], of_news], dim=-1) if ctx.needs_input_grad[0] else None
        of_recurrent = of_recurrent.flatten(0, 1)
        of_weight = large_linear(of_recurrent.t(), hiddens[:-1].flatten(0, 1).t()) if ctx.needs_input_grad[2] else None
        return of_projected, of_hidden, of_weight, of_recurrent.sum(0)


def takes_gru_function(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a GRU with the recurrent `weight` over `inputs` `(seq, batch, size)` runs as the function."""
    return (
        weight.shape[1] >= 128
        and inputs.shape[0] > 2
        and inputs.dtype == torch.float32
        and may_take("gru_function")
        and can_pack(inputs, weight)
    )


def run_gru(projected: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """
    The equations of `GRUCell` over a sequence without padding.

    Args:
        projected (`torch.Tensor` of shape `(seq, batch, 3 * hidden_size)`): What the inputs contribute to the gates.
        hidden (`torch.Tensor` of shape `(batch, hidden_size)`): The state before the first step.
        weight (`torch.Tensor` of shape `(3 * hidden_size, hidden_size)`): The recurrent weight.
        bias (`torch.Tensor` of shape `(3 * hidden_size,)`): Its bias.

    Returns:
        The hidden states `(seq, batch, hidden_size)` after each step.
    """
    return _GRU.apply(projected, hidden, weight, bias)
