"""Reads questions about texts: SQuAD's JSON, JSON lines, or a data set of the Hub.

A file (UTF-8, with or without a final `.gz`) holds either one JSON object as SQuAD has it,

    {"data": [{"paragraphs": [{"context": ..., "qas": [{"id": ..., "question": ..., "answers": [...]}]}]}]}

or an object with `question`, `context` and `answers` on each line (or a JSON list of them); `id` may be left out.
Answers are a list of `{"text": ..., "answer_start": ...}` or, as in data sets of the Hub, one object of two lists. A
question without answers has none in its text (SQuAD 2.0; `is_impossible` says the same). Anything else raises
`DataError`, which names the file and the line or the question.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from text_pairs import DataError, load_hub_split, read_text


@dataclass(frozen=True)
class Question:
    """A question about a text. `answers` are texts and where they begin; empty where the text has no answer."""

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...] = ()

    @property
    def texts(self) -> list[str]:
        """All right answers."""
        return [text for text, _ in self.answers]

    @property
    def usual_answer(self) -> tuple[str, int] | None:
        """The answer that most people gave, of several the one that stands first; None where there is none."""
        return Counter(self.answers).most_common(1)[0][0] if self.answers else None


def read_questions(path: str | Path, skip_bad_questions: bool = False) -> list[Question]:
    """
    Reads the questions of a file (see the head of this module).

    Args:
        path (`str` or `Path`): The file.
        skip_bad_questions (`bool`, *optional*, defaults to `False`):
            Leave out questions that are malformed, empty, or whose answers do not stand where they are said to. Never
            hides a file that is not JSON.

    Raises:
        `DataError`: With the file and the line or question, for whatever cannot be read.
    """
    text = read_text(path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        rows = _json_lines(path, text, error)
    else:
        if isinstance(content, dict) and "data" in content:
            rows = _squad_rows(path, content["data"])
        else:
            rows = enumerate(content if isinstance(content, list) else [content], start=1)
            rows = [(f"question {number}", row) for number, row in rows]
    return _questions(path, rows, skip_bad_questions)


def questions_from_hub(
    name: str, config_name: str | None, split: str, skip_bad_questions: bool = False
) -> list[Question]:
    """
    Questions of one split of a data set of the Hub (or a local folder that `datasets` can load), with the columns
    `question`, `context` and `answers`. Raises `DataError` when there is no such data set, split or column.
    """
    dataset = load_hub_split(name, config_name, split)
    rows = [(f"question {number}", row) for number, row in enumerate(dataset, start=1)]
    return _questions(f"{name} ({split})", rows, skip_bad_questions)


# Rows are (where, object), or (where, what is wrong as one string).
Rows = list[tuple[str, Any]]


def _json_lines(path: str | Path, text: str, error: json.JSONDecodeError) -> Rows:
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    try:
        json.loads(lines[0][1])
    except (IndexError, json.JSONDecodeError):
        # Not even the first line is an object: one value over several lines, with a mistake.
        raise DataError(path, error.lineno, f"not valid JSON ({error.msg}, column {error.colno})") from None
    rows = []
    for number, line in lines:
        try:
            rows.append((str(number), json.loads(line)))
        except json.JSONDecodeError as error:
            raise DataError(path, number, f"not valid JSON ({error.msg}, column {error.colno})") from None
    return rows


def _squad_rows(path: str | Path, data: Any) -> Rows:
    rows = []
    for article in _objects(path, data, "data"):
        for paragraph in _objects(path, article.get("paragraphs"), "paragraphs"):
            for row in _objects(path, paragraph.get("qas"), "qas"):
                rows.append((f"question {row.get('id', len(rows) + 1)}", row | {"context": paragraph.get("context")}))
    return rows


def _objects(path: str | Path, values: Any, name: str) -> list[dict]:
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise DataError(path, None, f"{name!r} must be a list of objects")
    return values


def _questions(path: str | Path, rows: Rows, skip_bad_questions: bool) -> list[Question]:
    questions, ids = [], set()
    for index, (where, row) in enumerate(rows):
        question = _question_of(row, f"{index:06d}")
        if isinstance(question, Question) and question.id in ids:
            question = f"the id {question.id!r} stands for another question, too"
        if isinstance(question, Question):
            questions.append(question)
            ids.add(question.id)
        elif not skip_bad_questions:
            raise DataError(path, int(where) if where.isdecimal() else None, _at(where, question))
    if not questions:
        raise DataError(path, None, "no questions in this file")
    return questions


def _at(where: str, problem: str) -> str:
    return problem if where.isdecimal() else f"{where}: {problem}"


def _question_of(row: Any, default_id: str) -> Question | str:
    """The question, or what is wrong with it."""
    if not isinstance(row, dict):
        return f"expected a JSON object, found {type(row).__name__}"
    for name in ("question", "context"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            return f"{name!r} must be text that is not empty"
    answers = row.get("answers")
    if row.get("is_impossible"):
        answers = []
    if isinstance(answers, dict):
        texts, starts = answers.get("text"), answers.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            return "'answers' must have the lists 'text' and 'answer_start', of one length"
        answers = [{"text": text, "answer_start": start} for text, start in zip(texts, starts)]
    if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
        return "'answers' must be a list of objects with 'text' and 'answer_start' (an empty one for no answer)"
    found = []
    for answer in answers:
        text, start = answer.get("text"), answer.get("answer_start")
        if not isinstance(text, str) or not text.strip():
            return "the text of an answer must not be empty"
        if not isinstance(start, int) or isinstance(start, bool):
            return f"'answer_start' must be a number, got {start!r}"
        if start < 0 or row["context"][start : start + len(text)] != text:
            return f"the answer {text!r} does not stand at {start} of its context"
        found.append((text, start))
    return Question(str(row.get("id", default_id)), row["question"].strip(), row["context"], tuple(found))
