"""Tagged sentences as they are read, and examples/tag.py from beginning to end on little data."""

import gzip
import json

import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

import tag
from hf_rnn import RNNConfig
from hf_rnn.training import first_continuation_id, make_word_tokenizer
from tag import is_entity_scheme, score_tags
from tagged_text import Sentence, read_sentences
from test_examples import run
from text_pairs import DataError
from training_helpers import UsageError


CONLLU = """# text = I'm here
1-2\tI'm\t_\t_\t_\t_\t_\t_\t_\t_
1\tI\tI\tPRON\tPRP\t_\t_\t_\t_\t_
2\t'm\tbe\tAUX\tVBP\t_\t_\t_\t_\t_
2.1\tnot\tnot\tPART\tRB\t_\t_\t_\t_\t_
3\there\there\tADV\tRB\t_\t_\t_\t_\t_

1\tGo\tgo\tVERB\tVB\t_\t_\t_\t_\t_
"""


def write(path, text: str):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["a.conllu", "a.conllu.gz"])
def test_conllu(tmp_path, name):
    """Comments, multiword and empty tokens are left out; either tag by its name or its number."""
    path = write(tmp_path / name, CONLLU)
    first, second = read_sentences(path)
    assert first == Sentence(["I", "'m", "here"], ["PRON", "AUX", "ADV"])
    assert second == Sentence(["Go"], ["VERB"])
    for column in ("xpos", "5"):
        assert read_sentences(path, tag_column=column)[0].tags == ["PRP", "VBP", "RB"]
    assert read_sentences(path, word_column="lemma")[0].words == ["I", "be", "here"]


def test_conll(tmp_path):
    """By tabs or white space, the word first and the tag last unless columns are named; sentences without tags."""
    text = "-DOCSTART- -X- O\n\nNew NNP B-loc\nYork NNP I-loc\n\n\n: # O\n"
    path = write(tmp_path / "a.conll", text)
    assert read_sentences(path) == [Sentence(["New", "York"], ["B-loc", "I-loc"]), Sentence([":"], ["O"])]
    assert read_sentences(path, tag_column="2")[0].tags == ["NNP", "NNP"]
    path = write(tmp_path / "b.tsv", "a b\tX\nc\tY\n")
    assert read_sentences(path) == [Sentence(["a b", "c"], ["X", "Y"])]
    path = write(tmp_path / "c.conll", "just\nwords\n")
    assert read_sentences(path, needs_tags=False) == [Sentence(["just", "words"], None)]
    path = write(tmp_path / "d.conll", " 10\u00a0000  CD O\n")
    assert read_sentences(path) == [Sentence(["10\u00a0000"], ["O"])]


def test_intents_of_conll(tmp_path):
    """In the lines that tag.py writes before a sentence; a word `#` is one."""
    text = "# intent = go\n#\tO\nhome\tO\n\n# intent = go on predicted = stop\n# O\n\n# predicted = go\nnow O\n"
    assert read_sentences(write(tmp_path / "a.conll", text)) == [
        Sentence(["#", "home"], ["O", "O"], "go"),
        Sentence(["#"], ["O"], "go on"),
        Sentence(["now"], ["O"]),
    ]
    path = write(tmp_path / "b.conllu", "# intent = say\n" + CONLLU)
    assert [sentence.intent for sentence in read_sentences(path)] == ["say", None]


def test_json_lines(tmp_path):
    """Words and tags, or spans of characters, which cut the words that they begin or end in."""
    rows = [
        {"tokens": ["a", "b"], "ner_tags": ["O", "B-x"], "intent": "go"},
        {"text": "play U2's songs", "slots": [{"start": 5, "end": 7, "label": "artist"}]},
        {"text": "to New York now", "entities": [{"start": 3, "end": 11, "label": "city"}], "intent": "fly"},
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_sentences(path) == [
        Sentence(["a", "b"], ["O", "B-x"], "go"),
        Sentence(["play", "U2", "'s", "songs"], ["O", "B-artist", "O", "O"]),
        Sentence(["to", "New", "York", "now"], ["O", "B-city", "I-city", "O"], "fly"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.doc", "x", "unknown kind of file"),
        ("a.conllu", "1\tI\tI\n", "a.conllu:1: expected at least 10 fields, found 3"),
        ("a.conll", "word O\nalone\n", "a.conll:2: expected at least 2 fields, found 1"),
        ("a.tsv", "word\tO\n\tO\n", "a.tsv:2: there is no word in field 1"),
        ("a.tsv", "word\t\n", "a.tsv:1: there is no tag at this word"),
        ("a.conll", "\n\n", "no sentences in this file"),
        ("a.jsonl", "{", "a.jsonl:1: not a JSON value"),
        ("a.jsonl", "[1]", "a.jsonl:1: expected a JSON object, found list"),
        ("a.jsonl", '{"tokens": ["a"]}', "a.jsonl:1: a sentence without tags"),
        ("a.jsonl", '{"tokens": ["a"], "tags": []}', "a.jsonl:1: 1 words, but 0 tags"),
        ("a.jsonl", '{"tokens": ["a", " "], "tags": ["O", "O"]}', "a word is empty"),
        ("a.jsonl", '{"tokens": [1], "tags": ["O"]}', "'tokens' is not a list of strings"),
        ("a.jsonl", '{"sentence": "a"}', "a.jsonl:1: no field"),
        ("a.jsonl", '{"text": "ab", "slots": [{"start": 0, "end": 3, "label": "x"}]}', "a span from 0 to 3"),
        ("a.jsonl", '{"text": "ab", "slots": [{"start": 0, "label": "x"}]}', "a span must have start, end and label"),
        ("a.jsonl", '{"text": "ab", "slots": [{"start": "0", "end": 1, "label": "x"}]}', "must be whole numbers"),
        ("a.jsonl", '{"text": "ab", "slots": [{"start": 0, "end": 1.5, "label": "x"}]}', "must be whole numbers"),
        ("a.jsonl", '{"text": "ab", "slots": [3]}', "a span must have start, end and label"),
        ("a.jsonl", '{"text": "ab", "slots": 5}', "a.jsonl:1: spans must be a list, found 5"),
        ("a.jsonl", '{"tokens": ["a"], "tags": ["O"], "intent": 3}', "field 'intent' is not text but int"),
        (
            "a.jsonl",
            '{"text": "ab", "slots": [{"start": 0, "end": 2, "label": "x"}, {"start": 1, "end": 2, "label": "y"}]}',
            "two spans have the character 1",
        ),
    ],
)
def test_what_cannot_be_read(tmp_path, name, text, message):
    with pytest.raises(DataError) as error:
        read_sentences(write(tmp_path / name, text))
    assert message in str(error.value)


def test_columns_that_are_none(tmp_path):
    for column in ("0", "upos", "-1"):
        with pytest.raises(DataError, match="is a number from 1"):
            read_sentences(write(tmp_path / "a.conll", "a O\n"), tag_column=column)


def test_scores():
    """Entities count as wholes, other tags by words."""
    right = [["B-a", "I-a", "O"], ["B-b", "O", "O"]]
    predicted = [["B-a", "O", "O"], ["B-b", "O", "O"]]
    scores = score_tags(predicted, right, ["O", "B-a", "I-a", "B-b"])
    assert scores["accuracy"] == pytest.approx(100 * 5 / 6)
    assert scores["f1"] == scores["score"] == pytest.approx(50)
    assert score_tags([["X"]], [["Y"]], ["X", "Y"]) == {"accuracy": 0.0, "score": 0.0}
    assert not is_entity_scheme(["NOUN", "B-x"])
    assert not is_entity_scheme(["I-x", "O"])


COLOURS, FRUITS = ["red", "green", "blue", "grey"], ["apple", "pear", "plum", "fig"]
TINY = {
    "hidden_size": 16,
    "word_encoder_size": 12,
    "word_embedding_size": 8,
    "embedding_size": 8,
    "num_train_epochs": 6,
    "learning_rate": 0.02,
    "per_device_train_batch_size": 16,
}


def made_rows(number: int) -> list[dict]:
    rows = []
    for index in range(number):
        colour, fruit = COLOURS[index % 4], FRUITS[index // 4 % 4]
        if index % 2:
            rows.append(
                {"intent": "eat", "tokens": ["eat", "a", colour, fruit], "tags": ["O", "O", "B-food", "I-food"]}
            )
        else:
            rows.append({"intent": "paint", "tokens": ["paint", "it", colour], "tags": ["O", "O", "B-colour"]})
    return rows


def test_tag(tmp_path):
    """Trains slots and intents, scores, saves, loads, tags; the saved model tags again, and text without tags."""
    path = write(tmp_path / "train.jsonl", "\n".join(map(json.dumps, made_rows(256))))
    test = write(tmp_path / "test.jsonl", "\n".join(map(json.dumps, made_rows(32))))
    files = {"validation_file": test, "test_file": test}
    output = run("tag.py", tmp_path / "out", train_file=path, **files, **TINY)
    assert "eval_intent_accuracy" in output
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["test_f1"] == results["test_intent_accuracy"] == results["test_whole_accuracy"] == 100
    assert results["eval_f1"] == 100
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "out")
    assert model.config.use_crf
    assert model.config.id2intent == {0: "eat", 1: "paint"}
    assert set(model.config.label2id) == {"O", "B-food", "I-food", "B-colour"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    tagger = pipeline("token-classification", model=model, tokenizer=tokenizer, aggregation_strategy="first")
    assert [(group["word"], group["entity_group"]) for group in tagger("eat a red plum")] == [("red plum", "food")]
    tagged = (tmp_path / "out" / "test_predictions.conll").read_text()
    assert tagged.count("# intent = eat predicted = eat") == 16
    assert "apple\tI-food\tI-food" in tagged

    text = write(tmp_path / "text.txt", "eat a red plum\n\npaint it grey\n")
    loaded = {"do_train": "false", "model_name_or_path": tmp_path / "out"}
    run("tag.py", tmp_path / "again", **loaded, test_file=test, predict_file=text)
    again = json.loads((tmp_path / "again" / "all_results.json").read_text())
    assert again["test_f1"] == results["test_f1"]
    predicted = (tmp_path / "again" / "predictions.conll").read_text()
    assert "plum\tI-food\n" in predicted
    assert predicted.count("\n\n") == 2
    refused = run("tag.py", tmp_path / "out", status=2, train_file=path, **TINY)
    assert refused.count("error:") == 1


def test_tag_with_plain_tags_and_sub_words(tmp_path):
    """Parts of speech without a random field or intents, held-out validation data, and a tokenizer of the user's."""
    path = write(tmp_path / "train.conllu", CONLLU * 40)
    vectors = write(tmp_path / "vectors.txt", "here 1 2 3\ni 4 5 6\nyonder 7 8 9\n")
    sizes = {name: value for name, value in TINY.items() if name != "word_embedding_size"}
    output = run(
        "tag.py",
        tmp_path / "vectors",
        train_file=path,
        **sizes | {"num_train_epochs": 1, "vectors_file": vectors, "use_crf": "false"},
    )
    assert "3 of 6 words have a vector" in output  # I, i and here; not 'm, Go and go
    options = TINY | {"num_train_epochs": 3, "use_crf": "false", "max_words": 0, "word_encoder": "gru"}
    run("tag.py", tmp_path / "out", train_file=path, **options)
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert "test_f1" not in results
    assert results["test_score"] == results["test_accuracy"]
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "out")
    assert (model.config.word_vocab_size, model.config.id2label[0]) == (0, "ADV")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_train": "false"}, "--do_train false needs a --model_name_or_path"),
        ({"train_file": "none.conll"}, "no such file"),
        ({"word_encoder": "letters"}, "`word_encoder` must be one of"),
        ({"test_file": "x.conll"}, "--train_file"),
    ],
)
def test_what_tag_refuses(tmp_path, options, message):
    output = run("tag.py", tmp_path / "out", status=2, **options)
    assert message.lower() in output.lower()
    assert output.count("error:") == 1


LABELS = ["O", "B-colour", "B-food", "I-food"]


@pytest.fixture
def tagger(tmp_path):
    """The folder of a tiny model of colours, food and two intents, which has learned nothing."""
    tokenizer = make_word_tokenizer()
    config = RNNConfig(
        vocab_size=len(tokenizer),
        hidden_size=4,
        embedding_size=4,
        word_encoder="cnn",
        word_encoder_size=4,
        first_continuation_id=first_continuation_id(tokenizer),
        bidirectional=True,
        use_crf=True,
        pooling="max",
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(LABELS)),
        label2id={name: index for index, name in enumerate(LABELS)},
        id2intent={0: "eat", 1: "paint"},
    )
    torch.manual_seed(0)
    AutoModelForTokenClassification.from_config(config).save_pretrained(tmp_path / "tagger")
    tokenizer.save_pretrained(tmp_path / "tagger")
    return tmp_path / "tagger"


def run_here(output_dir, capsys, **options) -> str:
    """What examples/tag.py prints, in this process."""
    options = {"output_dir": output_dir, "num_samples_to_show": 0, **options}
    with pytest.MonkeyPatch.context() as patch:
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        patch.setattr("sys.argv", ["tag.py", *words])
        assert tag.main() is None
    return capsys.readouterr().out


def test_sentences_to_tag_are_read_as_others(tagger, tmp_path, capsys):
    """Texts in the same words, by the same columns and in small letters: the tags that they get as test data."""
    rows = [
        {"text": "Don't paint U2's hall, please!", "slots": [{"start": 12, "end": 14, "label": "food"}]},
        {"text": "EAT figs.", "slots": []},
    ]
    loaded = {"do_train": "false", "model_name_or_path": tagger}
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    run_here(tmp_path / "out", capsys, **loaded, test_file=path, predict_file=path, lower_case="true")
    tested = read_sentences(tmp_path / "out" / "test_predictions.conll")
    assert [row.words for row in tested][1] == ["eat", "figs", "."]
    predicted = read_sentences(tmp_path / "out" / "predictions.conll")
    assert [row[:2] for row in predicted] == [row[:2] for row in tested]

    path = write(tmp_path / "b.conllu", CONLLU)
    run_here(tmp_path / "lemmas", capsys, **loaded, predict_file=path, word_column="lemma")
    assert read_sentences(tmp_path / "lemmas" / "predictions.conll")[0].words == ["I", "be", "here"]
    path = write(tmp_path / "c.txt", "Eat\n")
    run_here(tmp_path / "texts", capsys, **loaded, predict_file=path, lower_case="true")
    (sentence,) = read_sentences(tmp_path / "texts" / "predictions.conll")
    assert sentence.words == ["eat"]
    assert sentence.intent in ("eat", "paint")


@pytest.mark.parametrize("use_crf", [True, False])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_what_the_model_does_not_know_is_an_error(use_crf, padding_side, tagger, tmp_path, capsys):
    """Its tags and intents are scored by their own names, as in the file of predictions, and named once."""
    AutoTokenizer.from_pretrained(tagger, padding_side=padding_side).save_pretrained(tagger)
    config = RNNConfig.from_pretrained(tagger, use_crf=use_crf)
    model = AutoModelForTokenClassification.from_config(config)
    # All words are outside of entities, and everyone wants to paint.
    torch.nn.init.zeros_(model.classifier.weight)
    model.classifier.bias.data = torch.tensor([9.0, 0.0, 0.0, 0.0])
    torch.nn.init.zeros_(model.intent_classifier.weight)
    model.intent_classifier.bias.data = torch.tensor([0.0, 9.0])
    model.save_pretrained(tagger)
    rows = [
        {"tokens": ["call", "Bob", "Lee"], "tags": ["O", "B-person", "I-person"], "intent": "call"},
        {"tokens": ["paint", "it"], "tags": ["O", "O"], "intent": "paint"},
        {"tokens": ["a", "fig"], "tags": ["O", "B-food"]},
        {"tokens": ["paint", "it"], "tags": ["O", "B-person"], "intent": "paint"},
        {"tokens": ["please", "wait", "a", "little"], "tags": ["O"] * 4, "intent": "wait"},
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    loaded = {"do_train": "false", "model_name_or_path": tagger}
    output = run_here(tmp_path / "out", capsys, **loaded, test_file=path, per_device_eval_batch_size=2)
    warnings = [line for line in output.splitlines() if line.startswith("Warning: ")]
    assert warnings == [
        "Warning: 2 tags of the validation data are unknown to the model, so errors: B-person (2), I-person (1)",
        "Warning: 2 intents of the validation data are unknown to the model, so errors: call (1), wait (1)",
    ]
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    for split in ("eval", "test"):
        assert results[f"{split}_accuracy"] == pytest.approx(100 * 9 / 13, abs=1e-3)
        assert results[f"{split}_f1"] == 0
        # Of the four sentences that have an intent.
        assert results[f"{split}_intent_accuracy"] == 50
        assert results[f"{split}_whole_accuracy"] == 25
    assert read_sentences(tmp_path / "out" / "test_predictions.conll", tag_column="2") == read_sentences(path)


def test_scores_without_an_entity(tagger, tmp_path, capsys):
    """Neither in the data nor in what is predicted."""
    model = AutoModelForTokenClassification.from_pretrained(tagger)
    model.classifier.bias.data = torch.tensor([99.0, 0.0, 0.0, 0.0])
    model.save_pretrained(tagger)
    path = write(tmp_path / "a.conll", "go O\n\ngo O\non O\n")
    run_here(tmp_path / "out", capsys, do_train="false", model_name_or_path=tagger, test_file=path)
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert (results["test_accuracy"], results["test_f1"]) == (100, 0)
    assert "test_intent_accuracy" not in results


def test_trained_further(tagger, tmp_path, capsys):
    """With tags and intents that the model knows as it is, with others with a new head; the layers are kept."""
    config = RNNConfig.from_pretrained(tagger)
    before = AutoModelForTokenClassification.from_pretrained(tagger).state_dict()
    rows = [
        {"tokens": ["eat", "a", "fig"], "tags": ["O", "O", "B-food"], "intent": "eat"},
        {"tokens": ["eat", "it"], "tags": ["O", "O"], "intent": "eat"},
    ]
    options = {"model_name_or_path": tagger, "num_train_epochs": 1, "learning_rate": 1e-9}
    path = write(tmp_path / "known.jsonl", "\n".join(map(json.dumps, rows)))
    files = {"train_file": path, "validation_file": path}
    run_here(tmp_path / "known", capsys, **files, **options)
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "known")
    assert (model.config.id2label, model.config.id2intent) == (config.id2label, config.id2intent)
    assert model.state_dict().keys() == before.keys()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=1e-6, msg=name)

    rows[1] = {"tokens": ["eat", "now"], "tags": ["O", "B-time"], "intent": "hurry"}
    rows += [rows[0] | {"intent": "sleep"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    run_here(tmp_path / "other", capsys, **files, **options)
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "other")
    assert model.config.id2label == {0: "O", 1: "B-food", 2: "B-time"}
    assert model.config.id2intent == {0: "eat", 1: "hurry", 2: "sleep"}
    assert (model.classifier.out_features, model.intent_classifier.out_features) == (3, 3)
    for name, weight in model.state_dict().items():
        if name.startswith("model."):
            torch.testing.assert_close(weight, before[name], rtol=0, atol=1e-6, msg=name)
        assert weight.isfinite().all()


def test_labels_that_cannot_be_smoothed(tagger, tmp_path, capsys):
    """The Trainer would train without the random field and the intents; nothing is written."""
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, made_rows(8))))
    files = {"train_file": path, "validation_file": path}
    for options in ({"use_crf": "true", "use_intents": "false"}, {"use_crf": "false"}, {"model_name_or_path": tagger}):
        options = options | {"label_smoothing_factor": 0.1, **files}
        with pytest.raises(UsageError, match=r"--label_smoothing_factor must be 0 .* got 0\.1"):
            run_here(tmp_path / "out", capsys, **options)
    assert not (tmp_path / "out").exists()
    options = {"use_crf": "false", "use_intents": "false", "label_smoothing_factor": 0.1, "num_train_epochs": 1}
    run_here(tmp_path / "out", capsys, **files, **options)
