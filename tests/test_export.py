"""Exported models: the graphs, the files, the runner without torch, the command."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.cells import LayerNormLSTMCell
from hf_rnn import RECURRENT_CELLS, RNNConfig, RNNForCausalLM
from hf_rnn.__main__ import main
from hf_rnn.export import export_model, load, package, runner
from hf_rnn.export.graphs import make_graphs
from hf_rnn.export.onnx_files import share_weights, to_exported_program
from hf_rnn.recurrent_cells import LSTMCell, RecurrentCell
from matrix import BOS, EOS, MODEL_CLASSES, WORDS, make_inputs, make_mask, make_model, make_tokens
from test_gates import MinimalGatedCell


UNSEEN_SIZES = [(1, 1), (2, 9), (5, 1), (7, 23)]  # 3 x 4 are traced


def needs_onnx():
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module, reason="needs the extra: pip install 'hf_rnn[onnx]'")


def ragged_mask(*shape: int) -> torch.Tensor:
    """Padding anywhere, and in the last row nothing else."""
    mask = (torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4).long()
    if shape[0] > 1:
        mask[-1] = 0
    return mask


def as_numpy(inputs: dict) -> dict:
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def make_lively_model(name: str, **options):
    """A model that writes different tokens, one after the other and row by row."""
    model = make_model(name, dtype=torch.float32, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


@pytest.fixture(scope="module")
def language_model():
    return make_lively_model("RNNForCausalLM")


@pytest.fixture(scope="module")
def language_runner(language_model, tmp_path_factory):
    needs_onnx()
    folder = tmp_path_factory.mktemp("export") / "language_model"
    export_model(language_model, folder)
    return load(folder, threads=1)


@pytest.fixture(scope="module")
def translator():
    return make_lively_model("RNNSeq2SeqForConditionalGeneration", decoder_type="bahdanau", encoder_layers=1)


@pytest.fixture(scope="module")
def translation_runner(translator, tmp_path_factory):
    needs_onnx()
    folder = tmp_path_factory.mktemp("export") / "translator"
    export_model(translator, folder)
    return load(folder, threads=1)


# Graphs


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_every_class_exports_with_open_sizes(name):
    _, graphs, _ = make_graphs(make_model(name, dtype=torch.float32))
    generator = torch.Generator().manual_seed(0)
    for graph in graphs.values():
        module = to_exported_program(graph).module()
        for batch, length in UNSEEN_SIZES:
            inputs = package._random_inputs(graph, batch, length, generator)
            expected = graph(inputs)
            for output, result in zip(graph.outputs, module(*inputs.values())):
                torch.testing.assert_close(result, expected[output], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in MODEL_CLASSES if not name.startswith("RNNSeq2Seq")])
def test_graph_computes_what_the_model_does(name):
    model = make_model(name, dtype=torch.float32)
    _, graphs, states = make_graphs(model)
    inputs = make_inputs(name, 6, 7, with_labels=False)
    mask = make_mask(7)
    if inputs["input_ids"].dim() == 3:
        mask = mask[:, None].expand_as(inputs["input_ids"])
    inputs["attention_mask"] = mask
    expected = model(**inputs)
    if states:
        inputs["positions"] = torch.arange(7)
        inputs |= {f"past.{state.name}": torch.full((6, state.size), state.initial) for state in states}
    for output, result in graphs["model"](inputs).items():
        if not output.startswith("present"):
            torch.testing.assert_close(result, expected[output])


@pytest.mark.parametrize(
    "decoder",
    [
        {"input_feeding": True, "attention_score": "additive"},
        {"decoder_type": "gnmt", "attention_score": "location", "num_attention_heads": 2, "use_coverage": True},
        {"attention_score": "local", "attention_window": 2},
        {"decoder_type": "bahdanau", "attention_score": "normalized_additive", "use_coverage": True},
    ],
    ids=lambda options: options["attention_score"],
)
@pytest.mark.parametrize("name", ["RNNSeq2SeqForConditionalGeneration", "RNNSeq2SeqModel"])
def test_decoder_graph_computes_what_the_model_does(name, decoder):
    model = make_model(name, dtype=torch.float32, **decoder)
    _, graphs, states = make_graphs(model)
    inputs = make_inputs(name, 6, 7, with_labels=False)
    mask = make_mask(7)
    expected = model(**inputs, attention_mask=mask, output_attentions=True)
    results = graphs["encoder"]({"input_ids": inputs["input_ids"], "attention_mask": mask})
    memory = {"memory.keys": results["memory.keys"], "memory.values": results["memory.values"], "memory.mask": mask}
    outputs, weights = [], []
    for tokens in inputs["decoder_input_ids"].unbind(1):
        past = {f"past.{state.name}": results[f"present.{state.name}"] for state in states}
        results = graphs["decoder"]({"input_ids": tokens[:, None], **memory, **past})
        outputs.append(results[graphs["decoder"].outputs[0]])
        weights.append(results["cross_attentions"])
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected[graphs["decoder"].outputs[0]])
    torch.testing.assert_close(torch.cat(weights, dim=2), expected.cross_attentions[0])


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_what_graphs_read_and_return_has_no_gaps_in_memory(name):
    options = {"num_attention_heads": 2, "use_coverage": True} if name.startswith("RNNSeq2Seq") else {}
    _, graphs, _ = make_graphs(make_model(name, dtype=torch.float32, **options))
    for graph in graphs.values():
        for tensors in (graph.inputs, graph(graph.inputs)):
            assert [key for key, tensor in tensors.items() if not tensor.is_contiguous()] == []


@pytest.mark.slow
def test_graphs_of_a_translator_run_compiled_ahead_of_time(translator, tmp_path):
    _, graphs, _ = make_graphs(translator)
    graph = graphs["decoder"]
    package_path = str(tmp_path / "decoder.pt2")
    torch._inductor.aoti_compile_and_package(to_exported_program(graph), package_path=package_path)
    compiled = torch._inductor.aoti_load_package(package_path)
    for batch, length in UNSEEN_SIZES:
        inputs = package._random_inputs(graph, batch, length, torch.Generator().manual_seed(0))
        expected = graph(inputs)
        for output, result in zip(graph.outputs, compiled(*inputs.values()), strict=True):
            torch.testing.assert_close(result, expected[output], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.nn.Linear(2, 2), "must be one of the rnn or rnn_seq2seq family, got Linear.$"),
        (torch.compile(make_model("RNNModel")), "got OptimizedModule. Pass what was compiled, `model._orig_mod`"),
        (None, "must be one of the rnn or rnn_seq2seq family, got NoneType.$"),
    ],
)
def test_a_model_of_another_class_is_refused(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=f"`model` .*{message}"):
        export_model(wrong, tmp_path / "out", format="torch")
    with pytest.raises(ValueError, match=message):
        make_graphs(wrong)


class AmbientDtype:
    """Makes float64 the default type for a while."""

    def __enter__(self):
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *error):
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "state",
    [AmbientDtype(), torch.autocast("cpu", torch.bfloat16), torch.inference_mode()],
    ids=["dtype", "autocast", "inference"],
)
@pytest.mark.parametrize("name", ["RNNForCausalLM", "RNNForTokenClassification", "RNNSeq2SeqForConditionalGeneration"])
def test_an_export_does_not_depend_on_what_is_on_around_it(name, state, tmp_path):
    model = make_model(name, dtype=torch.float32)
    _, graphs, _ = make_graphs(model)
    with state:
        export_model(model, tmp_path / "out", format="torch")
    for graph_name, graph in graphs.items():
        module = torch.export.load(tmp_path / f"out/{graph_name}.pt2").module()
        inputs = package._random_inputs(graph, 2, 5, torch.Generator().manual_seed(0))
        expected = graph(inputs)
        for output, result in zip(graph.outputs, module(*inputs.values()), strict=True):
            torch.testing.assert_close(result, expected[output], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["RNNForCausalLM", "RNNForTokenClassification", "RNNSeq2SeqForConditionalGeneration"])
def test_outputs_that_a_configuration_asks_for_are_not_exported(name, tmp_path):
    model = make_model(name, dtype=torch.float32)
    asked = ("output_attentions", "output_hidden_states", "output_gates")
    for field in asked:
        setattr(model.config, field, True)
    export_model(model, tmp_path / "out", format="torch")
    assert all(getattr(model.config, field) for field in asked)


# Files


def test_one_node_per_layer_and_weights_once(language_runner):
    import onnx

    for graph in language_runner.description["graphs"].values():
        nodes = Counter(node.op_type for node in onnx.load(language_runner.folder / graph["file"]).graph.node)
        assert nodes["LSTM"] == 2
        assert not nodes.keys() & {"Loop", "Scan", "If"}
    small = ["config.json", "generation_config.json", "graphs.json", "model.onnx", "runner.py", "step.onnx"]
    assert sorted(path.name for path in language_runner.folder.iterdir() if path.name != "weights.bin") == small


def test_equal_weights_are_written_once(tmp_path):
    needs_onnx()
    import numpy
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper

    weights = numpy.random.default_rng(0).normal(size=(3, 500)).astype(numpy.float32)
    for name, owned in (("a", [0, 1]), ("b", [1, 2])):
        initializers = [numpy_helper.from_array(weights[i], f"weight_{i}") for i in owned]
        value = helper.make_tensor_value_info("sum", onnx.TensorProto.FLOAT, [500])
        node = helper.make_node("Add", [tensor.name for tensor in initializers], ["sum"])
        graph = helper.make_graph([node], name, [], [value], initializers)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / name)
    share_weights([tmp_path / "a", tmp_path / "b"], tmp_path / "weights.bin")
    assert (tmp_path / "weights.bin").stat().st_size == 2 * 4096 + 2000  # each begins at a page
    for name, expected in (("a", weights[0] + weights[1]), ("b", weights[1] + weights[2])):
        session = onnxruntime.InferenceSession(str(tmp_path / name))
        assert session.run(None, {})[0].tolist() == expected.tolist()


def test_description_names_inputs_outputs_and_states(language_runner):
    description = json.loads((language_runner.folder / "graphs.json").read_text())
    assert description["kind"] == "language_model"
    assert description["model_class"] == "RNNForCausalLM"
    assert description["graphs"]["model"]["inputs"]["input_ids"] == {"dtype": "int64", "shape": ["batch", "length"]}
    assert description["graphs"]["model"]["inputs"]["past.1.cell_state"] == {"dtype": "float32", "shape": ["batch", 6]}
    assert description["states"][1] == {"name": "0.cell_state", "size": 6, "initial": 0.0}
    session = language_runner.graphs["model"].session
    assert {node.name: node.shape for node in session.get_inputs()}["input_ids"] == ["batch", "length"]


@pytest.mark.parametrize("batch_length", UNSEEN_SIZES)
def test_onnx_computes_what_torch_does(batch_length, language_model, language_runner):
    input_ids, mask = make_tokens(*batch_length, seed=3), ragged_mask(*batch_length)
    logits, state = language_runner(input_ids.numpy(), mask.numpy())
    expected = language_model(input_ids, attention_mask=mask)
    torch.testing.assert_close(torch.from_numpy(logits), expected.logits, atol=1e-5, rtol=1e-5)
    for layer_idx, layer in enumerate(expected.past_key_values.layers):
        torch.testing.assert_close(torch.from_numpy(state[f"{layer_idx}.hidden_state"]), layer.keys)
        torch.testing.assert_close(torch.from_numpy(state[f"{layer_idx}.cell_state"]), layer.values)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("RNNForSequenceClassification", {"bidirectional": True, "pooling": "concat", "cell_type": "gru"}),
        (
            "RNNForSequenceClassification",
            {"bidirectional": True, "pooling": "attention", "pooling_heads": 2, "pooling_attention_size": 5},
        ),
        pytest.param("RNNForTokenClassification", {"bidirectional": True}, marks=pytest.mark.slow),
        pytest.param("RNNForQuestionAnswering", {"bidirectional": True, "residual": True}, marks=pytest.mark.slow),
        ("RNNForTokenClassification", WORDS[0]),
        pytest.param("RNNForSequenceClassification", WORDS[1] | {"pooling": "mean"}, marks=pytest.mark.slow),
        pytest.param("RNNForMultipleChoice", {"bidirectional": True}, marks=pytest.mark.slow),
        pytest.param("RNNForMaskedLM", {"bidirectional": True, "cell_type": "rnn_relu"}, marks=pytest.mark.slow),
        pytest.param("RNNModel", {"cell_type": "rnn_tanh"}, marks=pytest.mark.slow),
    ],
)
def test_encoder_runs_in_onnx(name, options, tmp_path):
    needs_onnx()
    model = make_model(name, dtype=torch.float32, **options)
    export_model(model, tmp_path / "model")
    encoder = load(tmp_path / "model", threads=1)
    for batch, length in UNSEEN_SIZES:
        shape = (batch, 2, length) if name == "RNNForMultipleChoice" else (batch, length)
        inputs = {"input_ids": make_tokens(*shape, seed=4), "attention_mask": ragged_mask(*shape)}
        expected = model(**inputs)
        results = encoder(**as_numpy(inputs))
        assert results
        for output, result in results.items():
            torch.testing.assert_close(torch.from_numpy(result), expected[output], atol=1e-5, rtol=1e-5)


class LeakyCell(RecurrentCell):
    """h' = h / 2 + tanh(W x + U h) / 2"""

    def step(self, projected, state, linear=F.linear):
        (hidden,) = state
        return ((hidden + torch.tanh(projected + linear(hidden, self.weight_hh, self.bias_hh))) / 2,)


def test_a_cell_that_onnx_does_not_know_becomes_a_scan(tmp_path, monkeypatch):
    needs_onnx()
    import onnx

    monkeypatch.setitem(RECURRENT_CELLS, "leaky", LeakyCell)
    model = make_model(
        "RNNForTokenClassification", dtype=torch.float32, cell_type="leaky", bidirectional=True, num_hidden_layers=1
    )
    export_model(model, tmp_path / "model")
    nodes = Counter(node.op_type for node in onnx.load(tmp_path / "model/model.onnx").graph.node)
    assert nodes["Scan"] == 2
    for batch, length in UNSEEN_SIZES:
        inputs = {"input_ids": make_tokens(batch, length), "attention_mask": ragged_mask(batch, length)}
        result = load(tmp_path / "model")(**as_numpy(inputs))["logits"]
        torch.testing.assert_close(torch.from_numpy(result), model(**inputs).logits, atol=1e-5, rtol=1e-5)


class PeepholeCell(LSTMCell):
    """Two gates see the cell state."""

    def __init__(self, input_size, hidden_size):
        super().__init__(input_size, hidden_size)
        self.to_input = nn.Parameter(torch.full((hidden_size,), 0.3))
        self.to_forget = nn.Parameter(torch.full((hidden_size,), -0.2))

    def step(self, projected, state, linear=F.linear):
        hidden, cell = state
        gates = projected + linear(hidden, self.weight_hh, self.bias_hh)
        input_gate, forget_gate, new, output_gate = gates.chunk(4, dim=-1)
        kept = torch.sigmoid(forget_gate + self.to_forget * cell) * cell
        cell = kept + torch.sigmoid(input_gate + self.to_input * cell) * torch.tanh(new)
        return torch.sigmoid(output_gate) * torch.tanh(cell), cell


def test_added_cells_in_one_process(tmp_path, monkeypatch):
    """Equations after those of another model, and parts that are initialised in place."""
    needs_onnx()
    for cell_class in (MinimalGatedCell, PeepholeCell, LayerNormLSTMCell):
        name = cell_class.__name__
        monkeypatch.setitem(RECURRENT_CELLS, name, cell_class)
        model = make_model("RNNForCausalLM", dtype=torch.float32, cell_type=name)
        export_model(model, tmp_path / name)
        for batch, length in UNSEEN_SIZES:
            tokens = make_tokens(batch, length)
            logits, _ = load(tmp_path / name)(tokens.numpy())
            torch.testing.assert_close(torch.from_numpy(logits), model(tokens).logits, atol=1e-5, rtol=1e-5)


def test_eight_bit_weights_cost_little_quality(tmp_path):
    needs_onnx()
    import onnx

    text = "the cat sat on the mat. the dog sat on the log. " * 30
    characters = sorted(set(text))
    ids = torch.tensor([characters.index(character) + 3 for character in text])
    torch.manual_seed(0)
    config = RNNConfig(vocab_size=len(characters) + 3, hidden_size=64, num_hidden_layers=2)
    model = RNNForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        starts = torch.randint(0, len(ids) - 33, (16,))
        batch = torch.stack([ids[start : start + 32] for start in starts])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    report = export_model(model, tmp_path / "int8", int8=True)
    assert max(report["differences"].values()) < 1e-4 < max(report["int8_differences"].values())
    for graph in ("model", "step"):
        nodes = Counter(node.op_type for node in onnx.load(tmp_path / f"int8/{graph}.onnx").graph.node)
        assert nodes["DynamicQuantizeLSTM"] == 2
        assert nodes["LSTM"] == nodes["MatMul"] == nodes["Gemm"] == 0
    size = sum(path.stat().st_size for path in (tmp_path / "int8").glob("weights.bin"))
    assert size < 0.5 * 4 * sum(parameter.numel() for parameter in model.parameters())

    held_out = ids[None, :300]
    expected = model(held_out, labels=held_out).loss.item()
    logits, _ = load(tmp_path / "int8")(held_out.numpy())
    loss = F.cross_entropy(torch.from_numpy(logits)[0, :-1], held_out[0, 1:]).item()
    assert expected < 1.0  # it has learned something
    assert abs(loss - expected) < 0.02


# The runner


GENERATION_OPTIONS = [
    {"max_new_tokens": 12},
    {"max_length": 9, "min_length": 8},
    {"max_new_tokens": 9, "min_new_tokens": 6, "eos_token_id": [2, 6, 9]},
    {"max_new_tokens": 9, "eos_token_id": [2, 6, 9], "pad_token_id": 0},
    {"max_new_tokens": 9, "repetition_penalty": 1.7, "suppress_tokens": [4, 9]},
    {"max_new_tokens": 12, "no_repeat_ngram_size": 2, "bad_words_ids": [[5], [7, 8], [EOS]]},
    {"max_new_tokens": 6, "forced_eos_token_id": EOS, "forced_bos_token_id": 6, "begin_suppress_tokens": [11]},
]
SEARCHES = [
    {"num_beams": 1},
    {"num_beams": 3},
    {"num_beams": 2, "early_stopping": True, "length_penalty": 0.0},
    {"num_beams": 4, "early_stopping": "never", "length_penalty": 2.0, "num_return_sequences": 3},
    {"num_beams": 4, "early_stopping": False, "length_penalty": -0.7, "num_return_sequences": 2},
]


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_language_runner_generates_the_tokens_of_generate(search, language_model, language_runner):
    for options in GENERATION_OPTIONS:
        for batch, length in ((1, 1), (4, 6)):
            input_ids = make_tokens(batch, length, seed=length)
            mask = torch.ones_like(input_ids)
            mask[-1, : length // 2] = 0
            inputs = {"input_ids": input_ids, "attention_mask": mask}
            expected = language_model.generate(**inputs, **options, **search)
            result = language_runner.generate(**as_numpy(inputs), **options, **search)
            assert result.tolist() == expected.tolist(), options


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_translation_runner_generates_the_tokens_of_generate(search, translator, translation_runner):
    for options in GENERATION_OPTIONS:
        for batch, length in ((1, 1), (4, 6)):
            inputs = {
                "input_ids": make_tokens(batch, length, seed=length),
                "attention_mask": ragged_mask(batch, length),
            }
            expected = translator.generate(**inputs, **options, **search)
            result = translation_runner.generate(**as_numpy(inputs), **options, **search)
            assert result.tolist() == expected.tolist(), options


@pytest.mark.parametrize(
    "given", [[[BOS, 7, 9], [BOS, 4, 4]], [[7, 9], [4, 4]], [[7, 9], [BOS, 4]]], ids=["start", "no_start", "one_start"]
)
def test_translation_continues_what_is_given(given, translator, translation_runner):
    inputs = {"input_ids": make_tokens(2, 5), "decoder_input_ids": torch.tensor(given)}
    expected = translator.generate(**inputs, num_beams=2, max_new_tokens=5)
    assert translation_runner.generate(**as_numpy(inputs), num_beams=2, max_new_tokens=5).tolist() == expected.tolist()


def test_each_row_of_a_translation_may_have_its_start(translator, translation_runner):
    source = make_tokens(2, 5)
    options = {"decoder_start_token_id": [5, 6], "num_beams": 2, "max_new_tokens": 5}
    expected = translator.generate(source, **options)
    assert translation_runner.generate(source.numpy(), **options).tolist() == expected.tolist()
    with pytest.raises(
        ValueError, match="`decoder_start_token_id` must be one token id or a list of 3, one for each row"
    ):
        translation_runner.generate(make_tokens(3, 5).numpy(), **options)
    with pytest.raises(ValueError, match="`decoder_start_token_id` must lie between 0 and 28, got -1"):
        translation_runner.generate(source.numpy(), decoder_start_token_id=-1)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"eos_token_id": -1, "min_new_tokens": 6},
        {"eos_token_id": [29, EOS], "min_length": 10, "pad_token_id": 0},
        {"suppress_tokens": [-1, 29]},
        {"begin_suppress_tokens": [29, -1]},
        {"eos_token_id": [5, 6], "pad_token_id": 0, "top_k": -1, "temperature": 0.0},
    ],
    ids=str,
)
def test_tokens_outside_of_the_vocabulary_do_nothing(options, num_beams, language_model, language_runner):
    # Only the last token is left, which is where -1 would lead.
    suppressed = [*range(28), *options.get("suppress_tokens", ())]
    options = {"max_new_tokens": 8, "num_beams": num_beams} | options | {"suppress_tokens": suppressed}
    input_ids = make_tokens(4, 3, seed=1)
    expected = language_model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)
    assert (expected[:, 3:] == 28).all()
    assert language_runner.generate(input_ids.numpy(), **options).tolist() == expected.tolist()


def test_where_nothing_can_be_chosen_beams_return_the_prompts(language_model, language_runner):
    input_ids = make_tokens(2, 3)
    options = {"suppress_tokens": [*range(29)], "num_beams": 2, "max_new_tokens": 4}
    expected = language_model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)
    assert language_runner.generate(input_ids.numpy(), **options).tolist() == expected.tolist()


def test_padding_outside_of_the_vocabulary_is_refused_where_it_is_read(language_model, language_runner):
    input_ids = make_tokens(4, 3, seed=1)
    options = {"pad_token_id": -1, "max_new_tokens": 12}
    expected = language_model.generate(input_ids[:1], attention_mask=torch.ones(1, 3), **options)
    assert language_runner.generate(input_ids[:1].numpy(), **options).tolist() == expected.tolist()
    with pytest.raises(IndexError):
        language_model.generate(input_ids, attention_mask=torch.ones(4, 3), **options)
    with pytest.raises(ValueError, match="`pad_token_id` must lie between 0 and 28, got -1"):
        language_runner.generate(input_ids.numpy(), **options)


def test_fields_of_the_file_that_do_not_change_the_tokens_are_left_out():
    harmless = {
        "_from_model_config": True,
        "assistant_confidence_threshold": 0.4,
        "cache_implementation": "static",
        "disable_compile": True,
        "max_matching_ngram_size": 2,
        "num_assistant_tokens": 20,
        "output_attentions": True,
        "output_scores": True,
        "prefill_chunk_size": 4,
        "prompt_lookup_num_tokens": 3,
        "return_dict_in_generate": True,
        "token_healing": False,
        "transformers_version": "5.24.0",
        "use_cache": False,
    }
    assert runner.read_settings(harmless, {}, 29) == runner.read_settings({}, {}, 29)
    with pytest.raises(ValueError, match="`token_healing` is not supported here"):
        runner.read_settings({"token_healing": True}, {}, 29)


def test_beams_that_are_drawn_keep_two_tokens():
    """As in transformers, where no token ends a sequence, too."""
    import numpy

    settings = runner.read_settings({}, {"do_sample": True, "num_beams": 2, "top_k": 1}, 5)
    scores = runner._process(numpy.zeros((1, 1), dtype=int), numpy.arange(5.0)[None], settings, 1, 9)
    assert numpy.isfinite(scores).sum() == 2


@pytest.mark.parametrize(
    "options", [{"temperature": 0.5, "top_k": 0}, {"top_k": 4}, {"top_k": 0, "top_p": 0.6}, {"min_p": 0.3, "top_k": 0}]
)
def test_sampling_draws_from_the_same_scores(options, language_model, language_runner):
    options |= {"do_sample": True, "max_new_tokens": 1}
    input_ids = make_tokens(3, 5)
    expected = language_model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    ).scores[0]
    settings = runner.read_settings(language_runner.generation_config, options, 29)
    logits, _ = language_runner(input_ids.numpy())
    scores = runner._process(input_ids.numpy(), logits[:, -1].copy(), settings, 5, 6)
    torch.testing.assert_close(torch.from_numpy(scores), expected)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_sampling_follows_its_seed(num_beams, language_runner):
    options = {"do_sample": True, "max_new_tokens": 8, "num_beams": num_beams, "num_return_sequences": 2}
    prompts = make_tokens(3, 4).numpy()
    once, again, other = (language_runner.generate(prompts, seed=seed, **options).tolist() for seed in (0, 0, 1))
    assert once == again != other
    assert len(once) == 6


def test_draws_have_the_frequencies_of_the_scores():
    import numpy

    scores = numpy.log(numpy.array([[0.5, 0.3, 0.2, 0.0]], dtype=numpy.float32) + 1e-30).repeat(20000, axis=0)
    tokens = runner._choose(scores, {"do_sample": True}, numpy.random.default_rng(0))
    frequencies = numpy.bincount(tokens, minlength=4) / len(tokens)
    assert numpy.abs(frequencies - [0.5, 0.3, 0.2, 0.0]).max() < 0.015


def test_reading_in_pieces_is_reading_at_once(language_runner):
    input_ids = make_tokens(2, 9).numpy()
    logits, state = language_runner(input_ids)
    pieces, carried = [], None
    for piece in (input_ids[:, :1], input_ids[:, 1:5], input_ids[:, 5:6], input_ids[:, 6:]):
        part, carried = language_runner(piece, state=carried)
        pieces.append(torch.from_numpy(part))
    torch.testing.assert_close(torch.cat(pieces, dim=1), torch.from_numpy(logits))
    for name in state:
        torch.testing.assert_close(torch.from_numpy(carried[name]), torch.from_numpy(state[name]))
    last, _ = language_runner(input_ids, positions=[-1])
    assert last.tolist() == logits[:, -1:].tolist()


def test_stream_resumes_from_a_saved_state(language_model, language_runner, tmp_path):
    import numpy

    prompt = make_tokens(1, 5, seed=2)
    expected = language_model.generate(prompt, max_new_tokens=12, min_new_tokens=12)[0, 5:].tolist()
    stream = language_runner.stream(prompt.numpy(), max_new_tokens=7, suppress_tokens=[EOS])
    expected = language_model.generate(prompt, max_new_tokens=12, suppress_tokens=[EOS])[0, 5:].tolist()
    first = list(stream)
    numpy.savez(tmp_path / "state.npz", **stream.state)
    state = dict(numpy.load(tmp_path / "state.npz"))
    assert {name: values.shape for name, values in state.items()} == {
        "logits": (1, 29),
        **{f"{layer}.{name}": (1, 6) for layer in (0, 1) for name in ("hidden_state", "cell_state")},
    }
    assert first + list(language_runner.stream(state=state, max_new_tokens=5, suppress_tokens=[EOS])) == expected
    # With new tokens in between the stream is one text.
    more = make_tokens(1, 3, seed=9)
    whole = torch.cat([prompt, torch.tensor([first]), more], dim=1)
    expected = language_model.generate(whole, max_new_tokens=4, suppress_tokens=[EOS])[0, whole.shape[1] :].tolist()
    stream = language_runner.stream(more.numpy(), state=state, max_new_tokens=4, suppress_tokens=[EOS])
    assert list(stream) == expected


def test_stream_ends_at_the_end_token_or_never(language_model, language_runner):
    prompt = make_tokens(1, 4)
    expected = language_model.generate(prompt, max_new_tokens=60, eos_token_id=[2, 6, 9])[0, 4:].tolist()
    assert list(language_runner.stream(prompt.numpy(), max_new_tokens=60, eos_token_id=[2, 6, 9])) == expected
    endless = language_runner.stream(prompt.numpy(), suppress_tokens=[EOS], do_sample=True, seed=0)
    assert len([next(endless) for _ in range(100)]) == 100


def test_translation_streams(translator, translation_runner):
    source = make_tokens(1, 5)
    expected = translator.generate(source, max_new_tokens=9)[0, 1:].tolist()
    assert list(translation_runner.stream(source.numpy(), max_new_tokens=9)) == expected


def test_attention_weights_are_those_of_the_model(translator, translation_runner):
    source, mask = make_tokens(3, 6), ragged_mask(3, 6)
    memory, state = translation_runner.read(source.numpy(), mask.numpy())
    _, _, weights = translation_runner.step([1, 1, 1], state, memory)
    expected = translator(
        source, attention_mask=mask, decoder_input_ids=torch.ones(3, 1).long(), output_attentions=True
    ).cross_attentions[0]
    torch.testing.assert_close(torch.from_numpy(weights), expected[:, :, 0])


def test_texts(tmp_path):
    needs_onnx()
    pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    from subword_tokenizer import train_character_tokenizer

    tokenizer = train_character_tokenizer(["the cat sat", "on the mat"])
    model = make_model("RNNForCausalLM", dtype=torch.float32, num_hidden_layers=1, vocab_size=len(tokenizer))
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "exported")
    exported = load(tmp_path / "exported")
    encoding = exported.encode(["the", "on the mat"])
    tokenizer.padding_side = "left"
    expected = tokenizer(["the", "on the mat"], padding=True, return_tensors="pt")
    assert encoding.input_ids.tolist() == expected.input_ids.tolist()
    assert encoding.attention_mask.tolist() == expected.attention_mask.tolist()
    tokens = model.generate(expected.input_ids, attention_mask=expected.attention_mask, max_new_tokens=6)
    expected_texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert exported.complete(["the", "on the mat"], max_new_tokens=6) == expected_texts
    # The folder by itself, where nothing but NumPy, ONNX Runtime and tokenizers can be imported.
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'hf_rnn', 'onnx'): sys.modules[name] = None\n"
        "from runner import load\n"
        "print(load('.').complete(['the', 'on the mat'], max_new_tokens=6))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "exported", capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == str(expected_texts)
    with pytest.raises(ValueError, match="`texts` must be a list of strings"):
        exported.complete("the")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": [[1, 99]]}, "`input_ids` must lie between 0 and 28, got 1 to 99"),
        ({"input_ids": [1, 2]}, r"`input_ids` must be integers of the shape \(batch, seq\)"),
        ({"input_ids": [[0.5]]}, "`input_ids` must be integers"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, r"`attention_mask` must have the shape \(1, 2\)"),
        ({"input_ids": [[1, 2]], "state": {}}, "`state` must hold"),
        ({"input_ids": [[1, 2]], "max_length": 2}, "`max_length` must be more than the 2 tokens"),
        ({"input_ids": [[1, 2]], "max_new_tokens": 0}, "`max_new_tokens` must be an integer of at least 1, got 0"),
        ({"input_ids": [[1, 2]], "temprature": 1.0}, "Options of `generate` must be among .* got .'temprature'."),
        ({"input_ids": [[1, 2]], "typical_p": 0.5}, "`typical_p` is not supported here"),
        ({"input_ids": [[1, 2]], "num_return_sequences": 2}, "`num_return_sequences` must be at most `num_beams`"),
        ({"input_ids": [[1, 2]], "early_stopping": "soon"}, "`early_stopping` must be True, False or 'never'"),
        ({"input_ids": [[1, 2]], "do_sample": True, "temperature": 0.0}, "`temperature` must be a positive number"),
        (
            {"input_ids": [[1, 2]], "do_sample": True, "top_k": -1},
            "`top_k` must be an integer of at least 0, .* got -1",
        ),
        ({"input_ids": [[1, 2]], "eos_token_id": 2.5}, "`eos_token_id` must be token ids, which are integers, got 2.5"),
        (
            {"input_ids": [[1, 2]], "bad_words_ids": []},
            r"`bad_words_ids` must be a list of lists of token ids, got \[\]",
        ),
        (
            {"input_ids": [[1, 2]], "bad_words_ids": [5]},
            r"`bad_words_ids` must be a list of lists of token ids, got \[5",
        ),
        ({"input_ids": [[1, 2]], "bad_words_ids": [[-1]]}, r"`bad_words_ids` must lie between 0 and 28, got \[-1\]"),
        (
            {"input_ids": [[1, 2]], "bad_words_ids": [[5, 29]]},
            r"`bad_words_ids` must lie between 0 and 28, got \[5, 29",
        ),
        ({"input_ids": [[1, 2]], "forced_eos_token_id": -1}, "`forced_eos_token_id` must lie between 0 and 28, got -1"),
        ({"input_ids": [[1, 2]], "forced_bos_token_id": 29}, "`forced_bos_token_id` must lie between 0 and 28, got 29"),
        (
            {"input_ids": [[1, 2]], "forced_eos_token_id": 2, "suppress_tokens": [2, 3]},
            r"`forced_eos_token_id` must not be among `suppress_tokens`, got \[2\]",
        ),
        ({"bos_token_id": -1}, "`bos_token_id` must lie between 0 and 28, got -1"),
    ],
)
def test_runner_refuses_what_it_cannot_do(arguments, message, language_runner):
    with pytest.raises(ValueError, match=message):
        language_runner.generate(**arguments)


def test_stream_refuses_to_look_back(language_runner):
    with pytest.raises(ValueError, match=r"cannot look back, which \['repetition_penalty'\] would have to"):
        language_runner.stream([[1, 2]], repetition_penalty=2.0)
    with pytest.raises(ValueError, match="must be one sequence, got 2"):
        language_runner.stream([[1], [2]])
    with pytest.raises(ValueError, match="`input_ids` must be given"):
        language_runner.stream()


# Writing


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    make_model("RNNForMaskedLM", dtype=torch.float32, num_hidden_layers=1).save_pretrained(folder)
    return folder


def test_command_writes_torch_files(saved, tmp_path, capsys):
    assert main(["export", str(saved), str(tmp_path / "out"), "--format", "torch"]) == 0
    assert "largest difference" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "graphs.json", "model.pt2"]
    module = torch.export.load(tmp_path / "out/model.pt2").module()
    model = MODEL_CLASSES["RNNForMaskedLM"][1].from_pretrained(saved).eval()
    input_ids, mask = make_tokens(4, 11), ragged_mask(4, 11)
    torch.testing.assert_close(module(input_ids, mask)[0], model(input_ids, attention_mask=mask).logits)


@pytest.mark.parametrize("cell_type", RECURRENT_CELLS)
@pytest.mark.parametrize("name", ["RNNForCausalLM", "RNNSeq2SeqForConditionalGeneration"])
def test_torch_files_of_models_with_a_state_are_read_again(name, cell_type, tmp_path):
    model = make_model(name, dtype=torch.float32, cell_type=cell_type)
    report = export_model(model, tmp_path / "out", format="torch")
    assert max(report["differences"].values()) < 1e-5
    _, graphs, _ = make_graphs(model)
    for graph_name, graph in graphs.items():
        module = torch.export.load(tmp_path / f"out/{graph_name}.pt2").module()
        inputs = package._random_inputs(graph, 2, 9, torch.Generator().manual_seed(5))
        expected = graph(inputs)
        for output, result in zip(graph.outputs, module(*inputs.values()), strict=True):
            torch.testing.assert_close(result, expected[output], atol=1e-5, rtol=1e-5)


def test_command_refuses_to_overwrite_unless_told(saved, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert main(["export", str(saved), str(out), "--format", "torch"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    assert main(["export", str(saved), str(out), "--format", "torch", "--overwrite"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "graphs.json", "model.pt2"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_is_left_where_an_export_fails(saved, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    monkeypatch.setattr(package, "check", lambda *arguments: {"model": 0.5})
    assert main(["export", str(saved), str(out), "--format", "torch", "--overwrite"]) == 1
    assert "differs from the model by 5.0e-01" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def everything_in(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("here", "model", "out", "message"),
    [
        (".", "model", "model", "must not hold the model"),
        (".", "work/model", "work", "must not hold the model"),
        (".", "work/model", "link", "must not hold the model"),
        ("work", "../model", "../work", "must not hold the current directory"),
        ("work", "../model", ".", "must not hold the current directory"),
        ("work/model", "../../model", "..", "must not hold the current directory"),
    ],
)
def test_what_is_needed_is_not_overwritten(here, model, out, message, saved, tmp_path, monkeypatch, capsys):
    shutil.copytree(saved, tmp_path / "model")
    shutil.copytree(saved, tmp_path / "work/model")
    (tmp_path / "link").symlink_to("work")
    before = everything_in(tmp_path)
    monkeypatch.setattr(package, "make_graphs", None)  # nothing is computed
    monkeypatch.chdir(tmp_path / here)
    assert main(["export", model, out, "--format", "torch", "--overwrite"]) == 1
    assert message in capsys.readouterr().err
    assert everything_in(tmp_path) == before
    loaded = package.load_model(model)
    with pytest.raises(ValueError, match=message):
        export_model(loaded, out, format="torch", overwrite=True)
    with pytest.raises(ValueError, match="must not hold the tokenizer"):
        export_model(make_model("RNNModel"), model, format="torch", overwrite=True, tokenizer_folder=model)


def test_a_link_is_replaced_and_not_what_it_points_to(saved, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to("other")
    monkeypatch.chdir(tmp_path)
    report = export_model(saved, "link", format="torch", overwrite=True)
    assert report["folder"] == str(tmp_path / "link")
    assert everything_in(tmp_path) == ["link", *sorted(f"link/{name}" for name in report["files"]), "other"]


def test_what_was_there_comes_back_or_is_said_to_lie_elsewhere(saved, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    replace = os.replace

    def fail(source, target):
        if Path(target) == out and Path(source).name not in allowed:
            raise OSError(f"cannot move {source}")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    allowed = ["out"]  # what was there
    assert main(["export", str(saved), str(out), "--format", "torch", "--overwrite"]) == 1
    assert "cannot move" in capsys.readouterr().err
    assert everything_in(tmp_path) == ["out", "out/mine.txt"]
    allowed = []
    assert main(["export", str(saved), str(out), "--format", "torch", "--overwrite"]) == 1
    (kept,) = tmp_path.glob(".out.old.*/out")
    assert f"cannot move {kept}" in capsys.readouterr().err
    assert (kept / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere/at/all", "OUT"], "no /nowhere/at/all here"),
        (["MODEL", "OUT", "--format", "torch", "--int8"], "`int8` must be False unless `format` is 'onnx'"),
    ],
)
def test_command_says_what_is_wrong(arguments, message, saved, tmp_path, capsys):
    needs_onnx()
    places = {"MODEL": str(saved), "OUT": str(tmp_path / "out")}
    assert main(["export", *(places.get(argument, argument) for argument in arguments)]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_its_extra(saved, tmp_path, monkeypatch, capsys):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    assert main(["export", str(saved), str(tmp_path / "out")]) == 1
    assert "pip install 'hf_rnn[onnx]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_folders_that_hold_no_export(tmp_path, language_runner):
    with pytest.raises(FileNotFoundError, match=r"there is no graphs\.json in it"):
        load(tmp_path)
    with pytest.raises(ValueError, match="holds a language_model, not a translator"):
        runner.OnnxTranslator(language_runner.folder)
    description = dict(language_runner.description, format_version=99)
    (tmp_path / "graphs.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"`format_version` of .* must be at most 1, got 99"):
        load(tmp_path)


def test_files_of_torch_are_not_for_the_runner(saved, tmp_path):
    export_model(saved, tmp_path / "out", format="torch")
    message = r"must be 'onnx', got 'torch': open model\.pt2 with `torch\.export\.load` after `import hf_rnn`"
    for open_folder in (load, runner.OnnxEncoder):
        with pytest.raises(ValueError, match=message):
            open_folder(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("cell_type", ["gru", "rnn_tanh"])
def test_other_cells_generate_in_onnx(cell_type, tmp_path):
    needs_onnx()
    model = make_model("RNNForCausalLM", dtype=torch.float32, cell_type=cell_type)
    export_model(model, tmp_path / "model", int8=False)
    prompts = make_tokens(3, 4)
    expected = model.generate(prompts, attention_mask=torch.ones_like(prompts), num_beams=3, max_new_tokens=9)
    assert (
        load(tmp_path / "model").generate(prompts.numpy(), num_beams=3, max_new_tokens=9).tolist() == expected.tolist()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"decoder_type": "luong", "attention_score": "dot", "encoder_bidirectional": False},
        {"input_feeding": True, "num_attention_heads": 2, "attention_score": "scaled_dot", "cell_type": "gru"},
        {"decoder_type": "gnmt", "attention_score": "additive", "encoder_layers": 1, "decoder_layers": 3},
        {"attention_score": "location", "num_attention_heads": 2, "use_coverage": True},
        {"decoder_type": "gnmt", "attention_score": "local", "attention_window": 2},
        {"decoder_type": "bahdanau", "attention_score": "normalized_additive"},
    ],
)
def test_other_decoders_translate_in_onnx(options, tmp_path):
    needs_onnx()
    model = make_model("RNNSeq2SeqForConditionalGeneration", dtype=torch.float32, **options)
    export_model(model, tmp_path / "model")
    inputs = {"input_ids": make_tokens(4, 6), "attention_mask": ragged_mask(4, 6)}
    expected = model.generate(**inputs, num_beams=4, max_new_tokens=12, early_stopping=True)
    result = load(tmp_path / "model").generate(**as_numpy(inputs), num_beams=4, max_new_tokens=12, early_stopping=True)
    assert result.tolist() == expected.tolist()


# The exporters of transformers


EXPORTED_BY_TRANSFORMERS = [
    ("RNNForCausalLM", {}),
    ("RNNForTokenClassification", {"bidirectional": True, "cell_type": "gru"}),
    ("RNNForTokenClassification", {"bidirectional": True, "use_crf": True}),
    pytest.param("RNNSeq2SeqForConditionalGeneration", {"decoder_type": "bahdanau"}, marks=pytest.mark.slow),
]


def export_with_transformers(kind: str, name: str, options: dict, dynamic: bool):
    exporters = pytest.importorskip("transformers.exporters", reason="needs a transformers with exporters")
    exporter, config = {
        "dynamo": ("DynamoExporter", "DynamoConfig"),
        "onnx": ("OnnxExporter", "OnnxConfig"),
        "openvino": ("OpenVINOExporter", "OpenVINOConfig"),
        "executorch": ("ExecutorchExporter", "ExecutorchConfig"),
    }[kind]
    model = make_model(name, dtype=torch.float32, **options)
    inputs = make_inputs(name, 6, 7, with_labels=False) | {"attention_mask": make_mask(7)}
    config = getattr(exporters, config)(dynamic=dynamic)
    exported = getattr(exporters, exporter)().export(model, dict(inputs), config=config)
    if kind == "openvino":
        exported.to(config={"INFERENCE_PRECISION_HINT": "f32"})  # it may choose bfloat16 otherwise
    return model, exported, inputs


def check_exported(model, exported, inputs):
    if isinstance(exported, torch.export.ExportedProgram):  # as older transformers return it
        exported = exported.module()
    torch.testing.assert_close(exported(**inputs)["logits"], model(**inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["dynamo", pytest.param("onnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "options"), EXPORTED_BY_TRANSFORMERS)
def test_transformers_exports_with_open_sizes(kind, name, options):
    if kind == "onnx":
        needs_onnx()
    model, exported, inputs = export_with_transformers(kind, name, options, dynamic=True)
    check_exported(model, exported, inputs)
    for batch, length in ((2, 5), (4, 33)):
        # A decoder that feeds back what it computed is written out for the target's length.
        others = make_inputs(name, batch, 7, with_labels=False) | {"input_ids": make_tokens(batch, length)}
        check_exported(model, exported, others | {"attention_mask": ragged_mask(batch, length)})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["openvino", "executorch"])
@pytest.mark.parametrize(("name", "options"), EXPORTED_BY_TRANSFORMERS)
def test_transformers_exports_with_a_fixed_length(kind, name, options):
    pytest.importorskip(kind, reason=f"needs the package {kind}")
    model, exported, inputs = export_with_transformers(kind, name, options, dynamic=False)
    check_exported(model, exported, inputs)
    check_exported(model, exported, inputs | {"attention_mask": ragged_mask(6, 7)})
