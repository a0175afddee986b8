"""A GRU over a whole sequence as one autograd function, on CPUs. Imports the products of oneDNN.

Torch's own GRU goes through autograd step by step there, and through the slower of two libraries for its products.
"""

import torch

from .fast_paths import may_take
from .hyperbolic_tangent import tanh_
from .large_products import large_linear, weight_gradient
from .packed_linear import can_pack, multiply, pack


tanh_backward, sigmoid_backward = torch.ops.aten.tanh_backward.grad_input, torch.ops.aten.sigmoid_backward.grad_input


def _steps(*sequences: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """The parts of sequences, step by step."""
    return list(zip(*(sequence.unbind() for sequence in sequences)))


def _gate_steps(gates: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """For each step of gates `[seq, batch, 3 * size]` the first two of them in one, then each of the three."""
    reset, update, new = gates.chunk(3, dim=-1)
    return _steps(gates[..., : -new.shape[-1]], reset, update, new)


class _GRU(torch.autograd.Function):
    """
    Time comes first here, so that each step lies in one piece. What can wait for its step does, and few copies are made
    of the gates: an operation of a step finds its numbers in the caches of the processor, one over all steps does not.
    """

    @staticmethod
    def forward(ctx, inputs, hidden, weight_ih, weight_hh, bias_ih, bias_hh, reverse):
        seq, batch, _ = inputs.shape
        size = hidden.shape[-1]
        # Each step puts its gates (reset, update, new) in the place of what the inputs contribute to them.
        gates = large_linear(inputs, weight_ih, bias_ih)
        hiddens = gates.new_empty(seq + 1, batch, size)
        hiddens[seq if reverse else 0] = hidden
        befores, afters = (hiddens[1:], hiddens[:-1]) if reverse else (hiddens[:-1], hiddens[1:])
        recurrent_news = gates.new_empty(seq, batch, size)  # what the reset gate lets through or not
        packed = pack(weight_hh)
        steps = list(zip(_gate_steps(gates), _steps(recurrent_news, befores, afters)))
        for (both, reset, update, new), (recurrent_new, before, after) in reversed(steps) if reverse else steps:
            of_both, of_new = multiply(before, packed, bias_hh).split_with_sizes([2 * size, size], dim=-1)
            both.add_(of_both).sigmoid_()
            recurrent_new.copy_(of_new)
            tanh_(new.addcmul_(reset, recurrent_new))
            torch.lerp(new, before, update, out=after)
        ctx.save_for_backward(inputs, befores, gates, recurrent_news, weight_ih, weight_hh)
        ctx.reverse = reverse
        return afters.clone() if ctx.needs_input_grad[1] else afters

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        inputs, befores, gates, recurrent_news, weight_ih, weight_hh = ctx.saved_tensors
        size = befores.shape[-1]
        packed = pack(weight_hh.detach().t().contiguous())
        of_gates, of_news = torch.empty_like(gates), torch.empty_like(recurrent_news)
        of_hidden = torch.zeros_like(of_news[0])
        steps = list(
            zip(
                _gate_steps(gates),
                _steps(recurrent_news, befores, gradient),
                _gate_steps(of_gates),
                _steps(of_gates, of_news),
            )
        )
        for (
            (both, reset, update, new),
            (recurrent_new, before, of_after),
            (of_both, of_reset, of_update, of_product),
            (of_recurrent, of_new),
        ) in steps if ctx.reverse else reversed(steps):
            of_hidden.add_(of_after)
            tanh_backward(torch.addcmul(of_hidden, of_hidden, update, value=-1), new, grad_input=of_new)
            torch.mul(of_new, recurrent_new, out=of_reset)
            torch.mul(before - new, of_hidden, out=of_update)
            sigmoid_backward(of_both, both, grad_input=of_both)
            torch.mul(of_new, reset, out=of_product)
            of_hidden = multiply(of_recurrent, packed).addcmul_(of_hidden, update)
        needs_inputs, _, needs_weight_ih, needs_weight_hh, needs_bias_ih, needs_bias_hh = ctx.needs_input_grad[:6]
        of_inputs = of_weight_ih = of_weight_hh = of_bias_ih = of_bias_hh = None
        with torch.autocast("cpu", enabled=False):
            rows = of_gates.flatten(0, 1)
            if needs_weight_hh:
                of_weight_hh = weight_gradient(rows, befores.flatten(0, 1))
            if needs_bias_hh:
                of_bias_hh = rows.sum(0)
            if needs_inputs or needs_weight_ih or needs_bias_ih:
                # From here on the gradients of what the inputs contribute, which the reset gate does not touch.
                of_gates[..., 2 * size :] = of_news
            if needs_inputs:
                of_inputs = large_linear(of_gates, weight_ih.t())
            if needs_weight_ih:
                of_weight_ih = weight_gradient(rows, inputs.flatten(0, 1))
            if needs_bias_ih:
                of_bias_ih = rows.sum(0)
        return of_inputs, of_hidden, of_weight_ih, of_weight_hh, of_bias_ih, of_bias_hh, None


def takes_gru_function(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a GRU with the recurrent `weight` over `inputs` `(seq, batch, size)` runs as the function."""
    return (
        weight.shape[1] >= 128
        and inputs.shape[0] > 2
        and inputs.dtype == torch.float32
        and may_take("gru_function")
        and can_pack(inputs, weight)
    )


def run_gru(
    inputs: torch.Tensor,
    hidden: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias_ih: torch.Tensor,
    bias_hh: torch.Tensor,
    reverse: bool = False,
) -> torch.Tensor:
    """
    The equations of `GRUCell` over a sequence without padding.

    Args:
        inputs (`torch.Tensor` of shape `(seq, batch, input_size)`): The inputs.
        hidden (`torch.Tensor` of shape `(batch, hidden_size)`): The state before the first step.
        weight_ih, weight_hh, bias_ih, bias_hh (`torch.Tensor`): The parameters of the cell.
        reverse (`bool`): Whether to read from right to left.

    Returns:
        The hidden states `(seq, batch, hidden_size)` after each step, each at the place of its input.
    """
    return _GRU.apply(inputs, hidden, weight_ih, weight_hh, bias_ih, bias_hh, reverse)
