"""Recordings, of loops and of kernels: when they are made and played, what they keep, and when they go."""

import contextvars
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.cells import LayerNormLSTMCell
from hf_rnn import RECURRENT_CELLS, recordings, without_fast_paths
from recorded import (
    SEQ,
    assert_same,
    make_inputs,
    make_model,
    plain,
    recorder,  # noqa: F401
    results_of,
)


CELLS = pytest.mark.parametrize("cell_type", ["lstm", "layer_norm"], ids=["kernel", "loop"])


@pytest.fixture(autouse=True)
def one_recording_for_each_layer(monkeypatch):
    """Compiling takes seconds, and GPUs have one call for several layers."""
    monkeypatch.setitem(RECURRENT_CELLS, "layer_norm", LayerNormLSTMCell)
    with without_fast_paths("fused_steps", "stacked_layers"):
        yield


def num_rooms() -> int:
    return len(recordings.recorder.rooms)


def assert_always_plain(function, rtol: float = 1e-9):
    """A function of inputs gives what the loop gives, before it is recorded and from then on."""
    for run in range(4):
        inputs = make_inputs(seed=run).requires_grad_()
        with torch.backends.cudnn.flags(enabled=False):  # which has first derivatives alone, one at a time
            torch.testing.assert_close(function(inputs), plain(function, inputs), rtol=rtol, atol=rtol)
    assert num_rooms() > 0


@CELLS
def test_several_forwards_before_a_backward(cell_type):
    """What a backward still needs is not overwritten, nor is it by a backward that may come again."""
    model = make_model(cell_type).train()
    for run in range(4):
        results_of(model, make_inputs(seed=run))
    inputs = [make_inputs(seed=10 + index).requires_grad_() for index in range(3)]

    def gradients():
        totals = [model(inputs_embeds=tensor).last_hidden_state.square().sum() for tensor in inputs]
        first = torch.autograd.grad(totals[0], inputs[0], retain_graph=True)
        later = [torch.autograd.grad(total, tensor)[0] for total, tensor in zip(totals, inputs)]
        return [*first, *later]

    torch.testing.assert_close(gradients(), plain(gradients), rtol=1e-9, atol=1e-9)
    assert num_rooms() > 2


@CELLS
def test_results_are_kept(cell_type):
    """Outputs and gradients of before are not changed by what comes later, also without a graph that holds them."""
    model = make_model(cell_type).train()
    for run in range(4):
        results_of(model, make_inputs(seed=run))
    kept = []
    for run in range(3):
        inputs = make_inputs(seed=run).requires_grad_()
        outputs = model(inputs_embeds=inputs).last_hidden_state
        (gradient,) = torch.autograd.grad(outputs.square().sum(), inputs)
        kept.append((outputs.detach(), outputs.detach().clone(), gradient, gradient.clone()))
        del outputs
        gc.collect()
    for outputs, outputs_then, gradient, gradient_then in kept:
        assert torch.equal(outputs, outputs_then)
        assert torch.equal(gradient, gradient_then)


@CELLS
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("seq", [SEQ, 32])
def test_dropout_behind_a_recording(cell_type, seq, bidirectional):
    """It draws what it drew before there was one, and for that it depends on where numbers lie in memory."""
    model = make_model(cell_type, hidden_dropout=0.5, bidirectional=bidirectional).train()
    inputs = make_inputs(seq)
    strides, results = [], []
    for _ in range(4):
        outputs, _, _ = model.layers[0](inputs)
        strides.append(outputs.stride())
        torch.manual_seed(0)
        results.append(model(inputs_embeds=inputs).last_hidden_state.detach())
    assert num_rooms() > 0
    assert len(set(strides)) == 1
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-9, atol=1e-9)


@CELLS
def test_without_gradients(cell_type):
    model = make_model(cell_type)
    for context in (torch.no_grad, torch.inference_mode):
        for run in range(5):
            inputs = make_inputs(seed=run)
            with context():
                actual = model(inputs_embeds=inputs).last_hidden_state
            torch.testing.assert_close(actual, plain(model, None, None, None, inputs).last_hidden_state)
    assert num_rooms() > 0
    inputs = make_inputs(seed=9)
    assert_same(results_of(model, inputs), plain(results_of, model, inputs))


@CELLS
def test_room_is_given_back(cell_type):
    """A forward without a backward gives its room back, too."""
    model = make_model(cell_type).train()
    for run in range(8):
        outputs = model(inputs_embeds=make_inputs(seed=run))
        del outputs
        gc.collect()
    assert num_rooms() == 2  # the two layers are in use at the same time
    assert not any(room.in_use for room in recordings.recorder.rooms)


@CELLS
@pytest.mark.parametrize("limit", ["memory", "number"])
def test_recordings_are_bounded(cell_type, limit, monkeypatch):
    """What was not played for long goes; what is in use does not, and then no other is made."""
    monkeypatch.setattr(recordings.Room, "num_bytes", 2)
    memory = (7 if limit == "memory" else 99) / recordings.MEMORY_SHARE
    monkeypatch.setattr(recordings, "_memory", lambda device: (memory, 0))
    if limit == "number":
        monkeypatch.setattr(recordings, "MOST_RECORDINGS", 8)
    monkeypatch.setattr(recordings, "LONG_UNUSED", 10)
    model = make_model(cell_type).train()

    def run(batch: int, times: int = 4) -> list[recordings.Room]:
        inputs = make_inputs(16, batch)
        for _ in range(times):
            assert_same(results_of(model, inputs), plain(results_of, model, inputs))
        return recordings.recorder.rooms

    first = run(1)  # two layers in two recordings each
    assert len(first) == 2
    both = run(2)
    assert len(both) == 4
    assert run(3, 1) == both
    assert run(1, 1) == both
    later = run(3, 8)
    assert later != both
    assert len(later) == 4
    for _ in range(5):
        run(3)
    assert run(4)[-1] not in later


@CELLS
def test_losses_that_are_kept(cell_type):
    """What was needed for gradients goes when they have been computed, not when the loss goes."""
    model, losses = make_model(cell_type).train(), []
    for run in range(8):
        losses.append(model(inputs_embeds=make_inputs(seed=run)).last_hidden_state.square().sum())
        losses[-1].backward()
    assert num_rooms() == 2
    assert not any(room.in_use for room in recordings.recorder.rooms)
    with pytest.raises(RuntimeError, match="a second time"):
        losses[-1].backward()


@CELLS
@pytest.mark.parametrize("power", [1, 2])
def test_derivatives_of_higher_order(cell_type, power):
    """Also where the gradient of the outputs is a constant."""
    model = make_model(cell_type).train()
    weights = list(model.layers.parameters())

    def gradients(inputs):
        total = (model(inputs_embeds=inputs).last_hidden_state ** power).sum()
        first = torch.autograd.grad(total, [inputs, *weights], create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        return [*first, *torch.autograd.grad(penalty, [inputs, *weights])]

    assert_always_plain(gradients, 1e-8)


@pytest.mark.parametrize("num_rows", [SEQ, 12], ids=["two_pieces", "one_piece"])
def test_dropped_units_and_another_forward_before_the_second_derivatives(num_rows):
    """The units that were dropped are those of the first forward."""
    model = make_model("layer_norm", recurrent_dropout=0.5).train()
    weights = list(model.layers.parameters())

    def gradients(inputs):
        torch.manual_seed(0)
        total = model(inputs_embeds=inputs).last_hidden_state.square().sum()
        first = torch.autograd.grad(total, [inputs, *weights], create_graph=True)
        del total
        model(inputs_embeds=inputs.detach()).last_hidden_state.sum().backward()
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), [inputs, *weights])

    for run in range(4):
        inputs = make_inputs(num_rows, seed=run).requires_grad_()
        torch.testing.assert_close(gradients(inputs), plain(gradients, inputs), rtol=1e-8, atol=1e-8)
    assert num_rooms() > 0


@CELLS
@pytest.mark.parametrize("way", ["vmap", "is_grads_batched"])
def test_many_gradients_at_once(cell_type, way):
    model = make_model(cell_type).train()

    def jacobian(inputs):
        outputs = model(inputs_embeds=inputs).last_hidden_state[0, -1, :4]
        several = torch.eye(4, dtype=inputs.dtype, device=inputs.device)
        if way == "is_grads_batched":
            return torch.autograd.grad(outputs, inputs, several, is_grads_batched=True)[0]
        return torch.func.vmap(lambda of: torch.autograd.grad(outputs, inputs, of, retain_graph=True)[0])(several)

    assert_always_plain(jacobian)


@CELLS
def test_who_looks_at_every_operation(cell_type, monkeypatch):
    """A tracer would take what is read from a recording for a constant."""
    played, play = [], recordings.Player.run
    monkeypatch.setattr(recordings.Player, "run", lambda self, values: played.append(self) or play(self, values))
    model = make_model(cell_type)

    def run(inputs):
        return model(inputs_embeds=inputs).last_hidden_state

    with torch.no_grad():
        for seed in range(4):
            run(make_inputs(seed=seed))
        assert played
        played.clear()
        traced = make_fx(run)(make_inputs())
        assert not played
        other = make_inputs(seed=9)
        torch.testing.assert_close(traced(other), plain(run, other), rtol=1e-9, atol=1e-9)


@CELLS
def test_first_in_inference_mode(cell_type):
    model = make_model(cell_type)
    with torch.inference_mode():
        for run in range(4):
            model(inputs_embeds=make_inputs(seed=run))
    assert num_rooms() > 0


@CELLS
def test_one_thread_records(cell_type):
    """Others play what is there."""
    model = make_model(cell_type).train()

    def train():
        for run in range(4):
            assert_same(results_of(model, make_inputs(seed=run)), plain(results_of, model, make_inputs(seed=run)))
        return num_rooms()

    with ThreadPoolExecutor(1) as thread:
        with without_fast_paths("fused_steps", "stacked_layers"):
            in_a_thread = contextvars.copy_context()
        assert thread.submit(in_a_thread.run, train).result() == 0
        assert train() == 2
        assert thread.submit(in_a_thread.run, train).result() == 2


@CELLS
def test_what_a_room_takes(cell_type):
    """Its copies of the weights are counted, too."""
    model = make_model(cell_type)
    with torch.no_grad():
        for run in range(4):
            model(inputs_embeds=make_inputs(seed=run))
    of_weights = sum(weight.nbytes for weight in model.layers[0].parameters())
    assert all(room.num_bytes > of_weights for room in recordings.recorder.rooms)


@CELLS
def test_memory_that_others_need(cell_type, monkeypatch):
    """Nothing is recorded where a program needs nearly all of the memory."""
    model = make_model(cell_type).train()
    for peak, num_recorded in ((15.5 / 16, 0), (14.5 / 16, 2)):
        monkeypatch.setattr(recordings, "_memory", lambda device, peak=peak: (2**40, peak * 2**40))
        monkeypatch.setattr(recordings, "LONG_UNUSED", 0)
        for run in range(4):
            results_of(model, make_inputs(seed=run))
        assert num_rooms() == num_recorded


@CELLS
def test_no_memory_for_a_recording(cell_type, monkeypatch):
    """It is tried again, but not at once."""
    tries = []

    class Fails:
        def __init__(self, function, beside=None):
            tries.append(function)
            raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(recordings, "LONG_UNUSED", 5)
    model = make_model(cell_type).train()
    with monkeypatch.context() as patched:
        patched.setattr(recordings, "Recording", Fails)
        for run in range(4):
            inputs = make_inputs(seed=run)
            assert_same(results_of(model, inputs), plain(results_of, model, inputs))
        assert len(tries) == 2
    for run in range(6):
        results_of(model, make_inputs(seed=run))
    assert num_rooms() == 2


@CELLS
def test_a_recording_that_fails(cell_type, monkeypatch):
    """What cannot be recorded is done without a recording, and nobody tries again."""
    tries = []

    class Fails:
        def __init__(self, function, beside=None):
            tries.append(function)
            raise RuntimeError("not allowed while a stream is captured")

    monkeypatch.setattr(recordings, "Recording", Fails)
    model = make_model(cell_type).train()
    for run in range(5):
        inputs = make_inputs(seed=run)
        assert_same(results_of(model, inputs), plain(results_of, model, inputs))
    assert len(tries) == 1


@CELLS
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(cell_type, use_reentrant):
    """It runs layers again within the backward, where nothing is recorded, and wants the same graph as before."""
    model = make_model(cell_type).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for run in range(5):
        inputs = make_inputs(seed=run)
        assert_same(results_of(model, inputs), plain(results_of, model, inputs))


@CELLS
def test_precision_of_products(cell_type):
    """What was recorded is not played where products are to be more exact, or less."""
    model, inputs = make_model(cell_type, torch.float32).train(), make_inputs(dtype=torch.float32)
    backend = torch.backends.cudnn.rnn
    before, rooms = backend.fp32_precision, []
    try:
        for precision in ("ieee", "tf32"):
            backend.fp32_precision = precision
            for _ in range(4):
                results_of(model, inputs)
            rooms.append(num_rooms())
    finally:
        backend.fp32_precision = before
    assert rooms[1] == 2 * rooms[0]
