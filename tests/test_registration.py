"""What can be named: the table, the Auto classes, configurations and their checks, outputs, arguments of forward."""

import inspect
import itertools
import math
import re

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import OutputRecorder

import hf_rnn
from hf_rnn import ATTENTION_SCORES, RECURRENT_CELLS, REGISTRATION, RNNConfig, RNNSeq2SeqConfig
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
    options_of,
)


TEXT = [name for name, (config_class, _) in MODEL_CLASSES.items() if config_class is RNNConfig]
SEQ2SEQ = [name for name, (config_class, _) in MODEL_CLASSES.items() if config_class is RNNSeq2SeqConfig]
WITH_LABELS = [name for name in MODEL_CLASSES if not name.endswith("Model")]
over_classes = pytest.mark.parametrize("name", MODEL_CLASSES)
over_families = pytest.mark.parametrize("config_class", REGISTRATION, ids=lambda config_class: config_class.__name__)

# What other software is written against.
PUBLIC_TABLE = {
    "RNNConfig": {
        "RNNModel": ["AutoModel", "AutoModelForTextEncoding"],
        "RNNForCausalLM": ["AutoModelForCausalLM"],
        "RNNForMaskedLM": ["AutoModelForMaskedLM"],
        "RNNForSequenceClassification": ["AutoModelForSequenceClassification"],
        "RNNForTokenClassification": ["AutoModelForTokenClassification"],
        "RNNForQuestionAnswering": ["AutoModelForQuestionAnswering"],
        "RNNForMultipleChoice": ["AutoModelForMultipleChoice"],
    },
    "RNNSeq2SeqConfig": {
        "RNNSeq2SeqModel": ["AutoModel"],
        "RNNSeq2SeqForConditionalGeneration": ["AutoModelForSeq2SeqLM"],
    },
}
OUTPUT_CLASSES = {
    "RNNModel": "BaseModelOutputWithPast",
    "RNNForCausalLM": "CausalLMOutputWithPast",
    "RNNForMaskedLM": "MaskedLMOutput",
    "RNNForSequenceClassification": "SequenceClassifierOutput",
    "RNNForTokenClassification": "TokenClassifierOutput",
    "RNNForQuestionAnswering": "QuestionAnsweringModelOutput",
    "RNNForMultipleChoice": "MultipleChoiceModelOutput",
    "RNNSeq2SeqModel": "Seq2SeqModelOutput",
    "RNNSeq2SeqForConditionalGeneration": "Seq2SeqLMOutput",
}


def test_public_names():
    """Every name that was promised is in the table, under its Auto classes."""
    table = {
        config.__name__: {cls.__name__: autos for cls, autos in rows.items()} for config, rows in REGISTRATION.items()
    }
    for config_name, rows in PUBLIC_TABLE.items():
        for name, auto_names in rows.items():
            assert [auto.__name__ for auto in table[config_name][name]] == auto_names
    assert RNNConfig.model_type == "rnn"
    assert RNNSeq2SeqConfig.model_type == "rnn_seq2seq"
    assert set(RECURRENT_CELLS) >= {"rnn_tanh", "rnn_relu", "gru", "lstm"}
    assert set(ATTENTION_SCORES) >= {"dot", "scaled_dot", "general", "additive"}


def test_all():
    """`__all__` holds what the table holds, and each name is there."""
    in_table = {cls.__name__ for config_class, rows in REGISTRATION.items() for cls in (config_class, *rows)}
    assert in_table <= set(hf_rnn.__all__)
    assert len(set(hf_rnn.__all__)) == len(hf_rnn.__all__)
    for name in hf_rnn.__all__:
        assert hasattr(hf_rnn, name)
    for name in ("REGISTRATION", "RECURRENT_CELLS", "ATTENTION_SCORES", "loop_only"):
        assert name in hf_rnn.__all__
    # No other model escapes the table.
    models = {
        name
        for name, value in vars(hf_rnn).items()
        if inspect.isclass(value) and issubclass(value, PreTrainedModel | PreTrainedConfig)
    }
    assert models == in_table


@over_families
def test_auto_classes(config_class):
    """Each Auto class makes its class from a configuration of the family."""
    config = AutoConfig.for_model(config_class.model_type, vocab_size=11, hidden_size=4)
    assert type(config) is config_class
    assert config.vocab_size == 11
    for model_class, auto_classes in REGISTRATION[config_class].items():
        assert model_class.config_class is config_class
        for auto_class in auto_classes:
            assert type(auto_class.from_config(config)) is model_class
    # Asked for twice it is done once.
    hf_rnn._register()
    assert type(AutoConfig.for_model(config_class.model_type)) is config_class


def test_auto_classes_refuse_other_families():
    """There is no sequence-to-sequence model in the family of encoders, and the other way round."""
    with pytest.raises(ValueError, match="RNNConfig"):
        transformers.AutoModelForSeq2SeqLM.from_config(make_config("RNNModel"))
    with pytest.raises(ValueError, match="RNNSeq2SeqConfig"):
        transformers.AutoModelForCausalLM.from_config(make_config("RNNSeq2SeqModel"))


def test_fields_and_their_defaults():
    """The fields with fixed names, with what they are where nothing is said."""
    common = {
        "cell_type": "lstm",
        "use_cache": True,
        "embedding_dropout": 0.0,
        "hidden_dropout": 0.0,
        "output_dropout": 0.0,
        "recurrent_dropout": 0.0,
        "residual": False,
    }
    defaults = {
        RNNConfig: common
        | {
            "num_hidden_layers": 2,
            "bidirectional": False,
            "classifier_dropout": None,
            "pooling": "last",
            "pooling_heads": 1,
            "pooling_attention_size": None,
            "use_crf": False,
            "crf_constraints": "auto",
            "id2intent": None,
            "tie_word_embeddings": False,
        },
        RNNSeq2SeqConfig: common
        | {
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_bidirectional": True,
            "attention_score": "general",
            "num_attention_heads": 1,
            "use_coverage": False,
            "decoder_type": "luong",
            "input_feeding": False,
            "tie_word_embeddings": True,
            "is_encoder_decoder": True,
        },
    }
    for config_class, fields in defaults.items():
        config = config_class(hidden_size=12)
        for field, value in fields.items():
            assert getattr(config, field) == value, field
        assert config.embedding_size == 12
        assert config_class(hidden_size=12, embedding_size=7).embedding_size == 7
        for field in ("vocab_size", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id"):
            assert hasattr(config, field)
        # Every field has its line in the documentation.
        for field in config_class.__annotations__:
            if field != "is_encoder_decoder" and not field.startswith("_"):
                assert f"        {field} (`" in config_class.__doc__ or field.endswith("_token_id"), field
    assert RNNSeq2SeqConfig().decoder_start_token_id is not None


@over_families
def test_scale_of_new_embeddings(config_class):
    """By the root of their width, and as large as was said where something was said."""
    assert config_class(hidden_size=12, embedding_size=25).initializer_range == 0.5
    assert config_class(hidden_size=100, initializer_range=None).initializer_range == 0.25
    config = config_class(hidden_size=100, initializer_range=0.7)
    assert config.initializer_range == 0.7
    assert config_class.from_dict(config.to_diff_dict()).initializer_range == 0.7
    config.initializer_range = None
    with pytest.raises(StrictDataclassError, match="`initializer_range` must be a positive finite number, got None"):
        config.validate()


@over_families
def test_there_is_no_limit_to_the_length_of_a_text(config_class, tmp_path):
    """Who asks for one gets a number beyond all texts; it is no field, so that no checkpoint can say otherwise."""
    config = config_class(hidden_size=12)
    limit = config.max_position_embeddings
    assert limit >= 2**31 - 1
    assert config.get_text_config(decoder=True).max_position_embeddings == limit
    config.max_position_embeddings = limit
    config.save_pretrained(tmp_path)
    assert "max_position_embeddings" not in (tmp_path / "config.json").read_text()
    assert AutoConfig.from_pretrained(tmp_path).max_position_embeddings == limit
    mistakes = [
        lambda value: setattr(config, "max_position_embeddings", value),
        lambda value: config_class(max_position_embeddings=value),
        lambda value: AutoConfig.from_pretrained(tmp_path, max_position_embeddings=value),
    ]
    for mistake, value in itertools.product(mistakes, (512, -1, None, "many")):
        with pytest.raises(ValueError, match=re.escape("`max_position_embeddings` cannot be given")):
            mistake(value)


def test_derived_sizes():
    """Heads size themselves from a property, so that two directions fit."""
    assert RNNConfig(hidden_size=12).output_size == 12
    assert RNNConfig(hidden_size=12, bidirectional=True).output_size == 24
    assert RNNSeq2SeqConfig(hidden_size=12).encoder_output_size == 24
    assert RNNSeq2SeqConfig(hidden_size=12, encoder_bidirectional=False).encoder_output_size == 12


def test_what_transformers_asks_of_a_configuration():
    """Layer types for caches, and the decoder as a text model of its own."""
    config = RNNConfig(num_hidden_layers=3)
    assert config.layer_types == ["recurrent_state"] * 3
    assert config.get_text_config(decoder=True).layer_types == config.layer_types
    config = RNNSeq2SeqConfig(encoder_layers=1, decoder_layers=3)
    decoder = config.get_text_config(decoder=True)
    assert decoder.num_hidden_layers == 3
    assert decoder.layer_types == config.layer_types == ["recurrent_state"] * 3
    assert config.num_hidden_layers == 1
    # Asking changed nothing.
    assert (config.encoder_layers, config.decoder_layers) == (1, 3)
    for config_class in REGISTRATION:
        assert "past_key_values" in config_class.keys_to_ignore_at_inference


SHARED_MISTAKES = [
    ("vocab_size", 0, "at least 1"),
    ("vocab_size", "many", "int"),
    ("vocab_size", 2.5, "int"),
    ("vocab_size", True, "int"),
    ("hidden_size", 0, "at least 1"),
    ("hidden_size", -3, "at least 1"),
    ("hidden_size", None, "int"),
    ("embedding_size", 0, "at least 1"),
    ("embedding_size", "wide", "int"),
    ("cell_type", "lstm2", "['gru', 'lstm', 'rnn_relu', 'rnn_tanh']"),
    ("cell_type", None, "str"),
    ("embedding_dropout", 1.0, "[0, 1)"),
    ("hidden_dropout", -0.1, "[0, 1)"),
    ("output_dropout", 1.5, "[0, 1)"),
    ("recurrent_dropout", math.nan, "[0, 1)"),
    ("hidden_dropout", "some", "float"),
    ("initializer_range", 0.0, "positive finite"),
    ("initializer_range", -0.1, "positive finite"),
    ("initializer_range", math.inf, "positive finite"),
    ("forget_gate_bias", math.nan, "finite"),
    ("residual", "yes", "bool"),
    ("tie_word_embeddings", 1, "bool"),
    ("use_cache", "yes", "bool"),
    ("pad_token_id", "pad", "int"),
    ("eos_token_id", 1.5, "int"),
]
MISTAKES = {
    RNNConfig: [
        ("num_hidden_layers", 0, "at least 1"),
        ("num_hidden_layers", 1.0, "int"),
        ("bidirectional", "both", "bool"),
        ("pooling", "first", "['attention', 'concat', 'last', 'max', 'mean']"),
        ("pooling_heads", 0, "at least 1"),
        ("pooling_heads", 2, "`pooling='attention'` alone, got 2 with 'last'"),
        ("pooling_attention_size", 8, "`pooling='attention'` alone, got 8 with 'last'"),
        ("pooling_attention_size", 0, "at least 1"),
        ("pooling_attention_size", 1.5, "int"),
        ("classifier_dropout", 2, "[0, 1)"),
        ("use_crf", 1, "bool"),
        ("crf_constraints", "iob1", "['auto', 'bilou', 'bio', 'bioes', 'iob2', 'iobes', 'none']"),
        ("crf_constraints", None, "str"),
        ("id2intent", {}, "0, 1, 2, ..."),
        ("id2intent", {1: "ask"}, "0, 1, 2, ..."),
    ],
    RNNSeq2SeqConfig: [
        ("encoder_layers", 0, "at least 1"),
        ("decoder_layers", -1, "at least 1"),
        ("encoder_bidirectional", 2, "bool"),
        ("attention_score", "cosine", "['additive', 'dot', 'general', 'local', 'location', 'normalized_additive'"),
        ("attention_score", 3, "str"),
        ("num_attention_heads", 0, "at least 1"),
        ("num_attention_heads", 5, "divide `hidden_size` (512)"),
        ("attention_window", 0, "at least 1"),
        ("location_filters", -2, "at least 1"),
        ("location_width", 2**30, "at most"),
        ("location_width", 4, "odd"),
        ("use_coverage", 1, "bool"),
        ("decoder_type", "transformer", "['bahdanau', 'gnmt', 'luong']"),
        ("input_feeding", "yes", "bool"),
        ("decoder_start_token_id", "go", "int"),
        ("pointer_generator", 1, "bool"),
        ("num_copy_ids", -1, "at least 0"),
        ("unk_token_id", 32000, "below `vocab_size` (32000)"),
        ("label_smoothing", 1.0, "[0, 1)"),
        ("scheduled_sampling", 1.5, "[0, 1]"),
        ("coverage_loss_weight", -0.5, "at least 0"),
        ("guided_alignment_weight", float("inf"), "finite"),
    ],
}


@over_families
def test_mistakes_in_a_configuration(config_class):
    """Whatever is wrong, of a wrong type too: a `ValueError` names the field, the value and what is allowed."""
    for field, value, allowed in SHARED_MISTAKES + MISTAKES.get(config_class, []):
        with pytest.raises(ValueError, match=field) as error:
            config_class(**{field: value})
        message = str(error.value)
        shown = "got NoneType" if value is None else str(value)
        assert shown in message, (field, value, message)
        assert allowed in message, (field, value, message)


def test_fields_that_do_not_fit_together():
    """Each alone would be right."""
    for kind in ("bahdanau", "gnmt"):
        with pytest.raises(ValueError, match=rf"`input_feeding` must be False.*'luong'.*{kind}"):
            RNNSeq2SeqConfig(decoder_type=kind, input_feeding=True)
    with pytest.raises(ValueError, match=r"`decoder_layers` must be at least 2.*gnmt.*got 1"):
        RNNSeq2SeqConfig(decoder_type="gnmt", decoder_layers=1)
    with pytest.raises(ValueError, match=r"`unk_token_id` must be a token.*`pointer_generator` is True, got None"):
        RNNSeq2SeqConfig(pointer_generator=True)
    with pytest.raises(ValueError, match=r"`num_attention_heads` must divide `hidden_size` \(6\), got 4"):
        RNNSeq2SeqConfig(hidden_size=6, num_attention_heads=4)


@over_families
def test_mistakes_on_loading_a_configuration(config_class, tmp_path):
    """A saved configuration with another value asked for is checked like a new one."""
    config_class().save_pretrained(tmp_path)
    loaded = config_class.from_pretrained(tmp_path, hidden_size=8, cell_type="gru")
    assert (loaded.hidden_size, loaded.cell_type) == (8, "gru")
    for field, value in [("cell_type", "lstm2"), ("hidden_dropout", 3.0), ("vocab_size", 0)]:
        with pytest.raises(ValueError, match=field):
            config_class.from_pretrained(tmp_path, **{field: value})


def test_tables_are_open(monkeypatch):
    """A cell or a score that was added to its table is allowed in a configuration at once."""
    monkeypatch.setitem(RECURRENT_CELLS, "lstm2", RECURRENT_CELLS["lstm"])
    monkeypatch.setitem(ATTENTION_SCORES, "cosine", ATTENTION_SCORES["dot"])
    RNNConfig(cell_type="lstm2")
    RNNSeq2SeqConfig(cell_type="lstm2", attention_score="cosine")


def run(model, name, **options):
    """A forward of a padded batch with everything asked for."""
    inputs = make_inputs(name)
    mask = make_mask()
    for _ in inputs["input_ids"].shape[1:-1]:
        mask = mask.unsqueeze(1)
    inputs["attention_mask"] = mask.expand(inputs["input_ids"].shape)
    with torch.no_grad():
        return model(**inputs, **options)


@over_classes
def test_output_classes(name):
    """Stock output classes of transformers, with their stock fields."""
    model = make_model(name)
    output = run(model, name)
    assert type(output).__module__ == "transformers.modeling_outputs"
    assert type(output).__name__ == OUTPUT_CLASSES.get(name, type(output).__name__)
    if name in WITH_LABELS:
        assert output.loss.shape == ()
        assert next(iter(output)) == "loss"
    assert "hidden_states" not in output
    assert "decoder_hidden_states" not in output
    assert "cross_attentions" not in output


def assert_same_structure(actual, expected):
    """The same values in the same nesting."""
    assert type(actual) is type(expected)
    if isinstance(expected, tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected):
            assert_same_structure(one, other)
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@over_classes
def test_tuples(name):
    """The same without names."""
    model = make_model(name)
    for options in ({}, {"output_hidden_states": True, "output_attentions": True}):
        expected = run(model, name, **options)
        assert isinstance(expected, ModelOutput)
        assert_same_structure(run(model, name, return_dict=False, **options), expected.to_tuple())


@pytest.mark.parametrize("name", TEXT)
def test_hidden_states(name):
    """One for each layer, embeddings first, the top one as the model returns it."""
    for options in options_of(name):
        model = make_model(name, **options, num_hidden_layers=3)
        output = run(model, name, output_hidden_states=True)
        inputs = make_inputs(name)["input_ids"]
        rows, length = inputs.flatten(0, -2).shape
        assert len(output.hidden_states) == 4
        assert output.hidden_states[0].shape == (rows, length, model.config.input_size)
        # Words are made of the embeddings, and a reader adds to them.
        if "word_encoder" not in options and "question_attention" not in options:
            assert torch.equal(output.hidden_states[0], model.get_input_embeddings()(inputs.flatten(0, -2)))
        for states in output.hidden_states[1:]:
            assert states.shape == (rows, length, model.config.output_size)
        if "last_hidden_state" in output:
            assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
        model.config.output_hidden_states = True
        assert len(run(model, name).hidden_states) == 4


@pytest.mark.skipif(
    not hasattr(OutputRecorder, "num_hidden_layers_key"), reason="older transformers know no negative indices"
)
@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_chosen_hidden_states(name):
    """Chosen by index, from the end too, where encoder and decoder have different numbers of layers."""
    if name in SEQ2SEQ:
        model = make_model(name, encoder_layers=2, decoder_layers=3)
        keys = {"encoder_hidden_states": 3, "decoder_hidden_states": 4}
    else:
        model, keys = make_model(name, num_hidden_layers=3), {"hidden_states": 4}
    everything = run(model, name, output_hidden_states=True)
    for chosen in ([0, -1], [-2]):
        output = run(model, name, output_hidden_states=chosen)
        for key, number in keys.items():
            kept = {index % number for index in chosen}
            for index, (states, expected) in enumerate(zip(output[key], everything[key], strict=True)):
                assert states is None if index not in kept else torch.equal(states, expected)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_hidden_states_and_attentions_of_a_translator(name):
    """One hidden state for each layer on both sides, and weights that sum to one over the source's tokens."""
    for options in options_of(name):
        model = make_model(name, **options)
        config = model.config
        output = run(model, name, output_hidden_states=True, output_attentions=True)
        inputs, mask = make_inputs(name), make_mask().bool()
        (rows, source), target = inputs["input_ids"].shape, inputs["decoder_input_ids"].shape[1]
        embed = model.get_input_embeddings()
        for states, ids, num_layers, size in [
            (output.encoder_hidden_states, inputs["input_ids"], config.encoder_layers, config.encoder_output_size),
            (output.decoder_hidden_states, inputs["decoder_input_ids"], config.decoder_layers, config.hidden_size),
        ]:
            assert len(states) == num_layers + 1
            assert torch.equal(states[0], embed(ids))
            assert all(state.shape == (*ids.shape, size) for state in states[1:])
        assert torch.equal(output.encoder_hidden_states[-1], output.encoder_last_hidden_state)
        (weights,) = output.cross_attentions
        assert weights.shape == (rows, config.num_attention_heads, target, source)
        assert (weights.masked_select(~mask[:, None, None]) == 0).all()
        has_tokens = mask.any(1).double()[:, None, None].expand(weights.shape[:-1])
        torch.testing.assert_close(weights.sum(-1), has_tokens, rtol=0, atol=1e-12)
        # The one sees a window only, and states of the other grow until a softmax saturates.
        if config.attention_score != "local" and config.cell_type != "rnn_relu":
            assert (weights.masked_select(mask[:, None, None]) > 0).all()


@over_classes
def test_embeddings_in_place_of_tokens(name):
    """`inputs_embeds` gives what `input_ids` gives, on both sides."""
    model = make_model(name)
    embed = model.get_input_embeddings()
    expected = run(model, name)
    inputs = make_inputs(name)
    mask = make_mask()
    for _ in inputs["input_ids"].shape[1:-1]:
        mask = mask.unsqueeze(1)
    mask = mask.expand(inputs["input_ids"].shape)
    for keys in [("input_ids",), ("decoder_input_ids",), ("input_ids", "decoder_input_ids")]:
        if not set(keys) <= set(inputs):
            continue
        others = dict(inputs)
        for key in keys:
            others[key.replace("input_ids", "inputs_embeds")] = embed(others.pop(key))
        with torch.no_grad():
            actual = model(**others, attention_mask=mask)
        assert_same_structure(actual.to_tuple(), expected.to_tuple())


@pytest.mark.parametrize("name", GENERATIVE)
def test_logits_to_keep(name):
    """All, the last few, or those at given positions."""
    model = make_model(name)
    inputs = make_inputs(name, with_labels=False)
    with torch.no_grad():
        logits = model(**inputs).logits
        assert_same_structure(model(**inputs, logits_to_keep=0).logits, logits)
        assert_same_structure(model(**inputs, logits_to_keep=2).logits, logits[:, -2:])
        positions = torch.tensor([3, 0])
        assert_same_structure(model(**inputs, logits_to_keep=positions).logits, logits[:, positions])


def test_default_inputs_of_the_decoder():
    """From labels, or for the bare model from the source, shifted right; -100 becomes padding."""
    name = "RNNSeq2SeqForConditionalGeneration"
    model = make_model(name)
    source, labels = make_tokens(2, 5), make_tokens(2, 4, seed=1)
    labels[1, 2:] = -100
    shifted = model.prepare_decoder_input_ids_from_labels(labels)
    config = model.config
    assert shifted[:, 0].tolist() == [config.decoder_start_token_id] * 2
    assert shifted[0, 1:].tolist() == labels[0, :-1].tolist()
    assert shifted[1, 1:].tolist() == [*labels[1, :2].tolist(), config.pad_token_id]
    with torch.no_grad():
        from_labels = model(source, labels=labels)
        explicit = model(source, decoder_input_ids=shifted, labels=labels)
        assert_same_structure(from_labels.logits, explicit.logits)
        expected = torch.nn.functional.cross_entropy(explicit.logits.float().flatten(0, 1), labels.flatten())
        torch.testing.assert_close(from_labels.loss.float(), expected)
        base = make_model("RNNSeq2SeqModel")
        start = torch.full((2, 1), config.decoder_start_token_id)
        target = torch.cat([start, source[:, :-1]], dim=1)
        assert_same_structure(base(source)[0], base(source, decoder_input_ids=target)[0])
    model.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="decoder_start_token_id"):
        model(source, labels=labels)


@pytest.mark.parametrize("name", GENERATIVE + [name for name in MODEL_CLASSES if name.endswith("Model")])
def test_when_the_state_is_returned(name):
    """As the configuration says, but not while training unless it is asked for or given."""
    inputs = make_inputs(name, with_labels=False)
    model = make_model(name)
    assert model(**inputs).past_key_values is not None
    assert model(**inputs, use_cache=False).past_key_values is None
    model.train()
    assert model(**inputs).past_key_values is None
    assert model(**inputs, use_cache=True).past_key_values is not None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    output = model(**inputs, past_key_values=cache)
    assert output.past_key_values is cache
    assert cache.get_seq_length() > 0
    model = make_model(name, use_cache=False)
    assert model(**inputs).past_key_values is None
    assert model(**inputs, use_cache=True).past_key_values is not None


@pytest.mark.parametrize("name", [name for name in TEXT if name not in GENERATIVE])
def test_two_directions_have_no_state_to_carry(name):
    """None is returned, and none is taken."""
    model = make_model(name, bidirectional=True)
    output = run(model, name)
    assert output.get("past_key_values") is None
    base = model if name == "RNNModel" else model.model
    assert base(make_tokens(2, 3), use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match=r"`past_key_values` must be None where `bidirectional` is True"):
        base(make_tokens(2, 3), past_key_values=DynamicCache(config=model.config))


def test_a_causal_language_model_has_one_direction():
    """It must not see what it predicts."""
    with pytest.raises(ValueError, match=r"`bidirectional` must be False.*got True"):
        hf_rnn.RNNForCausalLM(make_config("RNNForCausalLM", bidirectional=True))


@over_classes
def test_tokens_or_embeddings(name):
    """Exactly one of them."""
    model = make_model(name)
    inputs = make_inputs(name, with_labels=False)
    embeddings = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
        model(**inputs, **embeddings)
    with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
        model(**{key: value for key, value in inputs.items() if key != "input_ids"})
    if name in SEQ2SEQ:
        target = model.get_input_embeddings()(inputs["decoder_input_ids"])
        with pytest.raises(ValueError, match="exactly one of `decoder_input_ids` and `decoder_inputs_embeds`"):
            model(**inputs, decoder_inputs_embeds=target)
        with pytest.raises(ValueError, match="`decoder_input_ids` or `decoder_inputs_embeds`"):
            model(**embeddings)


@over_classes
def test_masks_of_a_wrong_shape(name):
    """Too short, of other rows, with other dimensions: an error that says what is expected, and no broadcasting."""
    model = make_model(name)
    inputs = make_inputs(name, with_labels=False)
    rows, length = inputs["input_ids"].shape[0], inputs["input_ids"].shape[-1]
    middle = inputs["input_ids"].shape[1:-1]
    shapes = [(rows, *middle, length - 1), (rows, *middle, 1), (rows, *middle, length, length), (length,)]
    for shape in shapes:
        for fill in (torch.ones, torch.zeros):
            with pytest.raises(ValueError, match="attention_mask"):
                model(**inputs, attention_mask=fill(shape, dtype=torch.long))


@over_classes
def test_masks_of_other_rows(name):
    """A mask for another batch is no mask for this one."""
    model = make_model(name)
    inputs = make_inputs(name, with_labels=False)
    _, *rest = inputs["input_ids"].shape
    for rows in (1, 2):
        for fill in (torch.ones, torch.zeros):
            with pytest.raises(ValueError, match="attention_mask"):
                model(**inputs, attention_mask=fill(rows, *rest, dtype=torch.long))


@pytest.mark.parametrize("name", [name for name in MODEL_CLASSES if name not in ("RNNModel", "RNNForCausalLM")])
def test_masks_that_are_too_long(name):
    """Where no state is carried, a mask covers the tokens that are given and nothing more."""
    model = make_model(name)
    inputs = make_inputs(name, with_labels=False)
    *rest, length = inputs["input_ids"].shape
    for fill in (torch.ones, torch.zeros):
        with pytest.raises(ValueError, match="attention_mask"):
            model(**inputs, attention_mask=fill(*rest, length + 2, dtype=torch.long))


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_masks_beside_encoder_outputs(name):
    """A source that was encoded before has a mask of its own length."""
    model = make_model(name)
    inputs = make_inputs(name, with_labels=False)
    encoded = model.get_encoder()(inputs.pop("input_ids"))
    rows, length = encoded.last_hidden_state.shape[:2]
    for shape in [(rows, 1), (rows, length - 1), (rows, length + 1), (1, length)]:
        with pytest.raises(ValueError, match="attention_mask"):
            model(**inputs, encoder_outputs=encoded, attention_mask=torch.ones(shape))


@pytest.mark.parametrize("options", DECODERS, ids=case_id)
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_encoder_outputs(name, options):
    """As an output or a tuple; without the final states, or with those of another encoder, the decoder cannot start."""
    model = make_model(name, **options)
    inputs = make_inputs(name, with_labels=False)
    with torch.no_grad():
        expected = model(**inputs)
        encoded = model.get_encoder()(inputs.pop("input_ids"))
        for given in (encoded, encoded.to_tuple(), list(encoded.to_tuple())):
            assert_same_structure(model(**inputs, encoder_outputs=given)[0], expected[0])
        hidden_states, final_states = encoded.to_tuple()
        for given in ((hidden_states,), BaseModelOutput(last_hidden_state=hidden_states)):
            with pytest.raises(ValueError, match="`encoder_outputs` must hold the encoder's final states"):
                model(**inputs, encoder_outputs=given)
        with pytest.raises(ValueError, match="final states"):
            model(**inputs, encoder_outputs=(hidden_states, final_states[:, :-1]))


@over_classes
def test_no_tokens_at_all(name):
    """A batch without rows gives an empty output, not a crash."""
    model = make_model(name)
    inputs = {key: ids[:0] for key, ids in make_inputs(name, with_labels=False).items()}
    output = model(**inputs)
    assert output[0].shape[0] == 0


def test_vocabulary_of_the_matrix():
    """The tests hold padding for a token like any other, which only a vocabulary that has it can show."""
    for name in MODEL_CLASSES:
        config = make_config(name)
        assert 0 < config.pad_token_id < VOCAB_SIZE == config.vocab_size


@over_classes
def test_tuples_by_configuration(name):
    """`return_dict=False` in the configuration gives tuples, as it does in a call."""
    model, inputs = make_model(name), make_inputs(name)
    expected = model(**inputs, return_dict=False)
    model.config.return_dict = False
    actual = model(**inputs)
    assert isinstance(actual, tuple)
    assert len(actual) == len(expected)
    torch.testing.assert_close(actual[0], expected[0])
