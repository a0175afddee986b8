"""Law 5: what is saved comes back the same through every door, and what a checkpoint lacks starts as configured."""

import ast
import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.initialization import no_init_weights

import hf_rnn
from hf_rnn import REGISTRATION, RNNSeq2SeqConfig
from hf_rnn.attention import AttentionScore, CoverageFeatures
from hf_rnn.crf import LinearChainCRF
from hf_rnn.recurrent_cells import RecurrentCell
from matrix import GENERATIVE, MODEL_CLASSES, VOCAB_SIZE, make_config, make_inputs, make_mask, make_model, options_of


over_classes = pytest.mark.parametrize("name", MODEL_CLASSES)
PACKAGE = Path(hf_rnn.__file__).parent
# Values that differ from the defaults, so that a default in their place is seen.
STARTS = {"initializer_range": 0.3, "forget_gate_bias": 0.75}


def main_options(name):
    """One set of options for a class, with two directions where it takes them."""
    return {"bidirectional": True} if name not in GENERATIVE and MODEL_CLASSES[name][0] is not RNNSeq2SeqConfig else {}


@torch.no_grad()
def run(model, name):
    """All tensors of a model's output for a padded batch."""
    inputs = make_inputs(name, with_labels=False)
    choices = inputs["input_ids"].shape[1:-1]
    mask = make_mask()
    for _ in choices:
        mask = mask.unsqueeze(1)
    mask = mask.expand(inputs["input_ids"].shape)
    output = model(**inputs, attention_mask=mask, output_hidden_states=True)
    return [tensor for tensor in output.to_tuple() if isinstance(tensor, torch.Tensor)]


def assert_same_outputs(actual, expected, **tolerances):
    """All outputs are the same, up to the order in which sums are taken."""
    assert len(actual) == len(expected) > 0
    for one, other in zip(actual, expected):
        torch.testing.assert_close(one, other, **({"rtol": 0, "atol": 1e-12} | tolerances))


def weight_files(folder):
    """What was saved beside configurations and code."""
    return sorted(path.name for path in Path(folder).iterdir() if path.suffix not in {".py", ".json"})


def tied_groups(model):
    """Names of parameters, aliases included, by the tensor they name."""
    groups = {}
    for key, weight in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(weight), []).append(key)
    return list(groups.values())


@pytest.fixture
def poison(monkeypatch):
    """Memory that nobody wrote to holds no number."""

    def poisoned(allocate):
        def allocate_poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocate_poisoned

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    assert torch.empty(3).isnan().all()


def expected_bias(cell, config):
    """The input bias of a cell: zero, but for forget gates."""
    gates = [torch.zeros(cell.hidden_size) for _ in cell.gate_names]
    if "forget" in cell.gate_names:
        gates[cell.gate_names.index("forget")] += config.forget_gate_bias
    return torch.cat(gates)


def assert_starts_as_configured(model, name, tolerance=1e-5):
    """The parameter `name` of a model is a fresh one, as the documentation of the configuration describes it."""
    module_name, _, attribute = name.rpartition(".")
    module, weight = model.get_submodule(module_name), model.get_parameter(name).detach().float()
    bound = None
    assert weight.isfinite().all(), name
    if isinstance(module, RecurrentCell):
        if attribute == "weight_hh":
            for gate in weight.chunk(len(module.gate_names)):
                torch.testing.assert_close(gate @ gate.T, torch.eye(len(gate)), rtol=0, atol=tolerance, msg=name)
        elif attribute == "weight_ih":
            bound = math.sqrt(6 / (module.input_size + module.hidden_size))
        elif attribute == "bias_ih":
            assert torch.equal(weight, expected_bias(module, model.config)), name
        else:
            assert attribute == "bias_hh"
            assert (weight == 0).all(), name
    elif isinstance(module, nn.Embedding) or (module is model.get_output_embeddings() and attribute == "weight"):
        scale = model.config.initializer_range
        assert 0.7 * scale < weight.std() < 1.3 * scale, name
        assert weight.mean().abs() < 0.5 * scale, name
    elif isinstance(module, nn.Linear) and attribute == "weight":
        bound = math.sqrt(6 / (module.in_features + module.out_features))
    elif isinstance(module, nn.Linear):
        assert (weight == 0).all(), name
    elif isinstance(module, nn.Conv1d):
        (width,) = module.kernel_size
        bound = math.sqrt(6 / (width * (module.in_channels // module.groups + module.out_channels)))
    elif isinstance(module, LinearChainCRF):
        assert (weight == 0).all(), name
    elif isinstance(module, CoverageFeatures):
        bound = math.sqrt(6 / (1 + len(weight) // module.num_heads))
    elif isinstance(module, AttentionScore) and attribute == "gain":
        torch.testing.assert_close(weight, torch.full_like(weight, (module.query_size // module.num_heads) ** -0.5))
    elif isinstance(module, AttentionScore):
        bound = math.sqrt(3 / (module.query_size // module.num_heads))
    else:
        raise AssertionError(f"Nothing says how {name} of {type(module).__name__} starts.")
    if bound is not None:
        assert weight.abs().max() <= bound * (1 + 1e-2), name
        assert len(weight) < 4 or weight.abs().max() > bound / 3, name
        assert weight.unique().numel() > weight.numel() / 2, name


@over_classes
def test_every_new_weight_starts_as_configured(name, poison):
    """Recurrent weights orthogonal, other weights Glorot uniform, biases zero, forget gates open, embeddings normal."""
    for options in options_of(name):
        torch.manual_seed(0)
        model = MODEL_CLASSES[name][1](make_config(name, **options, **STARTS))
        for parameter_name, _ in model.named_parameters():
            assert_starts_as_configured(model, parameter_name)
        for buffer_name, buffer in model.named_buffers():  # no word is known
            expected = (
                torch.arange(VOCAB_SIZE) if buffer_name.endswith("table.folded") else torch.full((11,), 2**63 - 1)
            )
            assert torch.equal(buffer, expected), buffer_name


@over_classes
def test_buffers_hold_their_start_without_initialisation(name):
    """A module that is made while initialisation is off, or outside of a model, has no buffer of bare memory."""
    for options in options_of(name):
        with no_init_weights():
            model = MODEL_CLASSES[name][1](make_config(name, **options))
        expected = dict(MODEL_CLASSES[name][1](make_config(name, **options)).named_buffers())
        assert dict(model.named_buffers()).keys() == expected.keys()
        for buffer_name, buffer in model.named_buffers():
            assert torch.equal(buffer, expected[buffer_name]), buffer_name


@over_classes
def test_round_trip(name, tmp_path):
    """Every option of every class, through its own class: the same outputs."""
    for index, options in enumerate(options_of(name)):
        model = make_model(name, **options)
        folder = tmp_path / str(index)
        model.save_pretrained(folder)
        loaded, info = MODEL_CLASSES[name][1].from_pretrained(folder, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert not loaded.training
        assert_same_outputs(run(loaded, name), run(model, name))


@pytest.mark.parametrize(
    ("auto_class", "name"),
    [(auto, cls.__name__) for classes in REGISTRATION.values() for cls, autos in classes.items() for auto in autos],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_every_auto_class(auto_class, name, tmp_path):
    """Each Auto class of the table finds its class, with and without trust in remote code, and what is local wins."""
    model = make_model(name, **main_options(name))
    model.save_pretrained(tmp_path)
    for trust in (None, True, False):
        loaded = auto_class.from_pretrained(tmp_path, trust_remote_code=trust)
        assert type(loaded) is MODEL_CLASSES[name][1]
        assert type(loaded.config) is MODEL_CLASSES[name][0]
        assert_same_outputs(run(loaded, name), run(model, name))
    from_config = auto_class.from_config(AutoConfig.from_pretrained(tmp_path, trust_remote_code=True))
    assert type(from_config) is MODEL_CLASSES[name][1]


@over_classes
def test_safetensors_only(name, tmp_path):
    """One file of safetensors, and no pickles."""
    make_model(name, **main_options(name)).save_pretrained(tmp_path)
    assert weight_files(tmp_path) == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@over_classes
def test_shards(name, tmp_path):
    """Cut into many files."""
    model = make_model(name, **main_options(name))
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    files = weight_files(tmp_path)
    assert len(files) > 2
    assert all(file.endswith(".safetensors") for file in files)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    loaded = MODEL_CLASSES[name][1].from_pretrained(tmp_path)
    assert_same_outputs(run(loaded, name), run(model, name))


@over_classes
def test_meta_device(name, tmp_path, poison):
    """A model is made without memory, and filled from a checkpoint."""
    options = main_options(name)
    model = make_model(name, **options)
    model.save_pretrained(tmp_path)
    model_class = MODEL_CLASSES[name][1]
    with torch.device("meta"):
        empty = model_class(make_config(name, **options))
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.load_state_dict(model.state_dict(), assign=True)
    empty.tie_weights()
    assert not any(parameter.is_meta for parameter in empty.parameters())
    assert_same_outputs(run(empty.eval(), name), run(model, name))
    for keywords in ({"device_map": "cpu"}, {"low_cpu_mem_usage": True}):
        assert_same_outputs(run(model_class.from_pretrained(tmp_path, **keywords), name), run(model, name))


@over_classes
def test_dtypes(name, tmp_path, poison):
    """Loaded in another precision, and back: exactly the rounded weights, and outputs near the others."""
    model = make_model(name, torch.float32, **main_options(name))
    model.save_pretrained(tmp_path / "single")
    model_class = MODEL_CLASSES[name][1]
    half = model_class.from_pretrained(tmp_path / "single", dtype=torch.bfloat16)
    for (key, actual), expected in zip(half.state_dict().items(), model.state_dict().values()):
        assert actual.dtype == torch.bfloat16
        assert torch.equal(actual, expected.bfloat16()), key
    for actual, expected in zip(run(half, name), run(model, name)):
        assert actual.dtype == torch.bfloat16
        # Positions of a text that cannot be answers have the lowest number of the precision.
        is_lowest = expected == torch.finfo(torch.float32).min
        assert torch.equal(actual == torch.finfo(torch.bfloat16).min, is_lowest)
        torch.testing.assert_close(actual[~is_lowest].float(), expected[~is_lowest], rtol=0.05, atol=0.1)
    half.save_pretrained(tmp_path / "half")
    assert model_class.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    back = model_class.from_pretrained(tmp_path / "half", dtype=torch.float32)
    assert_same_outputs(run(back, name), run(half.float(), name))


def assert_loads_with(model, state, missing, tolerance=1e-5, **keywords):
    """
    A checkpoint of `state` loads into the class of `model`: the weights in it as they are, the `missing` ones as the
    configuration says. Returns what was loaded.
    """
    loaded, info = type(model).from_pretrained(
        None, config=model.config, state_dict=dict(state), output_loading_info=True, **keywords
    )
    aliases = [group for group in tied_groups(model) if set(group) & set(missing)]
    assert set(info["missing_keys"]) == {key for group in aliases for key in group}
    for key, weight in loaded.named_parameters():
        if key in missing:
            assert_starts_as_configured(loaded, key, tolerance)
        else:
            assert torch.equal(weight, state[key].to(weight.dtype)), key
    return loaded


@over_classes
def test_any_missing_weight_starts_as_configured(name, poison):
    """Whichever single weight a checkpoint lacks, no memory stays as it was found and no other weight changes."""
    all_options = [main_options(name)]
    if MODEL_CLASSES[name][0] is RNNSeq2SeqConfig:
        all_options = [{"attention_score": "additive", "decoder_type": kind} for kind in ("luong", "bahdanau", "gnmt")]
    elif "ForSequence" in name or "Choice" in name:
        all_options.append({"pooling": "attention", "cell_type": "gru"})
        all_options.append({"pooling": "attention", "pooling_heads": 2, "pooling_attention_size": 5})
    for options in all_options:
        model = make_model(name, torch.float32, **options, **STARTS)
        state = dict(model.named_parameters())
        for key in state:
            assert_loads_with(model, {other: state[other] for other in state if other != key}, {key})


@over_classes
def test_half_of_the_weights_missing_in_half_precision(name, poison):
    """The same with many weights at once, in a precision in which torch cannot make an orthogonal matrix."""
    model = make_model(name, torch.float32, **main_options(name), **STARTS)
    state = dict(model.named_parameters())
    for first in (0, 1):
        missing = list(state)[first::2]
        kept = {key: weight for key, weight in state.items() if key not in missing}
        loaded = assert_loads_with(model, kept, missing, tolerance=0.05, dtype=torch.bfloat16)
        assert loaded.dtype == torch.bfloat16


@pytest.mark.parametrize("config_class", REGISTRATION, ids=lambda config_class: config_class.__name__)
def test_from_each_class_to_each_other(config_class, tmp_path, poison):
    """Base weights go into heads and out of them; a head that has none in the checkpoint starts as configured."""
    names = [model_class.__name__ for model_class in REGISTRATION[config_class]]
    base_class = next(iter(REGISTRATION[config_class]))
    for source in names:
        model = make_model(source, torch.float32, **STARTS)
        model.save_pretrained(tmp_path / source)
        base = model if source == base_class.__name__ else model.model
        for target in names:
            # Two heads may have a classifier of the same name and of another size.
            loaded, info = MODEL_CLASSES[target][1].from_pretrained(
                tmp_path / source, output_loading_info=True, ignore_mismatched_sizes=True
            )
            new_keys = set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}
            loaded_base = loaded if target == base_class.__name__ else loaded.model
            for (key, actual), expected in zip(loaded_base.state_dict().items(), base.state_dict().values()):
                assert torch.equal(actual, expected), (source, target, key)
            assert not any(key.startswith("model.") or target == base_class.__name__ for key in new_keys)
            for key in new_keys:
                assert_starts_as_configured(loaded, key)
            assert all(tensor.isfinite().all() for tensor in run(loaded, target))
            assert_same_outputs(run(loaded_base, base_class.__name__), run(base, base_class.__name__))


@over_classes
def test_mismatched_sizes(name, tmp_path, poison):
    """Weights of another size are refused, or on request replaced by new ones."""
    model_class = MODEL_CLASSES[name][1]
    model = make_model(name, torch.float32, **STARTS)
    model.save_pretrained(tmp_path)
    changes = [{"vocab_size": VOCAB_SIZE + 4}, {"hidden_size": 8}]
    if "Classification" in name:
        changes.append({"num_labels": 7})
    for change in changes:
        with pytest.raises(RuntimeError, match="mismatch"):
            model_class.from_pretrained(tmp_path, **change)
        loaded, info = model_class.from_pretrained(
            tmp_path, **change, ignore_mismatched_sizes=True, output_loading_info=True
        )
        mismatched = {key for key, *_ in info["mismatched_keys"]}
        assert mismatched
        state = dict(model.named_parameters())
        for key, weight in loaded.named_parameters():
            if key in mismatched:
                assert_starts_as_configured(loaded, key)
            else:
                assert torch.equal(weight, state[key]), key
        run(loaded, name)


@over_classes
@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_saved_once(name, tied, tmp_path):
    """A tensor with several names is one after loading too, and one in the file."""
    for embedding_size in (5, 6):
        folder = tmp_path / str(embedding_size)
        model = make_model(name, tie_word_embeddings=tied, embedding_size=embedding_size)
        has_head = model.get_output_embeddings() is not None
        if has_head:
            shares = model.get_output_embeddings().weight is model.get_input_embeddings().weight
            assert shares == tied
        model.save_pretrained(folder)
        saved = load_file(folder / "model.safetensors")
        groups = tied_groups(model)
        assert len(saved) == len(groups)
        assert all(len(set(group) & set(saved)) == 1 for group in groups)
        loaded = MODEL_CLASSES[name][1].from_pretrained(folder)
        assert sorted(tied_groups(loaded)) == sorted(groups)
        assert_same_outputs(run(loaded, name), run(model, name))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", [n for n, (config, _) in MODEL_CLASSES.items() if config is RNNSeq2SeqConfig])
def test_one_embedding_for_source_and_target(name, tied):
    """Whether or not the projection to the vocabulary is tied, encoder and decoder read the same embeddings."""
    model = make_model(name, tie_word_embeddings=tied)
    embeddings = model.get_input_embeddings()
    assert model.get_encoder().embed_tokens.weight is embeddings.weight
    assert model.get_decoder().embed_tokens.weight is embeddings.weight


@over_classes
@pytest.mark.parametrize("tied", [True, False])
def test_resize_token_embeddings(name, tied, tmp_path):
    """More tokens or fewer: old rows stay, logits follow, tied stays tied, and what is saved comes back."""
    for vocab_size in (VOCAB_SIZE + 6, VOCAB_SIZE - 6):
        torch.manual_seed(0)
        model = make_model(name, tie_word_embeddings=tied, **main_options(name))
        before = model.get_input_embeddings().weight.detach().clone()
        head = model.get_output_embeddings()
        head_before = None if head is None else {key: weight.clone() for key, weight in head.state_dict().items()}
        ties = sorted(tied_groups(model))
        model.resize_token_embeddings(vocab_size)
        kept = min(VOCAB_SIZE, vocab_size)
        assert model.config.vocab_size == vocab_size
        assert model.get_input_embeddings().weight.shape == (vocab_size, 5)
        assert torch.equal(model.get_input_embeddings().weight[:kept], before[:kept])
        assert sorted(tied_groups(model)) == ties
        for parameter in model.parameters():
            assert parameter.isfinite().all()
        if head is not None:
            for key, weight in model.get_output_embeddings().state_dict().items():
                assert len(weight) == vocab_size
                assert torch.equal(weight[:kept], head_before[key][:kept])
        if MODEL_CLASSES[name][0] is RNNSeq2SeqConfig:
            assert len(model.get_encoder().embed_tokens.weight) == vocab_size
            assert len(model.get_decoder().embed_tokens.weight) == vocab_size
        inputs = make_inputs(name, with_labels=False)
        inputs = {key: ids.clamp(max=kept - 1) for key, ids in inputs.items()}
        inputs["input_ids"][0, ..., 0] = vocab_size - 1
        with torch.no_grad():
            expected = model(**inputs)[0]
        model.save_pretrained(tmp_path)
        loaded = MODEL_CLASSES[name][1].from_pretrained(tmp_path)
        with torch.no_grad():
            assert_same_outputs([loaded(**inputs)[0]], [expected])


@over_classes
def test_config_round_trip(name, tmp_path):
    """Every field of a configuration survives."""
    config_class = MODEL_CLASSES[name][0]
    for options in options_of(name):
        config = make_config(name, **options, **STARTS, embedding_dropout=0.125, eos_token_id=[2, 4])
        config.save_pretrained(tmp_path)
        for loaded in (
            config_class.from_pretrained(tmp_path),
            AutoConfig.from_pretrained(tmp_path),
            config_class.from_dict(config.to_dict()),
            config_class(**config.to_dict()),
        ):
            assert type(loaded) is config_class
            expected, actual = config.to_dict(), loaded.to_dict()
            for fields in (expected, actual):
                fields.pop("auto_map", None)
                fields.pop("_name_or_path")
            assert actual == expected
            assert all(actual[key] == value for key, value in (options | STARTS).items())


@over_classes
def test_all_heads_in_auto_map(name, tmp_path):
    """The configuration names every class of the family, whichever was saved, and the files that it names are there."""
    config_class = MODEL_CLASSES[name][0]
    expected = {"AutoConfig": config_class.__name__}
    for model_class, auto_classes in REGISTRATION[config_class].items():
        expected |= {auto_class.__name__: model_class.__name__ for auto_class in auto_classes}
    model = make_model(name)
    for _ in range(2):
        model.save_pretrained(tmp_path)
        auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
        assert {key: value.split(".")[1] for key, value in auto_map.items()} == expected
        for value in auto_map.values():
            module, class_name = value.split(".")
            assert f"class {class_name}(" in (tmp_path / f"{module}.py").read_text()
        # What was loaded and saved again is the same.
        model = MODEL_CLASSES[name][1].from_pretrained(tmp_path)


def test_saved_code_is_complete(tmp_path):
    """Every file that a file in the folder imports is there, and it is the library's own."""
    for config_class in REGISTRATION:
        for model_class in REGISTRATION[config_class]:
            folder = tmp_path / model_class.__name__
            make_model(model_class.__name__).save_pretrained(folder)
            for path in folder.glob("*.py"):
                assert path.read_text() == (PACKAGE / path.name).read_text()
                for module in relative_imports(path):
                    assert (folder / f"{module}.py").exists(), f"{path.name} imports {module}"


REMOTE_PREAMBLE = """
    import importlib.abc, sys, torch
    from pathlib import Path

    class Blocker(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "hf_rnn":
                raise ModuleNotFoundError(f"{name} is not installed here")

    sys.meta_path.insert(0, Blocker())
    try:
        import hf_rnn
    except ModuleNotFoundError:
        pass
    else:
        raise AssertionError("hf_rnn is importable")

    import transformers
    root = Path(sys.argv[1])

    def check(model, expected):
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        with torch.no_grad():
            logits = model(**expected["inputs"]).logits
        torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-12)
        for options, sequences in expected["generated"]:
            generated = model.generate(**expected["inputs"], **options)
            assert torch.equal(generated, sequences), (options, generated, sequences)
"""


@pytest.fixture(scope="module")
def run_remote(tmp_path_factory):
    """Runs a script in a process that cannot import the library, with the folder of the saved models."""
    root = tmp_path_factory.mktemp("remote")
    ways = [{"max_new_tokens": 6}, {"max_new_tokens": 6, "num_beams": 3}, {"max_new_tokens": 6, "use_cache": False}]
    models = {
        "RNNForCausalLM": ({"tie_word_embeddings": True}, ways),
        "RNNForSequenceClassification": ({"cell_type": "gru", "bidirectional": True, "pooling": "attention"}, []),
        "RNNSeq2SeqForConditionalGeneration": ({"decoder_type": "gnmt", "attention_score": "additive"}, ways),
    }
    for name, (options, ways_of_model) in models.items():
        model = make_model(name, **options)
        model.save_pretrained(root / name)
        inputs = make_inputs(name, with_labels=False)
        inputs.pop("decoder_input_ids", None)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][1, :3] = 0
        with torch.no_grad():
            logits = model(**inputs).logits
        generated = [(way, model.generate(**inputs, **way)) for way in ways_of_model]
        torch.save({"inputs": inputs, "logits": logits, "generated": generated}, root / f"{name}.pt")

    def run_script(script, cache):
        environment = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "HF_RNN_LOOP_ONLY"}}
        environment |= {
            "HF_HOME": str(root / cache / "home"),
            "HF_MODULES_CACHE": str(root / cache / "modules"),
            "HF_HUB_OFFLINE": "1",
        }
        (root / cache).mkdir()
        code = textwrap.dedent(REMOTE_PREAMBLE) + textwrap.dedent(script)
        process = subprocess.run(
            [sys.executable, "-c", code, str(root)], cwd=root / cache, env=environment, capture_output=True, text=True
        )
        assert process.returncode == 0, process.stderr[-3000:]
        return process.stdout

    return run_script


def test_without_the_library(run_remote):
    """A saved folder works where `hf_rnn` is not installed: one language model, one classifier, one translator."""
    output = run_remote(
        """
        AUTO = {
            "RNNForCausalLM": transformers.AutoModelForCausalLM,
            "RNNForSequenceClassification": transformers.AutoModelForSequenceClassification,
            "RNNSeq2SeqForConditionalGeneration": transformers.AutoModelForSeq2SeqLM,
        }
        for name, auto_class in AUTO.items():
            expected = torch.load(root / f"{name}.pt")
            model = auto_class.from_pretrained(root / name, trust_remote_code=True)
            check(model, expected)
            # Saved again from there, with its code, it loads once more.
            model.save_pretrained("again-" + name)
            check(auto_class.from_pretrained("again-" + name, trust_remote_code=True), expected)
        # The other heads of the family, from the weights of one.
        for auto_name in ("AutoModel", "AutoModelForTokenClassification", "AutoModelForMultipleChoice"):
            auto_class = getattr(transformers, auto_name)
            head = auto_class.from_pretrained(root / "RNNForCausalLM", trust_remote_code=True)
            print(type(head).__name__)
        """,
        "alone",
    )
    assert output.split() == ["RNNModel", "RNNForTokenClassification", "RNNForMultipleChoice"]


def test_several_without_the_library(run_remote):
    """Two saved folders, each with its own copy of the code, are used side by side in one process."""
    run_remote(
        """
        expected = {name: torch.load(root / f"{name}.pt") for name in
                    ("RNNForCausalLM", "RNNSeq2SeqForConditionalGeneration")}
        first = transformers.AutoModelForCausalLM.from_pretrained(root / "RNNForCausalLM", trust_remote_code=True)
        second = transformers.AutoModelForSeq2SeqLM.from_pretrained(
            root / "RNNSeq2SeqForConditionalGeneration", trust_remote_code=True
        )
        for _ in range(2):
            check(first, expected["RNNForCausalLM"])
            check(second, expected["RNNSeq2SeqForConditionalGeneration"])
        """,
        "several",
    )


def test_local_classes_win(tmp_path):
    """With `hf_rnn` imported its own classes are used, whatever code lies in the folder."""
    model = make_model("RNNForCausalLM")
    model.save_pretrained(tmp_path)
    for path in tmp_path.glob("*.py"):
        path.write_text("raise RuntimeError('this must not run')")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded) is hf_rnn.RNNForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path, trust_remote_code=True)) is hf_rnn.RNNModel
    assert_same_outputs(run(loaded, "RNNForCausalLM"), run(model, "RNNForCausalLM"))


def test_checkpoints_of_torch_move_in(tmp_path):
    """The weights of `nn.LSTM` and its like fit by renaming, and give what they gave."""
    for cell_type, module_class in (("lstm", nn.LSTM), ("gru", nn.GRU), ("rnn_tanh", nn.RNN)):
        torch.manual_seed(0)
        source = module_class(5, 6, num_layers=2, bidirectional=True, batch_first=True).double()
        model = make_model("RNNModel", cell_type=cell_type, bidirectional=True)
        state = {"embed_tokens.weight": model.embed_tokens.weight.detach()}
        for key, weight in source.state_dict().items():
            kind, layer = key.removesuffix("_reverse").rsplit("_l", 1)
            cell = "cell_reverse" if key.endswith("_reverse") else "cell"
            state[f"layers.{layer}.{cell}.{kind}"] = weight
        save_file({key: weight.contiguous() for key, weight in state.items()}, tmp_path / "model.safetensors")
        model.config.save_pretrained(tmp_path)
        loaded, info = AutoModel.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        inputs = make_inputs("RNNModel")
        with torch.no_grad():
            expected, _ = source(model.embed_tokens(inputs["input_ids"]))
            torch.testing.assert_close(loaded(**inputs).last_hidden_state, expected, rtol=0, atol=1e-12)


def import_nodes(path):
    """The import statements of a file, each with whether it runs when the file is imported."""
    tree = ast.parse(path.read_text())
    inside = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.walk(node)
    }
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return [(node, node not in inside) for node in nodes]


def relative_imports(path, at_import_only=False):
    """Names of the files of the package that a file imports."""
    return {
        node.module
        for node, at_import in import_nodes(path)
        if isinstance(node, ast.ImportFrom) and node.level and (at_import or not at_import_only)
    }


FLAT_FILES = sorted(path for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", "__main__"))


@pytest.mark.parametrize("path", FLAT_FILES, ids=lambda path: path.name)
def test_imports_that_the_hub_can_copy(path):
    """Only `from .name import x` of files in the same folder: the Hub's copier follows nothing else."""
    tree = ast.parse(path.read_text())
    for node, _ in import_nodes(path):
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] != "hf_rnn" for alias in node.names)
        elif node.level == 0:
            assert node.module.split(".")[0] != "hf_rnn"
        else:
            assert node.level == 1
            assert node.module is not None, "`from . import x`"
            assert (PACKAGE / f"{node.module}.py").exists(), f"`from .{node.module} import` leaves the folder"
            assert node.module != "__init__"
            assert all(alias.name != "*" for alias in node.names)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "TYPE_CHECKING" not in names | attributes
    assert not {"import_module", "__import__"} & (names | attributes)


INDEPENDENT = {
    "attention",
    "checkpoint_files",
    "configuration_checks",
    "cuda_graphs",
    "fast_paths",
    "generation_masks",
    "higher_derivatives",
    "label_schemes",
    "pointer_generator",
    "pooling",
    "recurrent_cache",
    "recurrent_cells",
    "recurrent_padding",
    "seq2seq_losses",
}


RUNNING = {
    "bare_cells",
    "cell_functions",
    "crf",
    "crf_operators",
    "decoder_operator",
    "opaque_operators",
    "packed_sequences",
    "deferred_logits",
    "hyperbolic_tangent",
    "kept_for_texts",
    "large_products",
    "linear_calls",
    "linear_modules",
    "linear_operator",
    "packed_linear",
    "recorded_kernel",
    "recorded_loop",
    "recordings",
    "recurrent_gates",
    "recurrent_kernels",
    "recurrent_layer",
    "recurrent_onnx",
    "recurrent_operator",
    "recurrent_segments",
    "repeated_rows",
    "sequence_functions",
    "shared_sources",
    "step_linear",
    "weight_layouts",
    "vocabulary_loss",
}


@pytest.mark.parametrize("path", FLAT_FILES, ids=lambda path: path.name)
def test_imports_run_one_way(path):
    """
    Configurations, cells, cache and attention import nothing of the package (configurations share their checks, and
    look into the tables of cells and scores when they are made); the layer and what runs it import the cells; modeling
    files import those, never each other.
    """
    modules = relative_imports(path, at_import_only=True)
    late = relative_imports(path) - modules
    if path.stem.startswith("configuration_"):
        assert modules <= {"configuration_checks", "label_schemes"}
        assert late <= {"recurrent_cells", "attention"}
        # Reading a configuration needs no torch.
        for node, _ in import_nodes(path):
            roots = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert all(root.split(".")[0] != "torch" for root in roots)
        return
    assert not late
    if path.stem in INDEPENDENT:
        assert not modules
    elif path.stem in RUNNING:
        assert modules <= INDEPENDENT | RUNNING
    assert not any(module.startswith("modeling_") for module in modules)
    if not path.stem.startswith("modeling_"):
        assert not any(module.startswith("configuration_") for module in modules)


def test_imports_have_no_cycle():
    """Files can be put in an order in which each imports only those before it."""
    left = {path.stem: relative_imports(path) for path in FLAT_FILES}
    while left:
        ready = {name for name, modules in left.items() if not modules & left.keys()}
        assert ready, f"A cycle among {sorted(left)}."
        left = {name: modules for name, modules in left.items() if name not in ready}
