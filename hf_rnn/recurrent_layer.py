"""Layers of recurrence: directions, dropout, residual connections, stacks. Imports the cells and what runs them.

A layer has one door to its cells: [`run_sequence`] for sequences, in the graph of a compiler or an exporter through the
operator that hides it there, and [`RecurrentLayer.step`] for decoders that feed back what they computed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .cell_functions import step_by_function
from .fast_paths import loop_only
from .linear_calls import project_inputs
from .packed_linear import begin_text, packed_linear
from .packed_sequences import PackedPadding
from .recurrent_cells import RECURRENT_CELLS, Linear, RecurrentCell, State, masked_step, where_token
from .recurrent_gates import Gates, run_with_gates
from .recurrent_kernels import loop_linear, run_sequence
from .recurrent_operator import run_sequence_opaquely
from .recurrent_padding import Padding


__all__ = ["Dropout", "GateValues", "HiddenStates", "Padding", "RecurrentLayer", "loop_only", "make_layers"]


# Steps of a piece of time that is computed again as a whole.
CHECKPOINTED_STEPS = 128
# Products that are nothing but products.
_PLAIN = (F.linear, packed_linear)


class Dropout(nn.Dropout):
    """Torch's, without a call where nothing is dropped: in single steps it is half of what a small product takes."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs) if self.training and self.p > 0 else inputs


class HiddenStates(nn.Identity):
    """The place where hidden states `[batch, seq, size]` are recorded for `output_hidden_states`."""


class GateValues(nn.Module):
    """The place where the gates of a layer, by name `[batch, seq, hidden]`, are recorded for `output_gates`."""

    def forward(self, gates: Gates) -> Gates:
        return gates


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
        # What else is to be known of the cells is kept here, because an adapter may take their place.
        self.state_sizes = [cell.hidden_size for cell in self.cells for _ in cell.state_names]
        self.hidden_size = config.hidden_size
        self.layer_idx = layer_idx
        self.output_size = config.hidden_size * (2 if bidirectional else 1)
        self.input_dropout = config.hidden_dropout if layer_idx > 0 else 0.0
        self.recurrent_dropout = config.recurrent_dropout
        self.residual = config.residual and layer_idx > 0
        self.recorded = HiddenStates()
        self.recorded_gates = GateValues()

    @property
    def cells(self) -> list[RecurrentCell]:
        """The cell that reads from left to right, then the one from right to left, if any."""
        return [self.cell] if self.cell_reverse is None else [self.cell, self.cell_reverse]

    def within_cells(self, run: Callable[[list[RecurrentCell]], Any]) -> Any:
        """`run(cells)` within the forward of every cell, see [`RecurrentCell.forward`]."""
        if self.cell_reverse is None:
            return self.cell(lambda cell: run([cell]))
        return self.cell(lambda cell: self.cell_reverse(lambda cell_reverse: run([cell, cell_reverse])))

    def initial_state(self, inputs: torch.Tensor) -> State:
        """The states `(batch, hidden_size)` of all cells before the first of `inputs` `(batch, ...)`."""
        return self.within_cells(lambda cells: sum((cell.initial_state(inputs) for cell in cells), ()))

    def forward(
        self,
        hidden_states: torch.Tensor,
        state: State | None = None,
        padding: Padding | None = None,
        needs_state: bool = True,
        needs_history: bool = False,
        needs_gates: bool = False,
    ) -> tuple[torch.Tensor, State | None, State | None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, seq, input_size)`): The inputs.
            state (`tuple` of `torch.Tensor` of shape `(batch, hidden_size)`, *optional*):
                The states of the cells before the first token, in the order of `cells`; zero where not given.
            padding (`Padding`, *optional*): Where the tokens lie.
            needs_state (`bool`): Whether the final state is asked for.
            needs_history (`bool`): Whether the state after each position is asked for (one direction only).
            needs_gates (`bool`): Whether the gates are to pass through `recorded_gates`, see [`run_with_gates`].

        Returns:
            The outputs `(batch, seq, output_size)`; the final states or None; the states
            `(seq, batch, hidden_size)` after each position or None.
        """
        drops = self.training and self.input_dropout > 0
        inputs = F.dropout(hidden_states, self.input_dropout) if drops else hidden_states
        # A compiler that looked at the index would make a graph for each layer.
        if not torch.compiler.is_compiling() and self.layer_idx == 0 and (state is None or inputs.shape[1] > 1):
            begin_text(is_long=inputs.shape[1] > 1)
        if state is None:
            state = self.initial_state(inputs)
        kept = []
        if self.training:
            kept = [units for units in (self.kept_units(inputs) for _ in self.cells) if units is not None]
        run = run_sequence
        if inputs.shape[1] > 1 and torch.compiler.is_compiling() and not needs_history:
            # A single step goes into a graph as it is; so do the states passed through, which nobody compiles.
            # A checkpoint wants nothing to be kept; a graph would run the forwards of all layers before any backward.
            run = partial(run_sequence_opaquely, keeps=not (self.gradient_checkpointing and self.training))
        if needs_gates:
            run = run_with_gates
        elif run is run_sequence and not needs_history and self._takes_pieces(inputs, padding):
            outputs, state = self._run_in_pieces(inputs, state, padding, kept)
            return self.recorded(self._add_residual(outputs, hidden_states)), state if needs_state else None, None
        outputs, state, history, *gates = self.within_cells(
            lambda cells: run(cells, inputs, state, padding, kept, needs_state, needs_history)
        )
        for values in gates:
            self.recorded_gates(values)
        return self.recorded(self._add_residual(outputs, hidden_states)), state if needs_state else None, history

    def _takes_pieces(self, inputs: torch.Tensor, padding: Padding | None) -> bool:
        """Whether a long text is read in pieces of time, so that its backward needs little memory."""
        return (
            self.gradient_checkpointing
            and self.training
            and torch.is_grad_enabled()
            and inputs.shape[1] >= 2 * CHECKPOINTED_STEPS
            and self.cell_reverse is None
            and not isinstance(padding, PackedPadding)
        )

    def _run_in_pieces(
        self, inputs: torch.Tensor, state: State, padding: Padding | None, kept: list[torch.Tensor]
    ) -> tuple[torch.Tensor, State]:
        """
        Outputs and final state. With gradient checkpointing a layer as a whole keeps nothing but its inputs, and
        computes itself again in the backward; here it does that piece by piece, from the states in between.
        """

        def read(inputs, mask, *state):
            padding = None if mask is None else Padding.from_attention_mask(mask, inputs)
            outputs, state, _ = self.within_cells(lambda cells: run_sequence(cells, inputs, state, padding, kept))
            return outputs, *state

        outputs, pieces = [], inputs.split(CHECKPOINTED_STEPS, dim=1)
        masks = [None] * len(pieces) if padding is None else padding.mask.split(CHECKPOINTED_STEPS, dim=1)
        for piece, mask in zip(pieces, masks, strict=True):
            output, *state = self._gradient_checkpointing_func(read, piece, mask, *state)
            outputs.append(output)
        return torch.cat(outputs, dim=1), tuple(state)

    def step(
        self,
        hidden_states: torch.Tensor,
        state: State,
        is_token: torch.Tensor | None = None,
        linear: Linear = F.linear,
        input_linear: Linear = F.linear,
    ) -> tuple[torch.Tensor, State]:
        """
        One position of [`~RecurrentLayer.forward`], for decoders that feed back what they computed.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, input_size)`): The inputs of this position.
            state (`tuple` of `torch.Tensor` of shape `(batch, hidden_size)`): The state before it.
            is_token (`torch.Tensor` of shape `(batch, 1)`, *optional*): False in rows where the position is padding.
            linear: What [`~RecurrentLayer.loop_linear`] returned for the sequence.
            input_linear: What stands for `F.linear` in products with inputs.

        Returns:
            The output `(batch, output_size)` and the new state.
        """
        inputs = F.dropout(hidden_states, self.input_dropout, self.training)
        are_plain = linear in _PLAIN and input_linear in _PLAIN

        def run(cell):
            new_state = step_by_function(cell, inputs, state) if are_plain else None
            if new_state is not None:
                return where_token(is_token, new_state, state)
            return masked_step(cell, project_inputs(cell, inputs, input_linear), state, is_token, linear)

        state = self.cell(run)
        return self._add_residual(state[0], hidden_states), state

    def kept_units(self, inputs: torch.Tensor) -> torch.Tensor | None:
        """
        The factors `(batch, hidden_size)` of the hidden state in recurrent products: while training with
        `recurrent_dropout` some units are dropped, the same ones at every step of a sequence; None where all are kept.
        `inputs` `(batch, ...)` gives the number of rows, type and device.
        """
        if not self.training or self.recurrent_dropout == 0:
            return None
        return F.dropout(inputs.new_ones(inputs.shape[0], self.hidden_size), self.recurrent_dropout)

    def loop_linear(self, inputs: torch.Tensor, num_steps: int) -> Linear:
        """What stands for `F.linear` in `num_steps` steps over one sequence; see [`~RecurrentLayer.kept_units`]."""
        return loop_linear(inputs, num_steps, self.kept_units(inputs))

    def _add_residual(self, outputs: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        return outputs + inputs[..., : self.output_size] if self.residual else outputs


def make_layers(config, num_layers: int, input_size: int, bidirectional: bool = False) -> nn.ModuleList:
    """A stack of layers, of which each reads the output of the one before."""
    layers = nn.ModuleList()
    for layer_idx in range(num_layers):
        layers.append(RecurrentLayer(config, input_size, layer_idx, bidirectional))
        input_size = layers[-1].output_size
    return layers
