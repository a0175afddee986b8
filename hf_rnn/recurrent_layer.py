"""Time: whole sequences, padding, directions, dropout, and the fast paths. Imports the cells.

There is one definition of what a layer computes, the loop in [`run_loop`] over a cell's step: a token changes the
state, padding leaves it as it is, and the output of a position is the hidden state after it, so that at padding the
last one is repeated. Whatever is faster gives the same.
"""

import contextlib
import os
import warnings
from contextvars import ContextVar
from functools import cached_property
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .recurrent_cells import RECURRENT_CELLS, Linear, RecurrentCell, State


# cuDNN copies parameters that do not lie in one piece at each call, and says so each time; they are apart on purpose,
# under their own names.
warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk of memory")

_loop_only: ContextVar[bool] = ContextVar("hf_rnn_loop_only", default=os.environ.get("HF_RNN_LOOP_ONLY", "0") == "1")


@contextlib.contextmanager
def loop_only(enabled: bool = True):
    """
    Within this context every layer runs the plain loop over its cell's step, and no fast path. The environment
    variable `HF_RNN_LOOP_ONLY=1` does the same for a whole process.
    """
    token = _loop_only.set(enabled)
    try:
        yield
    finally:
        _loop_only.reset(token)


class HiddenStates(nn.Identity):
    """The place where hidden states `[batch, seq, size]` are recorded for `output_hidden_states`."""


class DirectionIndex(NamedTuple):
    """How one direction reads a padded batch: its tokens moved to the left, in the order of reading."""

    gather: torch.Tensor | None  # [batch * seq], where the tokens lie; None if they lie at the left in reading order
    scatter: torch.Tensor | None  # [batch * seq], the step whose output each position shows; None as above
    started: torch.Tensor | None  # [batch, seq, 1], False where nothing was read yet; None as above


class Padding:
    """
    Where the tokens of a batch lie, prepared once and shared by all layers.

    Args:
        mask (`torch.Tensor` of shape `(batch, seq)`): True where there is a token.
        is_right_padded (`bool`): Whether all padding is known to lie at the end.
    """

    def __init__(self, mask: torch.Tensor, is_right_padded: bool = False):
        self.mask = mask
        self.is_right_padded = is_right_padded
        self._directions: dict[bool, DirectionIndex] = {}

    @cached_property
    def lengths(self) -> torch.Tensor:
        """Number of tokens `[batch]`."""
        return self.mask.sum(dim=1)

    @cached_property
    def last(self) -> torch.Tensor:
        """The last step that reads a token `[batch, 1, 1]`; 0 in rows without one."""
        return (self.lengths - 1).clamp(min=0)[:, None, None]

    @cached_property
    def valid(self) -> torch.Tensor:
        """True at the first `lengths` steps `[batch, seq]`."""
        return torch.arange(self.mask.shape[1], device=self.mask.device) < self.lengths[:, None]

    @classmethod
    def from_attention_mask(
        cls, attention_mask: torch.Tensor | None, inputs: torch.Tensor, has_past: bool = False
    ) -> "Padding | None":
        """
        Args:
            attention_mask (`torch.Tensor` of shape `(batch, seq)`, *optional*): Non-zero where there is a token.
            inputs (`torch.Tensor` of shape `(batch, seq, ...)`): What the mask belongs to.
            has_past (`bool`): Whether the mask may begin with columns of earlier tokens, which are left out.

        Returns:
            `Padding`, or None where nothing is known to be padding.

        Raises:
            `ValueError`: The mask has another shape.
        """
        if attention_mask is None:
            return None
        batch, seq = inputs.shape[:2]
        shape = tuple(attention_mask.shape)
        if len(shape) != 2 or shape[0] != batch or shape[1] < seq or (shape[1] > seq and not has_past):
            wanted = f"({batch}, {'past + ' if has_past else ''}{seq})"
            raise ValueError(f"`attention_mask` must have the shape {wanted}, got {shape}.")
        mask = attention_mask[:, shape[1] - seq :].bool()
        # Looking at the values costs nothing on a CPU; elsewhere it would wait for the device.
        if mask.device.type != "cpu" or torch.compiler.is_compiling():
            return cls(mask)
        if mask.all():
            return None
        return cls(mask, is_right_padded=bool((mask[:, 1:] <= mask[:, :-1]).all()))

    def direction(self, reverse: bool) -> DirectionIndex:
        """The index for reading from left to right, or from right to left."""
        if reverse not in self._directions:
            self._directions[reverse] = self._make_direction(reverse)
        return self._directions[reverse]

    def _make_direction(self, reverse: bool) -> DirectionIndex:
        if self.is_right_padded and not reverse:
            return DirectionIndex(None, None, None)
        batch, seq = self.mask.shape
        counts = self.mask.long()
        steps = torch.arange(seq, device=self.mask.device).expand(batch, seq)
        order = (~self.mask).long().argsort(dim=1, stable=True)  # positions of the tokens first
        if reverse:
            read_before = counts.sum(dim=1, keepdim=True) - counts.cumsum(dim=1) + counts  # at or after the position
            order = order.gather(1, torch.where(self.valid, self.last[:, :, 0] - steps, steps))
        else:
            read_before = counts.cumsum(dim=1)  # at or before the position
        offset = torch.arange(batch, device=self.mask.device)[:, None] * seq
        scatter = (read_before - 1).clamp(min=0) + offset
        return DirectionIndex((order + offset).flatten(), scatter.flatten(), (read_before > 0)[:, :, None])

    def at_last(self, outputs: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
        """The output `[batch, size]` of the last step that read a token; `initial` for rows without one."""
        last = outputs.gather(1, self.last.expand(-1, 1, outputs.shape[-1])).squeeze(1)
        return torch.where((self.lengths == 0)[:, None], initial.to(last.dtype), last)


def gather_positions(features: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows `index` `[batch * seq]` of `features` `[batch, seq, size]` taken as `[batch * seq, size]`, same shape."""
    return features.flatten(0, 1).index_select(0, index).view_as(features)


def masked_step(
    cell: RecurrentCell, projected: torch.Tensor, state: State, is_token: torch.Tensor | None, linear: Linear = F.linear
) -> State:
    """One step of a cell that leaves the state of rows without a token `[batch, 1]` as it is."""
    new_state = cell.step(projected, state, linear)
    if is_token is None:
        return new_state
    return tuple(torch.where(is_token, new, old) for new, old in zip(new_state, state))


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
    projected = cell.project_inputs(inputs).unbind(1)
    is_token = [None] * len(projected) if padding is None else padding.mask.unsqueeze(-1).unbind(1)
    history = []
    for position in reversed(range(len(projected))) if reverse else range(len(projected)):
        state = masked_step(cell, projected[position], state, is_token[position], linear)
        history.append(state)
    outputs = [step[0] for step in (reversed(history) if reverse else history)]
    return torch.stack(outputs, dim=1), state, history


def call_torch_kernel(
    cells: list[RecurrentCell], inputs: torch.Tensor, state: State, weights: list[torch.Tensor] | None = None
) -> tuple[torch.Tensor, State]:
    """
    Torch's own kernel (oneDNN, cuDNN or ATen) over a whole sequence without padding.

    Args:
        cells (`list[RecurrentCell]`): One cell, or one for each of two directions.
        inputs (`torch.Tensor` of shape `(batch, seq, input_size)`): The inputs.
        state: The initial states of the first cell, then those of the second.
        weights (`list[torch.Tensor]`, *optional*): Stands for the parameters of the cells.

    Returns:
        The outputs `(batch, seq, cells * hidden_size)` and the final states in the order of `state`.
    """
    if weights is None:
        weights = [w for cell in cells for w in (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)]
    num_states = len(cells[0].state_names)
    initial = tuple(torch.stack(state[index::num_states]) for index in range(num_states))
    kernel = getattr(torch._VF, cells[0].torch_kernel)
    # cuDNN has no backward for a forward that ran as inference, whatever the mode of the model.
    keeps_graph = torch.is_grad_enabled()
    outputs, *final = kernel(
        inputs,
        initial if num_states > 1 else initial[0],
        weights,
        True,  # biases
        1,  # layers
        0.0,  # dropout
        keeps_graph,
        len(cells) > 1,
        True,  # batch first
    )
    return outputs, tuple(final[index][direction] for direction in range(len(cells)) for index in range(num_states))


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
    index = padding.direction(reverse)
    if index.gather is not None:
        inputs = gather_positions(inputs, index.gather)
    weights = None
    if needs_state and cell.hold_gates is not None:
        is_padding = (~padding.valid).to(inputs.dtype).unsqueeze(-1)
        hold = cell.weight_ih.new_tensor(cell.hold_gates) * SATURATION
        column = hold.repeat_interleave(cell.hidden_size).unsqueeze(-1)
        inputs = torch.cat([inputs, is_padding], dim=-1)
        weights = [torch.cat([cell.weight_ih, column], dim=-1), cell.weight_hh, cell.bias_ih, cell.bias_hh]
    outputs, final = call_torch_kernel([cell], inputs, state, weights)
    last = padding.at_last(outputs, state[0])
    if index.scatter is None:
        outputs = torch.where(padding.valid.unsqueeze(-1), outputs, last.unsqueeze(1))
    else:
        outputs = gather_positions(outputs, index.scatter)
        outputs = torch.where(index.started, outputs, state[0].to(outputs.dtype).unsqueeze(1))
    return outputs, (last, *final[1:])


class RecurrentLayer(GradientCheckpointingLayer):
    r"""
    One layer of recurrence over sequences, in one direction or two.

    Args:
        config: A configuration with `cell_type`, `hidden_size`, `hidden_dropout`, `recurrent_dropout` and `residual`.
        input_size (`int`): Width of the inputs.
        layer_idx (`int`): Position in the stack. Layers after the first drop units of their input and, where
            `config.residual` says so, add the first `output_size` features of their input to their output.
        bidirectional (`bool`): Whether a second cell reads from right to left.
    """

    def __init__(self, config, input_size: int, layer_idx: int, bidirectional: bool = False):
        super().__init__()
        cell_class = RECURRENT_CELLS[config.cell_type]
        self.cell = cell_class(input_size, config.hidden_size)
        self.cell_reverse = cell_class(input_size, config.hidden_size) if bidirectional else None
        self.layer_idx = layer_idx
        self.output_size = config.hidden_size * (2 if bidirectional else 1)
        self.input_dropout = config.hidden_dropout if layer_idx > 0 else 0.0
        self.recurrent_dropout = config.recurrent_dropout
        self.residual = config.residual and layer_idx > 0
        self.recorded = HiddenStates()

    @property
    def cells(self) -> list[RecurrentCell]:
        """The cell that reads from left to right, then the one from right to left, if any."""
        return [self.cell] if self.cell_reverse is None else [self.cell, self.cell_reverse]

    @property
    def state_sizes(self) -> list[int]:
        """The widths of the states of all cells."""
        return [cell.hidden_size for cell in self.cells for _ in cell.state_names]

    def forward(
        self,
        hidden_states: torch.Tensor,
        state: State | None = None,
        padding: Padding | None = None,
        needs_state: bool = True,
        needs_history: bool = False,
    ) -> tuple[torch.Tensor, State | None, State | None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, seq, input_size)`): The inputs.
            state (`tuple` of `torch.Tensor` of shape `(batch, hidden_size)`, *optional*):
                The states of the cells before the first token, in the order of `cells`; zero where not given.
            padding (`Padding`, *optional*): Where the tokens lie.
            needs_state (`bool`): Whether the final state is asked for.
            needs_history (`bool`): Whether the state after each position is asked for (one direction only).

        Returns:
            The outputs `(batch, seq, output_size)`; the final states or None; the states
            `(seq, batch, hidden_size)` after each position or None.
        """
        inputs = F.dropout(hidden_states, self.input_dropout, self.training)
        if state is None:
            state = tuple(zeros for cell in self.cells for zeros in cell.initial_state(inputs))
        if self._takes_torch_kernel(inputs, needs_history):
            outputs, state = self._run_torch_kernel(inputs, state, padding, needs_state)
            history = (outputs.transpose(0, 1),) if needs_history else None
        else:
            outputs, state, history = self._run_loop(inputs, state, padding, needs_history)
        return self.recorded(self._add_residual(outputs, hidden_states)), state if needs_state else None, history

    def step(
        self,
        hidden_states: torch.Tensor,
        state: State,
        is_token: torch.Tensor | None = None,
        linear: Linear = F.linear,
    ) -> tuple[torch.Tensor, State]:
        """
        One position of [`~RecurrentLayer.forward`], for decoders that feed back what they computed.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, input_size)`): The inputs of this position.
            state (`tuple` of `torch.Tensor` of shape `(batch, hidden_size)`): The state before it.
            is_token (`torch.Tensor` of shape `(batch, 1)`, *optional*): False in rows where the position is padding.
            linear: What [`~RecurrentLayer.recurrent_linear`] returned for the sequence.

        Returns:
            The output `(batch, output_size)` and the new state.
        """
        inputs = F.dropout(hidden_states, self.input_dropout, self.training)
        state = masked_step(self.cell, self.cell.project_inputs(inputs), state, is_token, linear)
        return self._add_residual(state[0], hidden_states), state

    def recurrent_linear(self, inputs: torch.Tensor) -> Linear:
        """
        `F.linear`, or while training with `recurrent_dropout` a stand-in that drops units of the state, the same ones
        at every step of a sequence. `inputs` `(batch, ...)` gives the number of rows, type and device.
        """
        if not self.training or self.recurrent_dropout == 0:
            return F.linear
        kept = F.dropout(inputs.new_ones(inputs.shape[0], self.cell.hidden_size), self.recurrent_dropout)

        def linear(hidden, weight, bias=None):
            return F.linear(hidden * kept, weight, bias)

        return linear

    def _add_residual(self, outputs: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        return outputs + inputs[..., : self.output_size] if self.residual else outputs

    def _takes_torch_kernel(self, inputs: torch.Tensor, needs_history: bool) -> bool:
        # A compiler can look neither into the kernel nor, for that matter, into a context variable.
        if self.cell.torch_kernel is None or torch.compiler.is_compiling() or _loop_only.get():
            return False
        if self.training and self.recurrent_dropout > 0:
            return False
        if needs_history and len(self.cell.state_names) > 1:
            return False
        # For a single step the kernel would spend its time on setting itself up.
        return inputs.shape[0] > 0 and inputs.shape[1] > 1

    def _run_torch_kernel(self, inputs, state, padding, needs_state):
        if padding is None:
            return call_torch_kernel(self.cells, inputs, state)
        return self._run_directions(
            lambda cell, state, reverse: run_torch_kernel(cell, inputs, state, padding, reverse, needs_state), state
        )

    def _run_loop(self, inputs, state, padding, needs_history):
        if inputs.shape[1] == 0:
            history = tuple(states.new_empty(0, *states.shape) for states in state) if needs_history else None
            return inputs.new_empty(*inputs.shape[:2], self.output_size), state, history
        histories = []

        def run(cell, state, reverse):
            linear = self.recurrent_linear(inputs)
            outputs, state, history = run_loop(cell, inputs, state, padding, reverse, linear)
            histories.append(history)
            return outputs, state

        outputs, state = self._run_directions(run, state)
        return outputs, state, tuple(map(torch.stack, zip(*histories[0]))) if needs_history else None

    def _run_directions(self, run, state: State) -> tuple[torch.Tensor, State]:
        num_states = len(self.cell.state_names)
        outputs, final = run(self.cell, state[:num_states], False)
        if self.cell_reverse is not None:
            reverse_outputs, reverse_final = run(self.cell_reverse, state[num_states:], True)
            outputs, final = torch.cat([outputs, reverse_outputs], dim=-1), final + reverse_final
        return outputs, final


def make_layers(config, num_layers: int, input_size: int, bidirectional: bool = False) -> nn.ModuleList:
    """A stack of layers, of which each reads the output of the one before."""
    layers = nn.ModuleList()
    for layer_idx in range(num_layers):
        layers.append(RecurrentLayer(config, input_size, layer_idx, bidirectional))
        input_size = layers[-1].output_size
    return layers
