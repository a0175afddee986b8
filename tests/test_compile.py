"""Law 9, first half: eager = `torch.compile` = exported program, for lengths and batch sizes not seen before."""

import pytest
import torch
from torch import nn
from torch.library import opcheck
from torch.nn import functional as F

from hf_rnn import RECURRENT_CELLS, loop_only
from hf_rnn.configuration_rnn import POOLING_TYPES
from hf_rnn.recurrent_cache import cache_of, cache_to_fill
from hf_rnn.recurrent_cells import LSTMCell
from hf_rnn.recurrent_layer import RecurrentLayer
from hf_rnn.recurrent_operator import recurrent_layer
from hf_rnn.recurrent_padding import Padding
from matrix import (
    MODEL_CLASSES,
    VOCAB_SIZE,
    WORDS,
    case_id,
    make_config,
    make_inputs,
    make_mask,
    make_model,
    make_tokens,
)


COPYING = {"pointer_generator": True, "num_copy_ids": 5, "unk_token_id": 4}
SEQ2SEQ = "RNNSeq2SeqForConditionalGeneration"
STEPWISE = [
    {"input_feeding": True},
    {"decoder_type": "bahdanau"},
    {"use_coverage": True, "attention_score": "additive"},
    {"decoder_type": "gnmt", "attention_score": "location", "location_filters": 3, "location_width": 5},
]
CELLS = pytest.mark.parametrize("cell_type", RECURRENT_CELLS)
DIRECTIONS = pytest.mark.parametrize("bidirectional", [False, True], ids=["one_direction", "two_directions"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check_slope(loss, weights: list[torch.Tensor]) -> None:
    """
    That the gradient of a function that draws random numbers is its slope along a direction, and that it draws others
    where the seed is another one.
    """
    directions = [torch.randn_like(weight) for weight in weights]

    def value(seed: int = 5, by: float = 0.0):
        with torch.no_grad():
            torch._foreach_add_(weights, directions, alpha=by)
        torch.manual_seed(seed)
        return loss()

    assert value() == value() != value(6)
    gradients = torch.autograd.grad(value(), weights)
    slope = sum((gradient * direction).sum() for gradient, direction in zip(gradients, directions))
    higher, lower = value(by=1e-5), value(by=-2e-5)
    torch.testing.assert_close(slope, (higher - lower).detach() / 2e-5, rtol=1e-5, atol=1e-6)


def random_mask(*shape: int) -> torch.Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(shape[0])) > 0.3).long()


def operator_arguments(cell_type: str, bidirectional: bool, mask: torch.Tensor | None, with_kept: bool, dtype):
    layer = RecurrentLayer(make_config("RNNModel", cell_type=cell_type), 5, 0, bidirectional).to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    batch, seq = (3, 4) if mask is None else mask.shape
    inputs = torch.randn(batch, seq, 5, dtype=dtype, requires_grad=True)
    states = [torch.randn(batch, size, dtype=dtype, requires_grad=True) for size in layer.state_sizes]
    weights = [weight for cell in layer.cells for weight in cell.parameters()]
    kept = [torch.randint(0, 2, (batch, 6)).to(dtype) * 2 for _ in layer.cells] if with_kept else []
    return inputs, states, weights, kept, None if mask is None else mask.bool(), cell_type, None, None


@CELLS
@DIRECTIONS
def test_the_operator_is_what_it_says(cell_type, bidirectional):
    """Schema, shapes, gradients: what a compiler assumes of it."""
    for mask in (None, make_mask(4)[:4]):
        for with_kept in (False, True):
            arguments = operator_arguments(cell_type, bidirectional, mask, with_kept, torch.float32)
            opcheck(recurrent_layer, arguments)


@CELLS
@DIRECTIONS
def test_the_operator_is_the_loop(cell_type, bidirectional):
    """Results and gradients of all arguments, with padding of every kind and dropped units."""
    for mask in (None, make_mask()):
        for with_kept in (False, True):
            inputs, states, weights, kept, mask, *_ = operator_arguments(
                cell_type, bidirectional, mask, with_kept, torch.float64
            )
            layer = RecurrentLayer(make_config("RNNModel", cell_type=cell_type), 5, 0, bidirectional).double()
            layer.load_state_dict(dict(zip(layer.state_dict(), weights)))
            units = iter(kept)
            layer.kept_units = lambda inputs, units=units: next(units, None)

            def objective(results):
                return sum((result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum() for result in results)

            actual = recurrent_layer(inputs, states, weights, kept, mask, cell_type, None, None)
            given = torch.autograd.grad(objective(actual), [inputs, *states, *weights])
            with loop_only():
                outputs, final, _ = layer(inputs, tuple(states), None if mask is None else Padding(mask))
            wanted = torch.autograd.grad(objective([outputs, *final]), [inputs, *states, *layer.parameters()])
            for pair in zip([*actual, *given], [outputs, *final, *wanted], strict=True):
                torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-10)


def compare(model, compiled, inputs: dict, tolerance: float = 1e-9) -> None:
    """Logits, loss and every gradient, compiled and not."""
    results = []
    for module in (compiled, model):
        outputs = module(**inputs)
        objective = sum(
            (value.clamp(min=-1e3).double() * 0.1).sum()
            for key, value in outputs.items()
            if isinstance(value, torch.Tensor) and value.requires_grad
        )
        gradients = torch.autograd.grad(objective, list(model.parameters()), allow_unused=True)
        values = [value for value in outputs.values() if isinstance(value, torch.Tensor)]
        results.append([*values, *(gradient for gradient in gradients if gradient is not None)])
    for pair in zip(*results, strict=True):
        torch.testing.assert_close(*pair, rtol=max(tolerance, 1e-6), atol=max(tolerance, 1e-6))


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_graphs_of_training(name):
    """
    The graph of every class is whole, and one graph serves all lengths and batch sizes once it is known that they
    change. What a graph is compiled to is tested below.
    """
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    model = make_model(name).train()
    compiled = torch.compile(model, fullgraph=True, backend=count)
    for batch, seq in [(6, 7), (5, 8), (4, 12), (7, 31), (3, 9), (2, 16)]:
        inputs = make_inputs(name, batch, seq)
        if name != "RNNForMultipleChoice":
            inputs["attention_mask"] = random_mask(batch, seq)
        compare(model, compiled, inputs)
    assert len(graphs) <= 3
    nodes = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert sum("recurrent_layer" in node for node in nodes) >= 2 * len(graphs)


@pytest.mark.parametrize("options", WORDS, ids=["cnn", "gru"])
def test_graphs_of_words(options):
    """One graph of a model of words for any number of rows and tokens, with gradients, and the exported program."""
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    model = make_model("RNNForTokenClassification", **options)
    compiled = torch.compile(model, fullgraph=True, backend=count)
    for batch, seq in [(6, 7), (5, 8), (4, 12), (7, 31)]:
        inputs = make_inputs("RNNForTokenClassification", batch, seq) | {"attention_mask": random_mask(batch, seq)}
        compare(model, compiled, inputs)
    assert len(graphs) <= 3
    inputs.pop("labels")
    sizes = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in inputs}
    program = torch.export.export(model, (), inputs, dynamic_shapes=sizes, strict=False).module()
    for batch, seq in [(3, 5), (8, 20)]:
        inputs = {"input_ids": make_tokens(batch, seq), "attention_mask": random_mask(batch, seq)}
        torch.testing.assert_close(program(**inputs).logits, model(**inputs).logits, rtol=1e-10, atol=1e-12)


@CELLS
@pytest.mark.slow
def test_compiled_training(cell_type):
    """By the default compiler, with recurrent dropout left to chance in neither."""
    model = make_model("RNNForCausalLM", cell_type=cell_type).train()
    compiled = torch.compile(model, fullgraph=True)
    for batch, seq in [(6, 7), (5, 8), (4, 30)]:
        compare(
            model, compiled, make_inputs("RNNForCausalLM", batch, seq) | {"attention_mask": random_mask(batch, seq)}
        )


@pytest.mark.parametrize(
    "options",
    [
        {"attention_score": "location", "use_coverage": True, "num_attention_heads": 2},
        pytest.param({"attention_score": "local", "attention_window": 2}, marks=pytest.mark.slow),
        pytest.param({"attention_score": "normalized_additive", "decoder_type": "gnmt"}, marks=pytest.mark.slow),
        pytest.param({"use_coverage": True, "decoder_type": "bahdanau"}, marks=pytest.mark.slow),
    ],
    ids=["location", "local", "normalized_additive", "coverage"],
)
def test_graphs_of_scores(options):
    """Every score goes into a graph for any number of rows and any source and target, with gradients."""
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    model = make_model("RNNSeq2SeqForConditionalGeneration", **options).train()
    compiled = torch.compile(model, fullgraph=True, backend=count)
    for batch, source, target in [(6, 7, 6), (5, 8, 9), (4, 12, 5), (2, 16, 30)]:
        inputs = make_inputs("RNNSeq2SeqForConditionalGeneration", batch, target)
        inputs["input_ids"] = make_tokens(batch, source)
        compare(model, compiled, inputs | {"attention_mask": random_mask(batch, source)})
    assert len(graphs) <= 3


def stepwise_model(**options):
    return make_model(SEQ2SEQ, **{"input_feeding": True, "num_attention_heads": 2} | options).train()


def inputs_of_lengths():
    """Inputs of several sizes, with padding on both sides."""
    for batch, source, target in [(6, 7, 6), (5, 8, 9), (3, 5, 20), (4, 9, 12), (7, 6, 5)]:
        inputs = make_inputs(SEQ2SEQ, batch, target)
        inputs |= {"input_ids": make_tokens(batch, source), "attention_mask": random_mask(batch, source)}
        yield inputs | {"decoder_attention_mask": random_mask(*inputs["decoder_input_ids"].shape)}


@pytest.mark.parametrize("cell_type", RECURRENT_CELLS)
@pytest.mark.parametrize("decoder", STEPWISE, ids=case_id)
def test_graphs_of_decoders(decoder, cell_type):
    """Two graphs serve all lengths, with gradients."""
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    model = make_model(SEQ2SEQ, **decoder, cell_type=cell_type).train()
    compiled = torch.compile(model, fullgraph=True, backend=count)
    for inputs in inputs_of_lengths():
        compare(model, compiled, inputs)
    assert len(graphs) == 2
    assert all("recurrent_decoder" in str(graph.graph) for graph in graphs)


@pytest.mark.parametrize("decoder", STEPWISE, ids=case_id)
def test_what_a_graph_of_a_decoder_returns(decoder):
    """States, hidden states and attentions."""
    model, inputs = make_model(SEQ2SEQ, **decoder), next(inputs_of_lengths())
    asked = {"output_hidden_states": True, "output_attentions": True}
    num_states = len(model.model.decoder.layers) + model.config.attention_has_state
    results = []
    # Hooks that record are installed outside of graphs, and in older versions caches are made there.
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        cache = cache_to_fill(model.config, None, True, False, num_states)
        results.append(run(**inputs, **asked, past_key_values=cache))
    for key in ("logits", "decoder_hidden_states", "cross_attentions"):
        torch.testing.assert_close(*(outputs[key] for outputs in results))
    for pair in zip(*(cache_of(outputs).self_attention_cache.layers for outputs in results), strict=True):
        for name in ("keys", "values"):
            torch.testing.assert_close(*(getattr(layer, name) for layer in pair))


def test_graphs_of_decoders_that_are_not_plain():
    """An adapter, a hook, an attribute that cannot be written down: the loop in the graph."""
    inputs = next(inputs_of_lengths())
    for change in (
        lambda decoder: decoder.attention.score.register_forward_hook(lambda module, inputs, output: 2 * output),
        lambda decoder: setattr(decoder, "combine", nn.Sequential(decoder.combine, nn.Tanh())),
        lambda decoder: setattr(decoder.layers[1], "residual", ("yes",)),
    ):
        torch._dynamo.reset()
        model = stepwise_model()
        change(model.model.decoder)
        compare(model, torch.compile(model, fullgraph=True, backend="aot_eager"), inputs)
        assert model.model.decoder._graph_description() == ""


def test_what_is_set_on_a_decoder_is_seen_by_its_graph():
    model, inputs = stepwise_model(), next(inputs_of_lengths())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = []
    for residual in (False, True):
        model.model.decoder.layers[1].residual = residual
        losses.append(compiled(**inputs).loss)
        torch.testing.assert_close(losses[-1], model(**inputs).loss)
    assert losses[0] != losses[1]


def test_second_derivatives_of_decoders():
    model, inputs = stepwise_model(), next(inputs_of_lengths())
    weights = [weight for name, weight in model.named_parameters() if "decoder.layers" in name]
    results = []
    for run in (model, torch.compile(model, backend="eager")):
        target = run(**{key: value for key, value in inputs.items() if key != "labels"}).logits.square().sum()
        gradients = torch.autograd.grad(target, weights, create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in gradients)
        results.append([*gradients, *torch.autograd.grad(penalty, weights)])
    torch.testing.assert_close(*results)


def test_dropped_units_of_decoders():
    """The backward drops those of the forward: the gradient is the slope along a direction."""
    rates = dict.fromkeys(["hidden_dropout", "output_dropout", "recurrent_dropout"], 0.3)
    model, inputs = stepwise_model(**rates), next(inputs_of_lengths())
    compiled = torch.compile(model.model, fullgraph=True, backend="aot_eager")
    del inputs["labels"]
    check_slope(
        lambda: compiled(**inputs, use_cache=False).last_hidden_state.sin().sum(),
        list(model.model.decoder.layers.parameters()),
    )


def test_dropout_beside_a_decoder_in_evaluation():
    """A part that is set to training, at a rate of its own."""
    model, inputs = stepwise_model().eval(), next(inputs_of_lengths())
    model.model.decoder.output_dropout.p = 0.4
    model.model.decoder.output_dropout.train()
    compiled = torch.compile(model.model, fullgraph=True, backend="aot_eager")
    del inputs["labels"]
    check_slope(
        lambda: compiled(**inputs, use_cache=False).last_hidden_state.sin().sum(),
        list(model.model.decoder.layers.parameters()),
    )


@pytest.mark.parametrize("decoder", STEPWISE, ids=case_id)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoders_in_mixed_precision(decoder, dtype):
    model = make_model(SEQ2SEQ, dtype=torch.float32, **decoder).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for inputs in inputs_of_lengths():
        with torch.autocast("cpu", dtype=dtype):
            actual, expected = compiled(**inputs), model(**inputs)
        assert actual.logits.dtype == expected.logits.dtype
        torch.testing.assert_close(actual.loss, expected.loss, rtol=0.02, atol=0.02)
        actual.loss.backward()


def copying_inputs(batch: int, source: int, target: int) -> dict:
    """Of a pointer-generator: every other word of the source and of the labels is one that the vocabulary lacks."""
    ids = [make_tokens(batch, length, seed=length) for length in (source, target)]
    for tokens in ids:
        tokens[:, ::2] = VOCAB_SIZE + tokens[:, ::2] % COPYING["num_copy_ids"]
    return {"input_ids": ids[0], "labels": ids[1], "attention_mask": random_mask(batch, source)}


@pytest.mark.parametrize(
    "options",
    [
        {"num_attention_heads": 2},
        pytest.param({"decoder_type": "bahdanau", "label_smoothing": 0.1}, marks=pytest.mark.slow),
        pytest.param({"decoder_type": "gnmt", "tie_word_embeddings": False}, marks=pytest.mark.slow),
    ],
    ids=["luong", "bahdanau", "gnmt"],
)
def test_graphs_of_copying(options):
    """
    A pointer-generator with labels, words beyond the vocabulary among them: one graph for any number of rows, any
    source and any target, with gradients.
    """
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    model = make_model("RNNSeq2SeqForConditionalGeneration", **COPYING, **options).train()
    compiled = torch.compile(model, fullgraph=True, backend=count)
    for batch, source, target in zip([6, 5, 4, 2], [7, 8, 12, 16], [5, 6, 9, 10]):
        compare(model, compiled, copying_inputs(batch, source, target))
    assert len(graphs) <= 3


@pytest.mark.parametrize("pooling", [pooling for pooling in POOLING_TYPES if pooling != "last"])
def test_graphs_of_pooling(pooling):
    """Pooling with its weights, in one graph for all lengths and batch sizes, compiled with gradients and exported."""
    name = "RNNForSequenceClassification"
    attending = {"pooling_heads": 2, "pooling_attention_size": 5} if pooling == "attention" else {}
    model = make_model(name, pooling=pooling, bidirectional=True, **attending).train()
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=count)
    for batch, seq in [(6, 7), (5, 8), (4, 12), (2, 16)]:
        inputs = make_inputs(name, batch, seq) | {"attention_mask": random_mask(batch, seq)}
        compare(model, compiled, inputs)
        outputs = [module(**inputs, output_attentions=True) for module in (compiled, model)]
        assert ("attentions" in outputs[0]) == (pooling == "attention")
        for pair in zip(*(output.get("attentions") or () for output in outputs), strict=True):
            torch.testing.assert_close(*pair, rtol=0, atol=1e-12)
    assert len(graphs) <= 6

    model.eval().config.output_attentions = True
    inputs = {"input_ids": make_tokens(4, 9), "attention_mask": random_mask(4, 9)}
    dynamic = {key: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for key in inputs}
    program = torch.export.export(model, (), inputs, dynamic_shapes=dynamic, strict=False).module()
    for batch, seq in [(2, 3), (7, 21)]:
        inputs = {"input_ids": make_tokens(batch, seq), "attention_mask": random_mask(batch, seq)}
        actual, expected = program(**inputs), model(**inputs)
        torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-12)
        assert ("attentions" in actual) == (pooling == "attention")
        for pair in zip(actual.get("attentions") or (), expected.get("attentions") or (), strict=True):
            torch.testing.assert_close(*pair, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["RNNForTokenClassification", "RNNSeq2SeqForConditionalGeneration"])
def test_compiled_training_of_other_classes(name):
    options = {"bidirectional": True} if name == "RNNForTokenClassification" else {}
    model = make_model(name, **options).train()
    compiled = torch.compile(model, fullgraph=True)
    for batch, seq in [(6, 7), (5, 8), (4, 30)]:
        compare(model, compiled, make_inputs(name, batch, seq) | {"attention_mask": random_mask(batch, seq)})


def test_mixed_precision():
    """Under autocast the operator computes in the lower precision, as the kernel does without a compiler."""
    model = make_model("RNNForCausalLM", dtype=torch.float32, hidden_size=32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = make_inputs("RNNForCausalLM", with_labels=False) | {"attention_mask": make_mask()}
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = compiled(**inputs).logits, model(**inputs).logits
    assert actual.dtype == expected.dtype
    assert (actual - expected).abs().max() < 0.05 * expected.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compiled(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["RNNForCausalLM", "RNNForTokenClassification", "RNNSeq2SeqForConditionalGeneration"])
def test_checkpointed_layers(name):
    """Gradient checkpointing within one graph, of long texts too."""
    model = make_model(name).train()
    model.gradient_checkpointing_enable()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch, seq in [(6, 7), (2, 300)]:
        compare(model, compiled, make_inputs(name, batch, seq))


def test_layers_compiled_one_by_one():
    """All of one size share their graphs."""
    model = make_model("RNNForCausalLM", num_hidden_layers=10, embedding_size=6).train()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend=backend)
    for batch, seq in [(6, 7), (5, 8), (4, 12)]:
        model(**make_inputs("RNNForCausalLM", batch, seq)).loss.backward()
    assert len(graphs) == 2


def test_transformed_functions():
    """Forward derivatives and gradients of each text, within graphs."""
    model, tokens = make_model("RNNForCausalLM"), make_tokens(3, 5)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def logits(weights, tokens=tokens):
        return torch.func.functional_call(model, weights, (tokens,), {"use_cache": False}).logits

    def derivative(weights):
        return torch.func.jvp(logits, (weights,), ({name: weight.cos() for name, weight in weights.items()},))[1]

    def gradients(weights):
        of_text = torch.func.grad(lambda weights, text: logits(weights, text[None]).square().sum())
        return torch.func.vmap(of_text, (None, 0))(weights, tokens)

    for function in (derivative, gradients):
        actual = torch.compile(function, fullgraph=True, backend="aot_eager")(weights)
        torch.testing.assert_close(actual, function(weights))


@DIRECTIONS
def test_second_derivatives(bidirectional):
    """Where a backend leaves the backward to autograd, and of an exported program."""
    model = make_model("RNNModel", bidirectional=bidirectional).train()
    embeddings = torch.randn(3, 6, 5, dtype=torch.float64, requires_grad=True)

    class OfEmbeddings(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, embeddings):
            return self.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state

    module = OfEmbeddings()

    def results(run):
        (gradient,) = torch.autograd.grad(run(embeddings).square().sum(), embeddings, create_graph=True)
        found = torch.autograd.grad(gradient.square().sum(), list(run.parameters()), allow_unused=True)
        return gradient, {name: value for (name, _), value in zip(run.named_parameters(), found)}

    expected = results(module)
    torch.testing.assert_close(results(torch.export.export(module, (embeddings,), strict=False).module()), expected)
    gradient, found = results(torch.compile(module, backend="eager"))
    found = {name.removeprefix("_orig_mod."): value for name, value in found.items()}
    torch.testing.assert_close((gradient, found), expected)


def test_alignments_in_a_cold_graph():
    name = "RNNSeq2SeqForConditionalGeneration"
    model, inputs = make_model(name).train(), make_inputs(name)
    inputs["alignments"] = torch.rand(6, inputs["labels"].shape[1], 7, dtype=torch.float64)
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).loss
    torch.testing.assert_close(loss, model(**inputs).loss)


def test_state_goes_in_and_out():
    """Chunks of a text through one compiled model, with the state carried."""
    model = make_model("RNNForCausalLM")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = make_tokens(3, 20)
    with torch.no_grad():
        expected = model(tokens).logits
        past, logits = None, []
        for chunk in tokens.split([4, 6, 1, 1, 8], dim=1):
            outputs = compiled(chunk, past_key_values=past, use_cache=True)
            past = outputs.past_key_values
            logits.append(outputs.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected)


@pytest.mark.slow
def test_a_compiled_decode_step():
    """`generate` with a static cache compiles the forward of a step into one graph, and writes the same tokens."""
    for name in ("RNNForCausalLM", "RNNSeq2SeqForConditionalGeneration"):
        model = make_model(name, dtype=torch.float32)
        inputs = {"input_ids": make_tokens(2, 6)}
        length = {"min_new_tokens": 12, "max_new_tokens": 12, "do_sample": False}
        expected = model.generate(**inputs, **length)
        step = torch.compile(model.forward, fullgraph=True)
        forward, calls = model.forward, []

        def counted(*args, step=step, forward=forward, calls=calls, **kwargs):
            tokens = kwargs.get("decoder_input_ids", kwargs.get("input_ids"))
            # The name that the cache has since transformers 5.24, and the one that it had before.
            state = kwargs.get("cache", kwargs.get("past_key_values"))
            is_step = state is not None and tokens.shape[1] == 1
            calls.append(is_step)
            return (step if is_step else forward)(*args, **kwargs)

        model.forward = counted
        actual = model.generate(**inputs, **length, cache_implementation="static")
        assert sum(calls) >= 11
        assert torch.equal(actual, expected)


def test_cells_out_of_the_table():
    """A layer whose cell's class is no longer to be found runs the loop in the graph."""

    class Gone(LSTMCell):
        def step(self, projected, state, linear=F.linear):
            return super().step(projected, state, linear)

    RECURRENT_CELLS["gone"] = Gone
    try:
        model = make_model("RNNForCausalLM", cell_type="gone")
    finally:
        del RECURRENT_CELLS["gone"]
    inputs = make_inputs("RNNForCausalLM")
    compare(model, torch.compile(model, fullgraph=True, backend="aot_eager"), inputs)


def test_a_new_cell_is_compiled_at_any_length(monkeypatch):
    """A cell that somebody adds goes through the operator as the plain four do."""

    class Mine(LSTMCell):
        def step(self, projected, state, linear=F.linear):
            hidden, cell = super().step(projected, state, linear)
            return hidden * 0.9, cell

    monkeypatch.setitem(RECURRENT_CELLS, "mine", Mine)
    model = make_model("RNNForCausalLM", cell_type="mine").train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch, seq in [(6, 7), (5, 8), (4, 30)]:
        compare(model, compiled, make_inputs("RNNForCausalLM", batch, seq))
