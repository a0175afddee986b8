"""Recorded kernels of torch: that they are the loop, for every cell, and what is recorded."""

import copy

import pytest
import torch

from hf_rnn import loop_only, recorded_kernel, recordings, recurrent_stack, without_fast_paths
from hf_rnn.recurrent_cells import RECURRENT_CELLS
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
