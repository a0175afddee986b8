"""Stacks of recurrent layers: one behind the other, or on a GPU all in one call. Imports the layers and the kernels."""

from collections.abc import Sequence

import torch

from .fast_paths import is_watched, may_take
from .packed_sequences import PackedPadding
from .recurrent_cells import RecurrentCell, State
from .recurrent_kernels import call_torch_kernel, over_tokens
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
    if len(layers) < 2 or inputs.shape[0] == 0 or inputs.shape[1] < 2:
        return False
    if needs_history or needs_gates or torch.compiler.is_compiling():
        return False
    if not (may_take("torch_kernel") and may_take("stacked_layers")):
        return False
    # Each direction reads a padded batch in an order of its own, and no layer but the last would hold its state there.
    if padding is not None and (needs_state or isinstance(padding, PackedPadding)):
        return False
    kind = None
    for layer in layers:
        if type(layer) is not RecurrentLayer or not _does_nothing_else(layer):
            return False
        if padding is not None and layer.cell_reverse is not None:
            return False
        kind = type(layer.cell) if kind is None else kind
        if any(type(cell) is not kind or is_watched(cell) for cell in layer.cells):
            return False
    return issubclass(kind, RecurrentCell) and kind.torch_kernel is not None


def _does_nothing_else(layer: RecurrentLayer) -> bool:
    """Whether a layer is nothing but its recurrence, and nobody watches it."""
    if layer.residual or is_watched(layer) or is_watched(layer.recorded):
        return False
    return not (layer.training and (layer.input_dropout or layer.recurrent_dropout or layer.gradient_checkpointing))


def _join_states(layers, inputs, states) -> State:
    """The states of all layers one behind the other, and where there are none those that they begin with."""
    if not any(states) and type(layers[0].cell).initial_state is RecurrentCell.initial_state:
        zeros = inputs.new_zeros(inputs.shape[0], layers[0].hidden_size)  # one for all of them, which are only read
        return (zeros,) * sum(len(layer.state_sizes) for layer in layers)
    return sum(
        (layer.initial_state(inputs) if of_layer is None else of_layer for layer, of_layer in zip(layers, states)), ()
    )


def _run_in_one_call(layers, inputs, states, padding, needs_state):
    """[`run_layers`] by one call of torch's kernel."""
    cells = [cell for layer in layers for cell in layer.cells]
    state = _join_states(layers, inputs, states)

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
