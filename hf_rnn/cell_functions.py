"""Single steps on GPUs by torch's functions for cells. Imports the cells.

They are two products and one kernel for all that is behind them, where the equations of a cell are a dozen operations,
each of which takes longer to start than to run.
"""

import torch

from .fast_paths import are_plain, autocast_dtype, may_take, transforms_are_active
from .recurrent_cells import RecurrentCell, State


DEVICE_TYPE = "cuda"


def step_by_function(cell: RecurrentCell, inputs: torch.Tensor, state: State) -> State | None:
    """
    The state after a step of a cell by torch's function, None where that does not serve.

    Args:
        cell (`RecurrentCell`): The cell.
        inputs (`torch.Tensor` of shape `(batch, input_size)`): The inputs.
        state (`tuple` of `torch.Tensor` of shape `(batch, hidden_size)`): The state before it.
    """
    if (
        inputs.device.type != DEVICE_TYPE
        or cell.torch_kernel is None
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or not may_take("cell_functions")
        or transforms_are_active()
        # Under which it would bring the state to the type of products.
        or autocast_dtype(DEVICE_TYPE) is not None
    ):
        return None
    # Read once, as something may be computed where they are read.
    weights = cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh
    if not are_plain(*weights) or any(tensor.dtype != inputs.dtype for tensor in (*state, *weights)):
        return None
    function = getattr(torch, f"{cell.torch_kernel}_cell")
    if len(state) > 1:
        return tuple(function(inputs, state, *weights))
    return (function(inputs, state[0], *weights),)
