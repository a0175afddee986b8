"""
The common tests that transformers has for its own models, on the classes here.

They are part of its repository and not of its package, so that this file is not collected with the others. With a copy
of the repository at the version that is installed, and with `pip install parameterized`:

    RUN_SLOW=1 PYTHONPATH=path/to/transformers python -m pytest -c /dev/null tests/transformers_suite.py
"""

import atexit
import json
import os
import shutil
import tempfile
import unittest
from pathlib import Path

import torch
from transformers import EncoderDecoderCache
from transformers.models.auto import modeling_auto

import hf_rnn
from matrix import make_model
from word_tokenizer import make_tokenizer


def save_tiny_models() -> str:
    """Checkpoints for the tests of pipelines, in the places where the suite looks for them."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    tokenizer, summary = make_tokenizer(), {}
    for config_class, model_classes in hf_rnn.REGISTRATION.items():
        for name in [model_class.__name__ for model_class in model_classes]:
            path = folder / config_class.model_type / name
            make_model(name, dtype=torch.float32).save_pretrained(path)
            tokenizer.save_pretrained(path)
            summary[name] = {"tokenizer_classes": ["PreTrainedTokenizerFast"], "processor_classes": []}
    (folder / "reports").mkdir()
    (folder / "reports" / "tiny_model_summary.json").write_text(json.dumps(summary))
    return str(folder)


# Read while the suite is imported.
os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = save_tiny_models()

from tests.generation.test_utils import GenerationTesterMixin  # noqa: E402
from tests.test_configuration_common import ConfigTester  # noqa: E402
from tests.test_fsdp_mixin import FSDPTesterMixin  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin, ids_tensor  # noqa: E402
from tests.test_pipeline_mixin import PipelineTesterMixin  # noqa: E402
from tests.test_training_mixin import TrainingTesterMixin  # noqa: E402

from tests import test_fsdp_mixin  # noqa: E402


test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None  # all models that have a plan
# What the suite asks for the labels that a class takes, if any.
for table, name in [
    ("MODEL", "RNNModel"),
    ("MODEL", "RNNSeq2SeqModel"),
    ("MODEL_FOR_CAUSAL_LM", "RNNForCausalLM"),
    ("MODEL_FOR_MASKED_LM", "RNNForMaskedLM"),
    ("MODEL_FOR_SEQUENCE_CLASSIFICATION", "RNNForSequenceClassification"),
    ("MODEL_FOR_TOKEN_CLASSIFICATION", "RNNForTokenClassification"),
    ("MODEL_FOR_QUESTION_ANSWERING", "RNNForQuestionAnswering"),
    ("MODEL_FOR_MULTIPLE_CHOICE", "RNNForMultipleChoice"),
    ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM", "RNNSeq2SeqForConditionalGeneration"),
]:
    model_type = getattr(hf_rnn, name).config_class.model_type
    getattr(modeling_auto, f"{table}_MAPPING_NAMES")[model_type] = name


class ModelTester:
    """Tiny configurations and inputs, with the attributes by which the suite knows their sizes."""

    batch_size, seq_length, num_choices, vocab_size, hidden_size = 13, 7, 4, 99, 32
    encoder_seq_length = decoder_seq_length = seq_length
    num_hidden_layers = 2
    is_training = True
    causal_lm_class = hf_rnn.RNNForCausalLM

    def __init__(self, config_class, **options):
        self.config_class = config_class
        layers = ["num_hidden_layers"] if config_class is hf_rnn.RNNConfig else ["encoder_layers", "decoder_layers"]
        self.options = options | dict.fromkeys(layers, self.num_hidden_layers)

    def get_config(self):
        return self.config_class(vocab_size=self.vocab_size, hidden_size=self.hidden_size, **self.options)

    def prepare_config_and_inputs_for_common(self):
        config, shape = self.get_config(), [self.batch_size, self.seq_length]
        inputs = {"input_ids": ids_tensor(shape, self.vocab_size), "attention_mask": torch.ones(shape).tril().long()}
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids_tensor(shape, self.vocab_size)
            inputs["decoder_attention_mask"] = inputs["decoder_input_ids"].ne(config.pad_token_id)
        return config, inputs


class CommonTest(ModelTesterMixin, PipelineTesterMixin):
    """What all families go through; none has attention of a text to itself."""

    has_attentions = False
    config_class = hf_rnn.RNNConfig
    options = {}
    model_tester = None

    def setUp(self):
        self.model_tester = ModelTester(self.config_class, **self.options)

    def test_config(self):
        properties = ["hidden_size", "num_hidden_layers"]
        ConfigTester(self, config_class=self.config_class, common_properties=properties).run_common_tests()

    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        # The suite asks for a check of caches that hold something else than the keys and values of attention.
        if isinstance(past_key_values, EncoderDecoderCache):
            past_key_values = past_key_values.self_attention_cache
        assert len(past_key_values) == self.model_tester.num_hidden_layers
        assert past_key_values.get_seq_length() == seq_length
        for layer in past_key_values.layers:
            assert layer.keys.shape == (batch_size, config.hidden_size)
            assert layer.values.shape == (batch_size, config.hidden_size * (config.cell_type == "lstm"))


RNN_PIPELINES = {
    "feature-extraction": hf_rnn.RNNModel,
    "text-classification": hf_rnn.RNNForSequenceClassification,
    "token-classification": hf_rnn.RNNForTokenClassification,
    "zero-shot": hf_rnn.RNNForSequenceClassification,
}
RNN_CLASSIFIERS = (
    hf_rnn.RNNForSequenceClassification,
    hf_rnn.RNNForTokenClassification,
    hf_rnn.RNNForQuestionAnswering,
    hf_rnn.RNNForMultipleChoice,
)


class LSTMTest(CommonTest, GenerationTesterMixin, TrainingTesterMixin, FSDPTesterMixin, unittest.TestCase):
    """One direction."""

    all_model_classes = (hf_rnn.RNNModel, hf_rnn.RNNForCausalLM, *RNN_CLASSIFIERS)
    pipeline_model_mapping = RNN_PIPELINES | {"text-generation": hf_rnn.RNNForCausalLM}

    def test_left_padding_compatibility(self):
        self.has_attentions = True  # models without attention are left out, as if they knew of no padding
        super().test_left_padding_compatibility()


class GRUTest(LSTMTest):
    """Another cell."""

    options = {"cell_type": "gru"}


class BidirectionalTest(CommonTest, TrainingTesterMixin, unittest.TestCase):
    """Two directions."""

    options = {"bidirectional": True}
    all_model_classes = (hf_rnn.RNNModel, hf_rnn.RNNForMaskedLM, *RNN_CLASSIFIERS)
    pipeline_model_mapping = RNN_PIPELINES | {"fill-mask": hf_rnn.RNNForMaskedLM}

    def _get_trainable_model_class(self):
        return hf_rnn.RNNForMaskedLM


class Seq2SeqTest(CommonTest, GenerationTesterMixin, unittest.TestCase):
    """An encoder with two directions, a decoder that attends to it."""

    config_class = hf_rnn.RNNSeq2SeqConfig
    is_encoder_decoder = True
    all_model_classes = (hf_rnn.RNNSeq2SeqModel, hf_rnn.RNNSeq2SeqForConditionalGeneration)
    pipeline_model_mapping = {"feature-extraction": hf_rnn.RNNSeq2SeqModel}

    def _check_encoder_hidden_states_for_generate(self, hidden_states, batch_size, config, prompt_length):
        # All of them have the width `hidden_size` with the suite; here two directions stand side by side.
        widths = [config.embedding_size, *[config.encoder_output_size] * config.encoder_layers]
        shapes = [(batch_size, prompt_length, width) for width in widths]
        assert [tuple(states.shape) for states in hidden_states] == shapes
