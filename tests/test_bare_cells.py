"""What is written down of a cell, and the cell that is made of it, eager and within graphs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from hf_rnn import RECURRENT_CELLS
from hf_rnn.bare_cells import attributes_of, describe, effects, make_cell
from hf_rnn.recurrent_cells import LSTMCell
from matrix import make_inputs, make_model, make_tokens
from test_compile import check_slope, compare, fresh_compiler


__all__ = ["fresh_compiler"]


class Zoneout(LSTMCell):
    """Units keep their state by chance while training, and in part otherwise (Krueger et al., 2016)."""

    def __init__(self, input_size, hidden_size):
        super().__init__(input_size, hidden_size)
        self.rate = 0.3

    def step(self, projected, state, linear=F.linear):
        hidden, cell = super().step(projected, state, linear)
        kept = torch.full_like(hidden, self.rate)
        if self.training:
            kept = torch.bernoulli(kept)
        return kept * state[0] + (1 - kept) * hidden, cell


class WithDropout(LSTMCell):
    def __init__(self, input_size, hidden_size):
        super().__init__(input_size, hidden_size)
        self.drop = nn.Dropout(0.5)

    def step(self, projected, state, linear=F.linear):
        hidden, cell = super().step(projected, state, linear)
        return self.drop(hidden), cell


class Permuted(LSTMCell):
    """With a buffer of whole numbers and one of truth values."""

    def __init__(self, input_size, hidden_size):
        super().__init__(input_size, hidden_size)
        self.register_buffer("order", torch.arange(hidden_size).flip(0))
        self.register_buffer("shown", torch.arange(hidden_size) > 1)

    def step(self, projected, state, linear=F.linear):
        hidden, cell = super().step(projected, state, linear)
        return torch.where(self.shown, hidden, 0.5 * hidden)[:, self.order], cell


class Counting(LSTMCell):
    """A step that writes to a buffer."""

    def __init__(self, input_size, hidden_size):
        super().__init__(input_size, hidden_size)
        self.register_buffer("steps", torch.zeros(1))

    def step(self, projected, state, linear=F.linear):
        self.steps.add_(1)
        hidden, cell = super().step(projected, state, linear)
        return hidden / self.steps.sqrt(), cell


class WithTensor(LSTMCell):
    """With numbers that are neither a parameter nor a buffer."""

    def __init__(self, input_size, hidden_size):
        super().__init__(input_size, hidden_size)
        self.scale = torch.linspace(0.5, 1, hidden_size, dtype=torch.float64)

    def step(self, projected, state, linear=F.linear):
        hidden, cell = super().step(projected, state, linear)
        return hidden * self.scale, cell


CELLS = {cell.__name__: cell for cell in (Zoneout, WithDropout, Permuted, Counting, WithTensor)}


@pytest.fixture(autouse=True)
def added(monkeypatch):
    for name, cell in CELLS.items():
        monkeypatch.setitem(RECURRENT_CELLS, name, cell)


def test_descriptions():
    """A name as long as nothing was set; then what was set, and what is made of it has it too."""
    cell = Zoneout(3, 4)
    assert describe(cell) == "Zoneout"
    assert attributes_of(cell) == {"hidden_size": 4, "input_size": 3, "rate": 0.3, "training": True}
    cell.rate = 0.1
    cell.eval()
    assert describe(cell) == '["Zoneout", {"rate": 0.1, "training": false}]'
    made = make_cell(describe(cell), 3, 4)
    assert (made.rate, made.training, made.weight_ih.device.type) == (0.1, False, "meta")
    cell = WithDropout(3, 4)
    cell.drop.p = 0.2
    assert make_cell(describe(cell), 3, 4).drop.p == 0.2


def test_equations_of_kernels_do_not_depend_on_the_mode():
    for name, cell_class in list(RECURRENT_CELLS.items())[:4]:
        assert describe(cell_class(3, 4).eval()) == name


def test_cells_that_cannot_be_described():
    class Elsewhere(LSTMCell):
        pass

    cells = [Elsewhere(3, 4), WithTensor(3, 4), Zoneout(3, 4), WithDropout(3, 4), WithDropout(3, 4), Zoneout(3, 4)]
    cells[2].rate = torch.tensor(0.1)
    cells[3].drop = nn.Identity()
    cells[4].drop.register_forward_hook(lambda *arguments: None)
    del cells[5].rate
    assert [describe(cell) for cell in cells] == [""] * len(cells)


def test_parametrized_weights_are_weights():
    cell = Zoneout(3, 4)
    parametrize.register_parametrization(cell, "weight_hh", nn.Tanh())
    assert describe(cell) == "Zoneout"


def test_effects():
    def effects_of(cell_class, training=True):
        return effects(cell_class(3, 4).train(training))

    assert effects_of(LSTMCell) == (False, False)
    assert effects_of(Permuted) == (False, False)
    assert effects_of(Zoneout) == (True, False)
    assert effects_of(Zoneout, training=False) == (False, False)
    assert effects_of(Counting) == (False, True)
    state = torch.get_rng_state()
    effects_of(WithDropout)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("cell_type", CELLS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_graphs_of_cells_in_evaluation(cell_type, bidirectional):
    name = "RNNForTokenClassification"
    model = make_model(name, cell_type=cell_type, bidirectional=bidirectional)
    if cell_type == "Counting":
        results = []
        for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
            for layer in model.model.layers:
                for cell in layer.cells:
                    cell.steps = torch.zeros_like(cell.steps)
            with torch.no_grad():
                results.append(run(**make_inputs(name)).logits)
        torch.testing.assert_close(*results)
        return
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch, seq in [(6, 7), (5, 8)]:
        compare(model, compiled, make_inputs(name, batch, seq))


def test_what_is_set_on_a_cell_is_seen_by_its_graph():
    """Before a graph is made, and after that."""
    model, inputs = make_model("RNNModel", cell_type="Zoneout"), make_tokens(3, 5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for rate in (0.3, 0.8, 0.0):
            for layer in model.layers:
                layer.cell.rate = rate
            torch.testing.assert_close(compiled(inputs)[0], model(inputs)[0])


@pytest.mark.parametrize("cell_type", ["Zoneout", "WithDropout"])
def test_gradients_of_cells_that_draw_random_numbers(cell_type):
    """The backward draws those of the forward: the gradient is the slope along a direction, and numbers do differ."""
    model, tokens = make_model("RNNModel", cell_type=cell_type).train(), make_tokens(6, 7)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    check_slope(
        lambda: compiled(tokens, use_cache=False).last_hidden_state.sin().sum(), list(model.layers.parameters())
    )
