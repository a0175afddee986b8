"""Tanh, where torch takes it from a library that is slow on the processor at hand. Imports the fast paths.

Torch computes it on CPUs with Intel's MKL, which goes a slow way on the processors of others. There a sigmoid, which
torch computes by itself, is several times as fast.
"""

import functools

import torch

from .fast_paths import are_plain, is_faster, may_measure, may_take, transforms_are_active


# Fewer numbers are not worth four operations in place of one.
FEWEST = 2**13


def _through_sigmoid_(numbers: torch.Tensor) -> torch.Tensor:
    """tanh(x) = 2 sigmoid(2x) - 1, in place: in float32 2e-7 from the truth at most."""
    return numbers.mul_(2).sigmoid_().mul_(2).sub_(1)


def _through_sigmoid(inputs: torch.Tensor) -> torch.Tensor:
    if inputs.dtype.itemsize < 4:
        # Near zero the sigmoid would keep few digits of what a narrow type has.
        return _through_sigmoid_(inputs.float()).to(inputs.dtype)
    return torch.mul(inputs, 2).sigmoid_().mul_(2).sub_(1)


@functools.cache
def sigmoid_pays(dtype: torch.dtype) -> bool:
    """Whether the way through the sigmoid is the faster one here in this type; measured once, in milliseconds."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    with torch.no_grad():
        numbers = torch.linspace(-4, 4, 2**15).to(dtype)
        return is_faster(lambda: _through_sigmoid(numbers), lambda: torch.tanh(numbers))


def _takes_sigmoid(inputs: torch.Tensor) -> bool:
    # First of all what keeps the others, which depend on shapes, out of the graphs of compilers and exporters.
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and inputs.numel() >= FEWEST
        and inputs.device.type == "cpu"
        and are_plain(inputs)
        and may_take("tanh_by_sigmoid")
        and not transforms_are_active()
        and may_measure()
        and sigmoid_pays(inputs.dtype)
    )


class _Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs):
        outputs = _through_sigmoid(inputs)
        ctx.save_for_backward(outputs)
        ctx.save_for_forward(outputs)
        return outputs

    @staticmethod
    def backward(ctx, gradient):
        (outputs,) = ctx.saved_tensors
        return torch.ops.aten.tanh_backward(gradient, outputs)

    @staticmethod
    def jvp(ctx, tangent):
        (outputs,) = ctx.saved_tensors
        return torch.ops.aten.tanh_backward(tangent, outputs)


def _keeps_graph(inputs: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and inputs.requires_grad


def tanh(inputs: torch.Tensor) -> torch.Tensor:
    """`torch.tanh` on the fastest path that serves, with derivatives of any order."""
    if not _takes_sigmoid(inputs):
        return torch.tanh(inputs)
    return _Tanh.apply(inputs) if _keeps_graph(inputs) else _through_sigmoid(inputs)


def tanh_(inputs: torch.Tensor) -> torch.Tensor:
    """The same in place; in a new tensor where a graph is kept or the type is narrow."""
    if not _takes_sigmoid(inputs):
        return inputs.tanh_()
    return tanh(inputs) if _keeps_graph(inputs) or inputs.dtype.itemsize < 4 else _through_sigmoid_(inputs)
