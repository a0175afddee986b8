"""Fast paths where others meet them: parts of graphs, frozen adapters, transformations, traces, hidden writes."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_rnn import RECURRENT_CELLS, loop_only, packed_linear, weight_layouts
from hf_rnn.large_products import large_linear
from hf_rnn.recurrent_cache import cache_of
from hf_rnn.recurrent_kernels import takes_torch_kernel
from hf_rnn.step_linear import StepLinear
from matrix import DECODERS, case_id, make_inputs, make_model, make_tokens


SEQ2SEQ, CAUSAL = "RNNSeq2SeqForConditionalGeneration", "RNNForCausalLM"
STEPWISE = [{"input_feeding": True}, {"decoder_type": "bahdanau"}]
CELLS = pytest.mark.parametrize("cell_type", RECURRENT_CELLS)
packing = pytest.mark.usefixtures("everything_is_packed")


def wide_model(name: str, **options):
    """Wide enough for products of oneDNN, of more than one layer."""
    layers = {"decoder_layers": 3} if name == SEQ2SEQ else {"num_hidden_layers": 2}
    sizes = {"embedding_size": 64, "hidden_size": 64}
    return make_model(name, torch.float32, **sizes, **layers, **options)


def unsampled_rows(weight: torch.Tensor) -> list[int]:
    """An even number of rows of which no number is compared at every step."""
    number, size = weight.shape
    step = weight.numel() // packed_linear._Copy.SAMPLES
    rows = [row for row in range(number) if -(-row * size // step) * step >= (row + 1) * size]
    return rows[: len(rows) // 2 * 2]


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@CELLS
@pytest.mark.parametrize("decoder", STEPWISE, ids=case_id)
def test_frozen_parametrizations(decoder, cell_type):
    """Their weights are new tensors at every step, and have no history."""
    model, inputs = wide_model(SEQ2SEQ, **decoder, cell_type=cell_type), make_inputs(SEQ2SEQ)
    for layer in model.model.decoder.layers:
        parametrize.register_parametrization(layer.cell, "weight_hh", Doubled())
    model.requires_grad_(False)
    actual = model(**inputs).logits
    with loop_only():
        torch.testing.assert_close(actual, model(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_weights_that_come_and_go():
    """A product knows its weight, and not the place in memory that another had before."""
    linear, inputs = StepLinear(), torch.randn(3, 40)
    for _ in range(50):
        weight = torch.randn(50, 40)
        torch.testing.assert_close(linear(inputs, weight), F.linear(inputs, weight), rtol=1e-4, atol=1e-4)
        weight = torch.randn(50, 40).requires_grad_()
        torch.testing.assert_close(linear(inputs, weight), F.linear(inputs, weight), rtol=1e-4, atol=1e-4)
        del weight


@CELLS
@pytest.mark.parametrize("options", [*STEPWISE, {"recurrent_dropout": 0.5}], ids=case_id)
def test_a_backward_to_the_inputs_before_the_one_to_all(options, cell_type):
    """As for perturbations of embeddings: the second counts everything once."""
    name = CAUSAL if "recurrent_dropout" in options else SEQ2SEQ
    model, inputs = wide_model(name, **options, cell_type=cell_type).train(), make_inputs(name)
    embed = model.get_input_embeddings()
    embeddings = embed(inputs.pop("input_ids")).detach().requires_grad_()

    def gradients(first: bool):
        torch.manual_seed(0)
        model.zero_grad()
        loss = model(inputs_embeds=embeddings, **inputs).loss
        if first:
            torch.autograd.grad(loss, embeddings, retain_graph=True)
        loss.backward()
        return {key: weight.grad.clone() for key, weight in model.named_parameters() if weight.grad is not None}

    torch.testing.assert_close(gradients(True), gradients(False))


@packing
def test_biases_with_gaps():
    """A column of a matrix, and one number for all."""
    weight, inputs = torch.randn(256, 200), torch.randn(64, 200)
    for bias in (torch.randn(512)[::2], torch.randn(1).expand(256), torch.randn(256, 3)[:, 1]):
        actual, expected = large_linear(inputs, weight, bias), F.linear(inputs, weight, bias)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@packing
@pytest.mark.parametrize("length", [1, 3], ids=["one token", "several tokens"])
@pytest.mark.parametrize("factor", [-1, 2, 4])
def test_rows_written_behind_the_back(length, factor):
    """Through `.data`, in a way that leaves sums of bits as they are."""
    model = make_model(CAUSAL, torch.float32, hidden_size=1024, embedding_size=1024, vocab_size=2000)
    prompt = torch.full((1, length), 5)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_scores": True}
    options["return_dict_in_generate"] = True
    for _ in range(2):
        model.generate(prompt, **options)
    model.lm_head.weight.data[unsampled_rows(model.lm_head.weight)] *= factor
    actual = model.generate(prompt, **options)
    with loop_only():
        expected = model.generate(prompt, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(actual.scores, expected.scores, rtol=1e-3, atol=1e-3)


@packing
@torch.no_grad()
def test_rows_written_between_texts_of_one_source():
    model = make_model(SEQ2SEQ, torch.float32, hidden_size=512, embedding_size=512, vocab_size=3000)
    outputs = model.get_encoder()(make_tokens(3, 7))

    def first_logits(model=model):
        first = torch.ones(3, 1, dtype=torch.long)
        return model(encoder_outputs=copy.copy(outputs), decoder_input_ids=first, use_cache=True).logits

    for _ in range(3):
        first_logits()
    model.lm_head.weight.data[unsampled_rows(model.lm_head.weight)] *= -1
    with loop_only():
        expected = first_logits()
    torch.testing.assert_close(first_logits(), expected, rtol=1e-3, atol=1e-3)


@packing
@torch.no_grad()
def test_a_change_between_two_copies_of_parts():
    weight, inputs = nn.Parameter(torch.randn(2048, 1024)), torch.randn(1, 1024)
    for _ in range(2):
        packed_linear.packed_linear(inputs, weight)
    weight.data[7, 900:902] += 1  # not among those that are compared at every step
    packed_linear.packed_linear(inputs[:, 512:], weight, first_column=512)
    packed_linear.begin_text()
    for first in (0, 512):
        actual = packed_linear.packed_linear(inputs[:, first:], weight, first_column=first)
        torch.testing.assert_close(actual, F.linear(inputs[:, first:], weight[:, first:]), rtol=1e-4, atol=1e-4)


@CELLS
@pytest.mark.parametrize("grad", [False, True])
def test_a_state_is_no_part_of_the_outputs(cell_type, grad):
    """Whoever writes to outputs leaves it alone, and it does not keep them in memory."""
    model = wide_model(CAUSAL, cell_type=cell_type).model
    tokens = make_tokens(33, 9)
    with torch.set_grad_enabled(grad):
        outputs = model(tokens, use_cache=True)
        (state, *_) = [layer.keys for layer in cache_of(outputs).layers][-1:]
        before = state.detach().clone()
        outputs.last_hidden_state.detach().zero_()
        assert torch.equal(state, before)
        assert state.untyped_storage().nbytes() == state.nbytes


@CELLS
def test_gradients_through_a_static_cache(cell_type):
    """What was read from it is not what is written to it afterwards."""
    model, tokens = make_model(CAUSAL, cell_type=cell_type), make_tokens(2, 6)
    results = []
    for cache in (StaticCache(config=model.config, max_cache_len=20), DynamicCache(config=model.config)):
        model.zero_grad()
        with torch.no_grad():
            model(tokens, past_key_values=cache, use_cache=True)
        model(tokens, past_key_values=cache, use_cache=True, labels=tokens).loss.backward()
        results.append([weight.grad.clone() for weight in model.parameters()])
    torch.testing.assert_close(*results)


def test_dropout_beside_a_model_in_evaluation():
    """Samples of one source are dropped other units each, from the first token on."""
    model = wide_model(SEQ2SEQ, hidden_dropout=0.5, output_dropout=0.5)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    inputs = make_inputs(SEQ2SEQ, batch=2, with_labels=False)["input_ids"]
    options = {"max_new_tokens": 2, "num_return_sequences": 3, "do_sample": True}
    scores = model.generate(inputs, **options, return_dict_in_generate=True, output_logits=True).logits[0]
    assert not torch.equal(scores[0], scores[1])


@packing
@torch.no_grad()
def test_derivatives_that_go_forward():
    weight, inputs, tangents = nn.Parameter(torch.randn(1024, 1024)), torch.randn(64, 1024), torch.randn(64, 1024)
    for linear in (large_linear, packed_linear.packed_linear):
        for _ in range(3):
            linear(inputs, weight)
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(linear(forward_ad.make_dual(inputs, tangents), weight)).tangent
        torch.testing.assert_close(found, F.linear(tangents, weight))
        _, found = torch.func.jvp(lambda inputs, linear=linear: linear(inputs, weight), (inputs,), (tangents,))
        torch.testing.assert_close(found, F.linear(tangents, weight))


@CELLS
@pytest.mark.parametrize("length", [1, 9])
def test_derivatives_of_a_language_model_that_go_forward(cell_type, length):
    model = wide_model(CAUSAL, cell_type=cell_type)
    embeddings, tangents = torch.randn(2, 2, length, 64)

    def logits(embeddings):
        return model(inputs_embeds=embeddings).logits

    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            logits(embeddings)
            _, found = torch.func.jvp(logits, (embeddings,), (tangents,))
            with loop_only():
                _, expected = torch.func.jvp(logits, (embeddings,), (tangents,))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("decoder", DECODERS, ids=case_id)
def test_transformed_decoders(decoder):
    """A gradient of the whole, and a derivative that goes forward through one step."""
    model, inputs = wide_model(SEQ2SEQ, **decoder), make_inputs(SEQ2SEQ)
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids")).detach()

    def loss(embeddings):
        return model(inputs_embeds=embeddings, **inputs).loss

    def step(features):
        outputs = BaseModelOutputWithPooling(features, encoded.pooler_output)
        return model(encoder_outputs=outputs, decoder_input_ids=make_tokens(len(features), 1), use_cache=True).logits

    with torch.no_grad():
        encoded = model.get_encoder()(inputs_embeds=embeddings)
        step(encoded.last_hidden_state)
    results = []
    for enabled in (False, True):
        with loop_only(enabled):
            gradient = torch.func.grad(loss)(embeddings)
            with torch.no_grad():
                features = encoded.last_hidden_state
                _, tangent = torch.func.jvp(step, (features,), (torch.ones_like(features),))
            results.append((gradient, tangent))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


@packing
@torch.no_grad()
def test_traced_steps():
    """Neither copies of weights nor keys of the example become constants."""
    model = make_model(CAUSAL, torch.float32, hidden_size=1024, embedding_size=1024, vocab_size=1200)
    model.requires_grad_(False)
    token, cache = torch.full((1, 1), 5), None
    for _ in range(3):
        cache = cache_of(model(token, past_key_values=cache, use_cache=True))
    traced = torch.jit.trace(lambda token: model(token, use_cache=False).logits, token, check_trace=False)
    torch.testing.assert_close(traced(token + 2), model(token + 2, use_cache=False).logits, rtol=1e-3, atol=1e-3)

    model = wide_model(SEQ2SEQ, attention_score="additive").requires_grad_(False)
    sources = [model.get_encoder()(make_tokens(2, 7, seed=seed)) for seed in (0, 1)]
    first = make_tokens(2, 1)

    def step(features, final):
        cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
        outputs = BaseModelOutputWithPooling(features, final)
        return model(encoder_outputs=outputs, decoder_input_ids=first, past_key_values=cache).logits

    examples = [(source.last_hidden_state, source.pooler_output) for source in sources]
    step(*examples[0])
    traced = torch.jit.trace(step, examples[0], check_trace=False)
    torch.testing.assert_close(traced(*examples[1]), step(*examples[1]), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_features_of_one_source_with_other_weights():
    """In texts that follow each other, whoever changes what: adapters, hooks, numbers behind the back."""
    model = wide_model(SEQ2SEQ, attention_score="general")
    outputs = model.get_encoder()(make_tokens(3, 7))

    def check():
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "return_dict_in_generate": True, "output_scores": True}
        actual = model.generate(encoder_outputs=copy.copy(outputs), **options)
        with loop_only():
            expected = model.generate(encoder_outputs=copy.copy(outputs), **options)
        torch.testing.assert_close(actual.scores, expected.scores, rtol=1e-3, atol=1e-3)
        return actual.scores[0]

    decoder = model.model.decoder
    first = check()
    changes = [
        lambda: decoder.attention.score.query.weight.data.mul_(-1),
        lambda: decoder.combine.weight.data.mul_(1.5),
        lambda: decoder.attention.score.query.register_forward_hook(lambda module, inputs, output: 3 * output),
        lambda: decoder.combine.register_forward_hook(lambda module, inputs, output: output + 1),
        lambda: outputs.last_hidden_state.data.mul_(2),
    ]
    for change in changes:
        change()
        second = check()
        assert not torch.allclose(first, second)
        first = second


@torch.no_grad()
def test_graphs_of_single_steps_serve_any_number_of_rows(monkeypatch):
    """No graph depends on whether a product is a large one."""
    monkeypatch.setattr(weight_layouts, "LARGE", 5 * 6 * 24)
    model = make_model(CAUSAL, torch.float32)
    model.config.use_cache = False
    dynamic = {"input_ids": {0: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(model, (), {"input_ids": make_tokens(3, 1)}, dynamic_shapes=dynamic, strict=False)
    graphs = []
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=lambda graph, _: graphs.append(1) or graph)
    for rows in (3, 9, 2, 30):
        tokens = make_tokens(rows, 1)
        for run in (program.module(), compiled):
            torch.testing.assert_close(run(input_ids=tokens).logits, model(tokens).logits)
    assert len(graphs) == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_kernels_where_operations_are_seen_or_transformed(device):
    """cuDNN takes weights by their memory, which is not there to be had; torch's kernel on a CPU sees numbers alone."""
    cell = make_model("RNNModel").layers[0].cell
    with FakeTensorMode():
        inputs = torch.empty(2, 3, 5, device=device)
    asked = []

    def ask(number):
        asked.append(takes_torch_kernel(cell, inputs, (), False))
        return number

    ask(0.0)
    with FlopCounterMode(display=False):
        ask(0.0)
    torch.func.grad(ask)(torch.tensor(0.0))
    assert asked == [True, device == "cpu", device == "cpu"]
