"""Derivatives of higher order for functions whose gradient is written by hand. Imports nothing of the package."""

from collections.abc import Callable, Sequence

import torch


def gradients_with_graph(
    function: Callable[..., torch.Tensor | list[torch.Tensor]],
    tensors: Sequence[torch.Tensor],
    needed: Sequence[bool],
    gradient: torch.Tensor | list[torch.Tensor],
) -> list[torch.Tensor | None]:
    """
    The gradients of `tensors` from the `gradient` of what a function makes of them, by autograd and with a graph of
    their own: what a backward returns where derivatives of higher order are asked for (`create_graph=True`).

    Args:
        function: What the forward computes, in operations that autograd knows.
        tensors (`Sequence` of `torch.Tensor`): Its arguments.
        needed (`Sequence` of `bool`): For each of them whether its gradient is asked for.
        gradient (`torch.Tensor` or a list of them): The gradient of what the function returns.

    Returns:
        For each of `tensors` its gradient, None where it is not needed and where the function does not depend on it.
    """
    # Under names of their own: one of them may have been computed from another one, which is no part of the function.
    tensors = [tensor.view_as(tensor) for tensor in tensors]
    leaves = [tensor for tensor, is_needed in zip(tensors, needed) if is_needed]
    found = iter(torch.autograd.grad(function(*tensors), leaves, gradient, create_graph=True, allow_unused=True))
    return [next(found) if is_needed else None for is_needed in needed]
