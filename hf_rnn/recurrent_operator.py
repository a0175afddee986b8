"""A layer's cells over a whole sequence as one operator, for graphs: `torch.compile`, `torch.export`, ONNX.

A compiler that looked into the loop over time would unroll it, anew for each length. It sees this operator instead,
with the shapes of its results and its gradient; at run time the operator runs what [`run_sequence`] runs without a
compiler. In ONNX it becomes one `LSTM`, `GRU` or `RNN` node, or a `Scan`. Imports the cells, what describes them, the
padding and what runs them.
"""

import contextlib
import threading
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import nn
from torch.func import functional_call

from .bare_cells import attributes_of, cell_class_of, describe, effects, is_as_compared, make_cell
from .fast_paths import autocast_dtype
from .opaque_operators import (
    NAMESPACE,
    Known,
    draw_seed,
    is_trained,
    is_transformed,
    let_graphs_ask,
    random_numbers_of,
    register_gradient,
)
from .packed_sequences import PackedPadding
from .recurrent_cells import RecurrentCell, State
from .recurrent_kernels import run_sequence
from .recurrent_onnx import in_onnx, in_scan
from .recurrent_padding import Padding


def _what_is_known(cell: RecurrentCell) -> Known:
    attributes, description, found = attributes_of(cell), describe(cell), effects(cell)
    if not description or found is None or found[1]:
        return Known(attributes=attributes)
    layer = _layer_for(description, cell.input_size, cell.hidden_size, 1)
    return Known(description, layer.weight_names[0], found[0], attributes)


let_graphs_ask(RecurrentCell, _what_is_known)


def run_sequence_opaquely(
    cells: Sequence[RecurrentCell],
    inputs: torch.Tensor,
    state: State,
    padding: Padding | None = None,
    kept: Sequence[torch.Tensor] = (),
    needs_state: bool = True,
    needs_history: bool = False,
    keeps: bool = True,
) -> tuple[torch.Tensor, State, None]:
    """
    [`run_sequence`] as one operator in the graph; `needs_history` must be False. Runs the loop in the graph where the
    operator would not do the same: the cell cannot be described, a step of it writes to its buffers, or a
    transformation of functions is to go through it. With `keeps` the forward may keep for the backward what it has
    computed.
    """
    are_known = all([is_as_compared(cell, cell._graph_numbers(), cell._graph_others()) for cell in cells])  # noqa: C419
    descriptions = [cell._graph_description() for cell in cells]
    if not are_known or not descriptions[0] or descriptions[0] != descriptions[-1] or is_transformed():
        return run_sequence(cells, inputs, state, padding, kept, needs_state, needs_history)
    weights = [attrgetter(name)(cell) for cell in cells for name in cell._graph_weight_names()]
    tensors = [inputs, *state, *weights, *kept]
    dtype = inputs.dtype
    if dtype != torch.float64:  # which autocast leaves as it is
        dtype = autocast_dtype(inputs.device.type) or dtype
    inputs, *others = (tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors)
    state, others = others[: len(state)], others[len(state) :]
    weights, kept = others[: len(weights)], others[len(weights) :]
    mask = None if padding is None else padding.mask
    starts = padding.starts if isinstance(padding, PackedPadding) else None
    seed = draw_seed(cells[0]._graph_draws())
    run = _for_training if keeps and is_trained([inputs, *state, *weights]) else recurrent_layer
    outputs, *final = run(inputs, state, weights, kept, mask, descriptions[0], starts, seed)
    return outputs, tuple(final), None


class _Layer(nn.Module):
    """Cells without weights of their own, to be called with those that the operator was given."""

    def __init__(self, description: str, input_size: int, hidden_size: int, num_directions: int):
        super().__init__()
        self.cells = nn.ModuleList(make_cell(description, input_size, hidden_size) for _ in range(num_directions))
        # For each cell the names of its parameters, then of its buffers.
        self.weight_names = [
            [name for name, _ in (*cell.named_parameters(), *cell.named_buffers())] for cell in self.cells
        ]

    def run(self, weights: Sequence[torch.Tensor], *arguments) -> list[torch.Tensor]:
        """The outputs and final states with these weights."""
        names = [f"cells.{index}.{name}" for index, names in enumerate(self.weight_names) for name in names]
        outputs, final = functional_call(self, dict(zip(names, weights, strict=True)), arguments)
        return [outputs, *final]

    def forward(self, inputs, state, padding, kept):
        return run_sequence(self.cells, inputs, state, padding, kept)[:2]


# One for each thread, because running it replaces its weights for that time.
_layers = threading.local()


def _layer_for(description: str, input_size: int, hidden_size: int, num_directions: int) -> _Layer:
    key = (cell_class_of(description), description, input_size, hidden_size, num_directions)
    known = _layers.__dict__.setdefault("known", {})
    if key not in known:
        known[key] = _Layer(*key[1:])
    return known[key]


def _run(inputs, states, weights, kept, mask, description: str, starts, seed) -> list[torch.Tensor]:
    num_directions = len(states) // len(cell_class_of(description).state_names)
    layer = _layer_for(description, inputs.shape[-1], states[0].shape[-1], num_directions)
    padding = Padding.from_attention_mask(mask, inputs)
    if starts is not None and starts.any():
        padding = PackedPadding(starts, None if padding is None else mask)
    # Types were settled when the graph was made.
    with torch.autocast(inputs.device.type, enabled=False), random_numbers_of(seed, inputs.device):
        return layer.run(weights, inputs, tuple(states), padding, kept)


@torch.library.custom_op(f"{NAMESPACE}::recurrent_layer", mutates_args=())
def recurrent_layer(
    inputs: torch.Tensor,
    states: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    kept: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
    cell_type: str,
    starts: torch.Tensor | None,
    seed: torch.Tensor | None,
) -> list[torch.Tensor]:
    """
    Args:
        inputs (`torch.Tensor` of shape `(batch, seq, input_size)`): The inputs, all other numbers in their type.
        states (`Sequence` of `torch.Tensor` of shape `(batch, hidden_size)`): For each direction the states of the
            cell before the sequence.
        weights (`Sequence` of `torch.Tensor`): For each direction the parameters, then the buffers of the cell.
        kept (`Sequence` of `torch.Tensor` of shape `(batch, hidden_size)`): As in [`run_sequence`].
        mask (`torch.Tensor` of shape `(batch, seq)`, *optional*): True where there is a token.
        cell_type (`str`): The description of the cell, which is its name in the table of cells and what was set on it.
        starts (`torch.Tensor` of shape `(batch, seq)`, *optional*): True where a text begins behind the first one of
            its row; see [`PackedPadding`].
        seed (`torch.Tensor` of shape `()`, *optional*): Of the random numbers that the cell draws.

    Returns:
        The outputs `(batch, seq, directions * hidden_size)` and the final states.
    """
    # No result may share its memory with another or with an argument.
    outputs, *final = _run(inputs, states, weights, kept, mask, cell_type, starts, seed)
    return [outputs.contiguous(), *(states.clone(memory_format=torch.contiguous_format) for states in final)]


@recurrent_layer.register_fake
def _shapes(inputs, states, weights, kept, mask, cell_type, starts, seed):
    num_states = len(cell_class_of(cell_type).state_names)
    width = sum(states.shape[-1] for states in states[::num_states])
    return [inputs.new_empty(*inputs.shape[:2], width), *(state.new_empty(state.shape) for state in states)]


SCHEMA = (
    "Tensor inputs, Tensor[] states, Tensor[] weights, Tensor[] kept, Tensor? mask, str cell_type, Tensor? starts, "
    "Tensor? seed"
)
_for_training = register_gradient(recurrent_layer, "recurrent_layer", SCHEMA, _run, _shapes, number=3)


def _decompose(*arguments) -> list[torch.Tensor]:
    # Others ask for the decomposition too, in order to see the shapes.
    return in_onnx(*arguments) if torch.onnx.is_in_onnx_export() else _shapes(*arguments)


# Where ONNX exporters look up what an operator consists of. It has no public door; without it `torch.onnx.export` asks
# for a translation of the operator.
with contextlib.suppress(ImportError):
    from torch._decomp import register_decomposition

    register_decomposition(getattr(torch.ops, NAMESPACE).recurrent_layer.default)(_decompose)

# The runtimes that transformers exports to do not know the operator. ExecuTorch knows `scan`; for OpenVINO the loop is
# written out for the length that is exported.
with contextlib.suppress(ImportError):
    from transformers.exporters.utils import register_patch

    register_patch("executorch", f"{__name__}.recurrent_layer")(lambda operator: in_scan)
    register_patch("openvino", f"{__name__}.recurrent_layer")(lambda operator: _run)
