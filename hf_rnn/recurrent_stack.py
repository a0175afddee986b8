"""Stacks of recurrent layers: one behind the other, or on a GPU all in one call. Imports the layers and the kernels."""

from collections.abc import Sequence

import torch

from .fast_paths import autocast_dtype, is_watched, may_take
from .packed_sequences import PackedPadding
from .recurrent_cells import RecurrentCell, State
from .recurrent_kernels import call_torch_kernel, over_tokens, takes_torch_kernel
from .recurrent_layer import Padding, RecurrentLayer


# Where one call serves: cuDNN works on several layers at the same time, each some steps behind the one below.
DEVICE_TYPE = "cuda"


def run_layers(
    layers: Sequence[RecurrentLayer],
    hidden_states: torch.Tensor,
    states: Sequence[State | None],
    padding: Padding | None = None,
    needs_state: bool = True,
    needs_history: bool = False,
    needs_gates: bool = False,
) -> tuple[torch.Tensor, list[State | None], list[State | None]]:
    """
    A stack of layers over sequences.

    Args:
        layers (`Sequence[RecurrentLayer]`): The layers, of which each reads the output of the one before.
        hidden_states (`torch.Tensor` of shape `(batch, seq, input_size)`): The inputs of the first.
        states: For each layer what it starts from, see [`RecurrentLayer.forward`], which has the other arguments.

    Returns:
        The outputs `(batch, seq, output_size)` of the last layer, and for each layer its final states and its states
        after each position, as [`RecurrentLayer.forward`] returns them.
    """
    if hidden_states.device.type == DEVICE_TYPE and _takes_one_call(
        layers, hidden_states, padding, needs_state, needs_history, needs_gates
    ):
        return _run_in_one_call(layers, hidden_states, states, padding, needs_state)
    new_states, histories = [], []
    for layer, state in zip(layers, states):
        hidden_states, new_state, history = layer(
            hidden_states, state, padding, needs_state, needs_history, needs_gates
        )
        new_states.append(new_state)
        histories.append(history)
    return hidden_states, new_states, histories


def _takes_one_call(layers, inputs, padding, needs_state, needs_history, needs_gates) -> bool:
    if needs_history or needs_gates:
        return False
    # A compiler cannot look into the context variable behind the fast paths.
    if torch.compiler.is_compiling() or not may_take("stacked_layers"):
        return False
    # No layer but the last would hold its state at padding.
    if padding is not None and (needs_state or isinstance(padding, PackedPadding)):
        return False
    if not all(type(layer) is RecurrentLayer and _does_nothing_else(layer) for layer in layers):
        return False
    # Its fastest algorithms in float16, which keep the weights of a step on the chip, take one layer at a time.
    if len(layers) > 1 and (autocast_dtype(DEVICE_TYPE) or inputs.dtype) == torch.float16:
        return False
    if padding is not None and layers[0].cell_reverse is not None:  # each direction reads it in an order of its own
        return False
    first, *others = cells = [cell for layer in layers for cell in layer.cells]
    if not isinstance(first, RecurrentCell) or any(type(cell) is not type(first) for cell in others):
        return False
    return takes_torch_kernel(first, inputs, (), needs_history) and not any(map(is_watched, cells))


def _does_nothing_else(layer: RecurrentLayer) -> bool:
    """Whether a layer is nothing but its recurrence, and nobody watches it."""
    if layer.residual or is_watched(layer) or is_watched(layer.recorded):
        return False
    return not (layer.training and (layer.input_dropout or layer.recurrent_dropout or layer.gradient_checkpointing))


def _run_in_one_call(layers, inputs, states, padding, needs_state):
    """[`run_layers`] by one call of torch's kernel."""
    cells = [cell for layer in layers for cell in layer.cells]
    state = None
    is_given = any(of_layer is not None for of_layer in states)
    if (
        padding is not None
        or is_given
        or any(type(cell).initial_state is not RecurrentCell.initial_state for cell in cells)
    ):
        state = sum(
            (layer.initial_state(inputs) if of_layer is None else of_layer for layer, of_layer in zip(layers, states)),
            (),
        )

    def run(inputs):
        return call_torch_kernel(cells, inputs, state, num_layers=len(layers))

    nothing = [None] * len(layers)
    if padding is not None:
        outputs, _, _ = over_tokens(run, inputs, state[-len(layers[0].state_sizes)], padding)
        return layers[-1].recorded(outputs), nothing, nothing
    outputs, final = run(inputs)
    size = len(layers[0].state_sizes)
    new_states = [final[start : start + size] for start in range(0, len(final), size)] if needs_state else nothing
    return layers[-1].recorded(outputs), new_states, nothing
