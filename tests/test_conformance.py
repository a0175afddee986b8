"""What a user of transformers tries on any model: every class of the table takes it as BERT, GPT-2 or BART would."""

import copy
import inspect
import itertools
import os
import pickle
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers import AutoConfig, DynamicCache, StaticCache

from hf_rnn import ATTENTION_SCORES, RECURRENT_CELLS, REGISTRATION, RNNSeq2SeqConfig
from hf_rnn.configuration_rnn import POOLING_TYPES
from hf_rnn.recurrent_layer import RecurrentLayer
from matrix import (
    DECODERS,
    GENERATIVE,
    MODEL_CLASSES,
    VOCAB_SIZE,
    case_id,
    make_config,
    make_inputs,
    make_mask,
    make_model,
    make_tokens,
)


SEQ2SEQ = [name for name, (config_class, _) in MODEL_CLASSES.items() if config_class is RNNSeq2SeqConfig]
BASES = [next(iter(classes)).__name__ for classes in REGISTRATION.values()]
POOLED = ["RNNForSequenceClassification", "RNNForMultipleChoice"]
HEADS = [name for name in MODEL_CLASSES if name not in BASES]
STATEFUL = ["RNNModel", "RNNForCausalLM", *SEQ2SEQ]
VOCABULARY_HEADS = ["RNNForCausalLM", "RNNForMaskedLM", "RNNSeq2SeqForConditionalGeneration"]
over_classes = pytest.mark.parametrize("name", MODEL_CLASSES)
over_families = pytest.mark.parametrize("config_class", REGISTRATION, ids=lambda config_class: config_class.__name__)


def padded_inputs(name, with_labels=False):
    """Inputs with a mask that has padding everywhere."""
    inputs = make_inputs(name, with_labels=with_labels)
    mask = make_mask()
    if name == "RNNForMultipleChoice":
        mask = mask.unsqueeze(1).expand(inputs["input_ids"].shape)
    return inputs | {"attention_mask": mask}


@torch.no_grad()
def first_output(model, name):
    """The main output for a padded batch."""
    return model(**padded_inputs(name))[0]


def variants(name):
    """Options that lead through different code: cells for the language models, decoders and scores for seq2seq."""
    if name not in SEQ2SEQ:
        return [{"cell_type": cell} for cell in RECURRENT_CELLS]
    return [decoder | {"attention_score": score} for decoder, score in zip(DECODERS, ATTENTION_SCORES)]


def objective(output):
    """The loss, or for models without one any number that depends on the output."""
    return output[0] if "loss" in output else output[0].square().mean()


# Names and accessors.


@over_classes
def test_names_that_transformers_asks_for(name):
    """The main input, the base model, embeddings in and out, and whether it generates."""
    model_class = MODEL_CLASSES[name][1]
    assert list(inspect.signature(model_class.forward).parameters)[1] == model_class.main_input_name == "input_ids"
    model = make_model(name)
    assert (model.base_model is model) == (name in BASES)
    if name in HEADS:
        assert model.base_model is getattr(model, model.base_model_prefix)
    assert model.can_generate() == (name in GENERATIVE)
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    assert isinstance(model.get_output_embeddings(), nn.Linear) == (name in VOCABULARY_HEADS)
    embeddings = nn.Embedding(10, 5)
    model.set_input_embeddings(embeddings)
    assert model.get_input_embeddings() is embeddings
    assert model.base_model.get_input_embeddings() is embeddings


@over_classes
def test_files_of_a_checkpoint(name, tmp_path):
    """A configuration, and one for generation exactly where the class generates."""
    make_model(name).save_pretrained(tmp_path)
    assert (tmp_path / "config.json").exists()
    assert (tmp_path / "generation_config.json").exists() == (name in GENERATIVE)


@over_classes
def test_attention_implementations(name, tmp_path):
    """There is the plain one only; others are refused in words, as with other recurrent models, and change nothing."""
    model = make_model(name)
    model.save_pretrained(tmp_path)
    model_class = MODEL_CLASSES[name][1]
    assert model_class.from_pretrained(tmp_path, attn_implementation="eager").config._attn_implementation == "eager"
    assert make_config(name, attn_implementation="eager")._attn_implementation == "eager"
    for implementation in ("sdpa", "flash_attention_2", "unheard_of"):
        with pytest.raises(ValueError, match="not support"):
            model_class.from_pretrained(tmp_path, attn_implementation=implementation)
        with pytest.raises(ValueError, match="not support"):
            model.set_attn_implementation(implementation)
    assert model.config._attn_implementation in (None, "eager")


# Outputs.


@over_classes
def test_every_combination_of_outputs(name):
    """Hidden states and attentions, each or both or none, as a dictionary or a tuple, asked for here or there."""
    for options, with_cache in itertools.product(variants(name), [False, True]):
        check_combinations_of_outputs(name, options, with_cache)


def check_combinations_of_outputs(name, options, with_cache):
    """The same numbers in every combination, and nothing but what was asked for."""
    model, inputs = make_model(name, **options), padded_inputs(name, with_labels=True) | {"use_cache": with_cache}
    states = ["encoder_hidden_states", "decoder_hidden_states"] if name in SEQ2SEQ else ["hidden_states"]
    attentions = ["cross_attentions"] if name in SEQ2SEQ else []
    plain = model(**inputs)
    assert any(hasattr(value, "get_seq_length") for value in plain.values()) == (with_cache and name in STATEFUL)
    fields = list(type(plain).__dataclass_fields__)
    for with_states, with_attentions in itertools.product([False, True], repeat=2):
        asked = {"output_hidden_states": with_states, "output_attentions": with_attentions}
        expected = set(plain) | set(states * with_states) | set(attentions * with_attentions)
        by_call = model(**inputs, **asked)
        config = copy.deepcopy(model.config)
        for key, value in asked.items():
            setattr(model.config, key, value)
        by_config = model(**inputs)
        as_tuple = model(**inputs, return_dict=False)
        model.config = model.base_model.config = config
        for module in model.modules():
            if hasattr(module, "config"):
                module.config = config
        assert set(by_call) == set(by_config) == expected
        # In the order of the fields, so that the tuples are those of other models.
        assert list(by_call) == [field for field in fields if field in expected]
        assert len(as_tuple) == len(expected)
        assert all(len(by_call[field]) == 3 for field in states * with_states)  # embeddings and two layers
        for field, value in zip(by_call, as_tuple):
            if hasattr(value, "get_seq_length"):
                assert type(value) is type(by_call[field])
                continue
            one, other = by_call[field], value
            if not isinstance(one, tuple):
                one, other = (one,), (other,)
            assert len(one) == len(other)
            assert all(torch.equal(left, right) for left, right in zip(one, other))
        assert torch.equal(by_call[0], plain[0])
        assert torch.equal(by_config[0], plain[0])


@pytest.mark.parametrize("name", POOLED)
def test_attentions_of_pooling(name):
    """Heads that pool by attention show its weights where they are asked for; those that pool otherwise have none."""
    inputs = padded_inputs(name, with_labels=True)
    mask = inputs["attention_mask"].flatten(0, -2)
    for pooling in POOLING_TYPES:
        for options in [{}, {"pooling_heads": 3, "pooling_attention_size": 5}] if pooling == "attention" else [{}]:
            model = make_model(name, pooling=pooling, bidirectional=True, **options)
            assert model(**inputs).attentions is None
            output = model(**inputs, output_attentions=True)
            if pooling != "attention":
                assert output.attentions is None
                continue
            (weights,) = output.attentions
            assert weights.shape == (len(mask), options.get("pooling_heads", 1), 1, mask.shape[-1])
            assert (weights.masked_select(mask[:, None, None] == 0) == 0).all()
            is_text = mask.any(1).double()[:, None, None]
            torch.testing.assert_close(weights.sum(-1), is_text.expand(weights.shape[:3]), rtol=0, atol=1e-12)
            # They are what the sequence was pooled by.
            states = model.model(
                *(inputs[key].flatten(0, -2) for key in ("input_ids", "attention_mask"))
            ).last_hidden_state
            pooled = (weights.squeeze(2) @ states).flatten(1)
            logits = model.classifier(pooled).view(output.logits.shape)
            torch.testing.assert_close(logits, output.logits, rtol=0, atol=1e-12)
            model.config.output_attentions = True
            assert torch.equal(model(**inputs).attentions[0], weights)
            assert torch.equal(model(**inputs, return_dict=False)[2][0], weights)
            assert model(**inputs, output_attentions=False).attentions is None
            weights[weights > 0].square().sum().backward()
            assert model.pooling.score.weight.grad.abs().sum() > 0


@over_classes
def test_gradients_of_hidden_states_and_attentions(name):
    """They are part of the graph: what was kept of them gets a gradient."""
    for options in variants(name):
        model = make_model(name, **options)
        output = model(**make_inputs(name, with_labels=False), output_hidden_states=True, output_attentions=True)
        fields = ["hidden_states", "encoder_hidden_states"]
        if name in SEQ2SEQ and not model.get_decoder().runs_step_by_step:
            # Step by step these are put together from the steps when all is done.
            fields += ["decoder_hidden_states", "cross_attentions"]
        kept = [tensor for field in fields for tensor in output.get(field) or ()]
        kept += (output.get("decoder_hidden_states") or ())[:1]
        assert kept
        for tensor in kept:
            tensor.retain_grad()
        output[0].square().sum().backward()
        for tensor in kept:
            assert tensor.grad is not None
            assert tensor.grad.abs().sum() > 0


@over_classes
def test_hidden_states_are_captured_once(name):
    """Outputs are recorded by the base model alone; asked for again they are as many, in a copy of the model too."""
    model = make_model(name)
    counts = []
    for each in (model, model, copy.deepcopy(model)):
        output = each(**make_inputs(name, with_labels=False), output_hidden_states=True)
        field = "decoder_hidden_states" if name in SEQ2SEQ else "hidden_states"
        counts.append(len(output[field]))
    assert counts == [3, 3, 3]


@over_classes
def test_arguments_for_other_models(name):
    """Head masks, positions and segments, which tokenizers and pipelines may hand over, change nothing."""
    model, inputs = make_model(name), padded_inputs(name)
    expected = first_output(model, name)
    length = inputs["input_ids"].shape[-1]
    others = {
        "head_mask": torch.ones(2, 1),
        "decoder_head_mask": torch.ones(2, 1),
        "cross_attn_head_mask": torch.ones(2, 1),
        "position_ids": torch.arange(length).expand(inputs["input_ids"].shape),
        "token_type_ids": torch.zeros_like(inputs["input_ids"]),
        "cache_position": torch.arange(length),
    }
    for key, value in others.items():
        for given in (None, value):
            with torch.no_grad():
                assert torch.equal(model(**inputs, **{key: given})[0], expected)


def test_targets_that_are_shifted_already():
    """`shift_labels`, which sequence parallel training hands over, take the place of `labels` in the loss."""
    model, inputs = make_model("RNNForCausalLM"), make_inputs("RNNForCausalLM")
    shifted = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    expected = model(**inputs).loss
    actual = model(input_ids=inputs["input_ids"], labels=torch.zeros_like(shifted), shift_labels=shifted).loss
    torch.testing.assert_close(actual, expected)


# Inputs that cannot be right.


@over_classes
def test_tokens_and_embeddings_of_a_wrong_shape(name):
    """An error that names the argument and its shape, where a kernel would read memory that is not its own."""
    model = make_model(name)
    inputs = make_inputs(name, with_labels=False)
    embed = model.get_input_embeddings()
    for key in inputs:
        ids, others = inputs[key], {other: value for other, value in inputs.items() if other != key}
        with pytest.raises(ValueError, match="input_ids"):
            model(**others, **{key: ids[0, ..., 0]})
        with pytest.raises(ValueError, match="input_ids"):
            model(**others, **{key: ids.unsqueeze(0)})
        embeddings = embed(ids)
        for wrong in (embeddings[..., :-1], nn.functional.pad(embeddings, (0, 4)), embeddings[..., 0], embeddings[0]):
            with pytest.raises(ValueError, match="inputs_embeds"):
                model(**others, **{key.replace("input_ids", "inputs_embeds"): wrong})


@pytest.mark.parametrize("name", GENERATIVE + BASES)
@pytest.mark.parametrize("length", [1, 3])
def test_states_of_another_batch_or_model(name, length):
    """Other rows, other widths, other layers: refused, and not stretched."""
    layers = "decoder_layers" if name in SEQ2SEQ else "num_hidden_layers"
    key = "decoder_input_ids" if name in SEQ2SEQ else "input_ids"
    source = {"input_ids": make_tokens(4, 5)} if name in SEQ2SEQ else {}
    for options in variants(name):
        model = make_model(name, **options)
        for other in (
            make_model(name, **options | {"hidden_size": 8}),
            make_model(name, **options | {layers: 3}),
            make_model(name, **options | {"cell_type": "gru" if model.config.cell_type == "lstm" else "lstm"}),
        ):
            cache = other(**source, **{key: make_tokens(4, 3)}).past_key_values
            with pytest.raises(ValueError, match=r"`past_key_values` must hold"):
                model(**source, **{key: make_tokens(4, length)}, past_key_values=cache)
        for rows in (1, 2, 6):
            cache = model(
                **{k: ids[:1].expand(rows, -1) for k, ids in source.items()}, **{key: make_tokens(rows, 3)}
            ).past_key_values
            with pytest.raises(ValueError, match=r"`past_key_values` must hold states of 4 rows.*got"):
                model(**source, **{key: make_tokens(4, length)}, past_key_values=cache)
        with pytest.raises(TypeError, match=r"`past_key_values` must be a cache of recurrent states, got a tuple"):
            model(**source, **{key: make_tokens(4, length)}, past_key_values=((torch.zeros(4, 6),),))


@pytest.mark.parametrize("options", DECODERS, ids=case_id)
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_a_source_of_other_rows(name, options):
    """What was encoded for one batch is not attended to by another."""
    model = make_model(name, **options)
    encoded = model.get_encoder()(make_tokens(4, 5))
    target = make_tokens(4, 3)
    for rows in (1, 2):
        with pytest.raises(ValueError, match=r"`encoder_hidden_states` must have the shape \(4, source, 12\)"):
            model(encoder_outputs=(encoded[0][:rows], encoded[1][:rows]), decoder_input_ids=target)
        with pytest.raises(ValueError, match="final states must be those of 4 rows"):
            model(encoder_outputs=(encoded[0], encoded[1][:rows]), decoder_input_ids=target)
    with pytest.raises(ValueError, match=r"`encoder_hidden_states` must have the shape"):
        model(encoder_outputs=(encoded[0][..., :-1], encoded[1]), decoder_input_ids=target)


@pytest.mark.parametrize("name", GENERATIVE)
def test_logits_to_keep_is_a_number_or_indices(name):
    """Less than nothing cannot be kept; more than there is means all."""
    model, inputs = make_model(name), make_inputs(name, with_labels=False)
    for wrong in (-1, 1.5, "last", None):
        with pytest.raises(ValueError, match="`logits_to_keep` must be a number of positions"):
            model(**inputs, logits_to_keep=wrong)
    assert torch.equal(model(**inputs, logits_to_keep=100).logits, model(**inputs).logits)


# Nothing to read.


@over_classes
def test_texts_without_a_single_token(name):
    """An empty output where there is one for each token, and for a whole text what a row of padding gives."""
    for options in [*variants(name), *({"pooling": kind} for kind in ("last", "mean", "max", "concat", "attention"))]:
        if "pooling" in options and name in SEQ2SEQ:
            continue
        model = make_model(name, **options)
        inputs = make_inputs(name, with_labels=False)
        empty = {key: ids[..., :0] for key, ids in inputs.items()}
        output = model(**empty, output_hidden_states=True, output_attentions=True)
        padding = model(**inputs, attention_mask=torch.zeros_like(inputs["input_ids"]))
        if name in ("RNNForSequenceClassification", "RNNForMultipleChoice"):
            torch.testing.assert_close(output.logits, padding.logits, rtol=0, atol=1e-12)
        else:
            assert output[0].shape == (6, 0, *padding[0].shape[2:])
        if name in SEQ2SEQ:
            assert [tuple(states.shape[:2]) for states in output.decoder_hidden_states] == [(6, 0)] * 3
            assert output.cross_attentions[0].shape == (6, 1, 0, 0)


@pytest.mark.parametrize("options", DECODERS, ids=case_id)
@pytest.mark.parametrize("name", SEQ2SEQ)
@torch.no_grad()
def test_targets_without_a_single_token(name, options):
    """The state stays as it is, also where it is recorded, and decoding goes on from it."""
    for cell_type in RECURRENT_CELLS:
        model = make_model(name, **options, cell_type=cell_type)
        source, target = make_tokens(4, 5), make_tokens(4, 3)
        expected = model(source, decoder_input_ids=target)[0]
        for recording in (False, True):
            cache = model(source, decoder_input_ids=target[:, :0], use_cache=True).past_key_values
            first = model(source, decoder_input_ids=target[:, :2], past_key_values=cache)[0]
            if recording:
                cache.self_attention_cache.activate_past_recording()
            nothing = model(source, decoder_input_ids=target[:, :0], past_key_values=cache, output_hidden_states=True)
            assert nothing[0].shape == (4, 0, *expected.shape[2:])
            assert len(nothing.decoder_hidden_states) == 3
            last = model(source, decoder_input_ids=target[:, 2:], past_key_values=cache)[0]
            assert cache.get_seq_length() == 3
            torch.testing.assert_close(torch.cat([first, last], dim=1), expected, rtol=0, atol=1e-12)
            if recording:
                cache.self_attention_cache.crop(-1)
                last = model(source, decoder_input_ids=target[:, 2:], past_key_values=cache)[0]
                torch.testing.assert_close(last, expected[:, 2:], rtol=0, atol=1e-12)


# Gradient checkpointing.


@over_classes
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not_reentrant", "reentrant"])
def test_checkpointing_with_frozen_weights(name, use_reentrant):
    """As PEFT trains: embeddings frozen, inputs that require gradients, and what is left learns as without."""
    for options in variants(name):
        model = make_model(name, **options).train()
        model.requires_grad_(False)
        first_layer = next(module for module in model.modules() if isinstance(module, RecurrentLayer))
        adapter = first_layer.cell.weight_hh.requires_grad_(True)
        gradients = []
        for enabled in (False, True):
            if enabled:
                model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
                model.enable_input_require_grads()
                assert model.is_gradient_checkpointing
            adapter.grad = None
            objective(model(**make_inputs(name), use_cache=False)).backward()
            gradients.append(adapter.grad)
        assert gradients[0].abs().sum() > 0
        torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-12)
        model.disable_input_require_grads()
        model.gradient_checkpointing_disable()
        assert not model.is_gradient_checkpointing
        for module in model.modules():
            assert not getattr(module, "gradient_checkpointing", False)


# Embeddings.


@over_classes
def test_resizing_to_a_multiple(name):
    """The vocabulary grows to the next multiple, and what was resized is not made anew afterwards."""
    model = make_model(name, tie_word_embeddings=False)
    model.resize_token_embeddings(VOCAB_SIZE + 1, pad_to_multiple_of=8)
    assert model.config.vocab_size == 32
    assert model.get_input_embeddings().num_embeddings == 32
    state = copy.deepcopy(model.state_dict())
    model.post_init()
    for key, weight in model.state_dict().items():
        assert torch.equal(weight, state[key]), key
    if name in GENERATIVE:
        assert model.generate(make_tokens(2, 4) + 3, max_new_tokens=3).shape[0] == 2


@pytest.mark.parametrize("name", VOCABULARY_HEADS)
def test_tying_and_untying(name, tmp_path):
    """A configuration that is changed on loading ties or unties; what cannot come from the checkpoint is reported."""
    model_class = MODEL_CLASSES[name][1]
    tied = make_model(name, tie_word_embeddings=True, embedding_size=6)
    untied = make_model(name, tie_word_embeddings=False, embedding_size=6)
    for folder, model in (("tied", tied), ("untied", untied)):
        model.tie_weights()
        is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert is_tied == (folder == "tied")
        model.save_pretrained(tmp_path / folder)
    # Two different weights in the checkpoint are not made one.
    loaded = model_class.from_pretrained(tmp_path / "untied", tie_word_embeddings=True)
    torch.testing.assert_close(first_output(loaded, name), first_output(untied, name), rtol=0, atol=1e-12)
    loaded, info = model_class.from_pretrained(tmp_path / "tied", tie_word_embeddings=False, output_loading_info=True)
    assert loaded.get_output_embeddings().weight is not loaded.get_input_embeddings().weight
    assert set(info["missing_keys"]) <= {"lm_head.weight"}
    assert torch.equal(loaded.get_input_embeddings().weight, tied.get_input_embeddings().weight)
    assert loaded.get_output_embeddings().weight.isfinite().all()
    # New embeddings are shared again once they are tied.
    tied.set_input_embeddings(nn.Embedding(VOCAB_SIZE, 6, dtype=torch.float64))
    tied.tie_weights()
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight


# Initialisation and loading.


@over_classes
def test_from_the_meta_device_by_initialisation(name):
    """Memory is given and `init_weights` fills all of it: nothing else lies in a module but parameters."""
    for options in variants(name):
        with torch.device("meta"):
            model = MODEL_CLASSES[name][1](make_config(name, **options)).eval()
        assert not list(model.buffers())
        model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        model.init_weights()
        for key, parameter in model.named_parameters():
            assert parameter.isfinite().all(), key
        assert first_output(model, name).isfinite().all()


@over_classes
def test_a_checkpoint_of_something_else(name, tmp_path):
    """Every weight is reported as missing, no other is, and what the file holds is reported as unexpected."""
    from safetensors.torch import save_file

    model = make_model(name, torch.float32)
    model.save_pretrained(tmp_path)
    save_file({"foreign": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    names = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    assert {key for key, _ in model.named_parameters()} <= set(info["missing_keys"]) <= names
    assert set(info["unexpected_keys"]) == {"foreign"}
    assert all(parameter.isfinite().all() for parameter in loaded.parameters())


@over_classes
def test_weights_given_as_a_dictionary(name):
    """No checkpoint at all: a configuration and a state dict, or none of it."""
    model = make_model(name, torch.float32)
    state = model.state_dict()
    loaded = type(model).from_pretrained(None, config=model.config, state_dict=dict(state))
    assert loaded.state_dict().keys() == state.keys()
    for key, weight in loaded.state_dict().items():
        assert torch.equal(weight, state[key]), key
    assert all(parameter.is_contiguous() for parameter in loaded.parameters())
    fresh = type(model).from_pretrained(None, config=model.config, state_dict={})
    assert not any(parameter.is_meta for parameter in fresh.parameters())


@over_classes
def test_half_precision(name, tmp_path):
    """float16 by both names of the argument, by the configuration's own, and as it was saved; float32 otherwise."""
    for index, options in enumerate(variants(name)):
        check_half_precision(name, options, tmp_path / str(index))


def check_half_precision(name, options, folder):
    """Saved in float32, loaded and saved in float16, and loaded once more."""
    model = make_model(name, torch.float32, **options)
    model.save_pretrained(folder / "single")
    model_class = MODEL_CLASSES[name][1]
    expected = first_output(model, name)
    for keywords in ({"dtype": torch.float16}, {"torch_dtype": torch.float16}, {"dtype": "float16"}):
        half = model_class.from_pretrained(folder / "single", **keywords)
        assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}
        output = first_output(half, name)
        assert output.dtype == torch.float16
        is_padding = expected == torch.finfo(torch.float32).min
        torch.testing.assert_close(output[~is_padding].float(), expected[~is_padding], rtol=0.01, atol=0.02)
    half.save_pretrained(folder / "half")
    assert AutoConfig.from_pretrained(folder / "half").dtype == torch.float16
    assert model_class.from_pretrained(folder / "half", dtype="auto").dtype == torch.float16
    assert model_class.from_pretrained(folder / "half", dtype=torch.float32).dtype == torch.float32


@over_classes
def test_modules_kept_in_single_precision(name, tmp_path, monkeypatch):
    """The two lists of modules that keep float32 are honoured: one beside float16 only, the strict one always."""
    model = make_model(name, torch.float32)
    model.save_pretrained(tmp_path)
    model_class = type(model)
    monkeypatch.setattr(model_class, "_keep_in_fp32_modules", {"layers"}, raising=False)
    monkeypatch.setattr(model_class, "_keep_in_fp32_modules_strict", {"embed_tokens", "shared"}, raising=False)
    for dtype, kept in (
        (torch.float16, ("layers", "embed_tokens", "shared")),
        (torch.bfloat16, ("embed_tokens", "shared")),
    ):
        loaded = model_class.from_pretrained(tmp_path, dtype=dtype)
        for key, parameter in loaded.named_parameters():
            in_single = any(part in kept for part in key.split("."))
            assert parameter.dtype == (torch.float32 if in_single else dtype), key


@over_classes
def test_devices_by_context(name, tmp_path):
    """Loading goes to the device of the context, and is refused where that device holds no numbers."""
    model = make_model(name)
    model.save_pretrained(tmp_path)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    with device:
        loaded = type(model).from_pretrained(tmp_path)
    assert {parameter.device for parameter in loaded.parameters()} == {device}
    with torch.device("meta"), pytest.raises(RuntimeError, match="meta device"):
        type(model).from_pretrained(tmp_path)


# Weights that are elsewhere.


def device_maps(model, name):
    """Everything on disk; half of it; and what fits into a given memory."""
    yield {"device_map": {"": "disk"}}
    yield {"device_map": "auto", "max_memory": {"cpu": model.get_memory_footprint() // 2}}
    prefix = "" if name in BASES else "model."
    parts = [part for part, _ in model.base_model.named_children()]
    others = {part: "cpu" for part, _ in model.named_children() if f"{part}." != prefix}
    if name in SEQ2SEQ:
        # Embeddings that are shared stay together.
        spread = dict.fromkeys(("shared", "encoder.embed_tokens", "decoder.embed_tokens"), "cpu")
        for stack in ("encoder", "decoder"):
            children = [child for child, _ in model.get_submodule(f"{prefix}{stack}").named_children()]
            spread |= {f"{stack}.{child}": "disk" for child in children if child != "embed_tokens"}
    else:
        spread = {part: "cpu" for part in parts if part != "layers"} | {"layers.0": "cpu", "layers.1": "disk"}
    others = {} if name in BASES else others
    yield {"device_map": {f"{prefix}{part}": device for part, device in spread.items()} | others}


@over_classes
def test_weights_on_disk(name, tmp_path):
    """Offloaded wholly or in part, with a cell in every mode: the same outputs, and the memory is free afterwards."""
    for index, options in enumerate(variants(name)):
        options = {"tie_word_embeddings": False} | options
        model = make_model(name, torch.float32, **options)
        folder = tmp_path / str(index)
        model.save_pretrained(folder)
        expected = first_output(model, name)
        for keywords in device_maps(model, name):
            loaded = type(model).from_pretrained(folder, offload_folder=folder / "offload", **keywords)
            assert "disk" in loaded.hf_device_map.values()
            on_disk = [key for key, parameter in loaded.named_parameters(remove_duplicate=False) if parameter.is_meta]
            assert on_disk
            for _ in range(2):
                torch.testing.assert_close(first_output(loaded, name), expected, rtol=0, atol=1e-5)
            after = [key for key, parameter in loaded.named_parameters(remove_duplicate=False) if parameter.is_meta]
            assert after == on_disk


@pytest.mark.parametrize("name", GENERATIVE)
def test_generating_with_weights_on_disk(name, tmp_path):
    """Step by step, with beams, with both kinds of cache."""
    for index, options in enumerate(variants(name)):
        model = make_model(name, torch.float32, **options)
        folder = tmp_path / str(index)
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder, device_map={"": "disk"}, offload_folder=folder / "offload")
        for keywords in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
            inputs = {"inputs": make_tokens(2, 4), "max_new_tokens": 4, **keywords}
            assert torch.equal(loaded.generate(**inputs), model.generate(**inputs))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@over_classes
def test_weights_on_the_cpu_beside_a_gpu(name, tmp_path):
    """Computed on the GPU with weights that lie on the CPU and on disk in between."""
    deep = {} if name in SEQ2SEQ else {"num_hidden_layers": 5}
    for index, options in enumerate(variants(name)):
        model = make_model(name, torch.float32, **options, **deep, tie_word_embeddings=False)
        folder = tmp_path / str(index)
        model.save_pretrained(folder)
        expected = first_output(model, name)
        size = sum(parameter.nbytes for parameter in model.parameters())
        for memory in ({0: size * 3 // 4, "cpu": 10 * size}, {0: size * 3 // 4, "cpu": size // 10}):
            loaded = type(model).from_pretrained(
                folder, device_map="auto", max_memory=memory, offload_folder=folder / "offload"
            )
            assert len(set(loaded.hf_device_map.values())) > 1
            # cuDNN multiplies numbers of float32 with 10 bits of them.
            torch.testing.assert_close(first_output(loaded, name).cpu(), expected, rtol=0, atol=5e-3)


# Copies.


@over_classes
def test_copies_of_a_model(name, tmp_path):
    """Deep copies, pickles and `torch.save`: the same outputs, tied weights still tied, nothing shared."""
    for options in variants(name):
        model = make_model(name, **options, tie_word_embeddings=True, embedding_size=6)
        expected = first_output(model, name)
        torch.save(model, tmp_path / "model.pt")
        copies = [
            pickle.loads(pickle.dumps(model)),
            copy.deepcopy(model),
            torch.load(tmp_path / "model.pt", weights_only=False),
        ]
        for copied in copies:
            assert torch.equal(first_output(copied, name), expected)
            assert len(list(copied.parameters())) == len(list(model.parameters()))
            with torch.no_grad():
                for parameter in copied.parameters():
                    parameter.zero_()
        assert torch.equal(first_output(model, name), expected)


@over_families
def test_copies_of_a_configuration(config_class):
    """Equal to what was copied, and no longer one with it."""
    config = config_class(vocab_size=11, hidden_size=4, id2label={0: "a", 1: "b"}, dtype=torch.bfloat16)
    for copied in (copy.deepcopy(config), copy.copy(config), pickle.loads(pickle.dumps(config))):
        assert copied == config
        assert copied.to_dict() == config.to_dict()
        copied.hidden_size = 8
        assert config.hidden_size == 4


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", GENERATIVE)
def test_a_text_goes_on_twice(name, static):
    """A cache that is copied in the middle of a text serves two continuations, neither of which sees the other."""
    for options in variants(name):
        model = make_model(name, **options)
        model.generation_config.eos_token_id = None
        make = (lambda config: StaticCache(config=config, max_cache_len=32)) if static else DynamicCache
        prompt = {"inputs": make_tokens(2, 4)}
        if name in SEQ2SEQ:
            whole = model.generate(**prompt, max_new_tokens=6)
            begun = model.generate(**prompt, max_new_tokens=3, return_dict_in_generate=True)
            rest = {"decoder_input_ids": begun.sequences, "decoder_attention_mask": torch.ones_like(begun.sequences)}
        else:
            cache = make(config=model.config)
            whole = model.generate(**prompt, max_new_tokens=6)
            begun = model.generate(**prompt, max_new_tokens=3, return_dict_in_generate=True, past_key_values=cache)
            prompt, rest = {}, {"inputs": begun.sequences}
        kept = copy.deepcopy(begun.past_key_values)
        model.generate(**prompt, **rest, max_new_tokens=3, past_key_values=begun.past_key_values, do_sample=True)
        again = model.generate(**prompt, **rest, max_new_tokens=3, past_key_values=pickle.loads(pickle.dumps(kept)))
        assert torch.equal(again, whole)


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_static_caches_read_prompts_in_chunks(chunk_size):
    """A static cache is made without the sizes of attention heads, which nothing here has."""
    for options in variants("RNNForCausalLM"):
        model = make_model("RNNForCausalLM", **options)
        prompt = {"inputs": make_tokens(2, 5), "max_new_tokens": 4}
        actual = model.generate(**prompt, cache_implementation="static", prefill_chunk_size=chunk_size)
        assert torch.equal(actual, model.generate(**prompt, use_cache=False))


def test_a_model_of_remote_code_goes_to_another_process(tmp_path):
    """Where `hf_rnn` is not installed, a model that came with its code is pickled and used in a spawned process."""
    model = make_model("RNNForCausalLM")
    model.save_pretrained(tmp_path / "model")
    prompt = make_tokens(2, 4)
    torch.save((prompt, model.generate(prompt, max_new_tokens=4)), tmp_path / "expected.pt")
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import multiprocessing
            import sys
            from concurrent.futures import ProcessPoolExecutor

            sys.modules["hf_rnn"] = None

            if __name__ == "__main__":
                import torch
                from transformers import AutoModelForCausalLM

                model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)
                assert type(model).__module__.startswith("transformers_modules."), type(model)
                prompt, expected = torch.load("expected.pt")
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                    assert torch.equal(pool.submit(model.generate, prompt, max_new_tokens=4).result(), expected)
            """
        )
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    process = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr[-3000:]


@pytest.mark.parametrize("name", GENERATIVE)
def test_two_threads_on_one_model(name):
    """Neither sees the state of the other, nor what the other asked to be returned."""
    for options in variants(name):
        model = make_model(name, **options)
        prompts = [make_tokens(3, 5, seed=seed) for seed in range(4)]

        def work(prompt, model=model, prompts=prompts):
            output = model.generate(
                prompt,
                max_new_tokens=12,
                num_beams=2 if prompt is prompts[1] else 1,
                output_hidden_states=prompt is prompts[2],
                output_scores=True,
                return_dict_in_generate=True,
            )
            field = "decoder_hidden_states" if name in SEQ2SEQ else "hidden_states"
            return output.sequences, torch.stack(output.scores), output.get(field)

        expected = [work(prompt) for prompt in prompts]
        with ThreadPoolExecutor(len(prompts)) as pool:
            for actual, one in zip(pool.map(work, prompts), expected):
                assert torch.equal(actual[0], one[0])
                torch.testing.assert_close(actual[1], one[1], rtol=0, atol=1e-12)
                assert (actual[2] is None) == (one[2] is None)


# Compiled decoding.


def decode(model, name, steps, source, tokens):
    """Logits of one token after the other with a static cache."""
    config = model.config.get_text_config(decoder=True)
    cache = StaticCache(config=config, max_cache_len=16)
    if name in SEQ2SEQ:
        from transformers import EncoderDecoderCache

        cache = EncoderDecoderCache(cache, StaticCache(config=config, max_cache_len=16))
    key = "decoder_input_ids" if name in SEQ2SEQ else "input_ids"
    logits = []
    for position in range(steps):
        with torch.no_grad():
            output = model(**source, **{key: tokens[:, position : position + 1]}, past_key_values=cache)
        logits.append(output.logits.clone())
    return torch.cat(logits, dim=1)


def check_compiled_decoding(name, options, backend):
    """One graph without a break, which the second and all later steps share."""
    model = make_model(name, torch.float32, **options)
    tokens = make_tokens(2, 6)
    source = {}
    if name in SEQ2SEQ:
        with torch.no_grad():
            encoded = model.get_encoder()(make_tokens(2, 5, seed=1))
        source = {"encoder_outputs": encoded}
    expected = decode(model, name, 6, source, tokens)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    compiled.config = model.config
    torch.testing.assert_close(decode(compiled, name, 6, source, tokens), expected, rtol=0, atol=1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(decode(compiled, name, 6, source, tokens), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", GENERATIVE)
def test_decoding_in_one_graph(name):
    """Every cell, decoder and score."""
    cells = [{"cell_type": cell} for cell in RECURRENT_CELLS] if name in SEQ2SEQ else []
    for options in [*variants(name), *cells]:
        check_compiled_decoding(name, options, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", GENERATIVE)
def test_compiled_decoding(name):
    """The same by the real compiler."""
    for options in variants(name):
        check_compiled_decoding(name, options, "inductor")


def test_layers_are_not_split():
    """Whoever spreads a model over devices keeps a recurrent layer in one piece."""
    for _, model_class in MODEL_CLASSES.values():
        assert RecurrentLayer.__name__ in model_class._no_split_modules
