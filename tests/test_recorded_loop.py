"""Recorded loops: on a GPU as they are, elsewhere with recordings that do their work anew each time they are played."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.cells import LayerNormLSTMCell, PeepholeLSTMCell
from hf_rnn import RECURRENT_CELLS, RNNConfig, RNNModel, loop_only, recorded_loop, recordings, without_fast_paths
from hf_rnn.recurrent_cells import GRUCell, LSTMCell, RecurrentCell
from matrix import make_mask


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, SEQ, HIDDEN = 6, 21, 8


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


class DoneAnew:
    """In the place of a recording: does the same again when played."""

    made = 0

    num_bytes = 0

    def __init__(self, function, beside=None):
        type(self).made += 1
        self.function, self.has_graph = function, torch.is_grad_enabled()
        function()

    def play(self):
        with torch.set_grad_enabled(self.has_graph):
            self.function()


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    """Cells of a program, an empty recorder, and recordings that work here."""
    for name, cell in CELLS.items():
        monkeypatch.setitem(RECURRENT_CELLS, name, cell)
    monkeypatch.setattr(recordings, "DEVICE_TYPE", DEVICE)
    if DEVICE == "cpu":
        monkeypatch.setattr(recordings, "Recording", DoneAnew)
    monkeypatch.setattr(DoneAnew, "made", 0)
    recordings.recorder.forget()
    yield recordings.recorder
    recordings.recorder.forget()


@pytest.fixture
def as_they_are():
    """Steps that are recorded as they are: compiling takes seconds."""
    with without_fast_paths("fused_steps"):
        yield


AS_THEY_ARE = pytest.mark.usefixtures("as_they_are")


def make_model(cell_type: str, dtype=torch.float64, **options) -> RNNModel:
    torch.manual_seed(0)
    config = RNNConfig(vocab_size=9, hidden_size=HIDDEN, num_hidden_layers=2, cell_type=cell_type, **options)
    model = RNNModel(config).to(DEVICE, dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def make_inputs(seq: int = SEQ, batch: int = BATCH, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, seq, HIDDEN, dtype=torch.float64, generator=generator).to(DEVICE, dtype)


def results_of(model: RNNModel, inputs: torch.Tensor, mask=None, kept_seed: int | None = None) -> dict:
    """Outputs, states and gradients of everything."""
    inputs = inputs.clone().requires_grad_()
    if kept_seed is not None:
        torch.manual_seed(kept_seed)
    outputs = model(inputs_embeds=inputs, attention_mask=None if mask is None else mask.to(DEVICE), use_cache=True)
    cache = outputs.past_key_values
    states = {f"state {index}": part for index, part in enumerate(parts_of(cache))}
    factors = torch.linspace(-1, 1, outputs.last_hidden_state.numel(), device=DEVICE, dtype=inputs.dtype)
    total = (outputs.last_hidden_state.flatten() * factors).sum() + sum(part.square().sum() for part in states.values())
    model.zero_grad()
    total.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    results = {"outputs": outputs.last_hidden_state, "inputs": inputs.grad} | states | gradients
    return {name: result.detach().clone() for name, result in results.items()}


def parts_of(cache) -> list[torch.Tensor]:
    layers = () if cache is None else cache.layers  # there is none for two directions
    return [part for layer in layers for part in (layer.keys, layer.values) if part is not None]


def assert_same(actual: dict, expected: dict, tolerance: float = 1e-9):
    assert actual.keys() == expected.keys()
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def plain(function, *arguments):
    """What the plain loop gives."""
    with loop_only():
        return function(*arguments)


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
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("seq", [SEQ, 32])
def test_dropout_behind_a_recording(seq, bidirectional):
    """It draws what it draws behind the loop, and for that it depends on where numbers lie in memory."""
    model = make_model("layer_norm", hidden_dropout=0.5, bidirectional=bidirectional).train()
    inputs = make_inputs(seq)
    strides, results = [], []
    for _ in range(4):
        outputs, _, _ = model.layers[0](inputs)
        strides.append(outputs.stride())
        torch.manual_seed(0)
        results.append(model(inputs_embeds=inputs).last_hidden_state.detach())
    assert num_pieces() > 0
    assert len(set(strides)) == 1
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-9, atol=1e-9)


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


def test_without_gradients():
    model = make_model("layer_norm")
    for context in (torch.no_grad, torch.inference_mode):
        for run in range(5):
            inputs = make_inputs(seed=run)
            with context():
                actual = model(inputs_embeds=inputs).last_hidden_state
                with loop_only():
                    expected = model(inputs_embeds=inputs).last_hidden_state
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    assert num_pieces() > 0
    inputs = make_inputs(seed=9)
    assert_same(results_of(model, inputs), plain(results_of, model, inputs))


@AS_THEY_ARE
def test_several_forwards_before_a_backward():
    """What a backward still needs is not overwritten, nor is it by a backward that may come again."""
    model = make_model("layer_norm").train()
    for run in range(3):
        results_of(model, make_inputs(seed=run))
    inputs = [make_inputs(seed=10 + index).requires_grad_() for index in range(3)]

    def gradients():
        totals = [model(inputs_embeds=tensor).last_hidden_state.square().sum() for tensor in inputs]
        first = torch.autograd.grad(totals[0], inputs[0], retain_graph=True)
        later = [torch.autograd.grad(total, tensor)[0] for total, tensor in zip(totals, inputs)]
        return [*first, *later]

    torch.testing.assert_close(gradients(), plain(gradients), rtol=1e-9, atol=1e-9)


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
def test_room_is_given_back():
    """A forward without a backward gives its room back, too."""
    model = make_model("layer_norm").train()
    for run in range(8):
        outputs = model(inputs_embeds=make_inputs(seed=run))
        del outputs
        gc.collect()
    assert len(recordings.recorder.rooms) == 2  # the two layers are in use at the same time
    assert not any(room.in_use for room in recordings.recorder.rooms)


@AS_THEY_ARE
def test_the_number_of_pieces_is_bounded(monkeypatch):
    monkeypatch.setattr(recordings, "MOST_RECORDINGS", 8)  # two for each piece
    model = make_model("layer_norm").train()
    for batch in range(1, 6):
        inputs = make_inputs(batch=batch)
        for _ in range(4):
            assert_same(results_of(model, inputs), plain(results_of, model, inputs))
        assert 0 < num_pieces() <= 4 + 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """The types are those of the loop, and the numbers are not much further from the exact ones."""
    if DEVICE == "cpu" and dtype == torch.float16:
        pytest.skip("float16 autocast is for GPUs")
    model = make_model("layer_norm", torch.float32).train()
    for run in range(4):
        inputs = make_inputs(seed=run, dtype=torch.float32)
        with torch.autocast(DEVICE, dtype):
            actual, expected = results_of(model, inputs), plain(results_of, model, inputs)
        exact = plain(results_of, copy.deepcopy(model).double(), inputs.double())
        for name, value in actual.items():
            assert value.dtype == expected[name].dtype
            errors = [(other.double() - exact[name]).norm() / exact[name].norm() for other in (value, expected[name])]
            assert errors[0] < 2 * errors[1] + 0.01, name
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


def test_a_recording_that_fails(monkeypatch):
    """The loop does what cannot be recorded, and nobody tries again."""
    tries = []

    class Fails:
        def __init__(self, function, beside=None):
            tries.append(function)
            raise RuntimeError("not allowed while a stream is captured")

    monkeypatch.setattr(recordings, "Recording", Fails)
    model = make_model("peephole").train()
    for run in range(5):
        inputs = make_inputs(seed=run)
        assert_same(results_of(model, inputs), plain(results_of, model, inputs))
    assert len(tries) == 1


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


@AS_THEY_ARE
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    """It runs layers again within the backward, where nothing is recorded, and wants the same graph as before."""
    model = make_model("layer_norm").train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for run in range(5):
        inputs = make_inputs(seed=run)
        assert_same(results_of(model, inputs), plain(results_of, model, inputs))


def test_plain_cells_are_not_recorded():
    """A GPU has kernels for them."""
    model = make_model("gru").train()
    assert isinstance(model.layers[0].cell, GRUCell)
    for run in range(4):
        results_of(model, make_inputs(seed=run))
    assert num_pieces() == 0
