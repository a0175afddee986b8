"""Products in code that calls `F.linear` itself, on the paths of the package. Imports the cells."""

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .recurrent_cells import Linear, RecurrentCell


class LinearCalls(TorchFunctionMode):
    """
    Within this context `linear` stands for `F.linear`, in modules too: for the equations of cells that a program adds,
    which know nothing of what is faster.
    """

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def __torch_function__(self, function, types, args=(), kwargs=None):
        # What is called `input` by its name has another one in the package.
        return (self.linear if function is F.linear and args else function)(*args, **kwargs or {})


def call_with_linear(function, inputs: torch.Tensor, linear) -> torch.Tensor:
    """`function(inputs)` with `linear` for its `F.linear`; as it is in the graph of a compiler or an exporter."""
    if linear is F.linear or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return function(inputs)
    with LinearCalls(linear):
        return function(inputs)


def project_inputs(cell: RecurrentCell, inputs: torch.Tensor, linear: Linear = F.linear) -> torch.Tensor:
    """`cell.project_inputs(inputs)`, with `linear` for its products."""
    if type(cell).project_inputs is not RecurrentCell.project_inputs:
        return call_with_linear(cell.project_inputs, inputs, linear)
    return linear(inputs, cell.weight_ih, cell.bias_ih)
