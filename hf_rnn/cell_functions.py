"""Single steps on GPUs by torch's functions for cells. Imports the cells.

They are two products and one kernel for all that is behind them, where the equations of a cell are a dozen operations,
each of which takes longer to start than to run.
"""

import torch
from torch import nn

from .fast_paths import autocast_dtype, may_take, transforms_are_active
from .recurrent_cells import RecurrentCell, State


DEVICE_TYPE = "cuda"


def takes_cell_function(cell: RecurrentCell, inputs: torch.Tensor, state: State) -> bool:
    """Whether torch's function serves for a step of a cell with `inputs` `(batch, ...)`."""
    return (
        inputs.device.type == DEVICE_TYPE
        and cell.torch_kernel is not None
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and may_take("cell_functions")
        and not transforms_are_active()
        # Under which it would bring the state to the type of products.
        and autocast_dtype(DEVICE_TYPE) is None
        and type(cell.weight_ih) in (torch.Tensor, nn.Parameter)
        and type(cell.weight_hh) in (torch.Tensor, nn.Parameter)
        and all(part.dtype == inputs.dtype for part in (*state, cell.weight_ih))
    )


def call_cell_function(cell: RecurrentCell, inputs: torch.Tensor, state: State) -> State:
    """The state after a step of a cell, for which [`takes_cell_function`] is true, with `inputs` `(batch, size)`."""
    function = getattr(torch, f"{cell.torch_kernel}_cell")
    weights = cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh
    if len(state) > 1:
        return tuple(function(inputs, state, *weights))
    return (function(inputs, state[0], *weights),)
