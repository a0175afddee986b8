"""Recorded kernels of torch: on a GPU as they are, elsewhere with recordings that do their work anew when played."""

import copy
import gc

import pytest
import torch

from hf_rnn import loop_only, recorded_kernel, recordings, recurrent_stack, without_fast_paths
from hf_rnn.recurrent_cells import RECURRENT_CELLS
from matrix import make_mask
from test_recorded_loop import (
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


KERNELS = sorted({cell.torch_kernel for cell in RECURRENT_CELLS.values()} - {None})


@pytest.fixture(autouse=True)
def on_every_device():
    """CPUs have functions of their own for some cells, and GPUs one call for several layers."""
    with without_fast_paths("sequence_functions", "stacked_layers"):
        yield


def num_calls() -> int:
    return sum(isinstance(room, recorded_kernel._Call) for room in recordings.recorder.rooms)


@pytest.mark.parametrize("mask", [None, make_mask(SEQ)], ids=["no_mask", "mask"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_recording_is_the_loop(kernel, bidirectional, mask):
    """From the third time on, with other inputs and other weights than those that were there when it was made."""
    model = make_model(kernel, bidirectional=bidirectional).train()
    for run in range(5):
        inputs = make_inputs(seed=run)
        assert_same(results_of(model, inputs, mask), plain(results_of, model, inputs, mask))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
    assert num_calls() > 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_stacked_layers(kernel, monkeypatch):
    """One recording for all layers of a stack."""
    monkeypatch.setattr(recurrent_stack, "DEVICE_TYPE", DEVICE)
    model = make_model(kernel).train()
    for run in range(5):
        inputs = make_inputs(seed=run)
        with loop_only(False):
            assert_same(results_of(model, inputs), plain(results_of, model, inputs))
        assert num_calls() == (run >= recordings.RUNS_BEFORE)


def test_states_that_are_used_and_not():
    """The gradient of a final state that nobody used is zero, also where it was not before."""
    model, inputs = make_model("lstm").train(), make_inputs()

    def gradients(of_states: bool):
        outputs = model(inputs_embeds=inputs, use_cache=True)
        total = outputs.last_hidden_state.square().sum()
        if of_states:
            total = total + sum(layer.values.square().sum() for layer in outputs.past_key_values.layers)
        return torch.autograd.grad(total, list(model.layers.parameters()))

    for of_states in (False, True, False, True, False, False, True, True):
        torch.testing.assert_close(gradients(of_states), plain(gradients, of_states), rtol=1e-9, atol=1e-9)
    assert num_calls() > 0


@pytest.mark.parametrize("frozen", ["layers.0.cell.weight_hh", "layers.0", "layers"])
def test_weights_that_are_not_trained(frozen):
    """None of a layer, or not all of them; the gradients of its inputs are there."""
    model = make_model("gru").train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    for run in range(5):
        inputs = make_inputs(seed=run)
        actual = results_of(model, inputs)
        assert_same(actual, plain(results_of, model, inputs))
        assert not any(name.startswith(frozen) for name in actual)
    assert num_calls() > 0


def test_a_state_that_is_trained():
    model, inputs = make_model("lstm").train(), make_inputs()
    state = model(inputs_embeds=inputs[:, :2], use_cache=True).past_key_values

    def gradients():
        given = copy.copy(state)
        given.layers = [copy.copy(layer) for layer in state.layers]
        parts = []
        for layer in given.layers:
            layer.keys = layer.keys.detach().requires_grad_()
            parts.append(layer.keys)
        outputs = model(inputs_embeds=inputs, cache=given).last_hidden_state
        return [outputs, *torch.autograd.grad(outputs.square().sum(), parts)]

    expected = plain(gradients)
    for _ in range(5):
        torch.testing.assert_close(gradients(), expected, rtol=1e-9, atol=1e-9)
    assert num_calls() > 0


def test_several_forwards_before_a_backward():
    """What a backward still needs is not overwritten, nor is it by a backward that may come again."""
    model = make_model("lstm").train()
    for run in range(4):
        results_of(model, make_inputs(seed=run))
    inputs = [make_inputs(seed=10 + index).requires_grad_() for index in range(3)]

    def gradients():
        totals = [model(inputs_embeds=tensor).last_hidden_state.square().sum() for tensor in inputs]
        first = torch.autograd.grad(totals[0], inputs[0], retain_graph=True)
        later = [torch.autograd.grad(total, tensor)[0] for total, tensor in zip(totals, inputs)]
        return [*first, *later]

    torch.testing.assert_close(gradients(), plain(gradients), rtol=1e-9, atol=1e-9)
    assert num_calls() > 2


def test_results_are_kept():
    """Outputs and gradients of before are not changed by what comes later, also without a graph that holds them."""
    model = make_model("lstm").train()
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


@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_behind_a_recording(bidirectional):
    """It draws what it draws behind the kernel, and for that it depends on where numbers lie in memory."""
    model = make_model("lstm", hidden_dropout=0.5, bidirectional=bidirectional).train()
    results = []
    for _ in range(5):
        torch.manual_seed(0)
        results.append(model(inputs_embeds=make_inputs()).last_hidden_state.detach())
    assert num_calls() > 0
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-9, atol=1e-9)


def test_without_gradients():
    model = make_model("gru")
    for context in (torch.no_grad, torch.inference_mode):
        for run in range(5):
            inputs = make_inputs(seed=run)
            with context():
                actual = model(inputs_embeds=inputs).last_hidden_state
            torch.testing.assert_close(actual, plain(model, None, None, None, inputs).last_hidden_state)
    assert num_calls() > 0
    inputs = make_inputs(seed=9)
    assert_same(results_of(model, inputs), plain(results_of, model, inputs))


def test_room_is_given_back():
    """A forward without a backward gives its room back, too."""
    model = make_model("lstm").train()
    for run in range(8):
        outputs = model(inputs_embeds=make_inputs(seed=run))
        del outputs
        gc.collect()
    assert num_calls() == 2  # the two layers are in use at the same time
    assert not any(room.in_use for room in recordings.recorder.rooms)


def test_memory_is_bounded(monkeypatch):
    """What was not played for long goes; what is in use does not, and then no other is made."""
    num_bytes = property(lambda self: 1, lambda self, value: None)
    monkeypatch.setattr(recordings, "Recording", type("OfOneByte", (recordings.Recording,), {"num_bytes": num_bytes}))
    monkeypatch.setattr(recordings, "_memory", lambda: 7 / recordings.MEMORY_SHARE)
    monkeypatch.setattr(recordings, "LONG_UNUSED", 10)
    model = make_model("lstm").train()

    def run(batch: int, times: int = 4) -> list[recordings.Room]:
        inputs = make_inputs(batch=batch)
        for _ in range(times):
            assert_same(results_of(model, inputs), plain(results_of, model, inputs))
        return list(recordings.recorder.rooms)

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """The types are those of the kernel, and the numbers too."""
    if DEVICE == "cpu" and dtype == torch.float16:
        pytest.skip("float16 autocast is for GPUs")
    model = make_model("lstm", torch.float32).train()
    for run in range(5):
        inputs = make_inputs(seed=run, dtype=torch.float32)
        with torch.autocast(DEVICE, dtype):
            actual = results_of(model, inputs)
            with without_fast_paths("recorded_kernel"):
                expected = results_of(model, inputs)
        assert {name: value.dtype for name, value in actual.items()} == {
            name: value.dtype for name, value in expected.items()
        }
        assert_same(actual, expected, 1e-2)
    assert num_calls() > 0


def test_what_is_not_recorded(monkeypatch):
    """Short sequences, large products, and where somebody rules it out."""
    model = make_model("lstm").train()
    for run in range(4):
        results_of(model, make_inputs(3, seed=run))
    with without_fast_paths("recorded_kernel"):
        for run in range(4):
            results_of(model, make_inputs(seed=run))
    with monkeypatch.context() as patched:
        patched.setattr(recorded_kernel, "MOST_MULTIPLICATIONS", 6 * 4 * HIDDEN * HIDDEN - 1)
        for run in range(4):
            results_of(model, make_inputs(seed=run))
    assert num_calls() == 0
    for run in range(4):
        results_of(model, make_inputs(seed=run))
    assert num_calls() > 0


def test_precision_of_products():
    """What was recorded is not played where products are to be more exact, or less."""
    model, inputs = make_model("lstm", torch.float32).train(), make_inputs(dtype=torch.float32)
    backend = torch.backends.cudnn.rnn
    before, calls = backend.fp32_precision, []
    try:
        for precision in ("ieee", "tf32"):
            backend.fp32_precision = precision
            for _ in range(4):
                results_of(model, inputs)
            calls.append(num_calls())
    finally:
        backend.fp32_precision = before
    assert calls[1] == 2 * calls[0]


def test_a_recording_that_fails(monkeypatch):
    """The kernel itself does what cannot be recorded, and nobody tries again."""
    tries = []

    class Fails:
        def __init__(self, function, beside=None):
            tries.append(function)
            raise RuntimeError("not allowed while a stream is captured")

    monkeypatch.setattr(recordings, "Recording", Fails)
    model = make_model("lstm").train()
    for run in range(5):
        inputs = make_inputs(seed=run)
        assert_same(results_of(model, inputs), plain(results_of, model, inputs))
    assert len(tries) == 1


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    """It runs layers again within the backward, where nothing is recorded, and wants the same graph as before."""
    model = make_model("lstm").train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for run in range(5):
        inputs = make_inputs(seed=run)
        assert_same(results_of(model, inputs), plain(results_of, model, inputs))
