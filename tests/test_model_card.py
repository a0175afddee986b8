"""The model card: what it says, what it refuses, where it is written, and what `Trainer` makes of it."""

import ast
import json
import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.modelcard import TrainingSummary

import hf_rnn
from hf_rnn import REGISTRATION, create_model_card, save_model_card, set_card_details
from hf_rnn.model_card import GENERATED_CARD, PIPELINE_TAGS, USES
from hf_rnn.training_summary import write_cards
from matrix import INTENTS, MODEL_CLASSES, WORDS, make_model, options_of
from word_tokenizer import make_tokenizer, snippets


over_classes = pytest.mark.parametrize("name", MODEL_CLASSES)
RESULT = EvalResult(
    task_type="translation",
    task_name="German to English",
    dataset_type="multi30k",
    dataset_name="Multi30k",
    dataset_split="test",
    metric_type="sacrebleu",
    metric_name="BLEU | 5 beams",
    metric_value=41.87,
)


def section(card, title):
    """What stands under a heading."""
    return card.text.split(f"## {title}\n")[1].split("\n## ")[0]


@over_classes
def test_every_option(name):
    """Each class with each option has a card that reads back as it was, whose programs are Python."""
    for options in options_of(name):
        model = make_model(name, **options)
        card = create_model_card(model, model_id="my-name/my-model")
        assert str(ModelCard(str(card))) == str(card)
        assert {"hf_rnn", model.config.model_type, model.config.cell_type, "custom_code"} == set(card.data.tags)
        assert f"- {sum(parameter.numel() for parameter in model.parameters()):,} parameters\n" in card.text
        assert f"(`{model.config.cell_type}`)" in card.text
        with_library, without = snippets(card.text)
        for program in (with_library, without):
            ast.parse(program)
            assert '"my-name/my-model"' in program
        assert "import hf_rnn" in with_library
        assert "trust_remote_code=True" not in with_library
        assert "hf_rnn" not in without
        assert without.count("trust_remote_code=True") == without.count("from_pretrained")
        for title in ("Results", "Training"):
            assert f"## {title}\n" not in card.text, "nothing was given for it"


def test_every_class_of_the_table():
    """Every Auto class that comes first for a class has a task and a way to use it."""
    for model_classes in REGISTRATION.values():
        for model_class, auto_classes in model_classes.items():
            assert model_class._auto_class == auto_classes[0].__name__
            assert model_class._auto_class in PIPELINE_TAGS
            assert model_class._auto_class in USES


def test_words_chains_and_intents():
    """What makes words of tokens, how many are known, and that labels are a chain beside an intent."""
    options = WORDS[0] | INTENTS | {"use_crf": True, "pooling": "mean"}
    text = create_model_card(make_model("RNNForTokenClassification", **options)).text
    assert "- words: 64 numbers made of their tokens by `cnn`, and embeddings of 4 numbers for 12 of them" in text
    assert "- labels are a chain" in text
    assert "- a text becomes one vector by `mean`" in text
    assert "- intents: `ask`, `tell`, `greet`" in text
    text = create_model_card(make_model("RNNForTokenClassification")).text
    assert not any(word in text for word in ("words:", "chain", "one vector", "intents"))


def test_what_the_configuration_says():
    """Directions, decoder, attention, tied embeddings, pooling and labels are described as they are."""
    text = create_model_card(make_model("RNNForSequenceClassification", bidirectional=True, pooling="max")).text
    assert "2 layers, read in both directions" in text
    assert "one vector by `max`" in text
    assert "one of 4 labels" in text
    assert "labels:" not in text
    assert "the whole text before" in text
    text = create_model_card(make_model("RNNForTokenClassification", num_labels=2, id2label={0: "good", 1: "bad"})).text
    assert "labels: `good`, `bad`" in text
    assert "both directions" not in text
    text = create_model_card(
        make_model(
            "RNNSeq2SeqForConditionalGeneration",
            attention_score="additive",
            num_attention_heads=2,
            input_feeding=True,
            encoder_layers=1,
            decoder_layers=3,
        )
    ).text
    assert "encoder: 1 layer, read in both directions" in text
    assert "decoder of the kind `luong` with input feeding: 3 layers" in text
    assert "score `additive`, heads: 2" in text
    assert "tied to the output" in text
    text = create_model_card(make_model("RNNForCausalLM", residual=True)).text
    assert "residual connections" in text
    assert "tied to the output" not in text
    assert "state of fixed size" in text


def test_everything_given():
    """What the caller gives stands in the metadata and in the text."""
    card = create_model_card(
        make_model("RNNSeq2SeqForConditionalGeneration"),
        model_id="me/translator",
        description="From German to English.",
        language=["de", "no"],
        license="mit",
        datasets="bentrevett/multi30k",
        base_model="me/older",
        metrics="chrf",
        tags=["news", "hf_rnn"],
        pipeline_tag="translation",
        results=[RESULT],
        evaluation={"loss": 1.25},
        example='Ein "Hund" rennt.',
        training_command="python examples/translate.py",
        hyperparameters={"seed": 42, "optimizer": "two\nlines"},
        training_log=[{"epoch": 1, "loss": 2.5}, {"epoch": 2, "loss": 2.25}],
        versions={"torch": "2.13.0"},
        limits=["It has seen pictures only."],
    )
    data = ModelCard(str(card)).data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["language"] == ["de", "no"]
    assert data["license"] == "mit"
    assert data["datasets"] == ["bentrevett/multi30k"]
    assert data["base_model"] == ["me/older"]
    assert data["metrics"] == ["chrf", "sacrebleu"]
    assert data["pipeline_tag"] == "translation"
    assert data["tags"] == ["hf_rnn", "rnn_seq2seq", "lstm", "custom_code", "news"]
    (entry,) = data["model-index"]
    assert entry["name"] == "translator"
    assert entry["results"][0]["metrics"] == [{"type": "sacrebleu", "value": 41.87, "name": "BLEU | 5 beams"}]
    assert card.text.strip().startswith(f"{GENERATED_CARD}\n\n# translator\n\nFrom German to English.\n")
    assert "| German to English | Multi30k test | BLEU \\| 5 beams | 41.87 |" in section(card, "Results")
    assert "| loss | 1.25 |" in section(card, "Results")
    training = section(card, "Training")
    for part in (
        "[me/older](https://huggingface.co/me/older)",
        "```bash\npython examples/translate.py\n```",
        "- optimizer: two lines\n",
        "| epoch | loss |\n| --- | --- |\n| 1 | 2.5 |\n| 2 | 2.25 |",
        "torch 2.13.0",
    ):
        assert part in training
    assert "- It has seen pictures only." in section(card, "Limits")
    assert "No results" not in section(card, "Limits")
    assert all('tokenizer("Ein \\"Hund\\" rennt."' in program for program in snippets(card.text))


@pytest.mark.parametrize(
    ("details", "message"),
    [
        ({"model_id": ""}, "model_id"),
        ({"model_id": 3}, "model_id"),
        ({"model_name": "two\nlines"}, "model_name"),
        ({"license": ["mit"]}, "license"),
        ({"pipeline_tag": 1}, "pipeline_tag"),
        ({"description": " "}, "description"),
        ({"training_command": ["python"]}, "training_command"),
        ({"language": "German"}, "language.*German"),
        ({"language": [None]}, "language"),
        ({"language": {"de"}}, "language"),
        ({"datasets": 3}, "datasets"),
        ({"tags": [3]}, "tags"),
        ({"metrics": ["a\nb"]}, "metrics"),
        ({"base_model": "not a name/of a model"}, "base_model"),
        ({"results": {"accuracy": 0.5}}, "results"),
        ({"results": EvalResult("t", "d", "D", "m", float("nan"))}, "metric_value.*nan"),
        ({"results": EvalResult("t", "d", "D", "m", None)}, "metric_value.*None"),
        ({"results": EvalResult("t", "d", "D", "m", True)}, "metric_value.*True"),
        ({"results": EvalResult("t", "d", "D", "m", torch.tensor(0.5))}, "metric_value"),
        ({"evaluation": [0.5]}, "evaluation"),
        ({"hyperparameters": "seed 42"}, "hyperparameters"),
        ({"versions": "2.13"}, "versions"),
        ({"training_log": {"epoch": 1}}, "training_log"),
        ({"training_log": [{"epoch": 1}, {"loss": 1}]}, "training_log"),
        ({"limits": {"none": 1}}, "limits"),
        ({"example": ("a", "b")}, "example"),
        ({"example": ""}, "example"),
    ],
)
def test_wrong_arguments(details, message, tmp_path):
    """A wrong argument is named before anything is written."""
    model = make_model("RNNForCausalLM")
    with pytest.raises(ValueError, match=message):
        create_model_card(model, **details)
    with pytest.raises(ValueError, match=message):
        set_card_details(model, **details)
    assert model.card_details is None
    with pytest.raises(ValueError, match=message):
        save_model_card(model, tmp_path / "new", **details)
    assert not (tmp_path / "new").exists()


def test_wrong_models_and_examples():
    with pytest.raises(ValueError, match=r"`model`.*Linear"):
        create_model_card(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="licence"):
        set_card_details(make_model("RNNForCausalLM"), licence="mit")
    for name, wrong, right in (
        ("RNNForMaskedLM", "No mask.", "A [MASK]."),
        ("RNNForQuestionAnswering", "A question?", ("A question?", "A text.")),
        ("RNNForQuestionAnswering", ("One?", "Two.", "Three."), ["A question?", "A text."]),
        ("RNNForMultipleChoice", ("A prompt.", "One choice."), ("A prompt.", "One.", "Two.", "Three.")),
    ):
        model = make_model(name)
        with pytest.raises(ValueError, match="`example`"):
            create_model_card(model, example=wrong)
        texts = right if isinstance(right, str) else ", ".join(json.dumps(text) for text in right)
        assert texts in snippets(create_model_card(model, example=right).text)[0]


@pytest.mark.parametrize(
    ("options", "printed"),
    [
        ({"num_labels": 2, "id2label": {0: "good", 1: "bad"}}, {"good", "bad"}),
        (
            {"num_labels": 2, "id2label": {0: "good", 1: "bad"}, "problem_type": "multi_label_classification"},
            {"['good', 'bad']", "[]"},
        ),
        ({"num_labels": 1}, None),
        ({"num_labels": 3, "problem_type": "regression"}, None),
    ],
)
def test_programs_of_classifiers(options, printed, tmp_path, capsys):
    """The program in the card prints what the kind of classifier has to say."""
    model = make_model("RNNForSequenceClassification", **options)
    with torch.no_grad():
        model.classifier.bias.fill_(9.0)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    card = ModelCard.load(save_model_card(model, tmp_path))
    capsys.readouterr()
    exec(snippets(card.text)[0], {})
    output = capsys.readouterr().out.strip()
    if printed is None:
        assert len(ast.literal_eval(output)) == options["num_labels"]
    else:
        assert output in printed


def test_where_the_card_is_about(tmp_path):
    """Without a name the programs load what the model was loaded from, or what lies in the current folder."""
    model = make_model("RNNForCausalLM")
    card = create_model_card(model)
    assert '.from_pretrained(".")' in card.text
    assert "# RNNForCausalLM\n" in card.text
    model.save_pretrained(tmp_path / "model")
    card = create_model_card(hf_rnn.RNNForCausalLM.from_pretrained(tmp_path / "model"))
    assert json.dumps(str(tmp_path / "model")) in card.text
    assert "# model\n" in card.text


def test_length_of_generation():
    """The program sets a length of its own only where the model's settings have none."""
    model = make_model("RNNForCausalLM")
    assert "max_new_tokens=40" in snippets(create_model_card(model).text)[0]
    model.generation_config.max_new_tokens = 7
    assert "max_new_tokens" not in create_model_card(model).text


def test_save(tmp_path):
    """A card is written as a whole, written anew if this library wrote it, and one written by hand stays."""
    model = make_model("RNNForCausalLM")
    path = save_model_card(model, tmp_path / "new" / "folder", license="mit")
    assert path == tmp_path / "new" / "folder" / "README.md"
    assert os.listdir(path.parent) == ["README.md"]
    assert ModelCard.load(path).data.license == "mit"
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    save_model_card(model, path.parent, license="apache-2.0")
    assert ModelCard.load(path).data.license == "apache-2.0"
    path.write_text(path.read_text().replace(GENERATED_CARD, "") + "My words.\n")
    text = path.read_text()
    with pytest.raises(FileExistsError, match=r"README\.md.*overwrite=True"):
        save_model_card(model, path.parent)
    assert path.read_text() == text
    save_model_card(model, path.parent, overwrite=True)
    assert "My words." not in path.read_text()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_no_half_of_a_card(tmp_path, monkeypatch):
    """Where writing fails the old card is there, and nothing else."""
    model = make_model("RNNForCausalLM")
    path = save_model_card(model, tmp_path)
    text = path.read_text()

    def fail(self, target):
        raise OSError("the disk is full")

    monkeypatch.setattr(type(path), "replace", fail)
    with pytest.raises(OSError, match="disk is full"):
        save_model_card(model, tmp_path, license="mit")
    assert os.listdir(tmp_path) == ["README.md"]
    assert path.read_text() == text


def test_saving_writes_no_card(tmp_path):
    """`save_pretrained` alone writes none, as of any model, and leaves the one that is there."""
    model = make_model("RNNForCausalLM")
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()
    (tmp_path / "README.md").write_text("By hand.\n")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "By hand.\n"


def test_tags_are_of_the_instance():
    """Tags that are added to a model are not those of the next."""
    model = make_model("RNNForCausalLM", cell_type="gru")
    assert model.model_tags == ["hf_rnn", "rnn", "gru", "custom_code"]
    model.add_model_tags("mine")
    assert make_model("RNNForCausalLM", cell_type="gru").model_tags == ["hf_rnn", "rnn", "gru", "custom_code"]
    assert "mine" in create_model_card(model).data.tags


def make_trainer(model, folder, rows, metrics=None, **options):
    options = {
        "max_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
    } | options
    arguments = TrainingArguments(str(folder), **options)
    compute = None if metrics is None else lambda _: dict(metrics)
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=compute)


ROWS = [{"input_ids": [5, 6, 7 + index], "label": index % 2} for index in range(4)]


def test_trainer(tmp_path):
    """The stock `Trainer` writes this library's card with what it knows: results, course, settings, versions."""
    model = hf_rnn.RNNForSequenceClassification(hf_rnn.RNNConfig(vocab_size=29, hidden_size=6))
    trainer = make_trainer(
        model, tmp_path / "tuned", ROWS, {"accuracy": 0.75}, eval_strategy="steps", eval_steps=1, learning_rate=0.25
    )
    trainer.train()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "tuned" / "README.md")
    assert GENERATED_CARD in card.text
    assert "More information needed" not in str(card)
    assert "# tuned\n" in card.text
    assert {"hf_rnn", "rnn", "lstm", "custom_code", "generated_from_trainer"} == set(card.data.tags)
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.eval_results is None, "there is no name of a data set"
    assert card.data.get("base_model") is None
    assert "| Accuracy | 0.75 |" in section(card, "Results")
    training = section(card, "Training")
    assert "- learning_rate: 0.25\n" in training
    assert "| Training Loss | Epoch | Step | Validation Loss | Accuracy |" in training
    assert training.count("| 0.75 |") == 2
    assert f"torch {torch.__version__.split('+')[0]}" in training
    assert len(snippets(card.text)) == 2
    # Written once more, over the last.
    trainer.create_model_card(tags="mine")
    assert {"mine", "hf_rnn"} <= set(ModelCard.load(tmp_path / "tuned" / "README.md").data.tags)


def test_what_is_given_to_trainer(tmp_path):
    """Arguments of `create_model_card` come before what was said of the model, and that before what was found out."""
    rows = Dataset.from_list(ROWS)
    rows.info.builder_name = "found"
    model = hf_rnn.RNNForSequenceClassification(hf_rnn.RNNConfig(vocab_size=29, hidden_size=6))
    model.config._name_or_path = "somebody/base"
    trainer = make_trainer(model, tmp_path, rows, {"accuracy": 0.75, "f1": float("nan"), "worst": "none"})
    trainer.evaluate()

    def written(**arguments):
        trainer.create_model_card(**arguments)
        return ModelCard.load(tmp_path / "README.md")

    card = written()
    assert card.data.datasets == ["found"]
    assert card.data.base_model == ["somebody/base"]
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.dataset_split, result.metric_type) == ("found", None, "accuracy")
    assert "| f1 | nan |" in card.text
    set_card_details(
        model, license="mit", datasets="said/data", limits="Few words.", tags="said", pipeline_tag="text-ranking"
    )
    card = written()
    assert card.data.datasets == ["said/data"]
    assert card.data.license == "mit"
    assert card.data.pipeline_tag == "text-ranking"
    assert {"said", "generated_from_trainer"} <= set(card.data.tags)
    assert "- Few words.\n" in section(card, "Limits")
    card = written(
        license="apache-2.0",
        dataset_tags=["given/data"],
        finetuned_from="given/base",
        tasks="token-classification",
        language="en",
    )
    assert card.data.license == "apache-2.0"
    assert card.data.language == ["en"]
    assert card.data.datasets == ["given/data"]
    assert card.data.base_model == ["given/base"]
    assert card.data.pipeline_tag == "token-classification"
    assert "- Few words.\n" in section(card, "Limits")


def test_trainer_with_little_to_say(tmp_path):
    """Before training, with evaluations that do not measure the same, and from a folder that is gone."""
    model = hf_rnn.RNNForCausalLM(hf_rnn.RNNConfig(vocab_size=29, hidden_size=6))
    model.config._name_or_path = "/a/folder/that/is gone"
    trainer = make_trainer(model, tmp_path, ROWS)
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.get("base_model") is None
    assert "## Results" not in card.text
    trainer.state.log_history = [
        {"eval_loss": 2.0, "epoch": 1, "step": 1},
        {"eval_loss": 1.0, "eval_accuracy": 0.5, "epoch": 2, "step": 2},
        {"train_runtime": 1.0},
    ]
    trainer.create_model_card()
    text = ModelCard.load(tmp_path / "README.md").text
    assert "| Training Loss | Epoch | Step | Validation Loss | Accuracy |" in text
    assert "| No log | 1 | 1 | 2 |  |" in text


def test_other_models_keep_their_card(tmp_path):
    """`Trainer` writes the card of another library's model as ever, and it is told so once only."""
    config = BertConfig(vocab_size=29, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    before = TrainingSummary.from_trainer
    write_cards()
    assert TrainingSummary.from_trainer == before
    make_trainer(BertForSequenceClassification(config), tmp_path, ROWS).create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "More information needed" in text
    assert "hf_rnn" not in text


RECIPES = sorted((Path(__file__).parents[1] / "model_cards").glob("*.md"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_cards_of_the_recipes(path):
    """The cards of the trained recipes have the form of a generated one, with results and the command."""
    card = ModelCard.load(path)
    assert card.data.library_name == "transformers"
    assert {"hf_rnn", "lstm", "custom_code"} <= set(card.data.tags)
    assert card.data.pipeline_tag
    assert card.data.metrics
    with_library, without = snippets(card.text)
    assert "import hf_rnn" in with_library
    assert without.count("trust_remote_code=True") == without.count("from_pretrained") == 2
    headings = [line[3:] for line in card.text.splitlines() if line.startswith("## ")]
    assert headings == ["Use", "Results", "Training", "Limits"]
    assert " parameters\n" in card.text
    assert "```bash\n" in section(card, "Training")
