"""GRUs and plain RNNs over a whole sequence as one autograd function, on CPUs. Imports the layouts of weights and
large products.

Torch's own go through autograd step by step there, and through the slower of two libraries for their products. Here
time comes first, so that each step lies in one piece. What can wait for its step does, and few copies are made: an
operation of a step finds its numbers in the caches of the processor, one over all steps does not.
"""

from collections.abc import Callable, Sequence

import torch

from .fast_paths import may_take, transforms_are_active
from .higher_derivatives import gradients_with_graph
from .hyperbolic_tangent import tanh_
from .large_products import large_linear, linear_gradients
from .weight_layouts import PLAIN, in_fastest_layout, layout_for, multiply


tanh_backward, sigmoid_backward = torch.ops.aten.tanh_backward.grad_input, torch.ops.aten.sigmoid_backward.grad_input
threshold_backward = torch.ops.aten.threshold_backward.grad_input


def _befores_and_afters(hidden: torch.Tensor, seq: int, reverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Views `[seq, batch, size]` of one piece of memory: the hidden states before and after each step, to be filled."""
    hiddens = hidden.new_empty(seq + 1, *hidden.shape)
    hiddens[seq if reverse else 0] = hidden
    return (hiddens[1:], hiddens[:-1]) if reverse else (hiddens[:-1], hiddens[1:])


def _in_order(steps: list, reverse: bool) -> list:
    return steps[::-1] if reverse else steps


def _linear_with(weight: torch.Tensor, inputs: torch.Tensor) -> Callable:
    """`F.linear` of many inputs like these with one weight, in the layout that is the fastest."""
    packed = in_fastest_layout(inputs, weight)
    return lambda inputs, bias=None: multiply(inputs, packed, bias)


def _backward(ctx, gradient: torch.Tensor, gradients: Callable) -> tuple[torch.Tensor | None, ...]:
    """`gradients(ctx, gradient)`; by torch's own kernel where derivatives of higher order are asked for."""
    if not torch.is_grad_enabled():
        with torch.autocast("cpu", enabled=False):  # as in the forward
            return gradients(ctx, gradient)

    def run(inputs, hidden, *weights):
        in_order = inputs.flip(0) if ctx.reverse else inputs
        kernel = getattr(torch._VF, ctx.kernel)
        outputs, _ = kernel(in_order, hidden.unsqueeze(0), weights, True, 1, 0.0, True, False, False)
        return outputs.flip(0) if ctx.reverse else outputs

    found = gradients_with_graph(run, ctx.saved_tensors[:6], ctx.needs_input_grad[:6], gradient)
    return *found, None, None


def _steps(*sequences: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """The parts of sequences, step by step."""
    return list(zip(*(sequence.unbind() for sequence in sequences)))


def _gate_steps(gates: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """For each step of gates `[seq, batch, 3 * size]` the first two of them in one, then each of the three."""
    reset, update, new = gates.chunk(3, dim=-1)
    return _steps(gates[..., : -new.shape[-1]], reset, update, new)


class _GRU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, hidden, weight_ih, weight_hh, bias_ih, bias_hh, reverse, kernel):
        seq, batch, _ = inputs.shape
        size = hidden.shape[-1]
        # Each step puts its gates (reset, update, new) in the place of what the inputs contribute to them.
        gates = large_linear(inputs, weight_ih, bias_ih)
        befores, afters = _befores_and_afters(hidden, seq, reverse)
        recurrent_news = gates.new_empty(seq, batch, size)  # what the reset gate lets through or not
        linear = _linear_with(weight_hh, hidden)
        steps = list(zip(_gate_steps(gates), _steps(recurrent_news, befores, afters)))
        for (both, reset, update, new), (recurrent_new, before, after) in _in_order(steps, reverse):
            of_both, of_new = linear(before, bias_hh).split_with_sizes([2 * size, size], dim=-1)
            both.add_(of_both).sigmoid_()
            recurrent_new.copy_(of_new)
            tanh_(new.addcmul_(reset, recurrent_new))
            torch.lerp(new, before, update, out=after)
        ctx.save_for_backward(inputs, hidden, weight_ih, weight_hh, bias_ih, bias_hh, befores, gates, recurrent_news)
        ctx.reverse, ctx.kernel = reverse, kernel
        return afters.clone() if ctx.needs_input_grad[1] else afters

    @staticmethod
    def backward(ctx, gradient):
        return _backward(ctx, gradient, _GRU._gradients)

    @staticmethod
    def _gradients(ctx, gradient):
        inputs, hidden, weight_ih, weight_hh, _, _, befores, gates, recurrent_news = ctx.saved_tensors
        size = hidden.shape[-1]
        of_gates, of_news = torch.empty_like(gates), torch.empty_like(recurrent_news)
        of_hidden = torch.zeros_like(hidden)
        linear = _linear_with(weight_hh.t(), of_gates[0])
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
        ) in _in_order(steps, not ctx.reverse):
            of_hidden.add_(of_after)
            tanh_backward(torch.addcmul(of_hidden, of_hidden, update, value=-1), new, grad_input=of_new)
            torch.mul(of_new, recurrent_new, out=of_reset)
            torch.mul(before - new, of_hidden, out=of_update)
            sigmoid_backward(of_both, both, grad_input=of_both)
            torch.mul(of_new, reset, out=of_product)
            of_hidden = linear(of_recurrent).addcmul_(of_hidden, update)
        needs_inputs, _, needs_weight_ih, needs_weight_hh, needs_bias_ih, needs_bias_hh = ctx.needs_input_grad[:6]
        needed = (False, needs_weight_hh, needs_bias_hh)
        _, of_weight_hh, of_bias_hh = linear_gradients(of_gates, befores, weight_hh, needed)
        needed = (needs_inputs, needs_weight_ih, needs_bias_ih)
        if any(needed):
            # From here on the gradients of what the inputs contribute, which the reset gate does not touch.
            of_gates[..., 2 * size :] = of_news
        of_inputs, of_weight_ih, of_bias_ih = linear_gradients(of_gates, inputs, weight_ih, needed)
        return of_inputs, of_hidden, of_weight_ih, of_weight_hh, of_bias_ih, of_bias_hh, None, None


class _RNN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, hidden, weight_ih, weight_hh, bias_ih, bias_hh, reverse, kernel):
        projected = large_linear(inputs, weight_ih, bias_ih)
        befores, afters = _befores_and_afters(hidden, len(inputs), reverse)
        linear = _linear_with(weight_hh, hidden)
        for part, before, after in _in_order(_steps(projected, befores, afters), reverse):
            torch.add(part, linear(before, bias_hh), out=after)
            after.relu_() if kernel == "rnn_relu" else tanh_(after)
        ctx.save_for_backward(inputs, hidden, weight_ih, weight_hh, bias_ih, bias_hh, befores, afters)
        ctx.reverse, ctx.kernel = reverse, kernel
        return afters.clone() if ctx.needs_input_grad[1] else afters

    @staticmethod
    def backward(ctx, gradient):
        return _backward(ctx, gradient, _RNN._gradients)

    @staticmethod
    def _gradients(ctx, gradient):
        inputs, hidden, weight_ih, weight_hh, _, _, befores, afters = ctx.saved_tensors
        of_sums = torch.empty_like(afters)
        of_hidden = torch.zeros_like(hidden)
        linear = _linear_with(weight_hh.t(), of_sums[0])
        for after, of_after, of_sum in _in_order(_steps(afters, gradient, of_sums), not ctx.reverse):
            of_hidden.add_(of_after)
            if ctx.kernel == "rnn_relu":
                threshold_backward(of_hidden, after, 0, grad_input=of_sum)
            else:
                tanh_backward(of_hidden, after, grad_input=of_sum)
            of_hidden = linear(of_sum)
        needs_inputs, _, needs_weight_ih, needs_weight_hh, needs_bias_ih, needs_bias_hh = ctx.needs_input_grad[:6]
        needed = (needs_inputs, needs_weight_ih, needs_bias_ih)
        of_inputs, of_weight_ih, of_bias_ih = linear_gradients(of_sums, inputs, weight_ih, needed)
        needed = (False, needs_weight_hh, needs_bias_hh)
        _, of_weight_hh, of_bias_hh = linear_gradients(of_sums, befores, weight_hh, needed)
        return of_inputs, of_hidden, of_weight_ih, of_weight_hh, of_bias_ih, of_bias_hh, None, None


# For kernels of torch, the function that stands in their place.
_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {"gru": _GRU, "rnn_tanh": _RNN, "rnn_relu": _RNN}


def takes_function(kernel: str, inputs: torch.Tensor, hidden: torch.Tensor, weights: Sequence[torch.Tensor]) -> bool:
    """Whether torch's `kernel` over `inputs` `(seq, batch, size)`, from `hidden` `(batch, size)`, is done here."""
    weight = weights[1]
    serves = (
        kernel in _FUNCTIONS
        and inputs.shape[0] > 2
        and inputs.device.type == "cpu"
        and inputs.dtype == weight.dtype == torch.float32
        and may_take("sequence_functions")
        and not torch.is_autocast_enabled("cpu")
        and not transforms_are_active()
    )
    if not serves:
        return False
    # Without a graph of all steps, torch's kernel is as fast but for its products.
    keeps_graph = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (inputs, hidden, *weights))
    return keeps_graph or layout_for(hidden, weight) != PLAIN


def run_function(
    kernel: str,
    inputs: torch.Tensor,
    hidden: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias_ih: torch.Tensor,
    bias_hh: torch.Tensor,
    reverse: bool = False,
) -> torch.Tensor:
    """
    The equations of `GRUCell`, `RNNTanhCell` or `RNNReLUCell` over a sequence without padding.

    Args:
        kernel (`str`): `"gru"`, `"rnn_tanh"` or `"rnn_relu"`, as torch calls them.
        inputs (`torch.Tensor` of shape `(seq, batch, input_size)`): The inputs.
        hidden (`torch.Tensor` of shape `(batch, hidden_size)`): The state before the first step.
        weight_ih, weight_hh, bias_ih, bias_hh (`torch.Tensor`): The parameters of the cell.
        reverse (`bool`): Whether to read from right to left.

    Returns:
        The hidden states `(seq, batch, hidden_size)` after each step, each at the place of its input.
    """
    return _FUNCTIONS[kernel].apply(inputs, hidden, weight_ih, weight_hh, bias_ih, bias_hh, reverse, kernel)
