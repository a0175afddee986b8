"""The names that PEFT is given, which need no PEFT."""

import pytest
from torch import nn

from clients import LowRankCell
from hf_rnn import RECURRENT_CELLS, RNNSeq2SeqConfig, lora_target_modules, lora_target_parameters
from matrix import MODEL_CLASSES, make_config, make_model


@pytest.fixture(params=[*RECURRENT_CELLS, "low_rank"])
def cell_type(request, monkeypatch):
    monkeypatch.setitem(RECURRENT_CELLS, "low_rank", LowRankCell)
    return request.param


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_target_parameters_are_all_matrices_of_cells(name, cell_type):
    options = {"cell_type": cell_type, "attention_score": "additive", "bidirectional": name != "RNNForCausalLM"}
    family = MODEL_CLASSES[name][0]
    del options["bidirectional" if family is RNNSeq2SeqConfig else "attention_score"]
    model = make_model(name, **options)
    names = lora_target_parameters(model)
    assert names == lora_target_parameters(model.config)
    matrices = {key for key, weight in model.named_parameters() if "cell" in key and weight.ndim == 2}
    matrices -= {key for key in matrices if "cell.inner" in key or "cell_reverse.inner" in key}
    found = {key for key in matrices if any(key == name or key.endswith(f".{name}") for name in names)}
    assert found == matrices
    assert len(names) == len(matrices)
    # As parts of another module they are told apart by their whole names.
    pair = nn.ModuleDict({"left": model, "right": model.base_model})
    assert set(lora_target_parameters(pair)) == {f"left.{key}" for key in matrices}


def test_target_modules():
    config = RNNSeq2SeqConfig(vocab_size=9, hidden_size=4, attention_score="additive", decoder_layers=1)
    expected = ["bridge.projections.0.0", "bridge.projections.0.1", "attention.score.query", "attention.score.key"]
    assert lora_target_modules(config) == [f"decoder.{name}" for name in [*expected, "combine"]]
    model = make_model("RNNForSequenceClassification", pooling="attention")
    assert lora_target_modules(model) == []


def test_targets_refuse():
    with pytest.raises(ValueError, match="`config_or_model` must have recurrent cells, got Linear"):
        lora_target_parameters(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="`config_or_model` must be a configuration or a module, got str"):
        lora_target_parameters("rnn")


def test_all_configurations_have_targets():
    for name in MODEL_CLASSES:
        assert lora_target_parameters(make_config(name))
