"""Cells other than the LSTM, forward and backward over whole sequences without padding."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from hf_rnn import RECURRENT_CELLS, RNNConfig, RNNModel, loop_only
from hf_rnn.recurrent_cells import RecurrentCell

from .harness import Measurement, Settings, benchmark, check_equal, matrix_products, measure, recurrence_shapes
from .plain import recurrence_of, weights_of


class LayerNormLSTMCell(RecurrentCell):
    """An LSTM with layer normalisation of both products and of the cell state, as a program would add it."""

    gate_names = ("input", "forget", "cell", "output")
    state_names = ("hidden_state", "cell_state")

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__(input_size, hidden_size)
        self.norm_ih = nn.LayerNorm(4 * hidden_size)
        self.norm_hh = nn.LayerNorm(4 * hidden_size)
        self.norm_cell = nn.LayerNorm(hidden_size)

    def project_inputs(self, inputs):
        return self.norm_ih(F.linear(inputs, self.weight_ih, self.bias_ih))

    def step(self, projected, state, linear=F.linear):
        hidden, cell = state
        gates = projected + self.norm_hh(linear(hidden, self.weight_hh, self.bias_hh))
        input_gate, forget_gate, new, output_gate = gates.chunk(4, dim=-1)
        cell = torch.sigmoid(forget_gate) * cell + torch.sigmoid(input_gate) * torch.tanh(new)
        return torch.sigmoid(output_gate) * torch.tanh(self.norm_cell(cell)), cell


class PeepholeLSTMCell(RecurrentCell):
    """An LSTM whose gates see the cell state (Gers and Schmidhuber, 2000)."""

    gate_names = ("input", "forget", "cell", "output")
    state_names = ("hidden_state", "cell_state")

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__(input_size, hidden_size)
        self.peepholes = nn.Parameter(torch.full((3, hidden_size), 0.1))

    def init_weights(self, config):
        super().init_weights(config)
        nn.init.constant_(self.peepholes, 0.1)

    def step(self, projected, state, linear=F.linear):
        hidden, cell = state
        gates = projected + linear(hidden, self.weight_hh, self.bias_hh)
        input_gate, forget_gate, new, output_gate = gates.chunk(4, dim=-1)
        to_input, to_forget, to_output = self.peepholes
        kept = torch.sigmoid(forget_gate + to_forget * cell) * cell
        cell = kept + torch.sigmoid(input_gate + to_input * cell) * torch.tanh(new)
        return torch.sigmoid(output_gate + to_output * cell) * torch.tanh(cell), cell


ADDED_CELLS = {"layer_norm_lstm": LayerNormLSTMCell, "peephole_lstm": PeepholeLSTMCell}


@contextlib.contextmanager
def added_cell(name: str) -> Iterator[None]:
    """Within this context the table of cells has one of the cells of this file, under a name of its own."""
    key = f"benchmark_{name}"
    RECURRENT_CELLS[key] = ADDED_CELLS[name]
    try:
        yield key
    finally:
        del RECURRENT_CELLS[key]


def make_layer(settings: Settings, cell_type: str, hidden_size: int) -> RNNModel:
    """A model of one recurrent layer."""
    config = RNNConfig(vocab_size=3, hidden_size=hidden_size, num_hidden_layers=1, cell_type=cell_type)
    return RNNModel(config).to(settings.device).train()


class _Sequences:
    """A batch of sequences, and forwards and backwards over it."""

    def __init__(self, settings: Settings, hidden_size: int):
        batch, seq = settings.size((32, 64), (3, 6))
        self.tokens = batch * seq
        self.inputs = torch.randn(batch, seq, hidden_size, device=settings.device, requires_grad=True)
        self.gradient = torch.randn(batch, seq, hidden_size, device=settings.device)

    def through_model(self, model: RNNModel, parameters) -> list[torch.Tensor]:
        outputs = model(inputs_embeds=self.inputs).last_hidden_state
        return outputs.detach(), *torch.autograd.grad(outputs, [self.inputs, *parameters], self.gradient)

    def through_module(self, recurrence: nn.Module) -> list[torch.Tensor]:
        outputs, _ = recurrence(self.inputs)
        return outputs.detach(), *torch.autograd.grad(outputs, [self.inputs, *recurrence.parameters()], self.gradient)


@benchmark("gru-256", "GRU, hidden 256 / nn.GRU", {"cpu": 0.75, "cuda": 1.03}, cell="gru", hidden_size=256)
@benchmark("gru-512", "GRU, hidden 512 / nn.GRU", {"cpu": 0.75, "cuda": 1.03}, cell="gru", hidden_size=512)
@benchmark("rnn-256", "plain RNN, hidden 256 / nn.RNN", {"cpu": 0.75, "cuda": 1.03}, cell="rnn_tanh", hidden_size=256)
@benchmark("rnn-512", "plain RNN, hidden 512 / nn.RNN", {"cpu": 0.75, "cuda": 1.03}, cell="rnn_tanh", hidden_size=512)
def sequence_function(settings: Settings, cell: str, hidden_size: int) -> Measurement:
    """Cells of torch for which the library has a function of its own."""
    hidden_size = settings.size(hidden_size, 12)
    model = make_layer(settings, cell, hidden_size)
    recurrence = recurrence_of(model.layers)
    sequences = _Sequences(settings, hidden_size)

    def ours():
        return sequences.through_model(model, weights_of(model.layers).values())

    check_equal("outputs and gradients", ours(), sequences.through_module(recurrence))
    gates = len(RECURRENT_CELLS[cell].gate_names)
    shapes = recurrence_shapes(sequences.tokens, hidden_size, hidden_size, gates)
    floor = matrix_products(shapes, settings, backward=True)
    return measure(settings, lambda: sequences.through_module(recurrence), ours, floor)


@benchmark(
    "layer-norm-512",
    "layer-norm LSTM, added by a program, hidden 512 / nn.LSTM",
    {"cpu": 1.5, "cuda": 3.0},
    cell="layer_norm_lstm",
    hidden_size=512,
)
@benchmark(
    "layer-norm-256",
    "layer-norm LSTM, added by a program, hidden 256 / nn.LSTM",
    {"cpu": 2.6, "cuda": 3.0},
    cell="layer_norm_lstm",
    hidden_size=256,
)
@benchmark(
    "peephole-512",
    "peephole LSTM, added by a program, hidden 512 / nn.LSTM",
    {"cpu": 1.5, "cuda": 3.0},
    cell="peephole_lstm",
    hidden_size=512,
)
@benchmark(
    "peephole-256",
    "peephole LSTM, added by a program, hidden 256 / nn.LSTM",
    {"cpu": 2.6, "cuda": 3.0},
    cell="peephole_lstm",
    hidden_size=256,
)
def added(settings: Settings, cell: str, hidden_size: int) -> Measurement:
    """A cell that has no fast path of its own, compared in time with a plain LSTM and in numbers with its loop."""
    hidden_size = settings.size(hidden_size, 12)
    with added_cell(cell) as cell_type:
        model = make_layer(settings, cell_type, hidden_size)
        recurrence = recurrence_of(make_layer(settings, "lstm", hidden_size).layers)
        sequences = _Sequences(settings, hidden_size)
        parameters = list(model.layers.parameters())

        def ours():
            return sequences.through_model(model, parameters)

        with loop_only():
            expected = ours()
        # Layer normalisation in float32 is itself up to 2e-4 away from float64.
        check_equal("outputs and gradients", ours(), expected, 1e-3)
        shapes = recurrence_shapes(sequences.tokens, hidden_size, hidden_size)
        floor = matrix_products(shapes, settings, backward=True)
        return measure(settings, lambda: sequences.through_module(recurrence), ours, floor)
