"""Linear modules on the fastest path for their products. Imports the products."""

import torch
from torch import nn

from .fast_paths import is_watched, may_take
from .large_products import large_linear
from .linear_operator import linear_in_graph, takes_operator
from .packed_linear import packed_linear


# More rows read a weight often enough without a copy of it.
MANY_ROWS = 1024


def apply_linear(module: nn.Module, inputs: torch.Tensor, step_linear=None) -> torch.Tensor:
    """
    `module(inputs)` on the fastest path where it is just an `nn.Linear` (no adapter, no hook): on `step_linear` where
    that is given and there are few rows, as in the steps of a loop.
    """
    if type(module) is not nn.Linear or is_watched(module):
        return module(inputs)
    if torch.compiler.is_compiling():  # a graph is not to depend on the number of rows
        takes = takes_operator(inputs, module.weight, module.bias)
        return linear_in_graph(inputs, module.weight, module.bias) if takes else module(inputs)
    linear = (large_linear if torch.is_grad_enabled() else packed_linear) if step_linear is None else step_linear
    if inputs.numel() > MANY_ROWS * module.in_features:
        linear = large_linear
    return linear(inputs, module.weight, module.bias)


def is_just_linear(module: nn.Module) -> bool:
    """Whether no more than a product happens in a module without a bias: no adapter, no hook; and no graph is made."""
    is_linear = type(module) is nn.Linear and module.bias is None and type(module.weight) is nn.Parameter
    return is_linear and not torch.compiler.is_compiling() and not is_watched(module)


def apply_transposed(module: nn.Linear, inputs: torch.Tensor) -> torch.Tensor | None:
    """`inputs @ module.weight`, or None where more than a product happens in the module, and in graphs."""
    if not (is_just_linear(module) and may_take("keys_for_plain_queries")):
        return None
    return large_linear(inputs, module.weight.t())
