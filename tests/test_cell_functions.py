"""Single steps by torch's functions for cells: where they are taken, and that they give what the equations give."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from hf_rnn import RECURRENT_CELLS, cell_functions, loop_only, without_fast_paths
from hf_rnn.recurrent_cells import LSTMCell
from matrix import make_inputs, make_mask, make_model, make_tokens


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = sorted({cell.torch_kernel for cell in RECURRENT_CELLS.values()} - {None})
STEPPING = [{"decoder_type": "bahdanau"}, {"decoder_type": "luong", "input_feeding": True}]


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The names of the functions that were called; on a CPU they are called as on a GPU."""
    names = []
    for kernel in KERNELS:
        function = getattr(torch, f"{kernel}_cell")

        def call(*args, name=kernel, function=function):
            names.append(name)
            return function(*args)

        monkeypatch.setattr(torch, f"{kernel}_cell", call)
    monkeypatch.setattr(cell_functions, "DEVICE_TYPE", DEVICE)
    return names


def on_device(name: str, **options) -> tuple[nn.Module, dict]:
    model, inputs = make_model(name, torch.float64, **options), make_inputs(name)
    return model.to(DEVICE), {key: value.to(DEVICE) for key, value in inputs.items()}


@pytest.mark.parametrize("kernel", KERNELS)
def test_single_steps_of_language_models(kernel, calls):
    """Logits and states of each step."""
    model, _ = on_device("RNNForCausalLM", cell_type=kernel)
    tokens = make_tokens(3, 5).to(DEVICE)

    @torch.no_grad()
    def decode():
        cache, found = None, []
        for token in tokens.split(1, dim=1):
            outputs = model(token, cache=cache, use_cache=True)
            cache = outputs.past_key_values
            found.append(outputs.logits)
        return [*found, *(layer.keys for layer in cache.layers)]

    with loop_only():
        expected = decode()
    assert not calls
    torch.testing.assert_close(decode(), expected, rtol=1e-10, atol=1e-12)
    assert set(calls) == {kernel}


@pytest.mark.parametrize("options", STEPPING, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_decoders_that_go_step_by_step(kernel, options, calls):
    """Loss and gradients of a padded batch, and the second derivatives."""
    model, inputs = on_device("RNNSeq2SeqForConditionalGeneration", cell_type=kernel, **options)
    inputs["attention_mask"] = make_mask().to(DEVICE)
    inputs["decoder_attention_mask"] = make_mask(inputs["labels"].shape[1]).to(DEVICE)
    weights = list(model.parameters())

    def gradients():
        logits = model(**inputs).logits
        first = torch.autograd.grad(logits.square().sum(), weights, create_graph=True, allow_unused=True)
        penalty = sum(gradient.square().sum() for gradient in first if gradient is not None)
        return [logits, *first, *torch.autograd.grad(penalty, weights, allow_unused=True)]

    with loop_only():
        expected = gradients()
    assert not calls
    # On a GPU the encoder has the first derivatives alone, elsewhere loops have products of their own.
    with without_fast_paths("torch_kernel", "recorded_loop", "step_linear"):
        torch.testing.assert_close(gradients(), expected, rtol=1e-8, atol=1e-10)
    assert set(calls) == {kernel}


def test_steps_in_which_units_are_dropped(calls):
    """The products are not those of the function."""
    model, inputs = on_device("RNNSeq2SeqForConditionalGeneration", recurrent_dropout=0.5, **STEPPING[0])
    model(**inputs)
    with without_fast_paths("step_linear"):
        model(**inputs)
        assert calls
        calls.clear()
        model.train()(**inputs)
        assert not calls


def test_weights_that_are_computed(calls):
    """Once for each step."""
    model, _ = on_device("RNNForCausalLM")
    computed = []

    class Count(nn.Module):
        def forward(self, weight):
            computed.append(weight)
            return 2 * weight

    for layer in model.model.layers:
        for name in ("weight_ih", "weight_hh"):
            parametrize.register_parametrization(layer.cell, name, Count())
    computed.clear()
    token = make_tokens(3, 1).to(DEVICE)
    logits = model(token).logits
    assert len(computed) == 2 * len(model.model.layers)
    assert calls
    with loop_only():
        torch.testing.assert_close(logits, model(token).logits, rtol=1e-10, atol=1e-12)


def test_where_the_equations_are_taken(calls, monkeypatch):
    """Under autocast, which keeps the state wide; with other equations; with derivatives that go forward; ruled out."""

    class Scaled(LSTMCell):
        def step(self, projected, state, linear=F.linear):
            return tuple(0.5 * part for part in super().step(projected, state, linear))

    monkeypatch.setitem(RECURRENT_CELLS, "scaled", Scaled)
    model, _ = on_device("RNNForCausalLM")
    token = make_tokens(3, 1).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        model.float()(token)
    with without_fast_paths("cell_functions"):
        model(token)
    on_device("RNNForCausalLM", cell_type="scaled")[0](token)
    embeddings = torch.zeros(3, 1, model.config.embedding_size, device=DEVICE)
    torch.func.jvp(lambda embeddings: model(inputs_embeds=embeddings).logits, (embeddings,), (embeddings + 1,))
    assert not calls
    model(token)
    assert calls
