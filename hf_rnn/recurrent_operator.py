"""A layer's cells over a whole sequence as one operator, for graphs: `torch.compile`, `torch.export`, ONNX.

A compiler that looked into the loop over time would unroll it, anew for each length. It sees this operator instead,
with the shapes of its results and its gradient; at run time the operator runs what [`run_sequence`] runs without a
compiler. In ONNX it becomes one `LSTM`, `GRU` or `RNN` node, or a `Scan`. Imports the cells, what describes them, the
padding and what runs them.
"""

import contextlib
import hashlib
import threading
from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from .bare_cells import attributes_of, cell_class_of, describe, effects, is_as_compared, make_cell
from .fast_paths import autocast_dtype, transforms_are_active
from .higher_derivatives import gradients_with_graph
from .packed_sequences import PackedPadding
from .recurrent_cells import RecurrentCell, State
from .recurrent_kernels import run_sequence
from .recurrent_onnx import in_onnx, in_scan
from .recurrent_padding import Padding


# A checkpoint that brings its own copy of this file brings its own operators.
NAMESPACE = "hf_rnn" if __package__ == "hf_rnn" else f"hf_rnn_{hashlib.sha256(__name__.encode()).hexdigest()[:16]}"


class _Known(NamedTuple):
    """What a graph is made with; it must not change while the graph is in use."""

    description: str  # empty where the loop is to run in the graph
    weight_names: list[str]
    draws: bool  # random numbers


def _what_is_known(cell: RecurrentCell) -> _Known:
    description, found = describe(cell), effects(cell)
    if not description or found is None or found[1]:
        return _Known("", [], False)
    return _Known(description, _layer_for(description, cell.input_size, cell.hidden_size, 1).weight_names[0], found[0])


# As methods of cells, on which a compiler can call them; it looks for them by their own names.


def _graph_description(cell: RecurrentCell) -> str:
    return _what_is_known(cell).description


def _graph_weight_names(cell: RecurrentCell) -> list[str]:
    return _what_is_known(cell).weight_names


def _graph_draws(cell: RecurrentCell) -> bool:
    return _what_is_known(cell).draws


def _graph_numbers(cell: RecurrentCell) -> list[tuple[str, float]]:
    return [(name, value) for name, value in attributes_of(cell).items() if isinstance(value, float)]


def _graph_others(cell: RecurrentCell) -> list[str]:
    return [name for name, value in attributes_of(cell).items() if not isinstance(value, float)]


for _function in (_graph_description, _graph_weight_names, _graph_draws, _graph_numbers, _graph_others):
    setattr(RecurrentCell, _function.__name__, torch.compiler.assume_constant_result(_function))


@torch.compiler.assume_constant_result
def is_transformed() -> bool:
    return transforms_are_active()


def run_sequence_opaquely(
    cells: Sequence[RecurrentCell],
    inputs: torch.Tensor,
    state: State,
    padding: Padding | None = None,
    kept: Sequence[torch.Tensor] = (),
    needs_state: bool = True,
    needs_history: bool = False,
) -> tuple[torch.Tensor, State, None]:
    """
    [`run_sequence`] as one operator in the graph; `needs_history` must be False. Runs the loop in the graph where the
    operator would not do the same: the cell cannot be described, a step of it writes to its buffers, or a
    transformation of functions is to go through it.
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
    seed = torch.randint(2**63 - 1, (), device="cpu") if cells[0]._graph_draws() else None
    outputs, *final = recurrent_layer(inputs, state, weights, kept, mask, descriptions[0], starts, seed)
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


@contextlib.contextmanager
def random_numbers_of(seed: torch.Tensor | None, device: torch.device):
    """Within this context random numbers are those of a seed, in the forward and again in the backward."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(seed))
        yield


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


def _differentiable(inputs, states, weights) -> list[torch.Tensor]:
    return [tensor for tensor in (inputs, *states, *weights) if tensor.is_floating_point()]


def _run_backward(grad_outputs, inputs, states, weights, kept, mask, cell_type, starts, seed):
    """The gradients of `inputs`, `states` and those of `weights` that have any, for which the layer runs once more."""
    leaves = [tensor.detach().requires_grad_() for tensor in _differentiable(inputs, states, weights)]
    with torch.enable_grad():
        results = _run_with(leaves, states, weights, kept, mask, cell_type, starts, seed)
    gradients = torch.autograd.grad(results, leaves, list(grad_outputs), materialize_grads=True)
    return [gradient.clone(memory_format=torch.contiguous_format) for gradient in gradients]


def _run_with(leaves, states, weights, *arguments) -> list[torch.Tensor]:
    """[`_run`] with `leaves` in the place of what has gradients."""
    inputs, *leaves = leaves
    states, leaves = leaves[: len(states)], iter(leaves[len(states) :])
    weights = [next(leaves) if weight.is_floating_point() else weight for weight in weights]
    return _run(inputs, states, weights, *arguments)


def _fake_backward(grad_outputs, inputs, states, weights, kept, mask, cell_type, starts, seed):
    return [inputs.new_empty(tensor.shape) for tensor in _differentiable(inputs, states, weights)]


# Not a `custom_op`, inside which autograd is out of reach.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
if not hasattr(getattr(torch.ops, NAMESPACE), "recurrent_layer_backward"):  # where this file is imported once more
    _library.define(
        "recurrent_layer_backward(Tensor[] grad_outputs, Tensor inputs, Tensor[] states, Tensor[] weights, "
        "Tensor[] kept, Tensor? mask, str cell_type, Tensor? starts, Tensor? seed) -> Tensor[]"
    )
    _library.impl("recurrent_layer_backward", _run_backward, "CompositeExplicitAutograd")
    _library.impl("recurrent_layer_backward", torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"{NAMESPACE}::recurrent_layer_backward", _fake_backward, lib=_library)
recurrent_layer_backward = getattr(torch.ops, NAMESPACE).recurrent_layer_backward


def _keep_for_backward(ctx, inputs, output):
    sequence, states, weights, kept, mask, ctx.cell_type, starts, seed = inputs
    ctx.sizes = len(states), len(weights), len(kept)
    ctx.save_for_backward(sequence, *states, *weights, *kept, mask, starts, seed)


def _backward(ctx, grad_outputs):
    inputs, *tensors = ctx.saved_tensors
    groups = []
    for size in ctx.sizes:
        groups.append(tensors[:size])
        tensors = tensors[size:]
    (states, weights, kept), (mask, starts, seed) = groups, tensors
    arguments = states, weights, kept, mask, ctx.cell_type, starts, seed
    if torch.is_grad_enabled():  # derivatives of the second order, of which the operator knows nothing
        leaves = _differentiable(inputs, states, weights)
        needed = [leaf.requires_grad for leaf in leaves]
        gradients = gradients_with_graph(
            lambda *leaves: _run_with(leaves, *arguments), leaves, needed, list(grad_outputs)
        )
    else:
        gradients = recurrent_layer_backward(list(grad_outputs), inputs, *arguments)
    of_inputs, *gradients = gradients
    of_states, gradients = gradients[: len(states)], iter(gradients[len(states) :])
    of_weights = [next(gradients) if weight.is_floating_point() else None for weight in weights]
    return of_inputs, of_states, of_weights, [None] * len(kept), None, None, None, None


recurrent_layer.register_autograd(_backward, setup_context=_keep_for_backward)


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
