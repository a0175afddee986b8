"""The test matrix: every class of the registration table with every option that applies to it, tiny and in float64."""

import inspect
import itertools
import os

import pytest
import torch

from hf_rnn import ATTENTION_SCORES, RECURRENT_CELLS, REGISTRATION, RNNConfig, RNNSeq2SeqConfig
from hf_rnn.configuration_rnn import QUESTION_ATTENTIONS


# For what a device does not do: fast paths of CPUs, and errors about values, for which it would have to be waited for.
ON_A_CPU = pytest.mark.skipif("HF_RNN_TEST_DEVICE" in os.environ, reason="only on a CPU")

VOCAB_SIZE = 29
PAD, BOS, EOS = 3, 1, 2  # padding is a token like any other, so that no zeroed row of the embeddings can hide a leak
MODEL_CLASSES = {
    model_class.__name__: (config_class, model_class)
    for config_class, model_classes in REGISTRATION.items()
    for model_class in model_classes
}
GENERATIVE = [
    name for name, (_, model_class) in MODEL_CLASSES.items() if hasattr(model_class, "create_masks_for_generate")
]
LANGUAGE_MODELS = ["RNNForCausalLM", "RNNForMaskedLM"]
DECODERS = [
    {"decoder_type": "luong"},
    {"decoder_type": "luong", "input_feeding": True},
    {"decoder_type": "bahdanau"},
    {"decoder_type": "gnmt"},
]

# Words of several tokens: those from 18 on continue the word before them.
WORDS = [
    {"word_encoder": "cnn", "word_vocab_size": 12, "word_embedding_size": 4},
    {"word_encoder": "gru", "word_encoder_size": 4, "residual": True},
]
WORDS = [options | {"first_continuation_id": 18, "bidirectional": True} for options in WORDS]

# Windows and filters that are smaller than the sources of tests.
SMALL_SCORES = {"local": {"attention_window": 2}, "location": {"location_filters": 3, "location_width": 5}}
# What the coverage is added to, one for each of the decoders.
COVERED = [
    {"attention_score": "additive"},
    {"attention_score": "location", "num_attention_heads": 2} | SMALL_SCORES["location"],
    {"attention_score": "general", "num_attention_heads": 2},
    {"attention_score": "local"} | SMALL_SCORES["local"],
]

# Labels of which some must not follow others, as many as there are by default; and a second task beside them.
SPANS = {0: "O", 1: "B-A", 2: "I-A", 3: "B-B"}
INTENTS = {"id2intent": {0: "ask", 1: "tell", 2: "greet"}}

READERS = [
    {"question_attention": attention, "cell_type": cell, "bidirectional": bidirectional}
    for attention in QUESTION_ATTENTIONS
    for cell, bidirectional in zip(RECURRENT_CELLS, itertools.cycle([True, False]))
] + [{"question_attention": attention, "bidirectional": True, "residual": True} for attention in QUESTION_ATTENTIONS]


def make_config(name: str, **options):
    """A tiny configuration for the class `name`, with sizes that differ wherever they may."""
    common = {
        "vocab_size": VOCAB_SIZE,
        "embedding_size": 5,
        "hidden_size": 6,
        "initializer_range": 0.1,  # `make_model` adds to it; what is narrow starts so wide that attention saturates
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    if MODEL_CLASSES[name][0] is RNNSeq2SeqConfig:
        common |= {"decoder_start_token_id": BOS}
    else:
        common |= {"num_labels": 4}
    return MODEL_CLASSES[name][0](**(common | options))


def make_model(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **options):
    """A tiny model in evaluation mode whose parameters, biases included, are all far from zero."""
    torch.manual_seed(seed)
    model = MODEL_CLASSES[name][1](make_config(name, **options)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def options_of(name: str) -> list[dict]:
    """The options of a class: all cells, directions and residuals; for seq2seq all decoders, scores and heads."""
    if MODEL_CLASSES[name][0] is RNNConfig:
        directions = [False] if name == "RNNForCausalLM" else [False, True]
        options = [
            {"cell_type": cell, "bidirectional": bidirectional, "residual": residual}
            for cell, bidirectional, residual in itertools.product(RECURRENT_CELLS, directions, [False, True])
        ]
        if name == "RNNForTokenClassification":
            options += [{"use_crf": True}, {"use_crf": True, "bidirectional": True, "id2label": SPANS}]
            options += [
                {"bidirectional": True} | INTENTS,
                {"use_crf": True, "pooling": "mean", "id2label": SPANS} | INTENTS,
            ]
        if name == "RNNForQuestionAnswering":
            options += READERS
        return options if name in LANGUAGE_MODELS else options + WORDS
    options = [decoder | {"cell_type": cell} for decoder in DECODERS for cell in RECURRENT_CELLS]
    # The cases above have the default score; a scaled dot product differs from one by a factor.
    scores = [score for score in ATTENTION_SCORES if score not in ("general", "scaled_dot")]
    options += [
        decoder | SMALL_SCORES.get(score, {}) | {"attention_score": score} for decoder in DECODERS for score in scores
    ]
    options += [decoder | {"num_attention_heads": 2, "residual": True} for decoder in DECODERS]
    options += [
        decoder | {"encoder_bidirectional": False, "attention_score": score}
        for decoder, score in zip(DECODERS, ["dot", "scaled_dot", "scaled_dot", "dot"])
    ]
    options += [decoder | {"use_coverage": True} | more for decoder, more in zip(DECODERS, COVERED)]
    options += [{"encoder_layers": 1, "decoder_layers": 3}, {"encoder_layers": 3, "decoder_layers": 1}]
    return options


def cases(*names: str) -> list[tuple[str, dict]]:
    """Pairs of class name and options; of all classes where none is named."""
    return [(name, options) for name in names or MODEL_CLASSES for options in options_of(name)]


def case_id(value) -> str:
    """A readable pytest id for a class name or its options."""
    if isinstance(value, dict):
        return "-".join(f"{key}={item}" for key, item in value.items()) or "default"
    return str(value)


def make_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids, padding and special ones included."""
    return torch.randint(0, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def make_mask(seq_length: int = 7) -> torch.Tensor:
    """Rows without padding, with padding at the right, at the left, in the middle, at both ends, and nothing else."""
    mask = torch.ones(6, seq_length, dtype=torch.long)
    mask[1, -3:] = 0
    mask[2, :2] = 0
    mask[3, 2:4] = 0
    mask[4, [0, 3, -1]] = 0
    mask[5] = 0
    return mask


def make_intents(batch: int) -> torch.Tensor:
    """Random intents for models with `INTENTS`."""
    return torch.randint(0, len(INTENTS["id2intent"]), (batch,), generator=torch.Generator().manual_seed(3))


def make_inputs(
    name: str, batch: int = 6, seq_length: int = 7, with_labels: bool = True, seed: int = 0, options: dict | None = None
) -> dict:
    """Inputs for a forward of the class `name`, with labels of the right kind; of all kinds that `options` ask for."""
    _, model_class = MODEL_CLASSES[name]
    choices = (3,) if name == "RNNForMultipleChoice" else ()
    inputs = {"input_ids": make_tokens(batch, *choices, seq_length, seed=seed)}
    if MODEL_CLASSES[name][0] is RNNSeq2SeqConfig:
        inputs["decoder_input_ids"] = make_tokens(batch, seq_length - 2, seed=seed + 1)
    if name == "RNNForQuestionAnswering" and seq_length > 3:
        inputs["input_ids"][:, 2] = EOS  # behind a question; some masks hide it
    if not with_labels:
        return inputs
    parameters = inspect.signature(model_class.forward).parameters
    generator = torch.Generator().manual_seed(seed + 2)
    if "start_positions" in parameters:
        inputs["start_positions"] = torch.zeros(batch, dtype=torch.long)
        inputs["end_positions"] = torch.zeros(batch, dtype=torch.long)
    elif "labels" in parameters:
        shape, high = {
            "RNNForSequenceClassification": ((batch,), 4),
            "RNNForMultipleChoice": ((batch,), 3),
            "RNNForTokenClassification": ((batch, seq_length), 4),
            "RNNSeq2SeqForConditionalGeneration": ((batch, seq_length - 2), VOCAB_SIZE),
        }.get(name, ((batch, seq_length), VOCAB_SIZE))
        inputs["labels"] = torch.randint(0, high, shape, generator=generator)
        if options and "id2intent" in options:
            inputs["intents"] = make_intents(batch)
    return inputs
