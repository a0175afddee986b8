"""What is wrong with a checkpoint is said in one clear error; only safetensors and JSON are read and written."""

import ast
import json
import logging
import math
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import hf_rnn
from hf_rnn import REGISTRATION, RNNForCausalLM
from matrix import GENERATIVE, MODEL_CLASSES, make_config, make_model


PACKAGE = Path(hf_rnn.__file__).parent
over_classes = pytest.mark.parametrize("name", MODEL_CLASSES)
over_families = pytest.mark.parametrize("config_class", REGISTRATION, ids=lambda config_class: config_class.__name__)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of a language model in one file."""
    make_model("RNNForCausalLM", torch.float32).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def shards(tmp_path):
    """The same in several files."""
    make_model("RNNForCausalLM", torch.float32).save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


def loaders(folder):
    """Every door to a checkpoint of a language model."""
    yield lambda: RNNForCausalLM.from_pretrained(folder)
    yield lambda: AutoModelForCausalLM.from_pretrained(folder)
    yield lambda: AutoModel.from_pretrained(folder)


def assert_refused(folder, error, *parts):
    """Every door is shut, with an error that contains all `parts`."""
    for load in loaders(folder):
        with pytest.raises(error) as caught:
            load()
        for part in parts:
            assert part in str(caught.value)


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_weights(folder, **weights):
    path = folder / "model.safetensors"
    save_file(load_file(path) | weights, path, metadata={"format": "pt"})


# Configurations.


@pytest.mark.parametrize("kept", [0, 1, 0.5, 0.99])
def test_a_truncated_configuration(folder, kept):
    """It is not JSON, and the error of transformers names the file."""
    path = folder / "config.json"
    text = path.read_text()
    path.write_text(text[: int(kept * len(text)) if isinstance(kept, float) else kept])
    assert_refused(folder, OSError, "config.json", "not a valid JSON file")
    with pytest.raises(OSError, match=r"config\.json"):
        AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"no json", b"\xff\xfe\x00", b"{'hidden_size': 3}"])
def test_a_configuration_that_is_no_json(folder, content):
    """Neither is this."""
    (folder / "config.json").write_bytes(content)
    assert_refused(folder, OSError, "config.json", "not a valid JSON file")


@over_families
@pytest.mark.parametrize("content", [[], [1], "text", 3, None])
def test_a_configuration_that_is_no_object(config_class, content):
    """Fields have names."""
    with pytest.raises(ValueError, match=f"{config_class.__name__} is made of a dictionary, got a"):
        config_class.from_dict(content)


MISTAKES = {
    "cell_type": ["lstm9", None, 3, ["lstm"], ""],
    "hidden_size": [-1, 0, 2**31, 10**30, 2.5, "6", None, True, math.nan, math.inf, [6], {}],
    "vocab_size": [-1, 0, math.nan, -math.inf, "many"],
    "num_hidden_layers": [0, -2, 2.0, "two", 10**9, 2**63],
    "initializer_range": [math.nan, math.inf, -math.inf, 0, -1, "x"],
    "forget_gate_bias": [math.nan, math.inf, "x", None],
    "hidden_dropout": [1, -0.1, math.nan, math.inf, "x", None],
    "pooling": ["first", None, 1],
    "pooling_heads": [0, -1, 2, 2**31, 1.5, None],
    "pooling_attention_size": [0, 8, "wide", 2**31],
    "question_attention": ["bidaf", "", 1, ["flow"]],
    "word_encoder": ["char", 3, True],
    "first_continuation_id": [-1, 5, "x"],
    "word_vocab_size": [-1, 1, 7, None],
    "word_dropout": [1, -0.1, None],
    "sep_token_id": [-1, 1.5, "sep", [2]],
    "bidirectional": [1, "yes", None],
    "tie_word_embeddings": ["yes", 1],
    "pad_token_id": [-1, 1.5, "pad", math.inf],
    "eos_token_id": [-2, [2, -1], ["a"], math.nan],
    "id2label": [[1], "labels", {"a": "b"}, {"-1": "b"}, {}],
    "label2id": [[1], 3],
    "num_labels": [0, -3, 10**9, 2.5, "many", None, True],
    "problem_type": ["clustering", 3, ["regression"]],
    "dtype": ["float99", "Tensor", 3, "int64", "auto"],
    "torch_dtype": ["float99", 3],
    "layer_types": [["full_attention"], 3],
}


@pytest.mark.parametrize("field", MISTAKES)
def test_a_configuration_with_a_wrong_value(folder, field):
    """The error names the field, and is the same through every door."""
    text = (folder / "config.json").read_text()
    for value in MISTAKES[field]:
        fields = {"id2label": None, "dtype": None} if field in ("num_labels", "torch_dtype") else {}
        (folder / "config.json").write_text(text)
        change_config(folder, **fields, **{field: value})
        assert_refused(folder, ValueError, field)
        with pytest.raises(ValueError, match=field):
            AutoConfig.from_pretrained(folder)
        for config_class in REGISTRATION:
            if field in config_class.__annotations__ or field in ("id2label", "num_labels", "problem_type", "dtype"):
                with pytest.raises(ValueError, match=field):
                    config_class(**{field: value})


@over_families
def test_right_values_of_the_same_fields(config_class):
    """What the checks let through, spelled in each way that transformers takes."""
    assert config_class(num_labels=3).num_labels == 3
    assert config_class(id2label={"0": "a", "1": "b"}).id2label == {0: "a", 1: "b"}
    for value in ("bfloat16", torch.bfloat16):
        assert config_class(dtype=value).dtype == config_class(torch_dtype=value).dtype == torch.bfloat16
    for value in ("regression", "single_label_classification", "multi_label_classification", None):
        assert config_class(problem_type=value, num_labels=2).problem_type == value
    assert config_class(pad_token_id=None, eos_token_id=[0, 5]).eos_token_id == [0, 5]


def test_a_model_type_that_nobody_knows(folder):
    """The Auto classes say so."""
    change_config(folder, model_type="rnn9", auto_map={})
    for auto_class in (AutoModelForCausalLM, AutoModel, AutoConfig):
        with pytest.raises(ValueError, match="rnn9"):
            auto_class.from_pretrained(folder)


# Weights.


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 0.5, 0.999])
def test_a_truncated_file_of_weights(folder, kept):
    """The error names the checkpoint and the file."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert_refused(folder, OSError, str(folder), "model.safetensors is damaged")


@pytest.mark.parametrize("content", [bytes(500), b"\xff" * 500, b"no weights", b"\x02" + bytes(7) + b"{}trailing"])
def test_a_file_that_holds_no_weights(folder, content):
    """Whatever the bytes say about sizes, nothing is read that is not there."""
    (folder / "model.safetensors").write_bytes(content)
    assert_refused(folder, OSError, "model.safetensors is damaged")


def test_a_damaged_shard(shards):
    """The error names that shard alone."""
    first, second, *_ = sorted(shards.glob("*.safetensors"))
    second.write_bytes(second.read_bytes()[:-1])
    assert_refused(shards, OSError, f"{second.name} is damaged")
    with pytest.raises(OSError) as caught:  # noqa: PT011
        RNNForCausalLM.from_pretrained(shards)
    assert first.name not in str(caught.value)


def test_a_missing_file(folder):
    """The one file, or one of them."""
    (folder / "model.safetensors").unlink()
    assert_refused(folder, OSError, "model.safetensors", str(folder))


def test_a_missing_shard(shards):
    """Named by the error."""
    shard = sorted(shards.glob("*.safetensors"))[1]
    shard.unlink()
    assert_refused(shards, OSError, shard.name)


@pytest.mark.parametrize("target", ["elsewhere.safetensors", "../elsewhere.safetensors"])
def test_an_index_that_names_a_missing_file(shards, target):
    """Named too."""
    path = shards / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = target
    path.write_text(json.dumps(index))
    assert_refused(shards, OSError, "elsewhere.safetensors")


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "null", '{"weight_map": null}', '{"weight_map": 3}'])
def test_a_damaged_index(shards, content):
    """Cut off, or not what it should be."""
    (shards / "model.safetensors.index.json").write_text(content)
    assert_refused(shards, OSError, "model.safetensors.index.json is damaged")


def test_a_weight_of_a_wrong_shape(folder, caplog, monkeypatch):
    """Refused by transformers, whose report names the weight and both shapes."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    change_weights(folder, **{"model.embed_tokens.weight": torch.zeros(3, 3)})
    for load in loaders(folder):
        caplog.clear()
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            load()
        assert "embed_tokens.weight" in caplog.text
        assert "[3, 3]" in caplog.text
        assert "[29, 5]" in caplog.text


@over_classes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights_that_are_no_numbers(name, dtype, tmp_path):
    """A single NaN anywhere is found, and the weights are named; on request they are loaded all the same."""
    model = make_model(name, dtype)
    model.save_pretrained(tmp_path)
    keys = list(load_file(tmp_path / "model.safetensors"))
    for broken in (keys[:1], keys[-1:], keys[1:3]):
        weights = load_file(tmp_path / "model.safetensors")
        for key in broken:
            weights[key].view(-1)[-1] = math.nan
        with pytest.raises(ValueError, match="Weights must be numbers, but there are NaNs in") as caught:
            type(model).from_pretrained(None, config=make_config(name), state_dict=weights)
        # A weight with several names has one of them in the file and maybe another in the message.
        parameters = dict(model.named_parameters(remove_duplicate=False))
        named = str(caught.value).rstrip(".").split(" in ")[1].split(", ")
        assert {id(parameters[key]) for key in named} == {id(parameters[key]) for key in broken}
    path = tmp_path / "model.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="NaNs"):
        type(model).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="NaNs"):
        type(model).from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)


def test_infinite_weights_are_numbers(folder):
    """A bias of minus infinity rules a token out, which somebody may want."""
    bias = torch.zeros(29)
    bias[3] = -math.inf
    change_weights(folder, **{"lm_head.bias": bias})
    model = RNNForCausalLM.from_pretrained(folder)
    assert model.lm_head.bias[3] == -math.inf


def test_weights_that_are_not_looked_at(folder):
    """What lies on disk is left there."""
    weight = torch.full((29, 6), math.nan)
    change_weights(folder, **{"lm_head.weight": weight})
    model = RNNForCausalLM.from_pretrained(folder, device_map={"": "disk"}, offload_folder=folder / "offload")
    assert model.lm_head.weight.is_meta


# Pickles.


class Malicious:
    """Runs a command where it is unpickled."""

    def __init__(self, witness):
        self.command = f"touch {witness}"

    def __reduce__(self):
        return os.system, (self.command,)


def test_pickles_are_not_read(folder, tmp_path):
    """Neither a good one nor a bad one is taken for the missing safetensors, unless it is asked for."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert_refused(folder, OSError, "model.safetensors")
    loaded = RNNForCausalLM.from_pretrained(folder, use_safetensors=False)
    assert torch.equal(loaded.lm_head.weight, weights["lm_head.weight"])
    witness = tmp_path / "witness"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(witness)))
    assert_refused(folder, OSError, "model.safetensors")
    with pytest.raises(pickle.UnpicklingError):
        RNNForCausalLM.from_pretrained(folder, use_safetensors=False)
    assert not witness.exists()


@over_classes
def test_no_pickle_is_written(name, tmp_path):
    """Whatever is saved is JSON, safetensors or the code of the model."""
    make_model(name).save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors", ".py"}
    assert (tmp_path / "generation_config.json").exists() == (name in GENERATIVE)


def test_the_library_uses_no_pickle():
    """Its own code neither loads nor saves one."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"} & {
                    name.split(".")[0] for name in names
                }, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                assert node.attr not in ("load", "save"), path
