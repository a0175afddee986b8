"""
Models go to the Hub and come back, with `hf_rnn` and without it.

The Hub is `hub_server.py` on the loopback interface. The clients are processes of their own, as `huggingface_hub`
reads `HF_ENDPOINT` and `HF_HUB_OFFLINE` when it is imported. `HF_HUB_DISABLE_XET` has it upload weights with the LFS
protocol.
"""

import inspect
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load as load_safetensors

import hf_rnn
from hf_rnn import REGISTRATION
from hf_rnn.model_card import GENERATED_CARD, PIPELINE_TAGS
from hub_server import TOKEN, USER, LocalHub
from matrix import MODEL_CLASSES, make_inputs, make_mask, make_model
from word_tokenizer import snippets


PACKAGE = Path(hf_rnn.__file__).parent
TESTS = Path(__file__).parent
AUTO_CLASSES = {
    model_class.__name__: auto_classes[0].__name__
    for model_classes in REGISTRATION.values()
    for model_class, auto_classes in model_classes.items()
}
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}

WITH_LIBRARY = """
    import sys, json, torch
    from pathlib import Path
    import transformers
    import hf_rnn
    root = Path(sys.argv[1])
"""
WITHOUT_LIBRARY = """
    import importlib.abc, sys, json, torch
    from pathlib import Path

    class Blocker(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "hf_rnn":
                raise ModuleNotFoundError(f"{name} is not installed here")

    sys.meta_path.insert(0, Blocker())
    import transformers
    root = Path(sys.argv[1])
    LOAD = {"trust_remote_code": True}

    def check(auto_name, source, name):
        model = getattr(transformers, auto_name).from_pretrained(source, **LOAD)
        assert type(model).__name__ == name.split("-")[0], type(model)
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        expected = torch.load(root / f"{name}.pt")
        with torch.no_grad():
            output = model(**expected["inputs"])[0]
        torch.testing.assert_close(output, expected["output"], rtol=0, atol=1e-12)
        return model
"""
TRAIN = """
    def train(model, tokenizer, rows, **keywords):
        arguments = transformers.TrainingArguments(
            "trained", hub_model_id=REPOSITORY, push_to_hub=True, save_strategy="no", max_steps=2, learning_rate=0.01,
            per_device_train_batch_size=2, report_to="none", disable_tqdm=True, use_cpu=True,
        )
        trainer = transformers.Trainer(
            model, arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer, **keywords
        )
        trainer.train()
        trainer.evaluate()
        return trainer
"""


@pytest.fixture(scope="module")
def hub():
    with LocalHub() as server:
        yield server


@pytest.fixture(scope="module")
def run(hub, tmp_path_factory):
    """Runs a script in a process of its own, with or without the library, in a folder and with a cache of its own."""
    root = tmp_path_factory.mktemp("hub")

    def run_script(script, name, library=True):
        environment = {
            key: value
            for key, value in os.environ.items()
            if key not in {"PYTHONPATH", "HF_HUB_OFFLINE", "HF_HUB_CACHE"}
        }
        environment |= {
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(root / name / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        preamble = WITHOUT_LIBRARY
        if library:
            preamble = WITH_LIBRARY
            environment["PYTHONPATH"] = os.pathsep.join([str(PACKAGE.parent), str(TESTS)])
        (root / name).mkdir()
        code = textwrap.dedent(preamble) + textwrap.dedent(script)
        process = subprocess.run(
            [sys.executable, "-c", code, str(root)],
            cwd=root / name,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert process.returncode == 0, process.stderr[-4000:]
        assert not hub.unknown
        return process.stdout

    run_script.root = root
    return run_script


@pytest.fixture(scope="module")
def pushed(hub, run):
    """
    One model of each class pushed under its own name, `translator` by `save_pretrained(..., push_to_hub=True)` from a
    folder with a card, and `classifier` by `Trainer`. Returns what is in them, by name.
    """
    for name in MODEL_CLASSES:
        model = make_model(name)
        model.save_pretrained(run.root / f"local-{name}")
        inputs = make_inputs(name, with_labels=False)
        inputs["attention_mask"] = make_mask()[[0, 1, 2, 3, 4, 1]]
        if inputs["input_ids"].dim() == 3:
            inputs["attention_mask"] = inputs["attention_mask"].unsqueeze(1).expand(-1, 3, -1)
        with torch.no_grad():
            torch.save({"inputs": inputs, "output": model(**inputs)[0]}, run.root / f"{name}.pt")
    script = """
    from matrix import MODEL_CLASSES, make_model
    from word_tokenizer import make_tokenizer

    tokenizer = make_tokenizer()
    for name, (_, model_class) in MODEL_CLASSES.items():
        model = model_class.from_pretrained(root / f"local-{name}")
        model.push_to_hub(name, tags=["of-the-test"])
        tokenizer.push_to_hub(name)
        assert "of-the-test" not in make_model(name).model_tags
    # Pushed once more, its card stays as it is.
    model.push_to_hub(name)

    translator = make_model("RNNSeq2SeqForConditionalGeneration")
    hf_rnn.save_model_card(translator, "translator", model_id="tester/translator", license="mit")
    Path("translator/README.md").write_text(Path("translator/README.md").read_text() + "By hand.\\n")
    translator.save_pretrained("translator", push_to_hub=True)

    model = hf_rnn.RNNForSequenceClassification(hf_rnn.RNNConfig(vocab_size=29, hidden_size=6)).double()
    hf_rnn.set_card_details(model, license="apache-2.0", limits="It knows 29 words.", training_command="train --now")
    rows = [{"input_ids": [5, 6, 7 + index], "label": index % 2} for index in range(4)]
    trainer = train(model, tokenizer, rows, compute_metrics=lambda _: {"accuracy": 0.75})
    trainer.push_to_hub(dataset_tags="nobody/toy", dataset="Toy", language="en")
    """
    train = TRAIN.replace("REPOSITORY", '"tester/classifier"')
    run(textwrap.dedent(train) + textwrap.dedent(script), "push")
    assert set(hub.repositories) == {f"{USER}/{name}" for name in [*MODEL_CLASSES, "translator", "classifier"]}
    return {name.split("/")[1]: dict(repository.files) for name, repository in hub.repositories.items()}


def assert_has_code(files, family):
    """The configuration names all heads of the family, each in a file that is there, and each is the library's own."""
    config_class = next(config_class for config_class in REGISTRATION if config_class.model_type == family)
    auto_map = json.loads(files["config.json"])["auto_map"]
    expected = {"AutoConfig": config_class.__name__}
    for model_class, auto_classes in REGISTRATION[config_class].items():
        expected |= {auto_class.__name__: model_class.__name__ for auto_class in auto_classes}
    assert {auto_class: name.rpartition(".")[2] for auto_class, name in auto_map.items()} == expected
    assert all("--" not in name and f"{name.split('.')[0]}.py" in files for name in auto_map.values())
    code = {path for path in files if path.endswith(".py")}
    assert {"modeling_rnn.py" if family == "rnn" else "modeling_rnn_seq2seq.py", "recurrent_model.py"} <= code
    assert not {"model_card.py", "training_summary.py", "__init__.py"} & code
    for path in code:
        assert files[path] == (PACKAGE / path).read_bytes()


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_what_is_pushed(name, pushed, run):
    """Weights, configuration, code, settings of generation, tokenizer and card, and nothing else."""
    files = pushed[name]
    family = MODEL_CLASSES[name][0].model_type
    assert_has_code(files, family)
    generative = hasattr(MODEL_CLASSES[name][1], "create_masks_for_generate")
    assert {path for path in files if not path.endswith(".py")} == (
        {"README.md", "config.json", "model.safetensors"}
        | TOKENIZER_FILES
        | ({"generation_config.json"} if generative else set())
    )
    folder = run.root / f"local-{name}"
    weights = load_safetensors(files["model.safetensors"])
    local = load_safetensors((folder / "model.safetensors").read_bytes())
    assert weights.keys() == local.keys()
    assert all(torch.equal(weights[key], local[key]) for key in weights)
    card = ModelCard(files["README.md"].decode())
    assert GENERATED_CARD in card.text
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == PIPELINE_TAGS[AUTO_CLASSES[name]]
    assert {"hf_rnn", family, "lstm", "custom_code", "of-the-test"} == set(card.data.tags)
    assert f'"{USER}/{name}"' in card.text


def test_card_of_a_folder(pushed):
    """A card that lies beside the weights is not replaced by a template; it goes to the Hub as it is."""
    files = pushed["translator"]
    assert_has_code(files, "rnn_seq2seq")
    assert {"model.safetensors", "config.json", "generation_config.json", "README.md"} <= set(files)
    text = files["README.md"].decode()
    assert text.endswith("By hand.\n")
    assert ModelCard(text).data.license == "mit"


def test_card_of_trainer(pushed):
    """`Trainer.push_to_hub` writes this library's card, with what `Trainer` measured and what was said of the model."""
    files = pushed["classifier"]
    assert_has_code(files, "rnn")
    assert {"model.safetensors", "config.json", "README.md"} | TOKENIZER_FILES <= set(files)
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "apache-2.0"
    assert card.data.language == ["en"]
    assert card.data.datasets == ["nobody/toy"]
    assert {"hf_rnn", "custom_code", "generated_from_trainer"} <= set(card.data.tags)
    (result,) = card.data.eval_results
    assert (result.task_type, result.dataset_type, result.dataset_name) == ("text-classification", "nobody/toy", "Toy")
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.75)
    for part in ("It knows 29 words.", "train --now", "learning_rate: 0.01", "| Loss |", f'"{USER}/classifier"'):
        assert part in card.text
    assert len(snippets(card.text)) == 2


@pytest.fixture(scope="module")
def pushed_without_library(hub, run, pushed):
    """
    In a process without the library: every model is loaded from the Hub and gives what it gave, the programs in the
    cards run, and a language model is trained on and pushed, pushed as it is, and saved.
    """
    script = f"""
    AUTO_CLASSES = {AUTO_CLASSES!r}
    from huggingface_hub import ModelCard

    import re
{textwrap.indent(inspect.getsource(snippets), "    ")}

    for name, auto_name in AUTO_CLASSES.items():
        check(auto_name, "tester/" + name, name)
        with_library, without = snippets(str(ModelCard.load("tester/" + name)))
        exec(without, {{}})
    # The other heads of the family, from the weights of one.
    for name, auto_name in AUTO_CLASSES.items():
        if "Seq2Seq" not in name:
            model = getattr(transformers, auto_name).from_pretrained("tester/RNNForCausalLM", **LOAD)
            assert type(model).__name__ == name

    model = check("AutoModelForCausalLM", "tester/RNNForCausalLM", "RNNForCausalLM")
    model.save_pretrained("../saved")
    model.push_to_hub("copied")
    # A folder without code, which points to that of a repository, is complete when it was loaded and saved.
    import shutil
    shutil.copytree("../saved", "pointing", ignore=shutil.ignore_patterns("*.py"))
    config = json.loads(Path("pointing/config.json").read_text())
    config["auto_map"] = {{key: "tester/RNNForCausalLM--" + name for key, name in config["auto_map"].items()}}
    Path("pointing/config.json").write_text(json.dumps(config))
    check("AutoModelForCausalLM", "pointing", "RNNForCausalLM").save_pretrained("../pointed")

    tokenizer = transformers.AutoTokenizer.from_pretrained("tester/RNNForCausalLM")
    rows = [{{"input_ids": [5, 6, 7 + index], "labels": [5, 6, 7 + index]}} for index in range(4)]
    trainer = train(model, tokenizer, rows)
    trainer.push_to_hub()
    inputs = torch.load(root / "RNNForCausalLM.pt")["inputs"]
    with torch.no_grad():
        output = model.eval()(**inputs).logits
    assert not torch.equal(output, torch.load(root / "RNNForCausalLM.pt")["output"])
    torch.save({{"inputs": inputs, "output": output}}, root / "RNNForCausalLM-trained.pt")
    """
    train = TRAIN.replace("REPOSITORY", '"tester/trained"')
    run(textwrap.dedent(train) + textwrap.dedent(script), "without", library=False)
    return {name: dict(hub.repositories[f"{USER}/{name}"].files) for name in ("copied", "trained")}


def test_without_the_library(hub, run, pushed_without_library):
    """What was pushed and saved without the library carries the code, and stands without what it came from."""
    for files in pushed_without_library.values():
        assert_has_code(files, "rnn")
        assert {"model.safetensors", "generation_config.json", "README.md"} <= set(files)
        assert {"hf_rnn", "custom_code"} <= set(ModelCard(files["README.md"].decode()).data.tags)
    for folder in ("saved", "pointed"):
        assert_has_code({path.name: path.read_bytes() for path in (run.root / folder).iterdir()}, "rnn")
    others = {name: hub.repositories.pop(name) for name in list(hub.repositories) if name.endswith("CausalLM")}
    try:
        run(
            """
            check("AutoModelForCausalLM", "tester/trained", "RNNForCausalLM-trained")
            for source in ("tester/copied", root / "saved", root / "pointed"):
                check("AutoModelForCausalLM", source, "RNNForCausalLM")
                for name in ("AutoModel", "AutoModelForTokenClassification"):
                    head = getattr(transformers, name).from_pretrained(source, **LOAD)
                    assert type(head).__module__.startswith("transformers_modules.")
            """,
            "alone",
            library=False,
        )
    finally:
        hub.repositories.update(others)


def test_with_the_library(run, pushed):
    """With `hf_rnn` its own classes are used, whatever code the repository has; the programs in the cards run."""
    run(
        f"""
        AUTO_CLASSES = {AUTO_CLASSES!r}
        from huggingface_hub import ModelCard
        from word_tokenizer import snippets

        for name, auto_name in AUTO_CLASSES.items():
            for keywords in ({{}}, {{"trust_remote_code": True}}):
                model = getattr(transformers, auto_name).from_pretrained("tester/" + name, **keywords)
                assert type(model) is getattr(hf_rnn, name)
                expected = torch.load(root / f"{{name}}.pt")
                with torch.no_grad():
                    output = model(**expected["inputs"])[0]
                torch.testing.assert_close(output, expected["output"], rtol=0, atol=1e-12)
            with_library, _ = snippets(str(ModelCard.load("tester/" + name)))
            exec(with_library, {{}})
        # Saved from there it names its own code, not that of the repository.
        model.save_pretrained("saved")
        assert "--" not in json.dumps(json.loads(Path("saved/config.json").read_text())["auto_map"])
        """,
        "with",
    )
    assert not list((run.root / "with" / "home").rglob("modeling_rnn*.py"))
