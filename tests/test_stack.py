"""Several layers in one call of torch's kernel: where it is made, and that it gives what the layers give one by one."""

import pytest
import torch
from torch.nn.utils import parametrize

from hf_rnn import (
    RECURRENT_CELLS,
    RNNConfig,
    RNNModel,
    RNNSeq2SeqConfig,
    RNNSeq2SeqForConditionalGeneration,
    loop_only,
    recurrent_stack,
    without_fast_paths,
)
from hf_rnn.recurrent_kernels import call_torch_kernel
from matrix import PAD, make_mask, make_tokens
from recorded import assert_same


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, SEQ, HIDDEN, LAYERS = 6, 7, 6, 3


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """How many layers each call of the kernel for several of them had; on a CPU they are made as on a GPU."""
    numbers = []

    def count(cells, *arguments, num_layers, **options):
        numbers.append(num_layers)
        return call_torch_kernel(cells, *arguments, num_layers=num_layers, **options)

    monkeypatch.setattr(recurrent_stack, "DEVICE_TYPE", DEVICE)
    monkeypatch.setattr(recurrent_stack, "call_torch_kernel", count)
    return numbers


def make_model(dtype=torch.float64, **options) -> RNNModel:
    torch.manual_seed(0)
    config = RNNConfig(vocab_size=9, embedding_size=5, hidden_size=HIDDEN, num_hidden_layers=LAYERS, **options)
    return RNNModel(config).to(DEVICE, dtype).eval()


def results_of(model: RNNModel, mask=None, state: bool = False, use_cache: bool = True) -> dict[str, torch.Tensor]:
    """Outputs, states and all gradients, from given states or from none."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        numbers = torch.randn(*shape, dtype=torch.float64, generator=generator)
        return numbers.to(DEVICE, model.dtype).requires_grad_()

    inputs, cache, given = draw(BATCH, SEQ, 5), None, []
    if state:
        cache = model(inputs_embeds=draw(BATCH, 2, 5), use_cache=True).past_key_values
        given = [draw(BATCH, HIDDEN) for _ in parts_of(cache)]
        for index, layer in enumerate(cache.layers):
            layer.keys = given[index] if len(given) == LAYERS else given[2 * index]
            layer.values = layer.values if len(given) == LAYERS else given[2 * index + 1]
    mask = None if mask is None else mask.to(DEVICE)
    outputs = model(inputs_embeds=inputs, attention_mask=mask, cache=cache, use_cache=use_cache)
    states = parts_of(outputs.past_key_values)
    total = sum((draw(*part.shape) * part).sum() for part in (outputs.last_hidden_state, *states))
    model.zero_grad()
    total.backward()
    results = {"outputs": outputs.last_hidden_state, "inputs": inputs.grad}
    results |= {f"state {index}": part for index, part in enumerate(states)}
    results |= {f"given {index}": part.grad for index, part in enumerate(given)}
    results |= {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {name: result.detach().clone() for name, result in results.items()}


def parts_of(cache) -> list[torch.Tensor]:
    layers = () if cache is None else cache.layers
    return [part for layer in layers for part in (layer.keys, layer.values) if part.numel() > 0]


@pytest.mark.parametrize(("bidirectional", "state"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("cell_type", ["rnn_tanh", "rnn_relu", "gru", "lstm"])
def test_equals_the_loop(cell_type, bidirectional, state, calls):
    model = make_model(cell_type=cell_type, bidirectional=bidirectional)
    actual = results_of(model, state=state)
    assert calls == ([LAYERS, LAYERS] if state else [LAYERS])  # the first of the two makes the cache
    with loop_only():
        assert_same(actual, results_of(model, state=state))
    assert len(calls) == 1 + state


@pytest.mark.parametrize("mask", [make_mask(SEQ), make_mask(SEQ).sort(descending=True).values], ids=["any", "right"])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("cell_type", ["rnn_tanh", "gru", "lstm"])
def test_padding(cell_type, state, mask, calls):
    """Where no final state is asked for: those of layers below are not to be had there."""
    model = make_model(cell_type=cell_type)
    actual = results_of(model, mask, state, use_cache=False)
    assert calls[-1] == LAYERS
    del calls[:]
    with loop_only():
        assert_same(actual, results_of(model, mask, state, use_cache=False))
        expected = results_of(model, mask, state)
    assert not calls
    assert_same(results_of(model, mask, state), expected)
    assert calls == [LAYERS] * state  # that makes the cache


def test_directions_read_padding_apart(calls):
    model = make_model(bidirectional=True)
    actual = results_of(model, make_mask(SEQ), use_cache=False)
    with loop_only():
        assert_same(actual, results_of(model, make_mask(SEQ), use_cache=False))
    assert not calls


def test_texts_in_one_row(calls):
    model = make_model()
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]], device=DEVICE).expand(BATCH, -1)
    tokens = make_tokens(BATCH, SEQ).to(DEVICE) % 9
    actual = model(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state
    first = model(input_ids=tokens[:, :3]).last_hidden_state
    second = model(input_ids=tokens[:, 3:]).last_hidden_state
    assert calls == [LAYERS] * 2  # and not for the texts that share a row
    torch.testing.assert_close(actual, torch.cat([first, second], dim=1))


def test_what_happens_between_layers(calls):
    """Whatever is more than the recurrence of cells of one kind goes layer by layer."""
    run = {
        "residual": lambda: results_of(make_model(residual=True)),
        "dropout": lambda: results_of(make_model(hidden_dropout=0.5).train()),
        "recurrent dropout": lambda: results_of(make_model(recurrent_dropout=0.5).train()),
        "one step": lambda: make_model()(input_ids=make_tokens(2, 1).to(DEVICE) % 9),
        "no row": lambda: make_model()(input_ids=make_tokens(0, 3).to(DEVICE)),
        "gates": lambda: make_model()(input_ids=make_tokens(2, 3).to(DEVICE) % 9, output_gates=True),
        "hidden states": lambda: make_model()(input_ids=make_tokens(2, 3).to(DEVICE) % 9, output_hidden_states=True),
    }
    for name, function in run.items():
        function()
        assert not calls, name
    for path in ("torch_kernel", "stacked_layers"):
        with without_fast_paths(path):
            results_of(make_model())
        assert not calls, path
    results_of(make_model(hidden_dropout=0.5, recurrent_dropout=0.5))
    assert calls == [LAYERS]


def test_gradient_checkpointing(calls):
    model = make_model().train()
    expected = results_of(model)
    assert calls == [LAYERS]
    model.gradient_checkpointing_enable()
    assert_same(results_of(model), expected)
    assert calls == [LAYERS]


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("place", ["layer", "cell", "recorded", "forward"])
def test_who_watches_a_layer_sees_it(place, calls):
    model, seen = make_model(), []
    layer = model.layers[1]
    if place == "forward":  # as Accelerate does
        forward = layer.forward
        layer.forward = lambda *arguments, **options: (seen.append(place), forward(*arguments, **options))[1]
    else:
        watched = layer if place == "layer" else getattr(layer, place)
        watched.register_forward_hook(lambda *arguments: seen.append(place))
    results_of(model)
    assert set(seen) == {place}
    assert not calls


def test_replaced_weights(calls):
    """Parametrised weights are those of the layers in any case."""
    model = make_model()
    for layer in model.layers:
        parametrize.register_parametrization(layer.cell, "weight_hh", Doubled())
    actual = results_of(model)
    with loop_only():
        assert_same(actual, results_of(model))


def test_cells_that_are_not_all_alike(calls):
    """As where an adapter takes the place of one of them."""
    model = make_model()
    model.layers[1].cell = type("Other", (type(model.layers[1].cell),), {})(HIDDEN, HIDDEN).to(DEVICE, torch.float64)
    model.layers[1].cell.init_weights(model.config)
    actual = results_of(model)
    assert not calls
    with loop_only():
        assert_same(actual, results_of(model))


def test_states_that_a_cell_begins_with(calls, monkeypatch):
    """A cell with the equations of another may begin with something else than zeros."""

    class Eager(RECURRENT_CELLS["gru"]):
        def initial_state(self, inputs):
            return (torch.full_like(super().initial_state(inputs)[0], 0.5),)

    monkeypatch.setitem(RECURRENT_CELLS, "eager", Eager)
    model = make_model(cell_type="eager")
    actual = results_of(model)
    assert calls == [LAYERS]
    with loop_only():
        assert_same(actual, results_of(model))


def test_half_precision(calls):
    """For which cuDNN has kernels of one layer."""
    model, tokens = make_model(torch.float32), make_tokens(2, 3).to(DEVICE) % 9
    with torch.autocast(DEVICE, torch.float16):
        model(input_ids=tokens)
    assert not calls
    model.half()(input_ids=tokens)
    assert not calls
    model.bfloat16()(input_ids=tokens)
    assert calls == [LAYERS]


def test_autocast(calls):
    model = make_model(torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = results_of(model)
        assert calls == [LAYERS]
        with without_fast_paths("stacked_layers"):
            expected = results_of(model)
    assert {name: result.dtype for name, result in actual.items()} == {
        name: result.dtype for name, result in expected.items()
    }
    assert_same(actual, expected, 0.05)


def test_encoder_and_decoder(calls):
    """Of an encoder without padding in both directions, of a decoder in training with it."""
    torch.manual_seed(0)
    config = RNNSeq2SeqConfig(
        vocab_size=20, hidden_size=HIDDEN, encoder_layers=2, decoder_layers=3, decoder_start_token_id=1
    )
    model = RNNSeq2SeqForConditionalGeneration(config).to(DEVICE, torch.float64).train()
    sources, labels = (make_tokens(4, 5, seed=seed).to(DEVICE) % 20 for seed in range(2))
    labels[1, 2:] = -100

    def gradients(mask):
        model.zero_grad()
        model(input_ids=sources, attention_mask=mask, labels=labels).loss.backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters()}

    for mask, expected_calls in ((None, [2, 3]), (sources != PAD, [3])):
        actual = gradients(mask)
        assert calls == expected_calls
        del calls[:]
        with loop_only():
            assert_same(actual, gradients(mask), 1e-6)  # the loss is computed in float32
        assert not calls


def test_in_a_graph(calls):
    """A compiler sees the layers one by one, and meets nothing on the way that it cannot look into."""
    model, tokens = make_model(), make_tokens(2, 5).to(DEVICE) % 9
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        actual = compiled(input_ids=tokens, use_cache=False).last_hidden_state
        assert not calls
        torch.testing.assert_close(actual, model(input_ids=tokens, use_cache=False).last_hidden_state)
