"""Products of one weight with the states of many steps, in loops that are trained. Imports the layouts of weights and
large products.

In a loop over time autograd would, at each step, read the weight in an order that suits it badly and add a gradient of
its size to the sum so far. Here the weight is brought into the fastest layout once for the loop, and the factors of its
gradient are kept, so that one product makes the gradient after the last step. The loop itself stays an ordinary loop,
with derivatives of any order.
"""

import torch
from torch import nn
from torch.autograd import Variable
from torch.nn import functional as F

from .fast_paths import autocast_dtype, current_backward, may_take, transforms_are_active
from .large_products import weight_gradient
from .recurrent_cells import Linear
from .weight_layouts import can_pack, in_fastest_layout, is_large, multiply


class _Weights:
    """
    A weight and a bias, for both directions in the layout that is the fastest, and the factors of their gradients that
    a backward has met so far.
    """

    def __init__(self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
        self.weight, self.version = weight, weight._version
        self.source = weight.detach().to(inputs.dtype)
        self.packed = in_fastest_layout(inputs, self.source)
        self.bias = None if bias is None else bias.detach().to(inputs.dtype)
        self._transposed: torch.Tensor | None = None
        self.backward: int | None = None
        self.inputs: list[torch.Tensor] = []
        self.gradients: list[torch.Tensor] = []

    def collect(self, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
        """Keeps the factors of one step; those of another backward, which did not ask for the weight, are dropped."""
        if self.backward != current_backward():
            self.backward, self.inputs, self.gradients = current_backward(), [], []
            if torch.is_grad_enabled():
                # They have a graph of which this is a part: nobody else could ever free them.
                Variable._execution_engine.queue_callback(self.forget)
        self.inputs.append(inputs)
        self.gradients.append(gradient)

    def forget(self) -> None:
        """Drops what was kept for the gradient of the weight."""
        self.inputs, self.gradients = [], []

    def multiply(self, inputs: torch.Tensor) -> torch.Tensor:
        return multiply(inputs, self.packed, self.bias)

    def multiply_transposed(self, gradient: torch.Tensor) -> torch.Tensor:
        if self.weight._version != self.version:
            raise RuntimeError("A weight was modified in place between a forward and its backward.")
        if not torch.is_grad_enabled():
            if self._transposed is None:
                self._transposed = in_fastest_layout(gradient, self.source.t())
            return multiply(gradient, self._transposed)
        # Second derivatives are asked for, which need the weight itself.
        return F.linear(gradient, self.weight.to(gradient.dtype).t())


class _Collect(torch.autograd.Function):
    """Stands before all steps, so that its backward runs when theirs are done, and makes the gradient of the weight."""

    @staticmethod
    def forward(ctx, weight, bias, weights):
        ctx.weights = weights
        ctx.dtype, ctx.has_bias = weight.dtype, bias is not None
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        inputs, gradients = torch.cat(ctx.weights.inputs), torch.cat(ctx.weights.gradients)
        ctx.weights.forget()
        of_weight = weight_gradient(gradients, inputs).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return of_weight, gradients.sum(0, dtype=ctx.dtype) if ctx.has_bias else None, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, before, weights):
        ctx.weights = weights
        ctx.save_for_backward(inputs)
        return weights.multiply(inputs)

    @staticmethod
    def backward(ctx, gradient):
        (inputs,) = ctx.saved_tensors
        gradient = gradient.contiguous()
        if ctx.needs_input_grad[1]:
            ctx.weights.collect(inputs, gradient)
        # Nothing flows to what stands before all steps; it is called in any case, when all of them are done.
        return ctx.weights.multiply_transposed(gradient) if ctx.needs_input_grad[0] else None, None, None


class StepLinear:
    """
    `F.linear` for the steps of one loop over time: to be called with `(batch, size)` and a few weights, again and
    again. The weights must not change while it is in use.
    """

    def __init__(self):
        # With the weight, so that no other can get its number.
        self._known: dict[int, tuple[torch.Tensor, _Weights, torch.Tensor]] = {}

    def __call__(self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        device = inputs.device.type
        # What a parametrization computes is another weight at each step; it has a history, unless all is frozen.
        is_the_same = weight.grad_fn is None and (isinstance(weight, nn.Parameter) or weight.requires_grad)
        if not is_the_same or (device == "cpu" and not (is_large(inputs, weight) and can_pack(inputs, weight))):
            return F.linear(inputs, weight, bias)
        inputs = inputs.to(autocast_dtype(device) or weight.dtype)
        if id(weight) not in self._known:
            weights = _Weights(inputs, weight, bias)
            self._known[id(weight)] = weight, weights, _Collect.apply(weight, bias, weights)
        _, weights, before = self._known[id(weight)]
        return _Step.apply(inputs, before, weights)


def step_linear(inputs: torch.Tensor, num_steps: int) -> Linear:
    """What stands for `F.linear` in a loop of `num_steps` steps over `inputs` `(batch, ...)`."""
    pays = (
        num_steps > 2
        and inputs.device.type == "cpu"
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not transforms_are_active()
        and current_backward is not None
        and may_take("step_linear")
    )
    return StepLinear() if pays else F.linear
