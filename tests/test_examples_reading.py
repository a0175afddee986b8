"""The reader's script: data, windows, spans, exact match and F1, and the whole from beginning to end."""

import gzip
import itertools
import json
import math
import random
import sys

import pytest
import torch


pytest.importorskip("datasets")
pytest.importorskip("sacrebleu")

from transformers import AutoModelForQuestionAnswering, AutoTokenizer, pipeline

import read
from clients import make_tokenizer
from question_data import Question, questions_from_hub, read_questions
from read import DataArguments, Window, best_span, choose_answers, load_questions, make_windows
from span_scores import characters, compare, score_answers, words
from subword_tokenizer import train_character_tokenizer, train_subword_tokenizer
from test_examples import run
from text_pairs import DataError
from training_helpers import UsageError, run_script


CONTEXT = "Anna lives in the old town of Graz. Ben, her brother, moved to Rome in 1999."


def question(text: str, answer: str | None, context: str = CONTEXT, id: str = "a") -> Question:
    return Question(id, text, context, () if answer is None else ((answer, context.index(answer)),))


# Scores.


@pytest.mark.parametrize(
    ("answer", "right", "exact", "f1"),
    [
        ("the Old Town", "old town", 1, 1),
        ("Old-Town!", "oldtown", 1, 1),  # punctuation goes without leaving a space
        ("old town of Graz", "old town", 0, 2 * 2 / (4 + 2)),
        ("town town", "old town", 0, 2 * 1 / (2 + 2)),  # a word counts as often as in both
        ("a an the", "", 1, 1),
        ("", "old town", 0, 0),
        ("Rome", "Graz", 0, 0),
        ("theatre", "atre", 0, 0),  # an article is a whole word
        ("$5–6", "5–6", 1, 1),  # string.punctuation is ASCII
        ("$5–6", "56", 0, 0),
    ],
)
def test_exact_match_and_f1_by_words(answer, right, exact, f1):
    assert compare(answer, right) == (exact, pytest.approx(f1))
    assert compare(right, answer) == (exact, pytest.approx(f1))


@pytest.mark.parametrize(
    ("answer", "right", "exact", "f1"),
    [
        ("手塚治虫", "手塚 治虫。", 1, 1),
        ("手塚", "手塚治虫", 0, 2 * 2 / (2 + 4)),
        ("１９９９年", "1999年", 1, 1),  # NFKC
        ("「ＡＢＣ」", "abc", 1, 1),
        ("虫治", "治虫", 0, 1),  # characters in another order are the same characters, and no exact match
        ("", "治虫", 0, 0),
    ],
)
def test_exact_match_and_f1_by_characters(answer, right, exact, f1):
    assert compare(answer, right, "characters") == (exact, pytest.approx(f1))


def test_units():
    assert words("The  U.S. Supreme\nCourt, an end.") == ["us", "supreme", "court", "end"]
    assert characters("Ｔｈｅ end、 です。") == list("theendです")


def test_scores_take_the_best_of_all_answers():
    answers = ["Graz", "old town", "", "Rome", ""]
    references = [["Graz", "old town of Graz"], ["town", "the old town of Graz"], [], [], ["Rome"]]
    scores = score_answers(answers, references)
    assert scores["exact_match"] == pytest.approx(100 * 2 / 5)
    second = max(2 * 1 / (2 + 1), 2 * 2 / (2 + 4))
    assert scores["f1"] == pytest.approx(100 * (1 + second + 1 + 0 + 0) / 5)
    assert scores["answerable_exact_match"] == pytest.approx(100 / 3)
    assert scores["answerable_f1"] == pytest.approx(100 * (1 + second) / 3)
    assert scores["unanswerable_accuracy"] == pytest.approx(50)
    assert score_answers(["Graz"], [["Graz"]]) == {"exact_match": 100, "f1": 100}
    with pytest.raises(ValueError, match="shorter"):
        score_answers(["Graz"], [])


def test_an_answer_of_articles_alone_is_none():
    """As in the official script of SQuAD 2.0: of the right answers those count of which something is left."""
    assert score_answers(["the"], [[]]) == {"exact_match": 100, "f1": 100}
    assert score_answers(["Graz"], [["the", "Graz"]]) == {"exact_match": 100, "f1": 100}
    assert score_answers([""], [["the"]]) == {"exact_match": 100, "f1": 100}
    assert score_answers([""], [["the", "Graz"]]) == {"exact_match": 0, "f1": 0}


# Data.


def squad(*questions: Question, **more) -> dict:
    paragraphs = [
        {
            "context": one.context,
            "qas": [
                {
                    "id": one.id,
                    "question": one.question,
                    "answers": [{"text": text, "answer_start": start} for text, start in one.answers],
                }
                | more
            ],
        }
        for one in questions
    ]
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}


QUESTIONS = [
    question("Where does Anna live?", "Graz"),
    question("Who moved to Rome?", "Ben", id="b"),
    question("Who lives in Paris?", None, id="c"),
]


def write(path, content) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def test_kinds_of_files(tmp_path):
    content = squad(*QUESTIONS)
    assert read_questions(write(tmp_path / "a.json", content)) == QUESTIONS
    assert read_questions(write(tmp_path / "b.json", json.dumps(content, indent=2))) == QUESTIONS
    with gzip.open(tmp_path / "c.json.gz", "wt") as file:
        json.dump(content, file)
    assert read_questions(tmp_path / "c.json.gz") == QUESTIONS
    rows = [
        {
            "id": one.id,
            "question": one.question,
            "context": one.context,
            "answers": {
                "text": [text for text, _ in one.answers],
                "answer_start": [start for _, start in one.answers],
            },
        }
        for one in QUESTIONS
    ]
    assert read_questions(write(tmp_path / "d.jsonl", "\n".join(map(json.dumps, rows)) + "\n")) == QUESTIONS
    assert read_questions(write(tmp_path / "e.json", rows)) == QUESTIONS
    assert read_questions(write(tmp_path / "f.jsonl", json.dumps(rows[0]))) == QUESTIONS[:1]
    del rows[0]["id"], rows[1]["id"]
    ids = [one.id for one in read_questions(write(tmp_path / "g.jsonl", "\n".join(map(json.dumps, rows))))]
    assert ids == ["000000", "000001", "c"]


def test_questions_of_squad_2(tmp_path):
    """What is said to be impossible has no answer; the plausible ones do not count."""
    content = squad(QUESTIONS[0], is_impossible=True, plausible_answers=[{"text": "Graz", "answer_start": 30}])
    assert read_questions(write(tmp_path / "a.json", content))[0].answers == ()


def test_the_usual_answer():
    answers = (("town", 22), ("old town", 18), ("old town", 18), ("Graz", 30))
    assert Question("a", "Where?", CONTEXT, answers).usual_answer == ("old town", 18)
    assert Question("a", "Where?", CONTEXT, answers[1::2]).usual_answer == ("old town", 18)
    assert Question("a", "Where?", CONTEXT).usual_answer is None


GOOD = {"question": "Where?", "context": CONTEXT, "answers": [{"text": "Graz", "answer_start": 30}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"data": [', "a.json:1: not valid JSON"),
        ('{\n "data": [\n}', "a.json:3: not valid JSON"),
        (json.dumps(GOOD) + "\n{", "a.json:2: not valid JSON"),
        ({"data": 3}, "'data' must be a list of objects"),
        ({"data": [{"paragraphs": None}]}, "'paragraphs' must be a list of objects"),
        ({"data": [{"paragraphs": [{"context": "a"}]}]}, "'qas' must be a list of objects"),
        ({"data": []}, "no questions"),
        (squad(QUESTIONS[0], QUESTIONS[0]), "question a: the id 'a' stands for another question"),
        ([[]], "question 1: expected a JSON object, found list"),
        ([GOOD | {"question": " "}], "question 1: 'question' must be text that is not empty"),
        ([GOOD | {"context": None}], "'context' must be text that is not empty"),
        ([GOOD | {"answers": None}], "'answers' must be a list of objects"),
        ([GOOD | {"answers": ["Graz"]}], "'answers' must be a list of objects"),
        ([GOOD | {"answers": {"text": ["Graz"], "answer_start": []}}], "of one length"),
        ([GOOD | {"answers": [{"text": "", "answer_start": 0}]}], "the text of an answer must not be empty"),
        ([GOOD | {"answers": [{"text": "Graz", "answer_start": "30"}]}], "'answer_start' must be a number, got '30'"),
        ([GOOD | {"answers": [{"text": "Graz", "answer_start": 31}]}], "the answer 'Graz' does not stand at 31"),
        ([GOOD | {"answers": [{"text": "Rome", "answer_start": -13}]}], "the answer 'Rome' does not stand at -13"),
    ],
)
def test_what_cannot_be_read(content, message, tmp_path):
    path = write(tmp_path / "a.json", content)
    with pytest.raises(DataError) as error:
        read_questions(path)
    assert message in str(error.value)
    assert str(error.value).startswith(path)


def test_files_that_are_none(tmp_path):
    for name, message in [("none.json", "no such file"), ("", "is a folder")]:
        with pytest.raises(DataError, match=message):
            read_questions(tmp_path / name)
    with pytest.raises(DataError, match="the file is empty"):
        read_questions(write(tmp_path / "a.json", ""))


def test_bad_questions_can_be_left_out(tmp_path):
    bad = [GOOD | {"answers": [{"text": "Graz", "answer_start": 31}]}, GOOD | {"question": ""}, 3]
    path = write(tmp_path / "a.json", [*bad, GOOD])
    assert [one.question for one in read_questions(path, skip_bad_questions=True)] == ["Where?"]
    with pytest.raises(DataError, match="no questions"):
        read_questions(write(tmp_path / "b.json", bad), skip_bad_questions=True)


def test_a_data_set_in_a_folder(tmp_path):
    row = GOOD | {"id": "x", "answers": {"text": ["Graz"], "answer_start": [30]}}
    write(tmp_path / "train.jsonl", json.dumps(row))
    (found,) = questions_from_hub(str(tmp_path), None, "train")
    assert found == Question("x", "Where?", CONTEXT, (("Graz", 30),))
    with pytest.raises(DataError, match="has no split 'test', only train"):
        questions_from_hub(str(tmp_path), None, "test")
    with pytest.raises(DataError, match="cannot be loaded"):
        questions_from_hub(str(tmp_path / "nothing"), None, "train")


def test_texts_are_held_out_whole(tmp_path):
    many = [question(f"Which {i}?", "Graz", f"{CONTEXT} {i // 4}", str(i)) for i in range(160)]
    path = write(tmp_path / "a.json", squad(*many))
    questions = load_questions(DataArguments(train_file=path), training=True, seed=0)
    parts = [{one.context for one in questions[part]} for part in ("train", "validation")]
    assert [len(part) for part in parts] == [38, 2]
    assert not parts[0] & parts[1]
    assert questions["test"] is questions["validation"]
    with pytest.raises(UsageError, match="too few texts"):
        load_questions(DataArguments(train_file=write(tmp_path / "b.json", squad(*many[:8]))), True, 0)
    with pytest.raises(UsageError, match="no --train_file"):
        load_questions(DataArguments(test_file=path), training=True, seed=0)
    with pytest.raises(UsageError, match="exclude each other"):
        load_questions(DataArguments(test_file=path, dataset_name="x"), training=True, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer_level": "words"}, "--tokenizer_level must be subwords or characters, got 'words'"),
        ({"answer_unit": "bytes"}, "--answer_unit must be words or characters, got 'bytes'"),
        ({"max_answer_length": 0}, "--max_answer_length must be at least 1, got 0"),
        ({"max_seq_length": 64}, "--doc_stride must be at least 0 and leave room"),
        ({"doc_stride": -1}, "--doc_stride must be at least 0"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(UsageError) as error:
        DataArguments(**options)
    assert message in str(error.value)


# Windows.


def tokenizer_for(level: str, questions):
    texts = [text for one in questions for text in (one.question, one.context)]
    if level == "characters":
        return train_character_tokenizer(texts, add_eos=True, normalization="nfkc")
    return train_subword_tokenizer(texts, 500, "lowercase")


@pytest.fixture(scope="module")
def shipped() -> list[Question]:
    return random.Random(0).sample(read_questions(read.DEFAULT_FILES["validation"]), 60)


@pytest.mark.parametrize("level", ["subwords", "characters"])
@pytest.mark.parametrize("length", [64, 384])
def test_windows_of_real_questions(level, length, shipped):
    """Every character of a text is in a window, and where the answer is, the labels give its tokens."""
    args = DataArguments(max_seq_length=length, doc_stride=8, max_question_length=length // 3)
    windows = make_windows(shipped, tokenizer_for(level, shipped), args)
    labelled = set()
    seen = [set() for _ in shipped]
    for window in windows:
        one = shipped[window.question]
        assert len(window.input_ids) == len(window.offsets) <= length
        for place in window.offsets:
            seen[window.question].update(range(*place) if place else ())
        if window.start == read.NO_ANSWER:
            assert window.end == read.NO_ANSWER
            continue
        text, begin = one.usual_answer
        first, last = window.offsets[window.start], window.offsets[window.end]
        assert first[0] <= begin < first[1]
        assert last[0] < begin + len(text) <= last[1]
        if level == "characters":
            assert one.context[first[0] : last[1]] == text
        labelled.add(window.question)
    assert len(windows) > len(shipped)
    for one, characters_seen in zip(shipped, seen, strict=True):
        assert {i for i, character in enumerate(one.context) if not character.isspace()} <= characters_seen
    assert len(labelled) > 0.5 * len(shipped)
    # What no window has is longer than what windows share.
    lost = set(range(len(shipped))) - labelled
    assert all(len(shipped[index].usual_answer[0]) > args.doc_stride for index in lost)


def test_a_long_question_is_cut():
    asked = question("Where? " * 200, "Graz")
    args = DataArguments(max_seq_length=64, max_question_length=10, doc_stride=4)
    tokenizer = tokenizer_for("subwords", [asked])
    for window in make_windows([asked], tokenizer, args):
        assert window.input_ids.index(tokenizer.eos_token_id) == 10


def test_normalization_of_characters():
    """Full width or not is the same character, and the places are those of the text as it is."""
    asked = question("１９９９年は?", "１９９９年", "それは１９９９年です。")
    tokenizer = tokenizer_for("characters", [asked])
    assert tokenizer("１9")["input_ids"] == tokenizer("1９")["input_ids"]
    (window,) = make_windows([asked], tokenizer, DataArguments())
    assert asked.context[window.offsets[window.start][0] : window.offsets[window.end][1]] == "１９９９年"
    with pytest.raises(ValueError, match="`normalization` must be one of"):
        train_character_tokenizer(["a"], normalization="upper")


def test_tokenizers_that_cannot_serve():
    """One without a separator or without padding; one of BERT's kind serves."""
    read.check_tokenizer(make_tokenizer())
    with pytest.raises(UsageError, match="between a question and a text"):
        read.check_tokenizer(make_tokenizer(special_tokens=False))
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(UsageError, match="pad_token"):
        read.check_tokenizer(tokenizer)


# Spans.


def test_the_best_span_is_the_best_of_all():
    """Against a look at every span, with tokens of no width and of the question in between, and padding."""
    generator = torch.Generator().manual_seed(0)
    offsets = [None, None, (0, 4), (4, 10), (10, 10), (10, 13), (13, 17), None, (17, 21)]
    window = Window(0, list(range(len(offsets))), offsets, offsets)
    places = [i for i, place in enumerate(offsets) if place and place[0] < place[1]]
    for max_length in (1, 2, 3, 30):
        for _ in range(20):
            starts, ends = 3 * torch.randn(2, len(offsets) + 3, generator=generator)
            score, span, none = best_span(window, starts, ends, max_length)
            chosen = torch.tensor([0, *places])
            log_starts, log_ends = (values[chosen].double().log_softmax(0).tolist() for values in (starts, ends))
            candidates = {
                (offsets[places[i]][0], offsets[places[j]][1]): log_starts[i + 1] + log_ends[j + 1]
                for i, j in itertools.product(range(len(places)), repeat=2)
                if i <= j < i + max_length
            }
            assert span == max(candidates, key=candidates.get)
            assert score == pytest.approx(candidates[span])
            assert none == pytest.approx(log_starts[0] + log_ends[0])
    assert best_span(Window(0, [1, 2], [None, None], [None, None]), *torch.zeros(2, 2), 5) == (-math.inf, None, 0.0)


def test_answers_of_whole_words():
    """A token in the middle of a word answers with the word, if asked to."""
    asked = question("Where does she live?", "Graz")
    tokenizer = train_subword_tokenizer(["Anna"], 260, "nfc")  # bytes
    for align, expected in [(True, "Graz"), (False, "raz")]:
        args = DataArguments(align_to_words=align)
        (window,) = make_windows([asked], tokenizer, args)
        logits = logits_for(window, "raz", CONTEXT, 9.0)
        assert choose_answers([asked], [window], [logits], args, may_be_none=False) == [expected]


def logits_for(window: Window, text: str, context: str, height: float):
    """Logits that are `height` at the first and the last token of a text, zero elsewhere."""
    begin = context.index(text)
    starts, ends = torch.zeros(2, len(window.offsets))
    for i, place in enumerate(window.offsets):
        if place and place[0] <= begin < place[1]:
            starts[i] = height
        if place and place[0] < begin + len(text) <= place[1]:
            ends[i] = height
    return starts, ends


def test_an_answer_behind_the_first_window():
    """Found where it is, in whichever window believes most in its answer."""
    filler = "It rained all day long and nobody went out. " * 20
    asked = question("Where does Anna live?", "Graz", filler + CONTEXT)
    args = DataArguments(max_seq_length=64, max_question_length=16, doc_stride=16)
    windows = make_windows([asked], tokenizer_for("subwords", [asked]), args)
    assert len(windows) > 5
    assert windows[0].start == read.NO_ANSWER
    assert windows[-1].start > read.NO_ANSWER
    logits = [logits_for(window, "rained", asked.context, 6.0) for window in windows]
    logits[-1] = logits_for(windows[-1], "Graz", asked.context, 9.0)
    assert choose_answers([asked], windows, logits, args, may_be_none=False) == ["Graz"]
    logits[-1] = logits_for(windows[-1], "Graz", asked.context, 1.0)
    assert choose_answers([asked], windows, logits, args, may_be_none=False) == ["rained"]


def test_no_answer():
    """It has to be likelier by more than the threshold, in every window, and to be allowed."""
    asked = question("Where does Anna live?", "Graz")
    windows = make_windows([asked], tokenizer_for("subwords", [asked]), DataArguments()) * 2
    logits = [logits_for(window, "Graz", CONTEXT, 5.0) for window in windows]
    for pair in logits:
        for values in pair:
            values[read.NO_ANSWER] = 6.0
    for threshold, expected in [(0.0, ""), (1.9, ""), (2.1, "Graz"), (-9.0, "")]:
        args = DataArguments(null_threshold=threshold)
        assert choose_answers([asked], windows, logits, args, may_be_none=True) == [expected], threshold
        assert choose_answers([asked], windows, logits, args, may_be_none=False) == ["Graz"]
    for values in logits[1]:
        values[read.NO_ANSWER] = 4.0
    assert choose_answers([asked], windows, logits, DataArguments(), may_be_none=True) == ["Graz"]


# From beginning to end.


def make_data(number: int, seed: int, with_none: bool) -> list[Question]:
    """Who has which thing: one look at the text says it."""
    rng = random.Random(seed)
    names = ["Anna", "Ben", "Cleo", "David", "Eva", "Finn", "Greta", "Hugo"]
    things = ["a red kite", "an apple", "the map", "two keys", "a drum", "some bread", "the lamp", "a boat"]
    questions = []
    for index in range(number):
        chosen = rng.sample(list(zip(names, rng.sample(things, len(things)))), 5)
        context = " ".join(f"{name} has {thing}." for name, thing in chosen[:4])
        name, thing = chosen[4] if with_none and rng.random() < 0.3 else rng.choice(chosen[:4])
        answers = ((thing, context.index(thing)),) if thing in context else ()
        questions.append(Question(f"{seed}-{index}", f"What does {name} have?", context, answers))
    return questions


TINY = {
    "vocab_size": 400,
    "embedding_size": 32,
    "hidden_size": 32,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
    "classifier_dropout": 0.0,
    "num_train_epochs": 5,
    "learning_rate": 1e-2,
    "report_to": "none",
    "bf16": "false",
    "num_samples_to_show": 3,
}


def test_script(tmp_path):
    """Trains, scores, saves, loads and answers; the same again without training; a second run there is refused."""
    files = {}
    for part, number, seed in [("train", 384, 0), ("validation", 48, 1), ("test", 48, 2)]:
        content = squad(*make_data(number, seed, with_none=True))
        files[f"{part}_file"] = write(tmp_path / f"{part}.json", content)
    output = run("read.py", tmp_path / "out", question_attention="aligned", **files, **TINY)
    assert output.count("question  What does ") == 3
    assert "eval_f1" in output
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["test_samples"] == 48
    assert results["test_f1"] > 60
    assert results["test_unanswerable_accuracy"] > 40
    rows = [json.loads(line) for line in (tmp_path / "out" / "test_answers.jsonl").read_text().splitlines()]
    scores = score_answers([row["answer"] for row in rows], [row["right"] for row in rows])
    assert results["test_exact_match"] == pytest.approx(scores["exact_match"], abs=1e-4)
    predictions = json.loads((tmp_path / "out" / "test_predictions.json").read_text())
    assert predictions == {row["id"]: row["answer"] for row in rows}

    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.question_attention == "aligned"
    reader = pipeline("extractive-question-answering", model=model, tokenizer=tokenizer)
    asked = make_data(48, 2, with_none=True)
    found = reader(
        [{"question": one.question, "context": one.context} for one in asked],
        handle_impossible_answer=True,
    )
    assert [answer["answer"] for answer in found] == [row["answer"] for row in rows]

    # Validation, whose batches come in another order, gives the same scores as the test at the end.
    options = {"do_train": "false", "model_name_or_path": tmp_path / "out", "report_to": "none"}
    given = {"validation_file": files["test_file"], "test_file": files["test_file"], "max_seq_length": 100}
    run("read.py", tmp_path / "again", bf16="false", doc_stride=10, **options, **given)
    again = json.loads((tmp_path / "again" / "all_results.json").read_text())
    for name in ("exact_match", "f1", "unanswerable_accuracy"):
        assert again[f"eval_{name}"] == pytest.approx(results[f"test_{name}"], abs=1e-4)
        assert again[f"test_{name}"] == pytest.approx(results[f"test_{name}"], abs=1e-4)
    refused = run("read.py", tmp_path / "out", status=2, **files, **TINY)
    assert refused.count("error:") == 1
    assert "--resume_from_checkpoint" in refused


def test_script_by_characters(tmp_path):
    """Another language, windows that do not hold a text, a plain span head."""
    rows = [
        {
            "question": one.question,
            "context": f"{one.context} {one.context}"[:150],
            "answers": [{"text": text, "answer_start": start} for text, start in one.answers],
        }
        for one in make_data(40, 0, with_none=False)
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    options = TINY | {"num_train_epochs": 1, "tokenizer_level": "characters", "answer_unit": "characters"}
    options |= {"max_seq_length": 80, "max_question_length": 30, "doc_stride": 20, "normalization": "nfkc"}
    options |= {"question_attention": "none", "train_file": path, "validation_file": path, "max_eval_samples": 10}
    output = run("read.py", tmp_path / "out", **options)
    assert "by characters" in output
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert 0 <= results["eval_f1"] <= 100
    assert results["test_samples"] == 40
    assert AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out").config.question_attention is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_train": "false"}, "--do_train false needs a --model_name_or_path"),
        ({"train_file": "nothing.json"}, "nothing.json: no such file"),
        ({"question_attention": "bidaf"}, "`question_attention` must be one of"),
        ({"vocab_size": 100}, "`vocab_size` must be at least 260"),
        ({"answer_unit": "bytes"}, "--answer_unit must be words or characters"),
        ({"config_overrides": '{"hidden_size": 0}'}, "`hidden_size` must be an integer of at least 1, got 0"),
    ],
)
def test_errors_are_one_line(options, message, tmp_path, monkeypatch, capsys):
    options = {"output_dir": tmp_path / "out", "max_train_samples": 20, "max_eval_samples": 2} | options
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["read.py", *words])
    with pytest.raises(SystemExit) as stopped:
        run_script(read.main)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
