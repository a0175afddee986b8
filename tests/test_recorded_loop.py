"""Recorded loops: that they are the loop, in which pieces they come, and what is recorded."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.cells import LayerNormLSTMCell, PeepholeLSTMCell
from hf_rnn import RECURRENT_CELLS, recorded_loop, recordings, step_linear, without_fast_paths
from hf_rnn.recurrent_cells import GRUCell, LSTMCell, RecurrentCell
from matrix import make_mask
from recorded import (
    DEVICE,
    HIDDEN,
    SEQ,
    assert_same,
    make_inputs,
    make_model,
    plain,
    recorder,  # noqa: F401
    results_of,
)


class ProductOfGate(RecurrentCell):
    """Gated as Cho et al. (2014) wrote it: the recurrent product is of something that the step computed."""

    gate_names = ("reset", "new")

    def step(self, projected, state, linear=F.linear):
        (hidden,) = state
        of_reset, of_new = projected.chunk(2, dim=-1)
        reset, new = self.weight_hh.chunk(2)
        return (torch.tanh(of_new + linear(torch.sigmoid(of_reset + linear(hidden, reset)) * hidden, new)),)


class WithBuffer(LSTMCell):
    """A step that notes something in the cell."""

    def __init__(self, input_size, hidden_size):
        super().__init__(input_size, hidden_size)
        self.register_buffer("steps", torch.zeros(()))

    def step(self, projected, state, linear=F.linear):
        self.steps += 1
        return super().step(projected, state, linear)


CELLS = {
    "layer_norm": LayerNormLSTMCell,
    "peephole": PeepholeLSTMCell,
    "product_of_gate": ProductOfGate,
    "with_buffer": WithBuffer,
}


@pytest.fixture(autouse=True)
def cells(monkeypatch):
    """Cells of a program."""
    for name, cell in CELLS.items():
        monkeypatch.setitem(RECURRENT_CELLS, name, cell)


@pytest.fixture
def as_they_are():
    """Steps that are recorded as they are: compiling takes seconds."""
    with without_fast_paths("fused_steps"):
        yield


AS_THEY_ARE = pytest.mark.usefixtures("as_they_are")


def num_pieces() -> int:
    return sum(len(room.pieces) for room in recordings.recorder.rooms if isinstance(room, recorded_loop._Loop))


@pytest.mark.parametrize("mask", [None, make_mask(SEQ)], ids=["no_mask", "mask"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell_type", ["layer_norm", "peephole", "product_of_gate"])
def test_a_recording_is_the_loop(cell_type, bidirectional, mask):
    """From the third time on, with other inputs and other weights than those that were there when it was made."""
    model = make_model(cell_type, bidirectional=bidirectional).train()
    for run in range(5):
        inputs = make_inputs(seed=run)
        assert_same(results_of(model, inputs, mask), plain(results_of, model, inputs, mask))
        # Two layers or directions have the same sizes, and each of them counts.
        assert (num_pieces() > 0) == ((run + 1) * 2 > recordings.RUNS_BEFORE)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)


@AS_THEY_ARE
@pytest.mark.parametrize("seq", [4, 15, 16, 17, 32, 33])
def test_lengths(seq):
    """Those that no piece ends with are read with a mask, and share the pieces of others."""
    model = make_model("layer_norm").train()
    for run in range(3):
        for length in (32, seq):
            inputs = make_inputs(length, seed=run)
            assert_same(results_of(model, inputs), plain(results_of, model, inputs))
    assert num_pieces() > 0


@AS_THEY_ARE
def test_long_sequences(monkeypatch):
    monkeypatch.setattr(recorded_loop, "LONG_SEQUENCE", 20)
    model = make_model("peephole").train()
    inputs = make_inputs(70)
    expected = plain(results_of, model, inputs)
    for _ in range(4):
        assert_same(results_of(model, inputs), expected)
    assert num_pieces() == 4  # two for each of two layers


@AS_THEY_ARE
@pytest.mark.parametrize("cell_type", ["lstm", "gru", "layer_norm"])
def test_dropped_units(cell_type):
    """Units that are dropped throughout a sequence are other ones each time."""
    model = make_model(cell_type, recurrent_dropout=0.4).train()
    for run in range(5):
        inputs = make_inputs(seed=run)
        actual, expected = results_of(model, inputs, None, run), plain(results_of, model, inputs, None, run)
        assert_same(actual, expected)
    assert num_pieces() > 0


@AS_THEY_ARE
def test_what_is_set_on_a_cell(monkeypatch):
    """Another recording, not the one of before."""

    class Scaled(LSTMCell):
        scale = 1.0

        def step(self, projected, state, linear=F.linear):
            hidden, cell = super().step(projected, state, linear)
            return self.scale * hidden, cell

    monkeypatch.setitem(RECURRENT_CELLS, "scaled", Scaled)
    model, inputs = make_model("scaled"), make_inputs()
    for scale in (1.0, 0.5):
        for layer in model.layers:
            layer.cell.scale = scale
        for _ in range(4):
            assert_same(results_of(model, inputs), plain(results_of, model, inputs))
    assert num_pieces() > 0


@AS_THEY_ARE
def test_more_pieces_than_there_is_space_for(monkeypatch):
    """Then all of them go, and the loop does it."""
    monkeypatch.setattr(recordings, "MOST_RECORDINGS", 6)
    model = make_model("layer_norm").train()
    for run in range(5):
        inputs = make_inputs(16 * 8, seed=run)
        assert_same(results_of(model, inputs), plain(results_of, model, inputs))
        assert sum(len(room.recordings) for room in recordings.recorder.rooms) <= 6
    assert num_pieces() == 0


@AS_THEY_ARE
def test_nothing_is_played_in_vain(monkeypatch):
    """Where a piece is missing and may not be recorded, those before it are not played either."""
    model = make_model("layer_norm").train()
    for run in range(4):
        results_of(model, make_inputs(32, seed=run))
    played, play = [], recordings.Player.run
    monkeypatch.setattr(recordings.Player, "run", lambda self, values: played.append(self) or play(self, values))
    monkeypatch.setattr(recorded_loop, "may_record", lambda device: False)
    inputs = make_inputs(48)
    assert_same(results_of(model, inputs), plain(results_of, model, inputs))
    assert not played
    results_of(model, make_inputs(32))
    assert played


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, monkeypatch):
    """
    The types are those of the loop, and the numbers are not much further from the exact ones, with weights that change;
    on a CPU too through what keeps weights of the type of products for all steps of a sequence.
    """
    if DEVICE == "cpu" and dtype == torch.float16:
        pytest.skip("float16 autocast is for GPUs")
    for name in ("can_pack", "is_large"):
        monkeypatch.setattr(step_linear, name, lambda inputs, weight: True)
    model = make_model("layer_norm", torch.float32).train()
    for run in range(5):
        inputs = make_inputs(seed=run, dtype=torch.float32)
        with torch.autocast(DEVICE, dtype):
            actual, expected = results_of(model, inputs), plain(results_of, model, inputs)
        exact = plain(results_of, copy.deepcopy(model).double(), inputs.double())
        for name, value in actual.items():
            assert value.dtype == expected[name].dtype
            errors = [(other.double() - exact[name]).norm() / exact[name].norm() for other in (value, expected[name])]
            assert errors[0] < 2 * errors[1] + 0.01, name
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.8)
    assert num_pieces() > 0


@pytest.mark.parametrize("name", ["recorded_loop", "fused_steps"])
def test_ruled_out(name, monkeypatch):
    fused = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: fused.append(function) or function)
    model = make_model("layer_norm").train()
    with without_fast_paths(name):
        for run in range(4):
            results_of(model, make_inputs(seed=run))
    assert (num_pieces() > 0) == (name == "fused_steps")
    assert not fused
    for run in range(4):
        results_of(model, make_inputs(seed=run))
    assert num_pieces() > 0
    assert fused


def test_no_compiler(monkeypatch):
    """Where steps cannot be fused they are recorded as they are."""

    def refuse(*arguments):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda function, **options: refuse)
    model = make_model("layer_norm").train()
    for run in range(4):
        inputs = make_inputs(seed=run)
        assert_same(results_of(model, inputs), plain(results_of, model, inputs))
    assert num_pieces() > 0


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_step_that_waits_for_the_gpu(monkeypatch):
    """It cannot be recorded; neither it nor random numbers notice that somebody tried."""

    class Waits(PeepholeLSTMCell):
        def step(self, projected, state, linear=F.linear):
            assert state[0].sum().item() < 1e9
            return super().step(projected, state, linear)

    monkeypatch.setitem(RECURRENT_CELLS, "waits", Waits)
    model = make_model("waits").train()
    for run in range(5):
        inputs = make_inputs(seed=run)
        assert_same(results_of(model, inputs), plain(results_of, model, inputs))
    assert num_pieces() == 0
    assert torch.rand(3, device=DEVICE).sum() > 0
    torch.manual_seed(0)


def test_cells_that_are_not_recorded():
    """Those that a step changes, and those that are not what their class says."""
    inputs = make_inputs()
    cells = {name: RECURRENT_CELLS[name](HIDDEN, HIDDEN).to(DEVICE, torch.float64) for name in CELLS}
    taken = {name: recorded_loop.takes_recording(cell, inputs, False) for name, cell in cells.items()}
    assert taken == {"layer_norm": True, "peephole": True, "product_of_gate": True, "with_buffer": False}
    cell = cells["layer_norm"]
    assert not recorded_loop.takes_recording(cell, inputs, True)
    assert not recorded_loop.takes_recording(cell, inputs[:, :3], False)
    assert not recorded_loop.takes_recording(cell, inputs.to("meta"), False)
    handle = cell.norm_hh.register_forward_hook(lambda *_: None)
    assert not recorded_loop.takes_recording(cell, inputs, False)
    handle.remove()
    assert recorded_loop.takes_recording(cell, inputs, False)
    nn.utils.parametrizations.weight_norm(cell, "weight_hh")
    assert not recorded_loop.takes_recording(cell, inputs, False)


def test_plain_cells_are_not_recorded():
    """A GPU has kernels for them."""
    model = make_model("gru").train()
    assert isinstance(model.layers[0].cell, GRUCell)
    for run in range(4):
        results_of(model, make_inputs(seed=run))
    assert num_pieces() == 0
