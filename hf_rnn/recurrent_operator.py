"""A layer's cells over a whole sequence as one operator, for graphs: `torch.compile`, `torch.export`, ONNX.

A compiler that looked into the loop over time would unroll it, anew for each length. It sees this operator instead,
with the shapes of its results and its gradient; at run time the operator runs what [`run_sequence`] runs without a
compiler. In ONNX it becomes one `LSTM`, `GRU` or `RNN` node, or a `Scan`. Imports the cells, the padding and what runs
them.
"""

import contextlib
import hashlib
import threading
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils.parametrize import type_before_parametrizations

from .fast_paths import autocast_dtype
from .packed_sequences import PackedPadding
from .recurrent_cells import RECURRENT_CELLS, RecurrentCell, State
from .recurrent_kernels import run_sequence
from .recurrent_onnx import in_onnx, in_scan
from .recurrent_padding import Padding


# A checkpoint that brings its own copy of this file brings its own operators.
_NAMESPACE = "hf_rnn" if __package__ == "hf_rnn" else f"hf_rnn_{hashlib.sha256(__name__.encode()).hexdigest()[:16]}"


def run_sequence_opaquely(
    cells: Sequence[RecurrentCell],
    inputs: torch.Tensor,
    state: State,
    padding: Padding | None = None,
    kept: Sequence[torch.Tensor] = (),
    needs_state: bool = True,
    needs_history: bool = False,
) -> tuple[torch.Tensor, State, None]:
    """[`run_sequence`] as one operator in the graph; `needs_history` must be False. Runs the loop in the graph where
    the cell's class has left the table of cells, by whose name the operator finds it."""
    # Adapters may have put a parametrized class in the place of the cell's own.
    cell_class = type_before_parametrizations(cells[0])
    names = [name for name, known_class in RECURRENT_CELLS.items() if known_class is cell_class]
    if not names:
        return run_sequence(cells, inputs, state, padding, kept, needs_state, needs_history)
    weight_names = _weight_names(names[0], cells[0].input_size, cells[0].hidden_size, len(cells))
    weights = [attrgetter(name)(cell) for cell, names_of_cell in zip(cells, weight_names) for name in names_of_cell]
    tensors = [inputs, *state, *weights, *kept]
    dtype = autocast_dtype(inputs.device.type) or inputs.dtype
    inputs, *others = (tensor.to(dtype) for tensor in tensors)
    state, others = others[: len(state)], others[len(state) :]
    weights, kept = others[: len(weights)], others[len(weights) :]
    mask = None if padding is None else padding.mask
    starts = padding.starts if isinstance(padding, PackedPadding) else None
    outputs, *final = recurrent_layer(inputs, state, weights, kept, mask, names[0], starts)
    return outputs, tuple(final), None


class _Layer(nn.Module):
    """Cells without weights of their own, to be called with those that the operator was given."""

    def __init__(self, cell_type: str, input_size: int, hidden_size: int, num_directions: int):
        super().__init__()
        with torch.device("meta"):
            cells = [RECURRENT_CELLS[cell_type](input_size, hidden_size) for _ in range(num_directions)]
        self.cells = nn.ModuleList(cells)
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


def _layer_for(cell_type: str, input_size: int, hidden_size: int, num_directions: int) -> _Layer:
    key = (RECURRENT_CELLS[cell_type], input_size, hidden_size, num_directions)
    known = _layers.__dict__.setdefault("known", {})
    if key not in known:
        known[key] = _Layer(cell_type, *key[1:])
    return known[key]


@torch.compiler.assume_constant_result
def _weight_names(cell_type: str, input_size: int, hidden_size: int, num_directions: int) -> list[list[str]]:
    return _layer_for(cell_type, input_size, hidden_size, num_directions).weight_names


def _run(inputs, states, weights, kept, mask, cell_type: str, starts) -> list[torch.Tensor]:
    num_directions = len(states) // len(RECURRENT_CELLS[cell_type].state_names)
    layer = _layer_for(cell_type, inputs.shape[-1], states[0].shape[-1], num_directions)
    padding = Padding.from_attention_mask(mask, inputs)
    if starts is not None and starts.any():
        padding = PackedPadding(starts, None if padding is None else mask)
    with torch.autocast(inputs.device.type, enabled=False):  # types were settled when the graph was made
        return layer.run(weights, inputs, tuple(states), padding, kept)


@torch.library.custom_op(f"{_NAMESPACE}::recurrent_layer", mutates_args=())
def recurrent_layer(
    inputs: torch.Tensor,
    states: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    kept: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
    cell_type: str,
    starts: torch.Tensor | None,
) -> list[torch.Tensor]:
    """
    Args:
        inputs (`torch.Tensor` of shape `(batch, seq, input_size)`): The inputs, all other numbers in their type.
        states (`Sequence` of `torch.Tensor` of shape `(batch, hidden_size)`): For each direction the states of the
            cell before the sequence.
        weights (`Sequence` of `torch.Tensor`): For each direction the parameters, then the buffers of the cell.
        kept (`Sequence` of `torch.Tensor` of shape `(batch, hidden_size)`): As in [`run_sequence`].
        mask (`torch.Tensor` of shape `(batch, seq)`, *optional*): True where there is a token.
        cell_type (`str`): The name of the cell in the table of cells.
        starts (`torch.Tensor` of shape `(batch, seq)`, *optional*): True where a text begins behind the first one of
            its row; see [`PackedPadding`].

    Returns:
        The outputs `(batch, seq, directions * hidden_size)` and the final states.
    """
    # No result may share its memory with another or with an argument.
    outputs, *final = _run(inputs, states, weights, kept, mask, cell_type, starts)
    return [outputs.contiguous(), *(states.clone() for states in final)]


@recurrent_layer.register_fake
def _shapes(inputs, states, weights, kept, mask, cell_type, starts):
    num_states = len(RECURRENT_CELLS[cell_type].state_names)
    width = sum(states.shape[-1] for states in states[::num_states])
    return [inputs.new_empty(*inputs.shape[:2], width), *(torch.empty_like(state) for state in states)]


def _run_backward(grad_outputs, inputs, states, weights, kept, mask, cell_type: str, starts) -> list[torch.Tensor]:
    """The gradients of `inputs`, `states` and `weights`, for which the layer runs once more."""
    leaves = [tensor.detach().requires_grad_() for tensor in (inputs, *states, *weights)]
    last_state = len(states) + 1
    with torch.enable_grad():
        results = _run(leaves[0], leaves[1:last_state], leaves[last_state:], kept, mask, cell_type, starts)
    gradients = torch.autograd.grad(results, leaves, list(grad_outputs), materialize_grads=True)
    return [gradient.clone(memory_format=torch.contiguous_format) for gradient in gradients]


def _fake_backward(grad_outputs, inputs, states, weights, kept, mask, cell_type, starts):
    return [inputs.new_empty(tensor.shape) for tensor in (inputs, *states, *weights)]


# Not a `custom_op`, inside which autograd is out of reach.
_library = torch.library.Library(_NAMESPACE, "FRAGMENT")
if not hasattr(getattr(torch.ops, _NAMESPACE), "recurrent_layer_backward"):  # where this file is imported once more
    _library.define(
        "recurrent_layer_backward(Tensor[] grad_outputs, Tensor inputs, Tensor[] states, Tensor[] weights, "
        "Tensor[] kept, Tensor? mask, str cell_type, Tensor? starts) -> Tensor[]"
    )
    _library.impl("recurrent_layer_backward", _run_backward, "CompositeExplicitAutograd")
    _library.impl("recurrent_layer_backward", torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"{_NAMESPACE}::recurrent_layer_backward", _fake_backward, lib=_library)
recurrent_layer_backward = getattr(torch.ops, _NAMESPACE).recurrent_layer_backward


def _keep_for_backward(ctx, inputs, output):
    sequence, states, weights, kept, mask, ctx.cell_type, starts = inputs
    ctx.sizes = len(states), len(weights), len(kept)
    ctx.save_for_backward(sequence, *states, *weights, *kept, mask, starts)


def _backward(ctx, grad_outputs):
    inputs, *tensors = ctx.saved_tensors
    groups = []
    for size in ctx.sizes:
        groups.append(tensors[:size])
        tensors = tensors[size:]
    mask, starts = tensors
    gradients = recurrent_layer_backward(list(grad_outputs), inputs, *groups, mask, ctx.cell_type, starts)
    last_state = 1 + len(groups[0])
    return gradients[0], gradients[1:last_state], gradients[last_state:], [None] * len(groups[2]), None, None, None


recurrent_layer.register_autograd(_backward, setup_context=_keep_for_backward)


def _decompose(*arguments) -> list[torch.Tensor]:
    # Others ask for the decomposition too, in order to see the shapes.
    return in_onnx(*arguments) if torch.onnx.is_in_onnx_export() else _shapes(*arguments)


# Where ONNX exporters look up what an operator consists of. It has no public door; without it `torch.onnx.export` asks
# for a translation of the operator.
with contextlib.suppress(ImportError):
    from torch._decomp import register_decomposition

    register_decomposition(getattr(torch.ops, _NAMESPACE).recurrent_layer.default)(_decompose)

# The runtimes that transformers exports to do not know the operator. ExecuTorch knows `scan`; for OpenVINO the loop is
# written out for the length that is exported.
with contextlib.suppress(ImportError):
    from transformers.exporters.utils import register_patch

    register_patch("executorch", f"{__name__}.recurrent_layer")(lambda operator: in_scan)
    register_patch("openvino", f"{__name__}.recurrent_layer")(lambda operator: _run)
