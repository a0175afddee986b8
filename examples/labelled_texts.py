"""Reads texts with labels: tsv, csv or JSON lines with named columns, or a data set of the Hub; and what labels mean.

Files are read as by `text_pairs.py` (which kinds there are follows from their names, lines end at `\\n`, quotation
marks mean nothing in a tsv), but a tsv or csv always has a header. Several files are joined by commas.
"""

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from text_pairs import DataError, load_hub_split, read_records


SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
PROBLEM_TYPES = (SINGLE, MULTI, REGRESSION)
SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


class LabelledText(NamedTuple):
    """A row of the data, and where it stands."""

    text: str
    label: Any  # as it was read: text, a number, a list, or None where there is none
    row_id: Any
    path: str
    line: int

    def error(self, problem: str) -> DataError:
        """What is wrong with this row."""
        return DataError(self.path, self.line, problem)


class Columns(NamedTuple):
    """The names of the columns."""

    text: str
    label: str
    row_id: str
    split: str | None = None


def read_texts(
    paths: str, columns: Columns, needs_label: bool = True, skip_bad_lines: bool = False
) -> dict[str, list[LabelledText]]:
    """
    Reads one or several files.

    Args:
        paths (`str`): The names, joined by commas.
        columns (`Columns`): Which columns to read; that of the ids may be missing, that of the labels where they are
            not needed.
        needs_label (`bool`): Whether every row has to have a label.
        skip_bad_lines (`bool`): Leave out lines that are malformed or empty. Never hides encoding errors or missing
            columns.

    Returns:
        The rows by split; all are `"train"` where no column tells them apart.

    Raises:
        `DataError`: With file and line, for whatever cannot be read.
    """
    rows: dict[str, list[LabelledText]] = {}
    for path in [paths] if Path(paths).exists() else paths.split(","):
        needed = (columns.text, *([columns.label] if needs_label else []), *([columns.split] if columns.split else []))
        optional = (*([] if needs_label else [columns.label]), columns.row_id)
        for number, record in read_records(path, needed, optional, texts_only=False):
            problem, split = record if isinstance(record, str) else None, "train"
            if problem is None:
                fields = dict(zip((*needed, *optional), record, strict=True))
                text, label = fields[columns.text], fields[columns.label]
                if columns.split:
                    split = SPLITS.get(str(fields[columns.split]).lower())
                problem = _problem_of(text, label, needs_label, columns)
            if problem is None and split is None:
                raise DataError(
                    path, number, f"{columns.split!r} must be one of {sorted(SPLITS)}, got {fields[columns.split]!r}"
                )
            if problem is None:
                row = LabelledText(text.strip(), label, fields[columns.row_id], path, number)
                rows.setdefault(split, []).append(row)
            elif not skip_bad_lines:
                raise DataError(path, number, problem)
    if not rows:
        raise DataError(paths, None, "no texts in this file")
    return rows


def _problem_of(text: Any, label: Any, needs_label: bool, columns: Columns) -> str | None:
    if not isinstance(text, str):
        return f"field {columns.text!r} is not text but {type(text).__name__}"
    if not text.strip():
        return "empty text"
    if needs_label and (label is None or isinstance(label, dict)):
        return f"field {columns.label!r} is no label but {type(label).__name__}"
    return None


def texts_from_hub(name: str, config_name: str | None, split: str, columns: Columns) -> list[LabelledText]:
    """Rows of one split of a data set of the Hub, with the names of its classes. Rows without text are left out."""
    dataset = load_hub_split(name, config_name, split)
    for column in (columns.text, columns.label):
        if column not in dataset.column_names:
            raise DataError(f"{name} ({split})", None, f"no column {column!r}, only {dataset.column_names}")
    feature = dataset.features[columns.label]
    inner = getattr(feature, "feature", feature)
    rows = []
    for number, row in enumerate(dataset, start=1):
        label = row[columns.label]
        if hasattr(inner, "int2str"):
            label = [inner.int2str(item) for item in label] if isinstance(label, list) else inner.int2str(label)
        problem = _problem_of(row[columns.text], label, True, columns)
        if problem == "empty text":
            continue
        if problem is not None:
            raise DataError(f"{name} ({split})", number, problem)
        rows.append(
            LabelledText(row[columns.text].strip(), label, row.get(columns.row_id), f"{name} ({split})", number)
        )
    if not rows:
        raise DataError(f"{name} ({split})", None, "no texts in this split")
    return rows


def find_problem_type(rows: Iterable[LabelledText], separator: str | None) -> str:
    """
    What is to be predicted: several labels where they come as lists or there is a `separator`, numbers where all are
    numbers and one has a fraction, classes otherwise.
    """
    if separator is not None:
        return MULTI
    numbers = []
    for row in rows:
        if isinstance(row.label, list):
            return MULTI
        numbers.append(_number_of(row.label))
    has_fraction = any(number is not None and number != int(number) for number in numbers)
    return REGRESSION if has_fraction and None not in numbers else SINGLE


def _number_of(label: Any) -> float | None:
    try:
        number = float(label) if not isinstance(label, bool) else None
    except (TypeError, ValueError):
        return None
    return number if number is not None and math.isfinite(number) else None


def label_of(row: LabelledText, problem_type: str, separator: str | None) -> Any:
    """
    The class of a row as text, its labels as a list of texts, or its number. Raises `DataError` where it is something
    else.
    """
    label = row.label
    if problem_type == REGRESSION:
        number = _number_of(label)
        if number is None:
            raise row.error(f"the label is not a finite number but {label!r}")
        return number
    if problem_type == MULTI:
        parts = label if isinstance(label, list) else [label]
        if separator is not None and isinstance(label, str):
            parts = label.split(separator)
        return list(dict.fromkeys(str(part).strip() for part in parts if str(part).strip()))
    if isinstance(label, list):
        raise row.error(f"the label is a list, {label!r}: several labels need --problem_type {MULTI}")
    if not str(label).strip():
        raise row.error("empty label")
    return str(label).strip()


def label_names(rows: Iterable[LabelledText], problem_type: str, separator: str | None) -> list[str]:
    """All labels there are, in the order of numbers where all are whole numbers, else of the alphabet."""
    counts: Counter[str] = Counter()
    for row in rows:
        label = label_of(row, problem_type, separator)
        counts.update(label if problem_type == MULTI else [label])
    if all(name.removeprefix("-").isdecimal() for name in counts):
        return sorted(counts, key=int)
    return sorted(counts)
