"""Law 6: every parameter gets a gradient and moves. And what else training rests on: dropout, checkpointing, losses,
initialisation, tied weights, and that cells and scores can be added from outside."""

import contextlib
import copy
import inspect
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_rnn import ATTENTION_SCORES, RECURRENT_CELLS, RNNConfig, RNNSeq2SeqConfig, loop_only, recurrent_kernels
from hf_rnn.attention import AttentionScore
from hf_rnn.configuration_rnn import POOLING_TYPES
from hf_rnn.recurrent_cells import LSTMCell, RecurrentCell
from hf_rnn.recurrent_layer import Padding, RecurrentLayer
from matrix import (
    DECODERS,
    MODEL_CLASSES,
    VOCAB_SIZE,
    case_id,
    make_config,
    make_inputs,
    make_mask,
    make_model,
    make_tokens,
    options_of,
)


SEQ2SEQ = "RNNSeq2SeqForConditionalGeneration"
POOLED = ["RNNForSequenceClassification", "RNNForMultipleChoice"]
CLASSIFIERS = [*POOLED, "RNNForTokenClassification", "RNNForQuestionAnswering"]
STACKS = pytest.mark.parametrize("decoder", [None, *DECODERS], ids=["rnn", *map(case_id, DECODERS)])
CELLS = pytest.mark.parametrize("cell_type", RECURRENT_CELLS)


def objective(outputs) -> torch.Tensor:
    """The loss, or a random projection of the last hidden state where there is none."""
    if outputs.get("loss") is not None:
        return outputs.loss
    hidden = outputs.last_hidden_state
    generator = torch.Generator().manual_seed(3)
    return (hidden * torch.randn(hidden.shape, generator=generator, dtype=hidden.dtype)).mean()


def assert_same_objective(actual: torch.Tensor, expected: torch.Tensor):
    """A loss over a vocabulary is added up in another order while training, and all losses are in float32."""
    torch.testing.assert_close(actual, expected, rtol=3e-7, atol=0)


def base_of(model):
    return getattr(model, model.base_model_prefix, model)


def is_seq2seq(name: str) -> bool:
    return MODEL_CLASSES[name][0] is RNNSeq2SeqConfig


# Law 6.


def training_options(name: str) -> list[dict]:
    """All options, and those that add parameters or take some away."""
    extra = [{"pooling": pooling, "bidirectional": True} for pooling in POOLING_TYPES] if name in POOLED else []
    if name in POOLED:
        extra.append({"pooling": "attention", "pooling_heads": 2, "pooling_attention_size": 5})
    if name in ("RNNForCausalLM", "RNNForMaskedLM"):
        extra = [{"tie_word_embeddings": True}, {"tie_word_embeddings": True, "embedding_size": 6}]
    if is_seq2seq(name):
        extra = [decoder | {"tie_word_embeddings": False} for decoder in DECODERS]
    return options_of(name) + extra


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_every_parameter_gets_a_gradient_and_moves(name):
    """A gradient well above rounding in at least one element, and another value after a step of AdamW."""
    still = {}
    for options in training_options(name):
        model = make_model(name, **options).train()
        before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, eps=1e-8)
        objective(model(**make_inputs(name, options=options))).backward()
        optimizer.step()
        for key, parameter in model.named_parameters():
            gradient = 0 if parameter.grad is None else parameter.grad.abs().max().item()
            change = (parameter.detach() - before[key]).abs().max().item()
            if not gradient > 1e-7 or not change > 1e-3:
                still.setdefault(key, f"gradient {gradient}, change {change} with {options}")
    assert not still


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_training_mode_without_dropout_is_evaluation_mode(name):
    """Nothing is random, or otherwise different, while training unless a dropout asks for it."""
    for options in options_of(name):
        model, inputs = make_model(name, **options), make_inputs(name, options=options)
        expected = objective(model(**inputs))
        assert_same_objective(objective(model.train()(**inputs)), expected)


# Dropout.


def dropouts_of(name: str) -> list[str]:
    """
    The fields that act in a class: all of its configuration, a classifier's only where there is one, and that of words
    only where words are known (see the tests of words).
    """
    fields = [field for field in vars(make_config(name)) if field.endswith("_dropout") and field != "word_dropout"]
    return [field for field in fields if field != "classifier_dropout" or name in CLASSIFIERS]


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_dropouts_act_in_training_only(name):
    """Every field changes what is computed while training, differently at each call, and nothing in evaluation."""
    assert dropouts_of(name)
    decoders = DECODERS if is_seq2seq(name) else [{}]
    for field in dropouts_of(name):
        for options in decoders:
            inputs = make_inputs(name)
            plain, model = make_model(name, **options), make_model(name, **options, **{field: 0.5})
            where = f"{field}, {options}"
            with torch.no_grad():
                expected = objective(plain(**inputs))
                assert torch.equal(objective(model(**inputs)), expected), where
                model.train()
                found = [objective(model(**inputs)).item() for _ in range(3)]
                assert len({*found, expected.item()}) == 4, where
                model.eval()
                assert torch.equal(objective(model(**inputs)), expected), where


def test_a_classifier_dropout_acts_on_the_classifiers_input():
    for name in CLASSIFIERS:
        for pooling in POOLING_TYPES if name in POOLED else ["last"]:
            model = make_model(name, classifier_dropout=0.5, pooling=pooling)
            seen = []
            classifier = model.qa_outputs if name == "RNNForQuestionAnswering" else model.classifier
            classifier.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
            model(**make_inputs(name))
            model.train()(**make_inputs(name))
            assert_dropped(seen[1], seen[0])


def assert_dropped(actual: torch.Tensor, full: torch.Tensor):
    """Every element of `full` is gone, or twice as large: dropout with a probability of one half."""
    gone = actual == 0
    torch.testing.assert_close(actual, (2 * full).masked_fill(gone, 0), rtol=1e-12, atol=1e-12)
    assert 0.2 < gone.double().mean() < 0.8


@pytest.mark.parametrize(
    "decoder", [None, *DECODERS], ids=lambda decoder: "rnn" if decoder is None else case_id(decoder)
)
def test_embedding_dropout_acts_on_the_embeddings(decoder):
    """And `output_dropout` on the outputs: of a stack, of an encoder, and on the attentional vectors."""
    name, options = ("RNNModel", {}) if decoder is None else ("RNNSeq2SeqModel", decoder)
    inputs = make_inputs(name) | {"output_hidden_states": True, "use_cache": False}
    keys = ["hidden_states"] if decoder is None else ["encoder_hidden_states", "decoder_hidden_states"]
    model = make_model(name, embedding_dropout=0.5, **options)
    expected, actual = model(**inputs), model.train()(**inputs)
    for key in keys:
        assert_dropped(actual[key][0], expected[key][0])
    model = make_model(name, output_dropout=0.5, **options)
    expected, actual = model(**inputs), model.train()(**inputs)
    for key in keys:
        assert torch.equal(actual[key][0], expected[key][0])
    if decoder is None:
        assert_dropped(actual.last_hidden_state, expected.last_hidden_state)
        return
    assert_dropped(actual.encoder_last_hidden_state, expected.encoder_last_hidden_state)
    # The decoder alone, on the same memory; with input feeding only the first vector depends on no dropped one.
    encoder_outputs = model.eval().get_encoder()(inputs["input_ids"])
    targets = {"decoder_input_ids": inputs["decoder_input_ids"], "encoder_outputs": encoder_outputs}
    expected, actual = model(**targets).last_hidden_state, model.train()(**targets).last_hidden_state
    first = slice(None, 1) if decoder.get("input_feeding") else slice(None)
    assert_dropped(actual[:, first], expected[:, first])


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_hidden_dropout_acts_between_layers(residual):
    """On the input of every layer but the first; a residual connection stays whole."""
    model = make_model("RNNModel", cell_type="rnn_relu", embedding_size=6, hidden_dropout=0.5, residual=residual)
    with torch.no_grad():
        model.embed_tokens.weight.abs_()
        for layer in model.layers:  # h_t = relu(I x_t)
            for parameter in layer.parameters():
                parameter.zero_()
            layer.cell.weight_ih.fill_diagonal_(1)
    tokens = make_tokens(6, 7)
    embedded, first, second = model.train()(tokens, output_hidden_states=True).hidden_states
    assert torch.equal(embedded, model.embed_tokens(tokens))
    assert torch.equal(first, embedded)
    assert_dropped(second - first if residual else second, first)
    again = model(tokens, output_hidden_states=True).hidden_states
    assert torch.equal(again[1], first)
    assert not torch.equal(again[2], second)


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_hidden_dropout_leaves_one_layer_alone(name):
    """There is no place between layers in a stack of one."""
    layers = {"encoder_layers": 1, "decoder_layers": 1} if is_seq2seq(name) else {"num_hidden_layers": 1}
    decoders = [decoder for decoder in DECODERS if decoder["decoder_type"] != "gnmt"] if is_seq2seq(name) else [{}]
    for options in decoders:
        model, inputs = make_model(name, hidden_dropout=0.9, **layers, **options), make_inputs(name)
        assert_same_objective(objective(model(**inputs)), objective(model.train()(**inputs)))


def make_counting(model):
    """Layers in which h_t = 1 + h_{t-1}, whatever the input, starting from zero."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "bridge" in key or "cell" in key:
                parameter.zero_()
        for module in model.modules():
            if isinstance(module, RecurrentCell):
                module.bias_ih.fill_(1)
                module.weight_hh.fill_diagonal_(1)


def assert_one_mask_per_sequence(outputs: torch.Tensor, reverse: bool = False) -> torch.Tensor:
    """
    With dropout of one half, a unit of a row whose state is dropped gives 1, 1, 1 ..., one that is kept 1, 3, 7 ...: at
    every step the same. Returns which are kept.
    """
    if reverse:
        outputs = outputs.flip(1)
    steps = torch.arange(outputs.shape[1], dtype=outputs.dtype)[:, None]
    kept = outputs[:, 1] != 1
    expected = torch.where(kept.unsqueeze(1), 2 ** (steps + 1) - 1, torch.ones_like(steps))
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=0)
    assert 0.2 < kept.double().mean() < 0.8
    return kept


@pytest.mark.parametrize(
    "decoder", [None, *DECODERS], ids=lambda decoder: "rnn" if decoder is None else case_id(decoder)
)
def test_recurrent_dropout_is_sampled_once_per_sequence(decoder):
    """One mask for all steps of a row; others for other rows, layers, directions and calls."""
    options = {"cell_type": "rnn_relu", "recurrent_dropout": 0.5, "hidden_size": 16}
    if decoder is None:
        model = make_model("RNNModel", bidirectional=True, **options).train()
        keys, inputs = ["hidden_states"], {"input_ids": make_tokens(4, 6)}
    else:
        model = make_model("RNNSeq2SeqModel", **decoder, **options).train()
        keys = ["encoder_hidden_states", "decoder_hidden_states"]
        inputs = {"input_ids": make_tokens(4, 6), "decoder_input_ids": make_tokens(4, 5)}
    make_counting(model)
    seen = []
    for _ in range(2):
        outputs = model(**inputs, output_hidden_states=True)
        for key in keys:
            for hidden in outputs[key][1:]:
                seen.append(assert_one_mask_per_sequence(hidden[..., :16]))
                if key != "decoder_hidden_states":
                    seen.append(assert_one_mask_per_sequence(hidden[..., 16:], reverse=True))
    for index, kept in enumerate(seen):
        assert len(kept.unique(dim=0)) == 4
        assert not any(torch.equal(kept, other) for other in seen[:index])


@CELLS
def test_recurrent_dropout_acts_on_recurrent_products_only(cell_type, monkeypatch):
    """
    What passes through the step without a product (gates, the LSTM's cell state) is whole: a layer is the loop over its
    cell with the hidden state masked in its products.
    """
    layer = RecurrentLayer(make_config("RNNModel", cell_type=cell_type, recurrent_dropout=0.5), 5, 0).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    inputs = torch.randn(6, 7, 5, dtype=torch.float64)
    kept = torch.randint(0, 2, (6, 6)) * 2.0
    monkeypatch.setattr(layer, "kept_units", lambda inputs: kept)
    actual, final, _ = layer.train()(inputs)
    cell, state = layer.cell, layer.cell.initial_state(inputs)
    for position in range(7):
        # A mask on the state is a mask on the columns of the weight, one for each row of the batch.
        rows = []
        for row in range(6):
            parameters = dict(cell.named_parameters()) | {"weight_hh": cell.weight_hh * kept[row]}
            with monkeypatch.context() as patch:
                for name, parameter in parameters.items():
                    patch.setitem(cell._parameters, name, parameter)
                projected = cell.project_inputs(inputs[row : row + 1, position])
                rows.append(cell.step(projected, tuple(states[row : row + 1] for states in state)))
        state = tuple(torch.cat(states) for states in zip(*rows))
        torch.testing.assert_close(actual[:, position], state[0], rtol=1e-11, atol=1e-12)
    for states, expected in zip(final, state, strict=True):
        torch.testing.assert_close(states, expected, rtol=1e-11, atol=1e-12)


# Gradient checkpointing.


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_gradient_checkpointing_changes_no_gradient(name):
    """The same loss and gradients, dropout included; every layer that runs over whole sequences is checkpointed."""
    for options in options_of(name):
        model = make_model(name, recurrent_dropout=0.3, hidden_dropout=0.3, **options).train()
        layers = [module for module in model.modules() if isinstance(module, RecurrentLayer)]
        if is_seq2seq(name) and (options.get("input_feeding") or options.get("decoder_type") == "bahdanau"):
            layers = list(base_of(model).encoder.layers)
        checkpointed, found = [], []

        def record(function, *args, checkpointed=checkpointed):
            checkpointed.append(function)
            return checkpoint(function, *args, use_reentrant=False)

        for enabled in (False, True):
            if enabled:
                enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
                enable({"use_reentrant": False})
                for layer in layers:
                    layer._gradient_checkpointing_func = record
            model.zero_grad()
            torch.manual_seed(0)
            loss = objective(model(**make_inputs(name, options=options)))
            loss.backward()
            assert len(checkpointed) == len(layers) * enabled, options
            found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
        for actual, expected in zip(*found):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_every_second_layer_checkpointed(name):
    """Of the layers that follow each other only some keep nothing, as transformers offers since 5.24."""
    model = make_model(name).train()
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None or "every_n_layers" not in inspect.signature(enable).parameters:
        pytest.skip("transformers is older than 5.24")
    layers = [module for module in model.modules() if isinstance(module, RecurrentLayer)]
    found = []
    for enabled in (False, True):
        if enabled:
            enable(every_n_layers=2)
            counted = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
            assert [layer.gradient_checkpointing for layer in counted] == [i % 2 == 0 for i in range(len(counted))]
            assert len({layer.gradient_checkpointing for layer in layers}) == 2
        model.zero_grad()
        loss = objective(model(**make_inputs(name)))
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for actual, expected in zip(*found):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not_reentrant", "reentrant"])
def test_what_is_checkpointed_runs_again_on_the_same_paths(use_reentrant):
    """Also where the backward is in another context than the forward was."""
    model, inputs = make_model("RNNForCausalLM"), make_inputs("RNNForCausalLM")
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model.train()
    found = []
    for context in (loop_only, contextlib.nullcontext):
        model.zero_grad()
        with context():
            loss = model(**inputs).loss
        loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-8)  # the loss itself is in float32


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not_reentrant", "reentrant"])
@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_checkpointed_pieces_of_time(name, use_reentrant, monkeypatch):
    """A long text is computed again piece by piece, with padding anywhere and dropout: nothing changes."""
    monkeypatch.setattr("hf_rnn.recurrent_layer.CHECKPOINTED_STEPS", 3)
    pieces, run = [], RecurrentLayer._run_in_pieces
    monkeypatch.setattr(RecurrentLayer, "_run_in_pieces", lambda *args: pieces.append(1) or run(*args))
    for options in options_of(name):
        model = make_model(name, recurrent_dropout=0.3, hidden_dropout=0.3, **options).train()
        one_way = [m for m in model.modules() if isinstance(m, RecurrentLayer) and m.cell_reverse is None]
        inputs = make_inputs(name, options=options)
        if "attention_mask" not in inputs and inputs["input_ids"].dim() == 2:
            inputs["attention_mask"] = make_mask()
        found = []
        for enabled in (False, True):
            if enabled:
                enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
                enable({"use_reentrant": use_reentrant})
                model.enable_input_require_grads()
            model.zero_grad()
            pieces.clear()
            torch.manual_seed(0)
            loss = objective(model(**inputs, use_cache=False))
            loss.backward()
            if not enabled or not one_way:
                assert not pieces
            elif not is_seq2seq(name):
                assert pieces, options
            found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
        for actual, expected in zip(*found):
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


# Losses.


@CELLS
@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_autocast(name, cell_type):
    """In both narrow types: kernels of torch that have no such type are not taken."""
    model, inputs = make_model(name, torch.float32, cell_type=cell_type).train(), make_inputs(name)

    def step():
        model.zero_grad()
        outputs = model(**inputs)
        if outputs.get("loss") is None:
            outputs.last_hidden_state = outputs.last_hidden_state.float()  # for the same projection
        loss = objective(outputs)
        loss.backward()
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        return loss.detach().float(), torch.cat([gradient.flatten() for gradient in gradients])

    expected_loss, expected = step()
    for dtype, tolerance in ((torch.float16, 0.02), (torch.bfloat16, 0.1)):
        with torch.autocast(expected.device.type, dtype):
            loss, gradients = step()
        torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=tolerance)
        assert F.cosine_similarity(gradients, expected, dim=0) > 1 - tolerance


def test_problem_types():
    """Regression, one class and several labels, told by the configuration or by the labels."""
    name, inputs = "RNNForSequenceClassification", {"input_ids": make_tokens(5, 7)}
    labels = {
        "single_label_classification": torch.tensor([0, 3, 2, 1, 1]),
        "multi_label_classification": torch.randint(0, 2, (5, 4)).double(),
        "regression": torch.randn(5, 4, dtype=torch.float64),
    }
    losses = {
        "single_label_classification": F.cross_entropy,
        "multi_label_classification": F.binary_cross_entropy_with_logits,
        "regression": F.mse_loss,
    }
    for problem_type, target in labels.items():
        model = make_model(name, problem_type=problem_type)
        outputs = model(**inputs, labels=target)
        torch.testing.assert_close(outputs.loss, losses[problem_type](outputs.logits, target))
        if problem_type != "regression":
            model = make_model(name)
            assert torch.equal(model(**inputs, labels=target).loss, outputs.loss)
            assert model.config.problem_type == problem_type
    model, target = make_model(name, num_labels=1), torch.randn(5, dtype=torch.float64)
    outputs = model(**inputs, labels=target)
    torch.testing.assert_close(outputs.loss, F.mse_loss(outputs.logits[:, 0], target))
    assert model.config.problem_type == "regression"


@pytest.mark.parametrize("name", ["RNNForCausalLM", "RNNForMaskedLM", "RNNForTokenClassification", SEQ2SEQ])
def test_losses_are_means_over_labels(name):
    """In nats per label, those with -100 left out; a causal model predicts the next token, the others their own."""
    model, inputs = make_model(name), make_inputs(name)
    inputs["labels"][:, 1:3] = -100
    outputs = model(**inputs)
    logits, labels = outputs.logits, inputs["labels"]
    if name == "RNNForCausalLM":
        logits, labels = logits[:, :-1], labels[:, 1:]
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(outputs.loss.double(), expected, rtol=1e-6, atol=0)


def test_choices_and_answers():
    """Cross-entropy over the choices, and over the positions for the start and the end of an answer."""
    inputs = make_inputs("RNNForMultipleChoice")
    outputs = make_model("RNNForMultipleChoice")(**inputs)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, inputs["labels"]))
    inputs = make_inputs("RNNForQuestionAnswering") | {
        "start_positions": torch.arange(6),
        "end_positions": torch.arange(6) + 1,
    }
    outputs = make_model("RNNForQuestionAnswering")(**inputs)
    starts = F.cross_entropy(outputs.start_logits, inputs["start_positions"])
    ends = F.cross_entropy(outputs.end_logits, inputs["end_positions"])
    torch.testing.assert_close(outputs.loss, (starts + ends) / 2)


@pytest.mark.parametrize("name", [name for name in MODEL_CLASSES if name not in ("RNNModel", "RNNSeq2SeqModel")])
def test_losses_take_no_number_of_items_for_none(name):
    """`num_items_in_batch=None` says nothing, as in the losses of transformers."""
    model, inputs = make_model(name), make_inputs(name)
    assert torch.equal(model(**inputs, num_items_in_batch=None).loss, model(**inputs).loss)


def test_target_inputs_are_the_labels_shifted():
    """Without inputs for the decoder, they are the start token and all labels but the last."""
    model = make_model(SEQ2SEQ)
    labels = make_tokens(3, 5)
    labels[1, 2:] = -100
    shifted = torch.cat([torch.full((3, 1), model.config.decoder_start_token_id), labels[:, :-1]], dim=1)
    shifted[shifted == -100] = model.config.pad_token_id
    assert torch.equal(model.prepare_decoder_input_ids_from_labels(labels), shifted)
    inputs = {"input_ids": make_tokens(3, 6), "labels": labels}
    assert torch.equal(model(**inputs).loss, model(**inputs, decoder_input_ids=shifted).loss)


# Residual connections and tied embeddings.


@CELLS
@pytest.mark.parametrize("bidirectional", [False, True])
def test_residual_connections(cell_type, bidirectional):
    """Every layer after the first adds its input; the state that it carries on has none of it."""
    model = make_model("RNNModel", cell_type=cell_type, bidirectional=bidirectional, residual=True, num_hidden_layers=3)
    tokens, mask = make_tokens(6, 7), make_mask()
    embedded, *hidden = model(tokens, attention_mask=mask, output_hidden_states=True).hidden_states
    padding = Padding.from_attention_mask(mask, mask)
    for layer, below, output in zip(model.layers, [embedded, *hidden], hidden):
        layer.residual = False
        plain, state, _ = layer(below, None, padding)
        layer.residual = layer.layer_idx > 0
        expected = plain + below if layer.layer_idx > 0 else plain
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
        for states, other in zip(layer(below, None, padding)[1], state, strict=True):
            assert torch.equal(states, other)


@pytest.mark.parametrize("name", ["RNNForCausalLM", "RNNForMaskedLM", SEQ2SEQ])
@pytest.mark.parametrize("embedding_size", [5, 6])
def test_tied_embeddings(name, embedding_size):
    """One weight for embeddings and projection, and a map between them only where their widths differ."""
    tied = make_model(name, tie_word_embeddings=True, embedding_size=embedding_size)
    untied = make_model(name, tie_word_embeddings=False, embedding_size=embedding_size)
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    assert untied.lm_head.weight is not untied.get_input_embeddings().weight
    assert isinstance(tied.projection, nn.Linear) == (embedding_size != 6)
    assert not isinstance(untied.projection, nn.Linear)
    # The gradient of the one weight is the sum of those of two equal ones.
    untied.projection, untied.lm_head = copy.deepcopy(tied.projection), nn.Linear(embedding_size, VOCAB_SIZE).double()
    untied.load_state_dict(tied.state_dict())
    inputs = make_inputs(name)
    losses = [model(**inputs).loss for model in (tied, untied)]
    torch.testing.assert_close(*losses)
    sum(losses).backward()
    gradients = [parameter.grad for key, parameter in untied.named_parameters() if is_vocabulary(key)]
    expected = sum(gradient for gradient in gradients if gradient is not None)
    torch.testing.assert_close(tied.lm_head.weight.grad, expected, rtol=1e-5, atol=1e-7)


def is_vocabulary(key: str) -> bool:
    return key.endswith(("lm_head.weight", "embed_tokens.weight", "shared.weight"))


@pytest.mark.parametrize("name", ["RNNSeq2SeqModel", SEQ2SEQ])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_source_and_target_share_one_embedding(name, tied):
    """It is the one that `get_input_embeddings` returns, whether the projection shares it or not."""
    model = make_model(name, tie_word_embeddings=tied)
    embeddings, base = model.get_input_embeddings().weight, base_of(model)
    assert base.encoder.embed_tokens.weight is embeddings
    assert base.decoder.embed_tokens.weight is embeddings


# Initialisation.


def new_models(**options):
    """One of each class with a hidden size at which statistics say something."""
    for name, (_, model_class) in MODEL_CLASSES.items():
        config = make_config(name, **({"vocab_size": 500, "embedding_size": 48, "hidden_size": 64} | options))
        yield name, config, model_class(config)


@CELLS
def test_cells_start_orthogonal(cell_type):
    """Recurrent weights orthogonal and input weights Glorot uniform, gate by gate; biases zero but for forget gates."""
    for name, config, model in new_models(cell_type=cell_type, forget_gate_bias=1.5):
        cells = [module for module in model.modules() if isinstance(module, RecurrentCell)]
        assert len(cells) >= 2
        for cell in cells:
            gates = len(cell.gate_names)
            for gate in cell.weight_hh.detach().chunk(gates):
                torch.testing.assert_close(gate @ gate.T, torch.eye(64), rtol=0, atol=1e-4)
            bound = math.sqrt(6 / (cell.input_size + 64))
            for gate in cell.weight_ih.detach().chunk(gates):
                assert 0.95 * bound < gate.abs().max() <= bound, name
                assert abs(gate.mean()) < 0.05 * bound, name
                assert abs(gate.std() - bound / math.sqrt(3)) < 0.05 * bound, name
            bias = torch.zeros(gates, 64)
            if cell_type == "lstm":
                bias[cell.gate_names.index("forget")] = config.forget_gate_bias
            assert torch.equal(cell.bias_ih.detach() + cell.bias_hh.detach(), bias.flatten()), name
        assert len({tuple(cell.weight_hh.flatten()[:5].tolist()) for cell in cells}) == len(cells)


def test_forget_gate_bias_opens_the_forget_gate():
    """With nothing to read the cell state decays by sigmoid(forget_gate_bias)."""
    for value in (0.0, 1.0, 2.5):
        model = MODEL_CLASSES["RNNModel"][1](make_config("RNNModel", forget_gate_bias=value))
        cell = model.layers[0].cell
        _, state = cell.step(cell.project_inputs(torch.zeros(1, 5)), (torch.zeros(1, 6), torch.ones(1, 6)))
        torch.testing.assert_close(state, torch.sigmoid(torch.full((1, 6), value)))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_other_weights_start_as_documented(tied):
    """Embeddings and what predicts tokens normal with `initializer_range`, other linear maps Glorot uniform."""
    for score in ATTENTION_SCORES:
        options = {"tie_word_embeddings": tied, "initializer_range": 0.07}
        for name, _, model in new_models(**options):
            if is_seq2seq(name):
                model = MODEL_CLASSES[name][1](make_config(name, **(vars_of(model) | {"attention_score": score})))
            elif score != "dot":
                continue
            embeddings = model.get_input_embeddings().weight
            for key, module in model.named_modules():
                where = f"{name}, {score}, {key}"
                if isinstance(module, nn.Embedding) or module is model.get_output_embeddings():
                    assert abs(module.weight.std() - 0.07) < 0.003, where
                    assert abs(module.weight.mean()) < 0.003, where
                elif isinstance(module, nn.Linear) and module.weight is not embeddings:
                    bound = math.sqrt(6 / (module.in_features + module.out_features))
                    assert 0.8 * bound < module.weight.abs().max() <= bound, where
                    assert abs(module.weight.mean()) < 0.15 * bound, where
                if isinstance(module, nn.Linear) and module.bias is not None:
                    assert not module.bias.any(), where
                if isinstance(module, AttentionScore) and hasattr(module, "vector"):
                    # Such that the scores of saturated features have a variance near one.
                    assert abs(module.vector.std() * math.sqrt(64) - 1) < 0.2, where


@pytest.mark.parametrize("name", ["RNNForCausalLM", "RNNForMaskedLM", "RNNSeq2SeqForConditionalGeneration"])
def test_new_rows_of_a_vocabulary_start_as_documented(name):
    """As the rows that were there before, in the embeddings and in an untied projection."""
    config = make_config(name, embedding_size=64, tie_word_embeddings=False, initializer_range=0.3)
    model = MODEL_CLASSES[name][1](config)
    vocab_size = config.vocab_size
    model.resize_token_embeddings(vocab_size + 200, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert abs(module.weight[vocab_size:].std() - 0.3) < 0.03


@pytest.mark.parametrize("cell_type", ["rnn_tanh", "gru", "lstm"])
def test_narrow_models_learn_by_heart_with_the_defaults(cell_type):
    """A text of 64 tokens in 300 steps, the loss a tenth of what it was: what transformers asks of small models."""
    torch.manual_seed(42)
    config = RNNConfig(vocab_size=99, hidden_size=32, cell_type=cell_type)
    model = MODEL_CLASSES["RNNForCausalLM"][1](config).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    tokens = torch.arange(1, 20).repeat(4)[:64].expand(2, -1)
    losses = []
    for _ in range(300):
        losses.append(model(input_ids=tokens, labels=tokens).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]
    output = model.eval().generate(tokens[:1, :1], max_new_tokens=63, do_sample=False, eos_token_id=None)
    assert torch.equal(output, tokens[:1])


def vars_of(model) -> dict:
    """The options that differ from the tiny configuration of the matrix."""
    keys = ("vocab_size", "embedding_size", "hidden_size", "tie_word_embeddings", "initializer_range")
    return {key: getattr(model.config, key) for key in keys}


# The contract is open.


class LeakyCell(RecurrentCell):
    """A cell of one's own: h_t = (1 - z) h_{t-1} + z tanh(...), with a parameter of its own."""

    gate_names = ("update", "new")

    def __init__(self, input_size, hidden_size):
        super().__init__(input_size, hidden_size)
        self.leak = nn.Parameter(torch.empty(hidden_size))

    def init_weights(self, config):
        super().init_weights(config)
        nn.init.constant_(self.leak, 0.5)

    def step(self, projected, state, linear=F.linear):
        (hidden,) = state
        update, new = (projected + linear(hidden, self.weight_hh, self.bias_hh)).chunk(2, dim=-1)
        update = torch.sigmoid(update + self.leak)
        return (hidden + update * (torch.tanh(new) - hidden),)


class CoupledLSTMCell(LSTMCell):
    """An LSTM that forgets as much as it takes in, and a third state: a mean of its outputs that decays."""

    state_names = ("hidden_state", "cell_state", "mean_state")

    def step(self, projected, state, linear=F.linear):
        hidden, cell, mean = state
        gates = projected + linear(hidden + mean, self.weight_hh, self.bias_hh)
        input_gate, forget_gate, new, output_gate = gates.chunk(4, dim=-1)
        keep = torch.sigmoid(forget_gate - input_gate)
        cell = keep * cell + (1 - keep) * torch.tanh(new)
        hidden = torch.sigmoid(output_gate) * torch.tanh(cell)
        return hidden, cell, 0.9 * mean + 0.1 * hidden


class CosineScore(AttentionScore):
    """A score of one's own: a learned temperature times the cosine of mapped query and key."""

    def __init__(self, query_size, key_size, num_heads=1):
        super().__init__(query_size, key_size, num_heads)
        self.key = nn.Linear(key_size, query_size, bias=False)
        self.temperature = nn.Parameter(torch.empty(()))

    def init_weights(self, config):
        nn.init.constant_(self.temperature, 3.0)

    def project_keys(self, keys):
        return self.key(keys)

    def compare(self, queries, keys):
        return self.temperature * super().compare(F.normalize(queries, dim=-1), F.normalize(keys, dim=-1))


NEW_CELLS = {"leaky": LeakyCell, "coupled_lstm": CoupledLSTMCell}


@pytest.fixture(params=NEW_CELLS)
def new_cell(request, monkeypatch):
    monkeypatch.setitem(RECURRENT_CELLS, request.param, NEW_CELLS[request.param])
    return request.param


@pytest.fixture
def new_score(monkeypatch):
    monkeypatch.setitem(ATTENTION_SCORES, "cosine", CosineScore)
    return "cosine"


def train(model, inputs: dict, steps: int = 40) -> tuple[float, float]:
    """The loss before and after some steps on one batch; every parameter has to move."""
    model.train()
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all((parameter != before[key]).any() for key, parameter in model.named_parameters())
    model.eval()
    return losses[0], losses[-1]


def assert_generates(model, inputs: dict):
    """Greedy and with beams, with the cache what it is without, padding on the left included."""
    for options in ({"num_beams": 1}, {"num_beams": 3, "num_return_sequences": 2}):
        options |= {"do_sample": False, "max_new_tokens": 6, "pad_token_id": model.config.pad_token_id}
        expected = model.generate(**inputs, **options, use_cache=False)
        actual = model.generate(**inputs, **options, use_cache=True)
        assert torch.equal(actual, expected)


def small_model(name: str, **options):
    """A new model as a user gets it, initialised by the library."""
    torch.manual_seed(0)
    config = make_config(name, **({"hidden_size": 16, "embedding_size": 8} | options))
    return MODEL_CLASSES[name][1](config).double()


def test_a_new_cell_in_a_language_model(new_cell):
    model = small_model("RNNForCausalLM", cell_type=new_cell)
    tokens, mask = make_tokens(6, 7), make_mask()[:5].index_select(0, torch.tensor([0, 2, 0, 2, 0, 0]))
    first, last = train(model, {"input_ids": tokens, "labels": tokens})
    assert last < 0.5 * first
    assert_generates(model, {"input_ids": tokens, "attention_mask": mask})
    # And the laws hold for it.
    whole = model(tokens, attention_mask=mask).logits
    cache, pieces = None, []
    for position in range(7):
        outputs = model(
            tokens[:, position : position + 1], attention_mask=mask[:, : position + 1], past_key_values=cache
        )
        cache = outputs.past_key_values
        pieces.append(outputs.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-11, atol=1e-12)
    with loop_only():
        assert torch.equal(model(tokens, attention_mask=mask).logits, whole)


@pytest.mark.parametrize("decoder", DECODERS, ids=case_id)
def test_a_new_cell_and_a_new_score_in_a_translator(new_cell, new_score, decoder):
    model = small_model(SEQ2SEQ, cell_type=new_cell, attention_score=new_score, num_attention_heads=2, **decoder)
    inputs = {"input_ids": make_tokens(6, 7), "attention_mask": make_mask()}
    labels = make_tokens(6, 5, seed=1)
    first, last = train(model, inputs | {"labels": labels})
    assert last < 0.5 * first
    assert_generates(model, inputs)


def test_a_new_cell_in_both_directions(new_cell):
    """Classifies, and padding does not matter."""
    model = small_model("RNNForSequenceClassification", cell_type=new_cell, bidirectional=True, pooling="mean")
    tokens, labels = make_tokens(6, 7), torch.tensor([0, 1, 2, 3, 0, 1])
    first, last = train(model, {"input_ids": tokens, "labels": labels})
    assert last < 0.5 * first
    padded = torch.cat([make_tokens(6, 2, seed=1), tokens[:, :3], make_tokens(6, 1, seed=2), tokens[:, 3:]], dim=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1, 1, 1]]).expand(6, -1)
    torch.testing.assert_close(model(padded, attention_mask=mask).logits, model(tokens).logits, rtol=1e-11, atol=1e-12)


def test_an_unknown_cell_or_score_is_refused():
    for name, field in [("RNNModel", "cell_type"), (SEQ2SEQ, "cell_type"), (SEQ2SEQ, "attention_score")]:
        with pytest.raises(ValueError, match=rf"`{field}` must be one of .*'lecky'"):
            make_config(name, **{field: "lecky"})


def takes_kernel(cell_class, monkeypatch) -> bool:
    """Whether a layer of this cell runs torch's kernel; its result has to be that of the loop in any case."""
    calls, call = [], recurrent_kernels.call_torch_kernel

    def record(*args):
        calls.append(args)
        return call(*args)

    monkeypatch.setitem(RECURRENT_CELLS, "mine", cell_class)
    monkeypatch.setattr(recurrent_kernels, "call_torch_kernel", record)
    model = make_model("RNNModel", cell_type="mine")
    actual = model(make_tokens(6, 7), attention_mask=make_mask()).last_hidden_state
    with loop_only():
        expected = model(make_tokens(6, 7), attention_mask=make_mask()).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
    return bool(calls)


class Doubled:
    """Changes the equations of the cell that it is mixed into."""

    def step(self, projected, state, linear=F.linear):
        return super().step(2 * projected, state, linear)


def test_changed_equations_do_not_take_the_kernel(monkeypatch):
    """A subclass with another step or other inputs loses torch's kernel, and so does what is derived from it."""

    class OtherStep(LSTMCell):
        def step(self, projected, state, linear=F.linear):
            hidden, cell = super().step(projected, state, linear)
            return hidden * 0.5, cell

    class OtherInputs(LSTMCell):
        def project_inputs(self, inputs):
            return 2 * super().project_inputs(inputs)

    class Derived(OtherStep):
        pass

    for cell_class in (OtherStep, OtherInputs, Derived):
        assert not takes_kernel(cell_class, monkeypatch), cell_class


def test_equations_changed_by_a_mixin_do_not_take_the_kernel(monkeypatch):
    """The step may come from any base class."""

    class Mixed(Doubled, LSTMCell):
        pass

    assert not takes_kernel(Mixed, monkeypatch)


def test_the_same_equations_keep_the_kernel(monkeypatch):
    """A subclass that starts from other weights, or that names the kernel itself."""

    class OtherStart(LSTMCell):
        def init_weights(self, config):
            super().init_weights(config)
            nn.init.zeros_(self.bias_hh)

    class SameStep(LSTMCell):
        torch_kernel = "lstm"

        def step(self, projected, state, linear=F.linear):
            return super().step(projected, state, linear)

    assert takes_kernel(OtherStart, monkeypatch)
    assert takes_kernel(SameStep, monkeypatch)
    assert takes_kernel(LSTMCell, monkeypatch)


def test_configurations_take_every_cell_of_the_table():
    for config_class in (RNNConfig, RNNSeq2SeqConfig):
        for cell_type in RECURRENT_CELLS:
            assert config_class(cell_type=cell_type).cell_type == cell_type
