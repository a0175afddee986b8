"""The classification script: labels of every kind, bad input, scores, and runs from beginning to end on made data."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from hf_rnn import RNNConfig, RNNForCausalLM, RNNForMaskedLM


pytest.importorskip("matplotlib")

import classify
import labelled_texts
from classification_metrics import confusion_matrix, score_classes, score_labels, score_numbers
from labelled_texts import Columns, find_problem_type, label_names, label_of, read_texts, texts_from_hub
from subword_tokenizer import train_word_tokenizer
from test_examples import run
from test_examples_data import jsonl, write
from test_examples_data import run as run_main
from text_pairs import DataError


COLUMNS = Columns("text", "label", "id")
TINY = {
    "per_device_train_batch_size": 32,
    "hidden_size": 8,
    "embedding_size": 8,
    "num_train_epochs": 2,
    "logging_steps": 5,
    "learning_rate": 0.02,
}
COLOURS = {"red": ["rose", "blood", "brick"], "green": ["leaf", "grass", "moss"], "blue": ["sky", "sea", "ink"]}


def colour_rows(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Texts of words of one colour, with their colour."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        colour = rng.choice(list(COLOURS))
        rows.append((colour, " ".join(["The", *rng.choices(COLOURS[colour], k=rng.randint(1, 5))]) + "!"))
    return rows


def table(rows, header=("label", "text")) -> str:
    return "".join("\t".join(map(str, row)) + "\n" for row in [header, *rows])


# Reading.


def test_named_columns_of_every_kind_of_file(tmp_path):
    rows = [("a", 'He said "no"'), ("b", "c, d"), ("a", "e\u2028f")]
    write(tmp_path / "a.tsv", table(rows))
    write(tmp_path / "a.csv", 'label,text\na,"He said ""no"""\nb,"c, d"\na,e\u2028f\n')
    write(tmp_path / "a.jsonl", jsonl({"text": text, "more": 1, "label": label} for label, text in rows))
    for name in ("a.tsv", "a.csv", "a.jsonl"):
        read = read_texts(str(tmp_path / name), COLUMNS)["train"]
        assert [(row.label, row.text) for row in read] == rows
        assert [row.row_id for row in read] == [None] * 3
    several = read_texts(f"{tmp_path / 'a.tsv'},{tmp_path / 'a.jsonl'}", COLUMNS)["train"]
    assert [(row.label, row.text) for row in several] == rows * 2
    assert (several[-1].path, several[-1].line) == (str(tmp_path / "a.jsonl"), 3)


def test_a_column_may_say_the_split(tmp_path):
    path = write(
        tmp_path / "a.tsv",
        table([("a", "x", "dev"), ("b", "y", "TRAIN"), ("a", "z", "test")], ["label", "text", "split"]),
    )
    read = read_texts(str(path), COLUMNS._replace(split="split"))
    assert {split: [row.text for row in rows] for split, rows in read.items()} == {
        "validation": ["x"],
        "train": ["y"],
        "test": ["z"],
    }
    write(path, table([("a", "x", "dev"), ("b", "y", "held out")], ["label", "text", "split"]))
    with pytest.raises(DataError, match=r"a.tsv:3: 'split' must be one of .* got 'held out'"):
        read_texts(str(path), COLUMNS._replace(split="split"))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        (
            "a.tsv",
            "label\tsentence\na\tb\n",
            r"a.tsv:1: no column 'text' in the header, which has \['label', 'sentence'\]",
        ),
        ("a.tsv", "text\tclass\na\tb\n", "a.tsv:1: no column 'label'"),
        ("a.tsv", "label\ttext\na\tb\nc\n", "a.tsv:3: expected 2 fields, found 1"),
        ("a.tsv", "label\ttext\na\t \n", "a.tsv:2: empty text"),
        ("a.tsv", "label\ttext\n", "no texts in this file"),
        ("a.tsv", b"label\ttext\na\t\xe9\n", "a.tsv:2: not valid UTF-8"),
        (
            "a.jsonl",
            '{"text": "x", "label": "a"}\n{"text": 3, "label": "a"}\n',
            "a.jsonl:2: field 'text' is not text but int",
        ),
        ("a.jsonl", '{"text": "x"}\n', "a.jsonl:1: no field 'label'"),
        ("a.jsonl", '{"text": "x", "label": null}\n', "a.jsonl:1: field 'label' is no label but NoneType"),
        ("a.jsonl", '{"text": "x", "label": {"a": 1}}\n', "a.jsonl:1: field 'label' is no label but dict"),
        ("a.txt", "x\n", "unknown kind of file"),
    ],
)
def test_bad_files(tmp_path, name, content, problem):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=problem):
        read_texts(str(path), COLUMNS)


def test_bad_lines_can_be_skipped(tmp_path):
    path = write(tmp_path / "a.tsv", "label\ttext\na\tb\nc\na\t\nd\te\n")
    assert [row.text for row in read_texts(str(path), COLUMNS, skip_bad_lines=True)["train"]] == ["b", "e"]


def test_data_sets_of_the_hub(tmp_path, monkeypatch):
    """A folder as a data set; classes by their names, one or several; what is missing is named."""
    write(
        tmp_path / "train.jsonl", jsonl([{"text": " x ", "label": "a", "id": 7}, {"text": " ", "label": "b", "id": 8}])
    )
    rows = texts_from_hub(str(tmp_path), None, "train", COLUMNS)
    assert [(row.text, row.label, row.row_id, row.line) for row in rows] == [("x", "a", 7, 1)]
    with pytest.raises(DataError, match="has no split 'test'"):
        texts_from_hub(str(tmp_path), None, "test", COLUMNS)
    with pytest.raises(DataError, match="no column 'sentence', only"):
        texts_from_hub(str(tmp_path), None, "train", COLUMNS._replace(text="sentence"))
    names = ClassLabel(names=["no", "yes"])
    for feature, labels, expected in (
        (names, [1, 0], ["yes", "no"]),
        (Sequence(names), [[0, 1], []], [["no", "yes"], []]),
        (Value("float32"), [0.5, 1], [0.5, 1.0]),
    ):
        features = Features({"text": Value("string"), "label": feature})
        dataset = Dataset.from_dict({"text": ["x", "y"], "label": labels}, features=features)
        monkeypatch.setattr(labelled_texts, "load_hub_split", lambda *arguments, dataset=dataset: dataset)
        assert [row.label for row in texts_from_hub("name", None, "train", COLUMNS)] == expected


def rows_of(labels) -> list[labelled_texts.LabelledText]:
    return [
        labelled_texts.LabelledText("x", label, None, "a.jsonl", line) for line, label in enumerate(labels, start=1)
    ]


@pytest.mark.parametrize(
    ("labels", "separator", "problem_type", "names"),
    [
        (["b", "a", "b"], None, "single_label_classification", ["a", "b"]),
        ([10, 9, 10], None, "single_label_classification", ["9", "10"]),
        (["10", "9", "1"], None, "single_label_classification", ["1", "9", "10"]),
        (["1.5", "x"], None, "single_label_classification", ["1.5", "x"]),
        ([True, False], None, "single_label_classification", ["False", "True"]),
        (["1.0", "2.5"], None, "regression", None),
        ([1, 2.5], None, "regression", None),
        ([["b", "a"], []], None, "multi_label_classification", ["a", "b"]),
        (["b; a", ""], ";", "multi_label_classification", ["a", "b"]),
    ],
)
def test_what_labels_are(labels, separator, problem_type, names):
    rows = rows_of(labels)
    assert find_problem_type(rows, separator) == problem_type
    if names is not None:
        assert label_names(rows, problem_type, separator) == names


@pytest.mark.parametrize(
    ("label", "problem_type", "problem"),
    [
        ("x", "regression", "a.jsonl:1: the label is not a finite number but 'x'"),
        ("inf", "regression", "not a finite number"),
        (True, "regression", "not a finite number"),
        (["a"], "single_label_classification", "the label is a list"),
        (" ", "single_label_classification", "empty label"),
    ],
)
def test_labels_of_another_kind(label, problem_type, problem):
    with pytest.raises(DataError, match=problem):
        label_of(rows_of([label])[0], problem_type, None)


# Scores, against sums by hand.


def test_scores_of_classes():
    labels, answers = np.array([0, 0, 0, 1, 3]), np.array([0, 1, 0, 1, 0])
    assert confusion_matrix(answers, labels, 4).tolist() == [[2, 1, 0, 0], [0, 1, 0, 0], [0] * 4, [1, 0, 0, 0]]
    scores = score_classes(answers, labels, 0, "zero")
    # F1 of class 0: 4 / 6, of class 1: 2 / 3, of class 3: 0; class 2 does not occur.
    assert scores["macro_f1"] == pytest.approx(100 * (4 / 6 + 2 / 3) / 3)
    assert scores["accuracy"] == pytest.approx(60)
    assert scores["recall_of_zero"] == pytest.approx(200 / 3)
    assert scores["accuracy_without_zero"] == pytest.approx(50)


def test_scores_of_labels_and_numbers():
    answers = np.array([[1, 0, 0], [1, 1, 0]], bool)
    labels = np.array([[1, 0, 0], [0, 1, 0]], bool)
    scores = score_labels(answers, labels)
    assert scores == {
        "micro_f1": pytest.approx(100 * 2 * 2 / (3 + 2)),
        "macro_f1": pytest.approx(100 * (2 / 3 + 1) / 2),
        "exact_match": pytest.approx(50),
    }
    scores = score_numbers(np.array([1.0, 2, 3, 10]), np.array([1.0, 2, 2, 4]))
    assert scores["mean_absolute_error"] == pytest.approx(7 / 4)
    assert scores["mean_squared_error"] == pytest.approx(37 / 4)
    assert scores["pearson"] == pytest.approx(np.corrcoef([1, 2, 3, 10], [1, 2, 2, 4])[0, 1])
    assert scores["spearman"] == pytest.approx(np.corrcoef([1, 2, 3, 4], [1, 2.5, 2.5, 4])[0, 1])
    assert score_numbers(np.ones(3), np.arange(3.0))["pearson"] == 0


# The tokenizer of words.


def test_words_of_a_tokenizer(tmp_path):
    """Signs stand alone, capital letters are small, rare words unknown; and it is the same once it is saved."""
    tokenizer = train_word_tokenizer(["Don't say No, no!", "No, Ünï_1"], 100)
    assert tokenizer.convert_ids_to_tokens(range(4)) == ["<pad>", "<s>", "</s>", "<unk>"]
    ids = tokenizer("Don't say: U\u0308nï_1")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["don", "'", "t", "say", "<unk>", "ünï_1"]
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("Don't say: Ünï_1")["input_ids"] == ids
    frequent = train_word_tokenizer(["no no No yes", "no Yes maybe"], 100, min_frequency=2, lowercase=False)
    assert set(frequent.get_vocab()) == {"<pad>", "<s>", "</s>", "<unk>", "no"}
    assert len(train_word_tokenizer(["a b c d e f"], 6)) == 6
    for arguments, message in (
        ((["a"], 4), "`vocab_size` must be above 4"),
        ((["a"], 9, 0), "`min_frequency` must be"),
    ):
        with pytest.raises(ValueError, match=message):
            train_word_tokenizer(*arguments)


def test_word_dropout():
    """As many tokens as asked for, never padding, in training texts alone; another epoch drops others."""
    tokenizer = train_word_tokenizer(["a b c"], 10)
    collator = classify.TextCollator(tokenizer, word_dropout=0.3, seed=1)
    features = [
        {"input_ids": [4] * length, "labels": 1, "length": length, "is_training": True} for length in (400, 100)
    ]
    batch = collator(features)
    dropped = batch["input_ids"] == tokenizer.unk_token_id
    assert 0.24 < dropped.sum() / 500 < 0.36
    assert not dropped[1, 100:].any()
    assert (batch["input_ids"][1, 100:] == tokenizer.pad_token_id).all()
    assert torch.equal(collator(features)["input_ids"], batch["input_ids"])
    collator.epoch = 1
    assert not torch.equal(collator(features)["input_ids"], batch["input_ids"])
    kept = collator([feature | {"is_training": False} for feature in features])
    assert not (kept["input_ids"] == tokenizer.unk_token_id).any()
    assert kept["labels"].tolist() == [1, 1]


# Options.


def test_every_field_of_the_config_is_an_option():
    derived = {
        "vocab_size",
        "tie_word_embeddings",
        "use_cache",
        "use_crf",
        "crf_constraints",
        "crf_ignored_ids",
        "id2intent",
        "question_attention",
        "sep_token_id",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    }
    fields = {name for name in RNNConfig.__annotations__ if not name.startswith("_")} - derived
    fields = {name for name in fields if not name.startswith(("word_", "first_continuation"))}  # of models of words
    assert fields <= {field.name for field in dataclasses.fields(classify.ModelArguments)}
    assert classify.HEAD_DEFAULTS.keys() <= fields


def test_bad_options_are_one_line(tmp_path, capsys):
    good = write(tmp_path / "good.tsv", table(colour_rows(40)))
    one = write(tmp_path / "one.tsv", table([("a", "x")] * 40))
    other = write(tmp_path / "other.tsv", table([("purple", "plum")]))
    vectors = write(tmp_path / "vectors.txt", "leaf 1 2\nsea 1\n")
    files = ["--train_file", good]
    cases = (
        (["--do_train", "false"], "--do_train false needs a --model_name_or_path"),
        ([*files, "--tokenization", "bytes"], "--tokenization must be one of words, subwords, characters, got 'bytes'"),
        ([*files, "--word_dropout", "1"], "--word_dropout must be a probability in [0, 1), got 1.0"),
        ([*files, "--max_length", "0"], "--max_length must be at least 1, got 0"),
        ([*files, "--label_separator", ""], "--label_separator must not be empty"),
        ([*files, "--dataset_name", "x"], "--dataset_name and --*_file exclude each other"),
        ([*files, "--split_column", "split", "--test_file", good], "--split_column needs a --train_file"),
        ([*files, "--problem_type", "guessing"], "--problem_type must be one of"),
        ([*files, "--problem_type", "regression"], ": the label is not a finite number but"),
        ([*files, "--label_separator", ",", "--problem_type", "regression"], "--label_separator is for multi_label"),
        ([*files, "--report_recall_of", "purple"], "--report_recall_of must be a class of the data, got 'purple'"),
        (
            [*files, "--validation_file", other],
            "other.tsv:2: the label 'purple' is none that the model knows (blue, green,",
        ),
        ([*files, "--cell_type", "lstm9"], "`cell_type` must be one of"),
        ([*files, "--pooling", "median"], "`pooling` must be one of"),
        ([*files, "--pooling_heads", "3"], "`pooling_heads` is for `pooling='attention'` alone"),
        ([*files, "--vectors_file", vectors], "vectors.txt:2: expected a word and 2 numbers"),
        ([*files, "--vectors_file", tmp_path / "none"], "none: no such file"),
        ([*files, "--text_column", "sentence"], "good.tsv:1: no column 'sentence'"),
        ([*files, "--vocab_size", "3"], "`vocab_size` must be above 4"),
        ([*files, "--model_name_or_path", tmp_path / "none"], "cannot load"),
        (["--train_file", one], "all texts have the same label"),
        (["--test_file", good], "there is no --train_file to train on"),
    )
    for index, (arguments, problem) in enumerate(cases):
        arguments = [*arguments, "--output_dir", tmp_path / f"out{index}"]
        status, error = run_main(classify, *arguments, capsys=capsys)
        assert status == 2, arguments
        errors = [line for line in error.splitlines() if line.startswith("error:")]
        assert len(errors) == 1, error
        assert problem in errors[0], errors[0]


def test_default_data():
    """The three parts share no question, and have the counts that are published."""
    parts = {
        split: read_texts(str(path), Columns("text", "intent", "id"))["train"]
        for split, path in classify.DEFAULT_FILES.items()
    }
    assert {split: len(rows) for split, rows in parts.items()} == {"train": 15100, "validation": 3100, "test": 2750}
    assert len(label_names(parts["train"], "single_label_classification", None)) == 151
    for split in ("validation", "test"):
        assert {row.label for row in parts[split]} == {row.label for row in parts["train"]}


# Runs.


def scores_of(folder) -> dict:
    return json.loads((folder / "all_results.json").read_text())


def test_classes(tmp_path, capsys):
    """Trains, saves, loads, judges, draws and predicts; what was saved is what a pipeline loads, and predicts alone."""
    train, dev = (
        write(tmp_path / "train.tsv", table(colour_rows(240))),
        write(tmp_path / "dev.tsv", table(colour_rows(60, 1))),
    )
    new = write(tmp_path / "new.tsv", table([("n1", "the moss"), ("n2", "blood, blood")], ("id", "text")))
    vectors = write(tmp_path / "vectors.txt", "leaf 1 1 1 1 1 1 1 1\nsea -1 -1 -1 -1 -1 -1 -1 -1\n")
    files = {"train_file": train, "validation_file": dev, "predict_file": new, "vectors_file": vectors}
    out = tmp_path / "out"
    output = run(
        "classify.py", out, **files, pooling="attention", report_recall_of="red", **TINY | {"num_train_epochs": 5}
    )
    assert "2 of 15 tokens have a vector of 8 numbers" in output
    assert "Every text gets one of 3 classes." in output
    scores = scores_of(out)
    assert scores["test_accuracy"] > 90
    assert scores["test_accuracy"] == pytest.approx(scores["eval_accuracy"], abs=1e-3)
    assert {"test_recall_of_red", "test_accuracy_without_red", "test_macro_f1"} <= scores.keys()
    assert (out / "confusion.png").stat().st_size > 5000
    assert (out / "attention.png").stat().st_size > 5000
    assert (out / "predictions.tsv").read_text() == "id\tlabel\nn1\tgreen\nn2\tred\n"
    rows = [json.loads(line) for line in (out / "test_results.jsonl").read_text().splitlines()]
    right = sum(row["answer"] == row["label"] for row in rows)
    assert scores["test_accuracy"] == pytest.approx(100 * right / len(rows), abs=1e-3)
    classifier = pipeline("text-classification", model=str(out))
    assert [answer["label"] for answer in classifier([row["text"] for row in rows])] == [row["answer"] for row in rows]

    again = tmp_path / "again"
    output = run("classify.py", again, do_train="false", model_name_or_path=out, test_file=dev, predict_file=new)
    assert scores_of(again)["test_accuracy"] == scores["test_accuracy"]
    assert (again / "predictions.tsv").read_text() == (out / "predictions.tsv").read_text()
    options = ("--do_train", "false", "--model_name_or_path", out, "--predict_file", new)
    assert run_main(classify, *options, "--output_dir", tmp_path / "alone", capsys=capsys)[0] is None
    assert (tmp_path / "alone" / "predictions.tsv").read_text() == (out / "predictions.tsv").read_text()
    refused = run("classify.py", out, status=2, **files, **TINY)
    assert refused.count("error:") == 1
    assert "--resume_from_checkpoint" in refused


def test_labels(tmp_path):
    """Several labels, as lists and with a separator: the same run; each label is learned by itself."""
    rng = random.Random(0)
    rows = []
    for _ in range(300):
        colours = [colour for colour in COLOURS if rng.random() < 0.5]
        words = [rng.choice(COLOURS[colour]) for colour in colours] + ["the"]
        rows.append((colours, " ".join(words)))
    lists = write(tmp_path / "lists.jsonl", jsonl({"text": text, "label": labels} for labels, text in rows))
    joined = write(tmp_path / "joined.tsv", table([("|".join(labels), text) for labels, text in rows]))
    options = TINY | {"num_train_epochs": 12, "embedding_dropout": 0, "classifier_dropout": 0.1}
    run("classify.py", tmp_path / "lists", train_file=lists, **options)
    output = run(
        "classify.py", tmp_path / "joined", train_file=joined, label_separator="|", predict_file=joined, **options
    )
    assert "Every text gets any of 3 labels." in output
    scores = scores_of(tmp_path / "joined")
    assert scores["test_micro_f1"] > 90
    assert scores["test_micro_f1"] == scores_of(tmp_path / "lists")["test_micro_f1"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "joined")
    assert model.config.problem_type == "multi_label_classification"
    assert list(model.config.id2label.values()) == ["blue", "green", "red"]
    predictions = (tmp_path / "joined" / "predictions.tsv").read_text().splitlines()
    assert predictions[0] == "id\tlabel"
    assert (
        sum(line.split("\t")[1] == "|".join(sorted(labels)) for line, (labels, _) in zip(predictions[1:], rows)) > 270
    )


def test_numbers(tmp_path):
    """Numbers are predicted as numbers, and best is what has the least loss."""
    rng = random.Random(0)
    rows = []
    for _ in range(300):
        words = rng.choices(["good", "bad", "film"], k=6)
        rows.append((0.5 * (words.count("good") - words.count("bad")), " ".join(words)))
    path = write(tmp_path / "numbers.tsv", table(rows))
    out = tmp_path / "out"
    output = run(
        "classify.py",
        out,
        train_file=path,
        word_dropout=0,
        embedding_dropout=0,
        classifier_dropout=0,
        pooling="mean",
        num_samples_to_show=30,
        **TINY | {"num_train_epochs": 6},
    )
    assert "Every text gets a number." in output
    assert "(0.0)" in output
    assert "(none)" not in output
    scores = scores_of(out)
    assert scores["test_pearson"] > 0.9
    assert scores["test_mean_squared_error"] == pytest.approx(scores["eval_loss"], abs=1e-3)
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert (model.config.problem_type, model.config.num_labels) == ("regression", 1)
    assert not (out / "confusion.png").exists()


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_layers_of_a_language_model(tmp_path, kind):
    """Its layers are taken over, a classifier of colours and one of something else go on from there."""
    rows = colour_rows(120)
    tokenizer = train_word_tokenizer([text for _, text in rows], 100)
    config = RNNConfig(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, bidirectional=kind == "masked")
    torch.manual_seed(0)
    model = (RNNForMaskedLM if kind == "masked" else RNNForCausalLM)(config)
    model.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    path = write(tmp_path / "train.tsv", table(rows))
    options = TINY | {"learning_rate": 1e-9, "num_train_epochs": 1, "train_file": path}
    run("classify.py", tmp_path / "first", model_name_or_path=tmp_path / "lm", pooling="concat", **options)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("lm", "first"))
    shared = [name for name in before if name.startswith("model.")]
    assert len(shared) >= 5
    for name in shared:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-5, msg=name)
    first = AutoModelForSequenceClassification.from_pretrained(tmp_path / "first")
    assert (first.config.pooling, first.config.embedding_dropout) == ("concat", 0.5)

    others = [("warm" if label == "red" else "cold", text) for label, text in rows]
    write(path, table(others))
    output = run("classify.py", tmp_path / "second", model_name_or_path=tmp_path / "first", **options)
    assert "Every text gets one of 2 classes." in output
    second = AutoModelForSequenceClassification.from_pretrained(tmp_path / "second")
    assert list(second.config.id2label.values()) == ["cold", "warm"]
    assert second.config.pooling == "concat"
    status = run(
        "classify.py",
        tmp_path / "third",
        status=2,
        do_train="false",
        model_name_or_path=tmp_path / "lm",
        test_file=path,
    )
    assert "is no classifier" in status


@pytest.mark.slow
def test_a_resumed_run(tmp_path):
    """From the checkpoint in the middle on, the weights of a run that was never stopped: dropout and order included."""
    path = write(tmp_path / "train.tsv", table(colour_rows(300)))
    options = TINY | {"train_file": path, "num_train_epochs": 4, "save_total_limit": 10, "word_dropout": 0.2}
    run("classify.py", tmp_path / "whole", **options)
    checkpoints = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda folder: int(folder.name[11:]))
    copied = tmp_path / "resumed"
    run("classify.py", copied, **options, resume_from_checkpoint=checkpoints[1])
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=0, msg=name)


def test_vectors_from_a_model(tmp_path, capsys):
    """Words of one token get its embedding, others the mean of their parts', moved and stretched; and they are read."""
    import vectors_from_model
    from hf_rnn.training import read_word_vectors

    tokenizer = train_word_tokenizer(["the red rose"], 100)
    tokenizer.save_pretrained(tmp_path / "model")
    model = RNNForCausalLM(RNNConfig(vocab_size=len(tokenizer), hidden_size=6))
    model.save_pretrained(tmp_path / "model")
    texts = write(tmp_path / "texts.tsv", "The red red rose\nThe unknown\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["x", str(tmp_path / "model"), str(tmp_path / "v.txt"), "--texts", str(texts)])
        vectors_from_model.main()
    assert "3 of 4 words have a vector of 6 numbers" in capsys.readouterr().out
    embeddings = model.get_input_embeddings().weight.detach()
    embeddings = embeddings - embeddings.mean(0)
    embeddings = 0.3 * embeddings / embeddings.std()
    vectors = read_word_vectors(tmp_path / "v.txt", ["red", "rose", "the", "unknown"])
    assert vectors.found.tolist() == [True, True, True, False]
    ids = tokenizer.convert_tokens_to_ids(["red", "rose", "the"])
    torch.testing.assert_close(vectors.vectors[:3], embeddings[ids], rtol=0, atol=1e-4)
