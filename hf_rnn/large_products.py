"""Large matrix products in float32 on CPUs, by oneDNN. Imports the layouts of weights.

Torch takes another library for them, which reaches about half of that on many CPUs.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from .fast_paths import are_plain, is_faster, may_measure, may_take, transforms_are_active
from .weight_layouts import by_onednn, can_pack, has_onednn


# Multiplications of a product, and the shortest of its three sides, from which on oneDNN is the faster one.
LARGE, SHORTEST = 2**21, 32


def is_large(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a product of `inputs` `(..., in)` and a weight `[out, in]` is worth the call."""
    width_out, width_in = weight.shape
    rows = inputs.numel() // max(width_in, 1)
    return min(rows, width_in, width_out) >= SHORTEST and rows * weight.numel() >= LARGE


@functools.cache
def onednn_pays(num_threads: int) -> bool:
    """Whether oneDNN is the faster library for large products here; measured once, in milliseconds."""
    if not has_onednn(torch.float32):
        return False
    with torch.no_grad():
        inputs, weight = (torch.full((rows, 512), 0.5, dtype=torch.float32, device="cpu") for rows in (256, 1024))
        return is_faster(lambda: by_onednn(inputs, weight), lambda: F.linear(inputs, weight))


def takes_onednn(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether [`large_linear`] takes oneDNN."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        # Neither what is sharded or quantised, nor what a transformation of functions wraps.
        and are_plain(inputs, weight)
        and not transforms_are_active()
        and inputs.dtype == torch.float32
        and may_take("large_products")
        and is_large(inputs, weight)
        and can_pack(inputs, weight)
        and may_measure()
        and onednn_pays(torch.get_num_threads())
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, weight, bias):
        ctx.save_for_backward(inputs, weight)
        return by_onednn(inputs, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        return linear_gradients(gradient, *ctx.saved_tensors, ctx.needs_input_grad)


def large_linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` of inputs `(..., in)` and a weight `[out, in]`, with gradients of any order."""
    if not takes_onednn(inputs, weight):
        return F.linear(inputs, weight, bias)
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        # With gaps between its rows oneDNN takes a plain loop, a thousand times as slow.
        weight = weight.contiguous()
    needs_graph = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (inputs, weight, bias)
    )
    return (_Linear.apply if needs_graph else by_onednn)(inputs, weight, bias)


def weight_gradient(gradients: torch.Tensor, inputs: torch.Tensor, linear: Callable = large_linear) -> torch.Tensor:
    """
    The gradient `[out, in]` of a weight, from those of its product `[rows, out]` and what it was multiplied with
    `[rows, in]`. One of the two is copied, column by column: the smaller one, where that is worth its while.
    """
    if gradients.shape[1] < 2 * inputs.shape[1]:
        return linear(gradients.t(), inputs.t())
    return linear(inputs.t(), gradients.t()).t()


def linear_gradients(
    gradient: torch.Tensor,
    inputs: torch.Tensor,
    weight: torch.Tensor,
    needed: Sequence[bool],
    linear: Callable = large_linear,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """
    The gradients of inputs `(..., in)`, weight `[out, in]` and bias from the `gradient` `(..., out)` of their linear
    map; None for those that are not `needed`. Products are made by `linear`.
    """
    of_inputs = of_weight = None
    rows = gradient.flatten(0, -2)
    with torch.autocast("cpu", enabled=False):
        if needed[0]:
            of_inputs = linear(gradient, weight.t())
        if needed[1]:
            of_weight = weight_gradient(rows, inputs.flatten(0, -2), linear)
    return of_inputs, of_weight, rows.sum(0) if needed[2] else None
