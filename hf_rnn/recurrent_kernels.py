"""One layer's cells over a whole sequence: the definition, the fast paths, and the choice between them.

There is one definition of what a layer computes, the loop in [`run_loop`] over a cell's step: a token changes the
state, padding leaves it as it is, and the output of a position is the hidden state after it, so that at padding the
last one is repeated. Whatever is faster gives the same. Imports the cells and the padding.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from .cell_functions import step_by_function
from .fast_paths import (
    are_plain,
    autocast_dtype,
    derivatives_go_forward,
    may_take,
    operations_are_watched,
    transforms_are_active,
)
from .hyperbolic_tangent import tanh
from .large_products import large_linear
from .linear_calls import project_inputs
from .packed_linear import packed_linear
from .packed_sequences import PackedPadding
from .recorded_kernel import play_kernel, side_by_side, takes_recorded_kernel
from .recorded_loop import play_loop, takes_recording
from .recurrent_cells import Linear, RecurrentCell, State, masked_step
from .recurrent_padding import Padding, gather_positions
from .recurrent_segments import Segments, find_segments, read_steps, show_steps
from .sequence_functions import run_function, takes_function
from .step_linear import step_linear


# Torch says so where it copies parameters for cuDNN, one by one; they are apart on purpose, under their own names.
warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk of memory")


# Cells know of no fast path by themselves.
RecurrentCell._tanh = staticmethod(tanh)


class _InOnePiece(torch.autograd.Function):
    """[`side_by_side`], with gradients."""

    @staticmethod
    def forward(ctx, *weights):
        return tuple(side_by_side(weights))

    @staticmethod
    def backward(ctx, *gradients):
        return gradients


def _in_one_piece(inputs: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """The weights as cuDNN reads them fastest; under autocast torch does that in any case."""
    if inputs.device.type != "cuda" or torch.is_autocast_enabled("cuda") or not are_plain(*weights):
        return weights
    return list(_InOnePiece.apply(*weights))


def run_loop(
    cell: RecurrentCell,
    inputs: torch.Tensor,
    state: State,
    padding: Padding | None,
    reverse: bool = False,
    linear: Linear = F.linear,
) -> tuple[torch.Tensor, State, list[State]]:
    """
    The definition of a recurrence in one direction: step by step.

    Args:
        cell (`RecurrentCell`): The cell.
        inputs (`torch.Tensor` of shape `(batch, seq, input_size)`): The inputs.
        state (`tuple` of `torch.Tensor` of shape `(batch, hidden_size)`): The state before the first step.
        padding (`Padding`, *optional*): Where the tokens lie.
        reverse (`bool`): Whether to read from right to left.
        linear: What stands for `F.linear` in recurrent products.

    Returns:
        The outputs `(batch, seq, hidden_size)`, the final state, and the state after every step in order of reading.
    """
    projected = project_inputs(cell, inputs, packed_linear if inputs.shape[1] == 1 else large_linear).unbind(1)
    is_token = [None] * len(projected) if padding is None else padding.mask.unsqueeze(-1).unbind(1)
    history = []
    for position in reversed(range(len(projected))) if reverse else range(len(projected)):
        state = masked_step(cell, projected[position], state, is_token[position], linear)
        history.append(state)
    if len(history) == 1:
        return state[0].unsqueeze(1), state, history
    outputs = [step[0] for step in (reversed(history) if reverse else history)]
    return torch.stack(outputs, dim=1), state, history


def call_torch_kernel(
    cells: list[RecurrentCell],
    inputs: torch.Tensor,
    state: State | None,
    weights: list[torch.Tensor] | None = None,
    batch_first: bool = True,
    num_layers: int = 1,
) -> tuple[torch.Tensor, State]:
    """
    Torch's own kernel (oneDNN, cuDNN or ATen) over a whole sequence without padding.

    Args:
        cells (`list[RecurrentCell]`): For each layer one cell, or one for each of two directions.
        inputs (`torch.Tensor` of shape `(batch, seq, input_size)`): The inputs.
        state (`tuple` of `torch.Tensor` of shape `(batch, hidden_size)`, *optional*):
            The initial states of the first cell, then those of the second, and so on; zero where not given.
        weights (`list[torch.Tensor]`, *optional*): Stands for the parameters of the cells.
        batch_first (`bool`): Whether inputs and outputs have the batch before the time, or behind it.
        num_layers (`int`): How many layers the cells make.

    Returns:
        The outputs `(batch, seq, directions * hidden_size)` of the last layer and the final states in the order of
        `state`.
    """
    if weights is None:
        weights = [w for cell in cells for w in (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)]
    by_time = inputs.transpose(0, 1) if batch_first else inputs
    name = cells[0].torch_kernel
    if state is not None and num_layers == 1 and takes_function(name, by_time, state[0], weights):
        outputs, final = _call_function(name, by_time, state, weights)
        return outputs.transpose(0, 1) if batch_first else outputs, final
    num_cells, num_states, hidden_size = len(cells), len(cells[0].state_names), cells[0].hidden_size
    initial = [] if state is None else [_stack(state[index::num_states]) for index in range(num_states)]
    directions = num_cells // num_layers
    batch, seq = inputs.shape[:2] if batch_first else inputs.shape[1::-1]

    def kernel(inputs, initial, weights):
        initial = initial or [inputs.new_zeros(num_cells, batch, hidden_size)] * num_states
        return getattr(torch._VF, name)(
            inputs,
            initial if num_states > 1 else initial[0],
            weights,
            True,  # biases
            num_layers,
            0.0,  # dropout
            # cuDNN has no backward for a forward that ran as inference, whatever the mode of the model.
            torch.is_grad_enabled(),
            directions > 1,
            batch_first,
        )

    results = None
    if takes_recorded_kernel(batch, seq, inputs, weights):
        results = play_kernel((name, num_layers, directions, batch_first), kernel, inputs, initial, weights)
    if results is None:
        results = kernel(inputs, initial, _in_one_piece(inputs, weights))
    outputs, *final = results
    return outputs, tuple(final[index][number] for number in range(num_cells) for index in range(num_states))


def _stack(parts: State) -> torch.Tensor:
    """`torch.stack(parts)`, without a copy of a single one."""
    return torch.stack(parts) if len(parts) > 1 else parts[0].unsqueeze(0).contiguous()


def _call_function(
    name: str, inputs: torch.Tensor, state: State, weights: list[torch.Tensor]
) -> tuple[torch.Tensor, State]:
    """[`call_torch_kernel`] by one function of autograd, with the time before the batch."""
    outputs, final = [], []
    for direction, hidden in enumerate(state):
        reverse = direction == 1
        hiddens = run_function(name, inputs, hidden, *weights[4 * direction : 4 * direction + 4], reverse)
        outputs.append(hiddens)
        # Not a view, which would keep the outputs of all steps, and change with them.
        final.append(hiddens[0 if reverse else -1].clone())
    return torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0], tuple(final)


# Far enough to close or open a gate completely in every precision, and within the range of float16.
SATURATION = 1e4


def run_torch_kernel(
    cell: RecurrentCell,
    inputs: torch.Tensor,
    state: State,
    padding: Padding,
    reverse: bool = False,
    needs_state: bool = True,
) -> tuple[torch.Tensor, State]:
    """
    The same as [`run_loop`] on a padded batch, by torch's kernel: tokens are moved to the left in order of reading, run
    as they are, and their outputs moved back. States that are not outputs (the LSTM's cell state) pass the padding at
    the end unchanged, because one more input column, which is on at padding, holds them there by the gates.
    """
    weights, holds = None, needs_state and cell.hold_gates is not None
    if holds:
        # Filled on the device: to copy numbers there would be to wait for it.
        column = torch.cat(
            [cell.weight_ih.new_full((cell.hidden_size, 1), SATURATION * hold) for hold in cell.hold_gates]
        )
        weights = [torch.cat([cell.weight_ih, column], dim=-1), cell.weight_hh, cell.bias_ih, cell.bias_hh]
    segments = find_segments(padding, inputs.shape[-1], cell.weight_hh.shape[0])
    if segments is not None:
        return _run_segments(cell, inputs, state, segments, reverse, weights)

    def run(inputs):
        if holds:
            inputs = torch.cat([inputs, (~padding.valid).to(inputs.dtype).unsqueeze(-1)], dim=-1)
        return call_torch_kernel([cell], inputs, state, weights)

    outputs, last, final = over_tokens(run, inputs, state[0], padding, reverse)
    return outputs, (last, *final[1:])


def over_tokens(
    run: Callable[[torch.Tensor], tuple[torch.Tensor, State]],
    inputs: torch.Tensor,
    initial: torch.Tensor,
    padding: Padding,
    reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, State]:
    """
    What knows nothing of padding over a padded batch.

    Args:
        run: Gets `inputs` with the tokens at the left in order of reading, and returns outputs `(batch, seq, size)`
            and final states.
        inputs (`torch.Tensor` of shape `(batch, seq, input_size)`): The inputs.
        initial (`torch.Tensor` of shape `(batch, size)`): What stands where nothing was read yet.
        padding (`Padding`): Where the tokens lie.
        reverse (`bool`): Whether to read from right to left.

    Returns:
        The outputs at the positions of their tokens, and the last one repeated at padding; the last output of each
        row; and the final states as `run` returned them, which is behind the padding.
    """
    index = padding.direction(reverse)
    if index.gather is not None:
        inputs = gather_positions(inputs, index.gather)
    outputs, final = run(inputs)
    last = padding.at_last(outputs, initial)
    if index.scatter is None:
        return torch.where(padding.valid.unsqueeze(-1), outputs, last.unsqueeze(1)), last, final
    outputs = gather_positions(outputs, index.scatter)
    return torch.where(index.started, outputs, initial.to(outputs.dtype).unsqueeze(1)), last, final


def _run_segments(
    cell: RecurrentCell,
    inputs: torch.Tensor,
    state: State,
    segments: Segments,
    reverse: bool,
    weights: list[torch.Tensor] | None,
) -> tuple[torch.Tensor, State]:
    """[`run_torch_kernel`] piece by piece, each with the rows that are not at their end; `weights` as it makes them."""
    steps = segments.direction(reverse)
    inputs = read_steps(inputs, steps)
    if weights is not None:
        inputs = torch.cat([inputs, (steps.shown_at < 0).to(inputs.dtype).unsqueeze(-1)], dim=-1)
    outputs, ended = [], []
    current = [part.index_select(0, segments.order) for part in state]
    for start, stop, rows, first in segments.pieces:
        ended.append([part[rows:] for part in current])
        piece = inputs[first : first + (stop - start) * rows].view(stop - start, rows, -1)
        output, current = call_torch_kernel([cell], piece, tuple(part[:rows] for part in current), weights, False)
        outputs.append(output.flatten(0, 1))
    outputs = torch.cat(outputs)
    last = torch.where(
        (segments.padding.lengths == 0)[:, None],
        state[0].to(outputs.dtype),
        outputs.index_select(0, segments.last_steps),
    )
    # The longest rows stand first, so that those that ended last do.
    ended = [[part.to(outputs.dtype) for part in parts] for parts in reversed([*ended, current])]
    final = [torch.cat(parts).index_select(0, segments.rank) for parts in zip(*ended)]
    return show_steps(outputs, steps, state[0]), (last, *final[1:])


def loop_linear(inputs: torch.Tensor, num_steps: int, kept: torch.Tensor | None = None) -> Linear:
    """
    What stands for `F.linear` in products of a loop over time, on the fastest path that serves.

    Args:
        inputs (`torch.Tensor` of shape `(batch, ...)`): Something of the device and type of the loop.
        num_steps (`int`): How many steps the loop has.
        kept (`torch.Tensor` of shape `(batch, hidden_size)`, *optional*): What to multiply hidden states with first.
    """
    linear = packed_linear if num_steps == 1 else step_linear(inputs, num_steps)
    if kept is None:
        return linear

    def linear_keeping(hidden, weight, bias=None):
        return linear(hidden * kept, weight, bias)

    return linear_keeping


def run_sequence(
    cells: Sequence[RecurrentCell],
    inputs: torch.Tensor,
    state: State,
    padding: Padding | None = None,
    kept: Sequence[torch.Tensor] = (),
    needs_state: bool = True,
    needs_history: bool = False,
) -> tuple[torch.Tensor, State, State | None]:
    """
    The cells of one layer over a whole sequence, on the fastest path that serves.

    Args:
        cells (`Sequence[RecurrentCell]`): The cell that reads from left to right, then the one from right to left, if
            any.
        inputs (`torch.Tensor` of shape `(batch, seq, input_size)`): The inputs.
        state (`tuple` of `torch.Tensor` of shape `(batch, hidden_size)`): The states of the cells before the sequence,
            in the order of `cells`.
        padding (`Padding`, *optional*): Where the tokens lie, and the texts where several stand in one row.
        kept (`Sequence` of `torch.Tensor` of shape `(batch, hidden_size)`): For each cell the factors of the hidden
            state in recurrent products; empty where all are one.
        needs_state (`bool`): Whether the final states will be used; they are returned in any case, but may be wrong
            where this is False.
        needs_history (`bool`): Whether the state after each position is asked for (one direction only).

    Returns:
        The outputs `(batch, seq, cells * hidden_size)`, the final states in the order of `state`, and the states
        `(seq, batch, hidden_size)` after each position or None.
    """
    num_steps = inputs.shape[1]
    if num_steps == 0:
        history = tuple(states.new_empty(0, *states.shape) for states in state) if needs_history else None
        return inputs.new_empty(*inputs.shape[:2], len(cells) * cells[0].hidden_size), state, history
    if num_steps == 1 and len(cells) == 1 and padding is None and not (kept or needs_history):
        # Nothing to choose from, and in generation the time to choose counts.
        (cell,), inputs = cells, inputs[:, 0]
        new_state = step_by_function(cell, inputs, state)
        if new_state is None:
            new_state = cell.step(project_inputs(cell, inputs, packed_linear), state, packed_linear)
        return new_state[0].unsqueeze(1), new_state, None
    if isinstance(padding, PackedPadding):
        return *_run_packed(cells, inputs, state, padding, kept, needs_state), None
    if takes_torch_kernel(cells[0], inputs, kept, needs_history):
        if padding is None:
            outputs, final = call_torch_kernel(cells, inputs, state)
        else:
            results = [
                run_torch_kernel(cell, inputs, states, padding, reverse, needs_state)
                for cell, states, reverse in _directions(cells, state)
            ]
            outputs, final = _join_directions(results)
        return outputs, final, (outputs.transpose(0, 1),) if needs_history else None
    results, histories = [], []
    for cell, states, reverse in _directions(cells, state):
        kept_here = kept[int(reverse)] if kept else None
        if takes_recording(cell, inputs, needs_history):
            mask = None if padding is None else padding.mask
            played = play_loop(cell, inputs, states, mask, reverse, kept_here)
            if played is not None:
                results.append(played)
                continue
        linear = loop_linear(inputs, num_steps, kept_here)
        outputs, final, history = run_loop(cell, inputs, states, padding, reverse, linear)
        results.append((outputs, final))
        histories.append(history)
    outputs, final = _join_directions(results)
    return outputs, final, tuple(map(torch.stack, zip(*histories[0]))) if needs_history else None


def _run_packed(
    cells: Sequence[RecurrentCell],
    inputs: torch.Tensor,
    state: State,
    padding: PackedPadding,
    kept: Sequence[torch.Tensor],
    needs_state: bool,
) -> tuple[torch.Tensor, State]:
    """
    [`run_sequence`] over rows of several texts, with each text in a row of its own: all of them begin with the `state`
    of their row, the final one is that of the last text, and the states in between are not to be had.
    """
    outputs, final, _ = run_sequence(
        cells,
        padding.split(inputs),
        padding.for_texts(state),
        padding.of_texts,
        padding.for_texts(kept),
        needs_state,
    )
    return padding.join(outputs), padding.of_last_texts(final)


def takes_torch_kernel(cell: RecurrentCell, inputs: torch.Tensor, kept: Sequence, needs_history: bool) -> bool:
    """Whether torch has a kernel for a cell over a sequence; arguments as in [`run_sequence`]."""
    # A compiler can look neither into the kernel nor, for that matter, into a context variable.
    if cell.torch_kernel is None or kept or torch.compiler.is_compiling() or not may_take("torch_kernel"):
        return False
    if needs_history and len(cell.state_names) > 1:
        return False
    # Under autocast torch takes oneDNN for an LSTM, which has none in float16 on most CPUs.
    if cell.torch_kernel == "lstm" and inputs.device.type == "cpu" and autocast_dtype("cpu") == torch.float16:
        return False
    if derivatives_go_forward():  # of which kernels know nothing
        return False
    # cuDNN goes by the memory of weights, which nothing that wraps or traces them has.
    if inputs.device.type == "cuda" and (transforms_are_active() or operations_are_watched()):
        return False
    # For a single step the kernel would spend its time on setting itself up.
    return inputs.shape[0] > 0 and inputs.shape[1] > 1


def _directions(cells: Sequence[RecurrentCell], state: State):
    """For each cell the cell, its part of the states, and whether it reads from right to left."""
    num_states = len(cells[0].state_names)
    for index, cell in enumerate(cells):
        yield cell, state[index * num_states : (index + 1) * num_states], index == 1


def _join_directions(results: list[tuple[torch.Tensor, State]]) -> tuple[torch.Tensor, State]:
    if len(results) == 1:
        return results[0]
    return torch.cat([outputs for outputs, _ in results], dim=-1), sum((final for _, final in results), ())
