"""Anything goes in: out comes a clear `ValueError`, or what the plain loop gives for each row alone and unpadded."""

import copy
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import StaticCache
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from hf_rnn import ATTENTION_SCORES, RECURRENT_CELLS, RNNConfig, RNNSeq2SeqConfig, loop_only
from hf_rnn.configuration_rnn import POOLING_TYPES, QUESTION_ATTENTIONS
from hf_rnn.configuration_rnn_seq2seq import DECODER_TYPES
from matrix import BOS, EOS, GENERATIVE, LANGUAGE_MODELS, MODEL_CLASSES, PAD, VOCAB_SIZE, WORDS
from test_laws_distributed import backward_over


SEQ2SEQ = [name for name, (config_class, _) in MODEL_CLASSES.items() if config_class is RNNSeq2SeqConfig]
STATEFUL = ["RNNModel", "RNNForCausalLM", *SEQ2SEQ]


def fuzz(check, cases, **strategies):
    """Two tests of a property: `cases` examples, the same ones each time, and on request ten times as many."""

    def make(number):
        limits = settings(
            max_examples=number,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        return limits(given(**strategies)(check))

    def test_many():
        make(10 * cases)()

    test_many.__doc__ = check.__doc__
    return make(cases), pytest.mark.slow(test_many)


# Configurations.


def is_int(value, minimum=1, maximum=math.inf):
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum


def is_size(value):
    return is_int(value, maximum=2**31 - 1)


def is_depth(value):
    return is_int(value, maximum=4096)


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_token(value):
    return value is None or is_int(value, 0)


def is_width(value):
    return is_int(value, 1, 2**20)


def is_dropout(value):
    return is_number(value) and 0 <= value < 1


def is_finite(value):
    return is_number(value) and abs(value) < math.inf


def is_one_of(*allowed):
    return lambda value: isinstance(value, str) and value in allowed


def is_bool(value):
    return isinstance(value, bool)


def is_names(value):
    """A dictionary from 0, 1, 2, ... or these as strings, all of one type, to strings."""
    of_one_type = len({type(key) for key in value}) == 1 and all(isinstance(name, str) for name in value.values())
    return of_one_type and set(map(str, value)) == set(map(str, range(len(value)))) and not any(map(is_bool, value))


# Written down once more from the documentation of the fields: which values each of them takes.
SHARED_FIELDS = {
    "vocab_size": is_size,
    "embedding_size": lambda value: value is None or is_size(value),
    "hidden_size": is_size,
    "cell_type": is_one_of(*RECURRENT_CELLS),
    "residual": is_bool,
    "embedding_dropout": is_dropout,
    "hidden_dropout": is_dropout,
    "output_dropout": is_dropout,
    "recurrent_dropout": is_dropout,
    "initializer_range": lambda value: value is None or (is_finite(value) and value > 0),
    "forget_gate_bias": is_finite,
    "tie_word_embeddings": is_bool,
    "use_cache": is_bool,
    "pad_token_id": is_token,
    "bos_token_id": is_token,
    "eos_token_id": lambda value: is_token(value) or (isinstance(value, list) and all(is_int(i, 0) for i in value)),
    "num_labels": lambda value: is_int(value, maximum=2**20),
    "problem_type": lambda value: (
        value is None or is_one_of("regression", "single_label_classification", "multi_label_classification")(value)
    ),
    "dtype": lambda value: (
        value is None or is_one_of("float16", "half", "bfloat16", "float32", "float", "float64", "double")(value)
    ),
}
FIELDS = {
    RNNConfig: SHARED_FIELDS
    | {
        "num_hidden_layers": is_depth,
        "bidirectional": is_bool,
        "pooling": is_one_of(*POOLING_TYPES),
        "pooling_heads": is_width,
        "pooling_attention_size": lambda value: value is None or is_width(value),
        "classifier_dropout": lambda value: value is None or is_dropout(value),
        "use_crf": is_bool,
        "crf_constraints": is_one_of("auto", "none", "bio", "iob2", "bioes", "iobes", "bilou"),
        "id2intent": lambda value: value is None or (isinstance(value, dict) and is_names(value)),
        "question_attention": lambda value: value is None or is_one_of(*QUESTION_ATTENTIONS)(value),
        "sep_token_id": is_token,
        "word_encoder": lambda value: value is None or is_one_of("cnn", *RECURRENT_CELLS)(value),
        "first_continuation_id": is_token,
        "word_encoder_size": is_size,
        "word_encoder_width": is_size,
        "word_vocab_size": lambda value: is_int(value, 0, 2**31 - 1),
        "word_embedding_size": lambda value: value is None or is_size(value),
        "word_dropout": is_dropout,
    },
    RNNSeq2SeqConfig: SHARED_FIELDS
    | {
        "encoder_layers": is_depth,
        "decoder_layers": is_depth,
        "encoder_bidirectional": is_bool,
        "attention_score": is_one_of(*ATTENTION_SCORES),
        "num_attention_heads": is_int,
        "attention_window": is_width,
        "location_filters": is_width,
        "location_width": lambda value: is_width(value) and value % 2 == 1,
        "use_coverage": is_bool,
        "decoder_type": is_one_of(*DECODER_TYPES),
        "input_feeding": is_bool,
        "decoder_start_token_id": is_token,
        "pointer_generator": is_bool,
        "num_copy_ids": lambda value: is_int(value, 0, 2**20),
        "unk_token_id": is_token,
        "scheduled_sampling": lambda value: is_number(value) and 0 <= value <= 1,
        "label_smoothing": is_dropout,
        "coverage_loss_weight": lambda value: is_finite(value) and value >= 0,
        "guided_alignment_weight": lambda value: is_finite(value) and value >= 0,
    },
}
NAMES = [*RECURRENT_CELLS, *ATTENTION_SCORES, *POOLING_TYPES, *DECODER_TYPES, "float16", "regression", "auto", "bioes"]
SENSIBLE = [None, False, True, *range(-1, 13), 0.0, 0.1, 0.5, 0.999, *NAMES, {0: "ask", 1: "tell"}, {"0": "ask"}]
ANYTHING = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 2**31, 2**63, 10**30, -(10**30)])
    | st.floats()
    | st.sampled_from([math.nan, math.inf, -math.inf, 1.0, -0.0, 5e-324, 1.7e308])
    | st.text(max_size=5)
    | st.sampled_from(NAMES)
    | st.binary(max_size=3)
    | st.lists(st.integers() | st.none() | st.text(max_size=2), max_size=3)
    | st.tuples(st.integers())
    | st.dictionaries(st.text(max_size=2), st.integers(), max_size=2)
)


# For each field right values, values that are right for another field, and anything.
VALUES = {
    (config_class, field): (
        st.sampled_from([value for value in SENSIBLE if is_valid(value)]),
        st.sampled_from(SENSIBLE),
        ANYTHING,
    )
    for config_class, fields in FIELDS.items()
    for field, is_valid in fields.items()
}
FIELD_NAMES = {
    config_class: st.lists(st.sampled_from(list(fields)), max_size=6, unique=True)
    for config_class, fields in FIELDS.items()
}
FAMILIES = st.sampled_from(list(FIELDS))
KINDS = st.sampled_from([0, 0, 0, 0, 1, 2])


@st.composite
def config_fields(draw):
    """A family and values for some of its fields."""
    config_class = draw(FAMILIES)
    fields = {field: draw(VALUES[config_class, field][draw(KINDS)]) for field in draw(FIELD_NAMES[config_class])}
    return config_class, fields


def lacks_unknown_token(value_of):
    unknown = value_of["unk_token_id"]
    return value_of["pointer_generator"] if unknown is None else unknown >= value_of["vocab_size"]


def uses(field, value):
    """Whether a field of words is used where there are none."""
    return lambda of: of["word_encoder"] is None and of[field] != value


# Fields of which each may be right by itself, how they do not fit together, and which of them is named then.
MISFITS = [
    (
        ["use_crf", "crf_constraints"],
        lambda of: of["use_crf"] and of["crf_constraints"] not in ("auto", "none"),
        "crf_constraints",
    ),
    (
        ["problem_type", "num_labels"],
        lambda of: of["problem_type"] == "single_label_classification" and of["num_labels"] == 1,
        "num_labels",
    ),
    (
        ["hidden_size", "num_attention_heads"],
        lambda of: of["hidden_size"] % of["num_attention_heads"],
        "num_attention_heads",
    ),
    (
        ["input_feeding", "decoder_type"],
        lambda of: of["input_feeding"] and of["decoder_type"] != "luong",
        "input_feeding",
    ),
    (
        ["pooling", "pooling_heads"],
        lambda of: of["pooling"] != "attention" and of["pooling_heads"] != 1,
        "pooling_heads",
    ),
    (
        ["pooling", "pooling_attention_size"],
        lambda of: of["pooling"] != "attention" and of["pooling_attention_size"] is not None,
        "pooling_attention_size",
    ),
    (["word_encoder", "first_continuation_id"], uses("first_continuation_id", None), "first_continuation_id"),
    (
        ["word_encoder", "first_continuation_id"],
        lambda of: of["word_encoder"] is not None and of["first_continuation_id"] is None,
        "first_continuation_id",
    ),
    (["word_encoder", "word_vocab_size"], uses("word_vocab_size", 0), "word_vocab_size"),
    (
        ["word_encoder", "word_encoder_width"],
        lambda of: of["word_encoder"] == "cnn" and of["word_encoder_width"] % 2 == 0,
        "word_encoder_width",
    ),
    (
        ["word_encoder", "word_encoder_size"],
        lambda of: of["word_encoder"] not in (None, "cnn") and of["word_encoder_size"] % 2 == 1,
        "word_encoder_size",
    ),
    (["word_vocab_size"], lambda of: of["word_vocab_size"] == 1, "word_vocab_size"),
    (
        ["word_encoder", "question_attention"],
        lambda of: of["word_encoder"] is not None and of["question_attention"] is not None,
        "question_attention",
    ),
    (["unk_token_id", "pointer_generator", "vocab_size"], lacks_unknown_token, "unk_token_id"),
    (
        ["decoder_type", "decoder_layers"],
        lambda of: of["decoder_type"] == "gnmt" and of["decoder_layers"] < 2,
        "decoder_layers",
    ),
]


def problems_of(config_class, fields):
    """The fields of which one has to be named: those that are wrong, and those that do not fit to others."""
    known = FIELDS[config_class]
    wrong = [field for field, value in fields.items() if not known[field](value)]
    value_of = {field: fields.get(field, getattr(config_class, field, None)) for field in known}
    for names, do_not_fit, named in MISFITS:
        if set(names) <= known.keys() and not set(names) & set(wrong) and do_not_fit(value_of):
            wrong.append(named)
    return wrong


def check_config(case):
    """A configuration is refused with the name of a wrong field, exactly where one is wrong, and else survives."""
    config_class, fields = case
    expected = problems_of(config_class, fields)
    if expected:
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            config_class(**copy.deepcopy(fields))
        assert any(field in str(caught.value) for field in expected), str(caught.value)
        return
    config = config_class(**copy.deepcopy(fields))
    for field, value in fields.items():
        if field == "dtype" and value is not None:
            value = getattr(torch, value)
        if field == "id2intent" and value is not None:
            value = {int(key): name for key, name in value.items()}
        if field in ("embedding_size", "word_embedding_size") and value is None:
            value = config.hidden_size
        if field == "initializer_range" and value is None:
            value = 2.5 / config.embedding_size**0.5
        assert getattr(config, field) == value
    assert config_class.from_dict(config.to_dict()).to_dict() == config.to_dict()


test_configurations, test_many_configurations = fuzz(check_config, 3000, case=config_fields())


# Forwards.


def make_fuzzed_model(name, options):
    """A small model with the given options whose parameters are all far from zero."""
    config_class, model_class = MODEL_CLASSES[name]
    common = {"vocab_size": VOCAB_SIZE, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    common |= {"decoder_start_token_id": BOS} if config_class is RNNSeq2SeqConfig else {"num_labels": 3}
    torch.manual_seed(0)
    model = model_class(config_class(**common, **options)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@st.composite
def models(draw, names):
    """A model of one of the classes with any options."""
    name = draw(st.sampled_from(names))
    heads = draw(st.integers(1, 2))
    options = {
        "cell_type": draw(st.sampled_from(list(RECURRENT_CELLS))),
        "hidden_size": heads * draw(st.integers(1, 4)),
        "embedding_size": draw(st.none() | st.integers(1, 5)),
        "residual": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if name in SEQ2SEQ:
        kind = draw(st.sampled_from([*DECODER_TYPES, "fed"]))
        options |= {
            "encoder_layers": draw(st.integers(1, 3)),
            "decoder_layers": draw(st.integers(2 if kind == "gnmt" else 1, 3)),
            "encoder_bidirectional": draw(st.booleans()),
            "attention_score": draw(st.sampled_from(list(ATTENTION_SCORES))),
            "num_attention_heads": heads,
            "decoder_type": "luong" if kind == "fed" else kind,
            "input_feeding": kind == "fed",
            "attention_window": draw(st.integers(1, 4)),
            "location_filters": draw(st.integers(1, 3)),
            "location_width": draw(st.sampled_from([1, 3, 5])),
            "use_coverage": draw(st.booleans()),
        }
    else:
        options |= {
            "num_hidden_layers": draw(st.integers(1, 3)),
            "bidirectional": name not in STATEFUL and draw(st.booleans()),
            "pooling": draw(st.sampled_from(POOLING_TYPES)),
            "use_crf": draw(st.booleans()),
            "id2label": draw(st.sampled_from([None, {0: "O", 1: "B-A", 2: "I-A"}])),
            "id2intent": draw(st.sampled_from([None, {0: "ask", 1: "tell"}])),
        }
        if name not in (*LANGUAGE_MODELS, *STATEFUL) and draw(st.booleans()):
            options |= draw(st.sampled_from(WORDS))
        if options["pooling"] == "attention":
            options["pooling_heads"] = draw(st.integers(1, 3))
            options["pooling_attention_size"] = draw(st.none() | st.integers(1, 5))
        if name == "RNNForQuestionAnswering" and "word_encoder" not in options:
            options["question_attention"] = draw(st.sampled_from([None, *QUESTION_ATTENTIONS]))
    return name, make_fuzzed_model(name, options)


MASK_TYPES = [torch.bool, torch.int64, torch.int32, torch.uint8, torch.float32, torch.float64, torch.float16]


@st.composite
def masks(draw, rows, length):
    """None, or zeros and ones of any type, with padding at the left, at the right, anywhere, or nothing but padding."""
    kind = draw(st.sampled_from(["none", "ones", "left", "right", "holes", "empty"]))
    if kind == "none":
        return None
    mask = torch.ones(rows, length, dtype=torch.bool)
    for row in range(rows):
        kept = draw(st.integers(0, length))
        if kind == "left":
            mask[row, : length - kept] = False
        elif kind == "right":
            mask[row, kept:] = False
        elif kind == "holes":
            mask[row] = torch.tensor(draw(st.lists(st.booleans(), min_size=length, max_size=length)), dtype=torch.bool)
        elif kind == "empty" and kept % 2:
            mask[row] = False
    return mask.to(draw(st.sampled_from(MASK_TYPES)))


@st.composite
def tokens(draw, *shape):
    seed = draw(st.integers(0, 1000))
    return torch.randint(0, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def forwards(draw):
    """A model, its inputs and masks; batches and texts may be empty."""
    name, model = draw(models(list(MODEL_CLASSES)))
    rows, length = draw(st.sampled_from([1, 2, 3, 4, 0])), draw(st.sampled_from([1, 2, 3, 4, 5, 6, 0]))
    choices = draw(st.integers(1, 3)) if name == "RNNForMultipleChoice" else None
    ids = draw(tokens(*((rows, length) if choices is None else (rows, choices, length))))
    mask = draw(masks(rows * (choices or 1), length))
    inputs = {"input_ids": ids}
    if mask is not None:
        inputs["attention_mask"] = mask.view(ids.shape)
    if name in SEQ2SEQ:
        target = draw(st.integers(0, 5))
        inputs["decoder_input_ids"] = draw(tokens(rows, target))
        target_mask = draw(masks(rows, target))
        if target_mask is not None:
            inputs["decoder_attention_mask"] = target_mask
    keep = draw(st.integers(0, 8) | st.lists(st.integers(-1, 5), max_size=3))
    return name, model, inputs, keep, draw(st.booleans())


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


@torch.no_grad()
def alone(model, inputs, row):
    """The plain loop over the tokens of one row, and where they lie."""
    kept, places = {}, {}
    for key, mask_key in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
        if key in inputs:
            mask = inputs.get(mask_key, torch.ones_like(inputs[key]))
            places[key] = mask[row].bool()
            kept[key] = inputs[key][row][places[key]].unsqueeze(0)
    with loop_only():
        return model(**kept, output_hidden_states=True, output_attentions=True), places


def check_forward(case):
    """Outputs, hidden states, attentions and states of a batch are those of its rows, and all of them are finite."""
    name, model, inputs, keep, embeds = case
    given_inputs = dict(inputs)
    needs_ids = any(getattr(model.config, field, None) for field in ("question_attention", "word_encoder"))
    if embeds and not needs_ids:
        for key in ("input_ids", "decoder_input_ids"):
            if key in inputs:
                ids = given_inputs.pop(key)
                given_inputs[key.replace("input_ids", "inputs_embeds")] = model.get_input_embeddings()(ids)
    with torch.no_grad():
        output = model(**given_inputs, output_hidden_states=True, output_attentions=True)
    for tensor in output.to_tuple():
        for part in tensor if isinstance(tensor, tuple) else (tensor,):
            assert not isinstance(part, torch.Tensor) or part.isfinite().all()
    if name == "RNNForMultipleChoice":
        rows, choices, _ = inputs["input_ids"].shape
        assert output.logits.shape == (rows, choices)
        for row in range(rows):
            for choice in range(choices):
                mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))[row, choice].bool()
                with torch.no_grad(), loop_only():
                    expected = model(inputs["input_ids"][row, choice][mask].view(1, 1, -1)).logits
                assert_same(output.logits[row, choice], expected[0, 0])
        return
    cache = output.get("past_key_values")
    for row in range(len(inputs["input_ids"])):
        expected, places = alone(model, inputs, row)
        source = places["input_ids"]
        place = places.get("decoder_input_ids", source)
        if name == "RNNForQuestionAnswering":
            for field in ("start_logits", "end_logits"):
                assert_same(output[field][row][source], expected[field][0])
                assert (output[field][row][~source] == torch.finfo(torch.float64).min).all()
        elif name == "RNNForSequenceClassification":
            assert_same(output.logits[row], expected.logits[0])
        else:
            assert_same(output[0][row][place], expected[0][0])
        for field, where in (
            ("hidden_states", source),
            ("encoder_hidden_states", source),
            ("decoder_hidden_states", place),
        ):
            for actual, one in zip(output.get(field) or (), expected.get(field) or ()):
                assert_same(actual[row][where], one[0])
        if name in SEQ2SEQ:
            (weights,), (one,) = output.cross_attentions, expected.cross_attentions
            assert_same(weights[row][:, place][..., source], one[0])
            assert (weights[row][..., ~source] == 0).all()
        if cache is not None:
            for layer, one in zip(state_layers(cache), state_layers(expected.past_key_values)):
                keys, values = layer.keys[row], layer.values[row]
                if keys.dim() == 2:  # of an attention, with a number for each position of the source
                    names = model.get_decoder().attention.state_names
                    of_source = len(source) * (len(names) - 1)
                    state = torch.cat([keys, values], dim=-1)
                    parts = [part[:, source] for part in state[:, :of_source].split(len(source), dim=-1)]
                    keys, *others = [*parts, state[:, of_source:]]
                    values = torch.cat(others, dim=-1)
                assert_same(keys, one.keys[0])
                assert_same(values, one.values[0])
    if name in GENERATIVE:
        check_kept_logits(model, given_inputs, keep, output.logits)


@torch.no_grad()
def check_kept_logits(model, inputs, keep, logits):
    length = logits.shape[1]
    if isinstance(keep, int):
        assert_same(model(**inputs, logits_to_keep=keep).logits, logits[:, max(length - keep, 0) if keep else 0 :])
    elif all(-length <= index < length for index in keep) or not len(logits):
        indices = torch.tensor([index for index in keep if -length <= index < length], dtype=torch.long)
        assert_same(model(**inputs, logits_to_keep=indices).logits, logits[:, indices])
    else:
        # Torch's own error for indices that are out of range.
        with pytest.raises(IndexError):
            model(**inputs, logits_to_keep=torch.tensor(keep))


def state_layers(cache):
    return getattr(cache, "self_attention_cache", cache).layers


test_forwards, test_many_forwards = fuzz(check_forward, 1000, case=forwards())


# Losses.

# With a number of labels, by which the loss is divided.
LABELLED = ["RNNForCausalLM", "RNNForMaskedLM", "RNNForSequenceClassification", "RNNForTokenClassification"]
LABELLED += ["RNNSeq2SeqForConditionalGeneration"]


@st.composite
def labelled(draw):
    """A model, inputs with a mask, and labels of which any may be missing."""
    name, model = draw(models(LABELLED))
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    inputs = {"input_ids": draw(tokens(rows, length))}
    mask = draw(masks(rows, length))
    if mask is not None:
        inputs["attention_mask"] = mask
    shape = (rows,) if name == "RNNForSequenceClassification" else (rows, length)
    if name in SEQ2SEQ:
        shape = (rows, draw(st.integers(1, 5)))
    num_labels = VOCAB_SIZE if name in LANGUAGE_MODELS + SEQ2SEQ else model.config.num_labels
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    labels = torch.randint(0, num_labels, shape, generator=generator)
    if len(shape) == 2:
        share = draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
        labels[torch.rand(shape, generator=generator) < share] = -100
    if getattr(model.config, "id2intent", None):
        inputs["intents"] = torch.randint(0, 2, (rows,), generator=generator)
    return name, model, inputs | {"labels": labels}


def loss_and_gradients(model, batches, num_items):
    """Summed over batches; of the weights that have a part in them."""
    total = backward_over(model, batches, num_items)
    return total, {
        key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None
    }


def check_loss(case):
    """The loss of a batch and its gradients are finite and those of its rows in the plain loop, with few labels too."""
    name, model, inputs = case
    model.train()
    labels = inputs["labels"]
    num_items = torch.tensor(max(int((labels[..., 1 if name == "RNNForCausalLM" else 0 :] != -100).sum()), 1))
    loss, actual = loss_and_gradients(model, [inputs], num_items)
    assert math.isfinite(loss)
    rows = [{key: value[row : row + 1] for key, value in inputs.items()} for row in range(len(labels))]
    with loop_only():
        expected_loss, expected = loss_and_gradients(model, rows, num_items)
    assert loss == pytest.approx(expected_loss, rel=1e-5, abs=1e-5)  # transformers adds up in float32
    for key in expected.keys() | actual.keys():
        assert key in actual or not expected[key].any(), key
        assert key in expected or not actual[key].any(), key
        if key in actual and key in expected:
            assert actual[key].isfinite().all(), key
            torch.testing.assert_close(actual[key], expected[key], rtol=1e-5, atol=1e-6)


test_losses, test_many_losses = fuzz(check_loss, 500, case=labelled())


# Inputs of a wrong shape.

FIXED_MODELS = {name: make_fuzzed_model(name, {"hidden_size": 3, "embedding_size": 2}) for name in MODEL_CLASSES}


@st.composite
def wrong_shapes(draw):
    """Inputs for a fixed model, and which of them to give another shape."""
    name = draw(st.sampled_from(list(MODEL_CLASSES)))
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    shape = (rows, 2, length) if name == "RNNForMultipleChoice" else (rows, length)
    shapes = {"input_ids": shape, "attention_mask": shape}
    if name in SEQ2SEQ:
        shapes |= {"decoder_input_ids": (rows, draw(st.integers(1, 4)))}
        shapes["decoder_attention_mask"] = shapes["decoder_input_ids"]
    changed = draw(st.sampled_from(list(shapes)))
    return name, shapes, changed, tuple(draw(st.lists(st.integers(0, 6), min_size=1, max_size=4)))


@torch.no_grad()
def check_wrong_shape(case):
    """A `ValueError` that names an argument; a shape that happens to be right gives an output."""
    name, shapes, changed, shape = case
    arguments = {
        key: (torch.ones if "mask" in key else torch.zeros)(shape if key == changed else right, dtype=torch.long)
        for key, right in shapes.items()
    }
    ids_of = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}
    fits = all(arguments[ids].shape == arguments[mask].shape for ids, mask in ids_of.items() if ids in arguments)
    fits = fits and arguments["input_ids"].dim() == len(shapes["input_ids"])
    if name in SEQ2SEQ:
        fits = fits and len(arguments["input_ids"]) == len(arguments["decoder_input_ids"])
    if fits:
        assert len(FIXED_MODELS[name](**arguments)[0]) == len(arguments["input_ids"])
    else:
        with pytest.raises(ValueError, match=r"input_ids|attention_mask|encoder_hidden_states"):
            FIXED_MODELS[name](**arguments)


test_wrong_shapes, test_many_wrong_shapes = fuzz(check_wrong_shape, 1500, case=wrong_shapes())


@st.composite
def wrong_tokens(draw):
    name = draw(st.sampled_from([name for name in MODEL_CLASSES if name not in SEQ2SEQ + ["RNNForMultipleChoice"]]))
    return name, draw(st.lists(st.integers(-3, VOCAB_SIZE + 3) | st.integers(-(2**62), 2**62), min_size=1, max_size=5))


@torch.no_grad()
def check_tokens(case):
    """A token that is not in the vocabulary is an `IndexError` of torch's embedding, as in every model, on a CPU."""
    name, ids = case
    if all(0 <= token < VOCAB_SIZE for token in ids):
        assert FIXED_MODELS[name](torch.tensor([ids]))[0].isfinite().all()
    else:
        with pytest.raises(IndexError):
            FIXED_MODELS[name](torch.tensor([ids]))


test_tokens, test_many_tokens = fuzz(check_tokens, 300, case=wrong_tokens())


# Caches.


@st.composite
def histories(draw):
    """A model that carries a state, and what happens to its cache: tokens in pieces, rows moved, steps taken back."""
    name, model = draw(models(STATEFUL))
    rows = draw(st.integers(1, 3))
    source = None
    if name in SEQ2SEQ:
        source = draw(tokens(rows, draw(st.integers(0, 4))))
    events = []
    for kind in draw(st.lists(st.sampled_from(["read", "read", "read", "rows", "back"]), min_size=1, max_size=5)):
        if kind == "read":
            length = draw(st.integers(0, 4))
            mask = draw(masks(rows, length))
            events.append((kind, draw(tokens(rows, length)), mask, draw(st.booleans())))
        elif kind == "rows":
            change = draw(st.sampled_from(["reorder", "repeat", "select"]))
            indices = draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=3))
            if change == "reorder":
                indices = [draw(st.sampled_from(range(rows))) for _ in range(rows)]
            elif change == "repeat":
                indices = [row for row in range(rows) for _ in range(2)]
            if len(indices) > 6:
                continue
            rows = len(indices)
            events.append((change, torch.tensor(indices)))
        else:
            events.append((kind, draw(st.integers(0, 4))))
    return name, model, source, events, draw(st.booleans()), draw(tokens(rows, 2))


@torch.no_grad()
def check_history(case):
    """Whatever happened to a cache, it goes on as the plain loop does over all the tokens in one piece."""
    name, model, source, events, static, last = case
    config = model.config.get_text_config(decoder=True)
    make = (lambda: StaticCache(config=config, max_cache_len=64)) if static else (lambda: DynamicCache(config=config))
    cache = EncoderDecoderCache(make(), make()) if name in SEQ2SEQ else make()
    key = "decoder_input_ids" if name in SEQ2SEQ else "input_ids"
    mask_key = "decoder_attention_mask" if name in SEQ2SEQ else "attention_mask"
    state = getattr(cache, "self_attention_cache", cache)
    state.activate_past_recording()
    rows = len(events[0][1]) if events[0][0] == "read" else None
    ids = mask = None
    recorded = 0

    def read(new_ids, new_mask, whole_mask):
        nonlocal ids, mask
        as_given = new_mask
        new_mask = torch.ones_like(new_ids) if new_mask is None else new_mask.long()
        ids = new_ids if ids is None else torch.cat([ids, new_ids], dim=1)
        mask = new_mask if mask is None else torch.cat([mask, new_mask], dim=1)
        inputs = {key: new_ids, "past_key_values": cache}
        if whole_mask or as_given is not None:
            inputs[mask_key] = mask if whole_mask else as_given
        return model(**inputs, **({} if source is None else {"input_ids": source}))[0]

    for kind, *details in events:
        if kind == "read":
            read(*details)
            recorded += details[0].shape[1]
        elif kind == "back":
            steps = details[0]
            if steps > recorded:
                with pytest.raises(RuntimeError, match="Cannot take the recurrent state back"):
                    state.crop(-steps)
                continue
            state.crop(-steps)
            recorded = 0
            if ids is not None:
                ids, mask = ids[:, : ids.shape[1] - steps], mask[:, : mask.shape[1] - steps]
        else:
            (indices,) = details
            if kind == "reorder":
                state.reorder_cache(indices)
            elif kind == "repeat":
                state.batch_repeat_interleave(2)
            else:
                state.batch_select_indices(indices)
            ids, mask = (None if part is None else part[indices] for part in (ids, mask))
            source = None if source is None else source[indices]
    assert cache.get_seq_length() == (0 if ids is None else ids.shape[1])
    logits = read(last, None, False)
    assert rows is None or logits.isfinite().all()
    for row in range(len(last)):
        inputs = {key: ids[row][mask[row].bool()].unsqueeze(0)}
        inputs |= {} if source is None else {"input_ids": source[row : row + 1]}
        with loop_only():
            expected = model(**inputs)[0]
        assert_same(logits[row], expected[0, -2:])


test_histories, test_many_histories = fuzz(check_history, 500, case=histories())


# Generation.


@st.composite
def generations(draw):
    """A model, prompts with padding at the left, and options of `generate`, of which some do not go together."""
    _, model = draw(models(GENERATIVE))
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    mask = torch.ones(rows, length, dtype=torch.long)
    for row in range(rows):
        mask[row, : draw(st.integers(0, length - 1))] = 0
    # Now and then options that are wrong, or wrong together.
    careless = draw(st.integers(0, 4)) == 0

    def choose(*values, wrong=()):
        return draw(st.sampled_from([*values, *(wrong if careless else ())]))

    do_sample = choose(False, False, True)
    num_beams = choose(1, 1, 2, 3)
    lookup = choose(None, 2) if careless or (num_beams == 1 and rows == 1) else None
    options = {
        "do_sample": do_sample,
        "num_beams": num_beams,
        "num_return_sequences": choose(1, 1, num_beams if lookup is None else 1, wrong=[2, 3]),
        "max_new_tokens": choose(1, 3, 4, wrong=[0]),
        "min_new_tokens": choose(None, 0, 2),
        "temperature": choose(None, 0.7, 2.0, wrong=[0.0, -1.0]),
        "top_k": choose(None, 1, 5, wrong=[0, -2]),
        "top_p": choose(None, 0.5, 1.0, wrong=[1.5]),
        "repetition_penalty": choose(None, None, None, 1.3, wrong=[0.0]),
        "no_repeat_ngram_size": choose(None, None, None, 2),
        "length_penalty": choose(None, 0.0, 2.0),
        "early_stopping": choose(None, True, "never"),
        "eos_token_id": choose(None, EOS, [EOS, 5], wrong=[-1]),
        "prompt_lookup_num_tokens": lookup,
        "cache_implementation": choose(None, "dynamic", *(["static"] * 2 if lookup is None else []), wrong=["magic"]),
    }
    if not model.config.is_encoder_decoder:
        # Transformers cuts the mask of the source into pieces, where there is one.
        options["prefill_chunk_size"] = choose(None, 1, 3)
    options = {key: value for key, value in options.items() if value is not None}
    return model, draw(tokens(rows, length)), mask, options, draw(st.integers(0, 99))


@torch.no_grad()
def check_generation(case):
    """Refused by transformers with a `ValueError`, or with the cache exactly what it is without."""
    model, ids, mask, options, seed = case
    needs_cache = ("prompt_lookup_num_tokens", "prefill_chunk_size", "cache_implementation")

    def generate(**options):
        torch.manual_seed(seed)
        return model.generate(ids, attention_mask=mask, **options)

    try:
        actual = generate(**options)
    except ValueError:
        return
    plain = {key: value for key, value in options.items() if key not in needs_cache}
    if "prompt_lookup_num_tokens" in options and options["do_sample"]:
        # Other random numbers are drawn.
        assert len(actual) == len(ids) * options["num_return_sequences"]
        return
    with loop_only():
        assert actual.tolist() == generate(**plain, use_cache=False).tolist()
        if (
            options["do_sample"]
            or options["num_beams"] > 1
            or {"repetition_penalty", "no_repeat_ngram_size"} & set(plain)
        ):
            return
        # Greedily and without a look at what was said before, a row is what it is alone and unpadded.
        for row, sequence in enumerate(actual.tolist()):
            prompt = ids[row : row + 1, mask[row].bool()]
            (alone,) = model.generate(prompt, attention_mask=torch.ones_like(prompt), **plain, use_cache=False).tolist()
            if not model.config.is_encoder_decoder:
                alone, sequence = alone[prompt.shape[1] :], sequence[ids.shape[1] :]
            assert sequence == alone + [PAD] * (len(sequence) - len(alone))


test_generations, test_many_generations = fuzz(check_generation, 200, case=generations())
