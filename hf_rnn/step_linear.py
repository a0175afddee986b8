"""Products of one weight with the states of many steps, in loops that are trained. Imports the products of oneDNN.

In a loop over time autograd would, at each step, read the weight in an order that suits it badly and add a gradient of
its size to the sum so far. Here the weight is packed once for the loop, and the factors of its gradient are kept, so
that one product makes the gradient after the last step. The loop itself stays an ordinary loop.
"""

import torch
from torch.nn import functional as F

from .fast_paths import may_take
from .large_products import weight_gradient
from .packed_linear import can_pack, multiply, pack
from .recurrent_cells import Linear


class _Weights:
    """A weight and a bias, packed for both directions, and the factors of their gradients so far."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.packed = pack(weight)
        self.bias = None if bias is None else bias.detach()
        self.source = weight
        self._transposed: torch.Tensor | None = None
        self.inputs: list[torch.Tensor] = []
        self.gradients: list[torch.Tensor] = []

    @property
    def transposed(self) -> torch.Tensor:
        """The packed transposed weight, for the gradients of inputs."""
        if self._transposed is None:
            self._transposed = pack(self.source.detach().t().contiguous())
        return self._transposed


class _Collect(torch.autograd.Function):
    """Stands before all steps, so that its backward runs when theirs are done, and makes the gradient of the weight."""

    @staticmethod
    def forward(ctx, weight, bias, weights):
        ctx.weights = weights
        ctx.has_bias = bias is not None
        return weight.new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _):
        inputs, gradients = torch.cat(ctx.weights.inputs), torch.cat(ctx.weights.gradients)
        ctx.weights.inputs, ctx.weights.gradients = [], []
        of_weight = weight_gradient(gradients, inputs) if ctx.needs_input_grad[0] else None
        return of_weight, gradients.sum(0) if ctx.has_bias else None, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, before, weights):
        ctx.weights = weights
        ctx.save_for_backward(inputs)
        return multiply(inputs, weights.packed, weights.bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (inputs,) = ctx.saved_tensors
        gradient = gradient.contiguous()
        if ctx.needs_input_grad[1]:
            ctx.weights.inputs.append(inputs)
            ctx.weights.gradients.append(gradient)
        of_inputs = multiply(gradient, ctx.weights.transposed) if ctx.needs_input_grad[0] else None
        return of_inputs, gradient.new_zeros(()) if ctx.needs_input_grad[1] else None, None


class StepLinear:
    """
    `F.linear` for the steps of one loop over time: to be called with `(batch, size)` and a few weights, again and
    again. The weights must not change while it is in use.
    """

    def __init__(self):
        self._known: dict[int, tuple[_Weights, torch.Tensor]] = {}

    def __call__(self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        # A weight with a history (of a parametrization) is another one at each step.
        if weight.grad_fn is not None or not can_pack(inputs, weight):
            return F.linear(inputs, weight, bias)
        if id(weight) not in self._known:
            weights = _Weights(weight, bias)
            self._known[id(weight)] = weights, _Collect.apply(weight, bias, weights)
        weights, before = self._known[id(weight)]
        return _Step.apply(inputs, before, weights)


def step_linear(inputs: torch.Tensor, num_steps: int) -> Linear:
    """What stands for `F.linear` in a loop of `num_steps` steps over `inputs` `(batch, ...)`."""
    pays = (
        num_steps > 2
        and inputs.device.type == "cpu"
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and may_take("step_linear")
    )
    return StepLinear() if pays else F.linear
