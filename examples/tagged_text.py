"""Reads sentences whose words are tagged: CoNLL and CoNLL-U files, JSON lines, or a data set of the Hub.

The kind of a file follows from its name, with or without a final `.gz`:

| name | one sentence is |
|---|---|
| `X.conllu` | lines of ten fields between tabs, the 2nd the word and the 4th the tag, up to a blank line |
| `X.conll`, `X.tsv`, `X.bio`, `X.iob2`, `X.txt` | lines with the word first and the tag last, up to a blank line |
| `X.jsonl`, `X.json`, `X.ndjson` | a line with a JSON object: words and tags, or a text with spans |

Fields of CoNLL files are parted by tabs, or by spaces where a line has no tab. `word_column` and `tag_column` name
other ones, counted from 1 (of CoNLL-U also `upos`, `xpos`). Comments and the multiword and empty tokens of CoNLL-U are
left out, as are `-DOCSTART-` lines. A line `# intent = ...` before the words of a sentence, as `tag.py` writes it, has
its intent.

A JSON object has the lists `tokens` (or `words`) and `tags` (or `labels`, `ner_tags`, `pos_tags`), or `text` and
`slots` (or `entities`, `spans`): a list of `{"start": ..., "end": ..., "label": ...}` in characters, from which tags
`B-label`, `I-label` and `O` are made. It may have an `intent`, one string for the whole.

Anything that cannot be read raises `DataError`, which names the file and the line.
"""

import json
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from text_pairs import JSON_SUFFIXES, DataError, load_hub_split, read_lines


CONLLU_COLUMNS = {"form": 2, "lemma": 3, "upos": 4, "xpos": 5}
CONLL_SUFFIXES = (".conll", ".tsv", ".bio", ".iob2", ".txt")
WORDS = ("tokens", "words")
TAGS = ("tags", "labels", "ner_tags", "pos_tags")
SPANS = ("slots", "entities", "spans")
# What `tag.py` writes before a sentence: its intent, if it has one, and the predicted one.
INTENT_LINE = re.compile(r"# intent = (.+?)(?: predicted = .+)?|# predicted = .+")


class Sentence(NamedTuple):
    """The words of a sentence, their tags (None where nobody tagged them) and its intent, if it has one."""

    words: list[str]
    tags: list[str] | None
    intent: str | None = None


Split = Callable[[str], list[tuple[int, int]]]


def split_at_spaces(text: str) -> list[tuple[int, int]]:
    """From where to where the words of a text reach that stand between white space."""
    return [match.span() for match in re.finditer(r"\S+", text)]


def read_sentences(
    path: str | Path,
    word_column: str | None = None,
    tag_column: str | None = None,
    needs_tags: bool = True,
    split: Split = split_at_spaces,
) -> list[Sentence]:
    """
    Reads the sentences of a file.

    Args:
        path (`str` or `Path`): The file.
        word_column, tag_column (`str`, *optional*):
            Fields of CoNLL files: numbers from 1, or for CoNLL-U `form`, `upos`, `xpos`; names in JSON objects.
        needs_tags (`bool`): Whether every sentence has to have tags.
        split: The words of a text that comes with spans, from where to where they reach. A word is cut in two where a
            span begins or ends within it.

    Raises:
        `DataError`: With file and line, for whatever cannot be read.
    """
    name = str(path).lower().removesuffix(".gz")
    if name.endswith(JSON_SUFFIXES):
        sentences = _json_sentences(path, word_column, tag_column, split)
    elif name.endswith(".conllu"):
        columns = _column(path, word_column, 2), _column(path, tag_column, 4)
        sentences = _conll_sentences(path, *columns, is_conllu=True, needs_tags=needs_tags)
    elif name.endswith(CONLL_SUFFIXES):
        last = -1 if tag_column is None else _column(path, tag_column, -1)
        sentences = _conll_sentences(path, _column(path, word_column, 1), last, False, needs_tags)
    else:
        raise DataError(
            path,
            None,
            f"unknown kind of file: expected a name in .conllu, {', '.join(CONLL_SUFFIXES)} or .jsonl (or any of them "
            "+ .gz)",
        )
    result = []
    for number, sentence in sentences:
        if needs_tags and sentence.tags is None:
            raise DataError(path, number, "a sentence without tags")
        result.append(sentence)
    if not result:
        raise DataError(path, None, "no sentences in this file")
    return result


def sentences_from_hub(
    name: str,
    config_name: str | None,
    split: str,
    word_column: str | None,
    tag_column: str | None,
    split_text: Split = split_at_spaces,
) -> list[Sentence]:
    """
    Sentences of one split of a data set of the Hub (or a local folder that `datasets` can load), with columns named as
    in JSON objects, and texts that come with spans parted by `split_text`. Tags that are numbers get the names that the
    data set has for them. Raises `DataError` where the data set, the split or a column does not exist.
    """
    dataset = load_hub_split(name, config_name, split)
    names = {}
    for column, feature in dataset.features.items():
        feature = getattr(feature, "feature", feature)
        if hasattr(feature, "int2str"):
            names[column] = feature.int2str
    sentences = []
    for number, row in enumerate(dataset, start=1):
        for column, to_name in names.items():
            row[column] = to_name(row[column])
        sentences.append(_sentence_of(row, f"{name} ({split})", number, word_column, tag_column, split_text))
    return sentences


def _column(path: str | Path, column: str | None, default: int) -> int:
    if column is None:
        return default
    if str(column).lower() in CONLLU_COLUMNS and ".conllu" in str(path).lower():
        return CONLLU_COLUMNS[str(column).lower()]
    if not str(column).isdecimal() or int(column) < 1:
        raise DataError(path, None, f"a column of this file is a number from 1, got {column!r}")
    return int(column)


def _conll_sentences(
    path: str | Path, word_column: int, tag_column: int, is_conllu: bool, needs_tags: bool
) -> Iterator[tuple[int, Sentence]]:
    words, tags, intent, first = [], [], None, None
    for number, line in read_lines(path):
        line = line.removesuffix("\n").removesuffix("\r")
        if not line.strip():
            if words:
                yield first, Sentence(words, tags if len(tags) == len(words) else None, intent)
            words, tags, intent, first = [], [], None, None
            continue
        if not words and (found := INTENT_LINE.fullmatch(line)):
            intent = found[1]
            continue
        # Only at spaces: a no-break space belongs to its word.
        fields = line.split("\t") if "\t" in line else re.split(" +", line.strip(" "))
        if (is_conllu and (line.startswith("#") or "-" in fields[0] or "." in fields[0])) or fields[0] == "-DOCSTART-":
            continue
        needed = max(word_column, tag_column if needs_tags else 0, 10 if is_conllu else 2 if needs_tags else 1)
        if len(fields) < needed:
            raise DataError(path, number, f"expected at least {needed} fields, found {len(fields)}")
        word = fields[word_column - 1].strip()
        if not word:
            raise DataError(path, number, f"there is no word in field {word_column}")
        first = number if first is None else first
        words.append(word)
        has_tag = len(fields) > 1 and len(fields) >= tag_column
        tag = fields[tag_column if tag_column < 0 else tag_column - 1].strip() if has_tag else ""
        if tag:
            tags.append(tag)
        elif needs_tags:
            raise DataError(path, number, "there is no tag at this word")
    if words:
        yield first, Sentence(words, tags if len(tags) == len(words) else None, intent)


def _json_sentences(
    path: str | Path, word_column: str | None, tag_column: str | None, split: Split
) -> Iterator[tuple[int, Sentence]]:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problem = f"not a JSON value ({error.msg}, column {error.colno}); one JSON object per line is expected"
            raise DataError(path, number, problem) from None
        yield number, _sentence_of(row, path, number, word_column, tag_column, split)


def _sentence_of(
    row: Any, path: str | Path, number: int, word_column: str | None, tag_column: str | None, split: Split
) -> Sentence:
    if not isinstance(row, dict):
        raise DataError(path, number, f"expected a JSON object, found {type(row).__name__}")
    intent = row.get("intent")
    if intent is not None and not isinstance(intent, str):
        raise DataError(path, number, f"field 'intent' is not text but {type(intent).__name__}")
    words = _strings(row, (word_column,) if word_column else WORDS, path, number)
    if words is None and isinstance(row.get("text"), str):
        spans = next((row[name] for name in SPANS if row.get(name) is not None), None)
        return Sentence(*_tags_of_spans(row["text"], spans, path, number, split), intent)
    if words is None:
        raise DataError(path, number, f"no field {word_column or ' or '.join((*WORDS, 'text'))!r}, only {list(row)}")
    tags = _strings(row, (tag_column,) if tag_column else TAGS, path, number)
    if tags is not None and len(tags) != len(words):
        raise DataError(path, number, f"{len(words)} words, but {len(tags)} tags")
    if not all(word.strip() for word in words):
        raise DataError(path, number, "a word is empty")
    return Sentence(words, tags, intent)


def _strings(row: dict, names: tuple[str, ...], path: str | Path, number: int) -> list[str] | None:
    for name in names:
        if row.get(name) is not None:
            values = row[name]
            if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
                raise DataError(path, number, f"field {name!r} is not a list of strings")
            return values
    return None


def _tags_of_spans(
    text: str, spans: Any, path: str | Path, number: int, split: Split
) -> tuple[list[str], list[str] | None]:
    """The words of a text, cut where spans begin and end, and their tags by these; of no spans at all None."""
    if not isinstance(spans, list | None):
        raise DataError(path, number, f"spans must be a list, found {spans!r}")
    places = []
    for span in spans or []:
        try:
            start, end, label = span["start"], span["end"], str(span["label"])
        except (KeyError, TypeError):
            raise DataError(path, number, f"a span must have start, end and label, found {span!r}") from None
        if type(start) is not int or type(end) is not int:
            raise DataError(path, number, f"start and end of a span must be whole numbers, found {span!r}")
        places.append((start, end, label))
        if not 0 <= start < end <= len(text):
            raise DataError(path, number, f"a span from {start} to {end} in a text of {len(text)} characters")
    places.sort()
    for (_, end, _), (start, _, _) in pairwise(places):
        if start < end:
            raise DataError(path, number, f"two spans have the character {start}")
    words, tags = [], []
    cuts = {position for start, end, _ in places for position in (start, end)}
    for first, last in split(text):
        inner = [first, *sorted(cut for cut in cuts if first < cut < last), last]
        for start, end in pairwise(inner):
            if not text[start:end].strip():
                continue
            words.append(text[start:end])
            inside = next((place for place in places if place[0] <= start < place[1]), None)
            if inside is None:
                tags.append("O")
            else:
                is_first = not text[inside[0] : start].strip()
                tags.append(("B-" if is_first else "I-") + inside[2])
    if not words:
        raise DataError(path, number, "a text without a word")
    return words, None if spans is None else tags
