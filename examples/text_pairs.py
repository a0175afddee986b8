"""Reads parallel text: tsv, csv, JSON lines, a pair of plain-text files, or a data set of the Hub.

The kind of a file follows from its name, with or without a final `.gz`:

| name | one pair is |
|---|---|
| `X.tsv`, `X.tab` | a line; fields are separated by tabs, quotation marks mean nothing |
| `X.csv` | a record as the `csv` module reads it, quoted fields may hold commas and line ends |
| `X.jsonl`, `X.json`, `X.ndjson` | a line with a JSON object, flat or under the key `"translation"` |
| `A,B` (two names, a comma between) | line n of `A` and line n of `B`: source file first |

Which field is the source: with `source_column` and `target_column` the fields of these names, and the first line of a
tsv or csv file has to be a header that has both. Without names the first field is the source, the second the target,
and a tsv or csv file has no header. For plain-text pairs names play no role.

Lines end at `\\n` only (a `\\r` before it is dropped), text is UTF-8, and white space around a sentence is removed.
Anything that cannot be a pair raises `DataError`, which names the file and the line.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
TSV_SUFFIXES = (".tsv", ".tab")


class DataError(ValueError):
    """
    Data that cannot be used. Its text is `FILE:LINE: what is wrong`.

    Args:
        path (`str` or `Path`): The file.
        line (`int`, *optional*): The line, counted from 1.
        problem (`str`): What is wrong.
    """

    def __init__(self, path: str | Path, line: int | None, problem: str):
        self.path, self.line, self.problem = path, line, problem
        super().__init__(f"{path}: {problem}" if line is None else f"{path}:{line}: {problem}")


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yields (line number, line) of a UTF-8 file, gzipped if its name ends in `.gz`. Lines keep their `\\n`."""
    opener = gzip.open if str(path).endswith(".gz") else open
    number = 0
    try:
        with opener(path, "rb") as file:  # a binary file splits at \n alone
            for number, raw in enumerate(file, start=1):
                try:
                    line = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    bad_byte = raw[error.start]
                    raise DataError(
                        path, number, f"not valid UTF-8: byte 0x{bad_byte:02x} at byte {error.start + 1} of the line"
                    ) from None
                yield number, line.removeprefix("\ufeff") if number == 1 else line
    except FileNotFoundError:
        raise DataError(path, None, "no such file") from None
    except IsADirectoryError:
        raise DataError(path, None, "is a folder, not a file") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(path, number + 1, f"damaged gzip file ({error})") from None
    if number == 0:
        raise DataError(path, None, "the file is empty")


def read_text(path: str | Path) -> str:
    """The whole text of a UTF-8 file, plain or gzipped. Raises `DataError` for an empty or undecodable file."""
    return "".join(line for _, line in read_lines(path))


def read_pairs(
    path: str | Path,
    source_column: str | None = None,
    target_column: str | None = None,
    skip_bad_lines: bool = False,
) -> list[tuple[str, str]]:
    """
    Reads the pairs of a file.

    Args:
        path (`str` or `Path`): A file, or two plain-text files joined by a comma (see the head of this module).
        source_column, target_column (`str`, *optional*): Names of the fields; give both or none.
        skip_bad_lines (`bool`, *optional*, defaults to `False`):
            Leave out lines that are malformed or have an empty side. Never hides encoding errors or missing columns.

    Returns:
        `list[tuple[str, str]]`: (source, target), in the order of the file.

    Raises:
        `DataError`: With file and line, for whatever cannot be read.
    """
    if (source_column is None) != (target_column is None):
        raise ValueError("source_column and target_column have to be given together")
    columns = None if source_column is None else (source_column, target_column)
    first_path, comma, second_path = str(path).partition(",")
    name = str(path).lower().removesuffix(".gz")
    if comma and not Path(path).exists():
        path, records = first_path, _plain_records(first_path, second_path)
    elif name.endswith((*TSV_SUFFIXES, ".csv", *JSON_SUFFIXES)):
        records = read_records(path, columns)
    else:
        raise DataError(
            path,
            None,
            "unknown kind of file: expected a name in .tsv, .csv or .jsonl (or any of them + .gz), or two plain-text "
            "files joined by a comma",
        )

    pairs = []
    for number, record in records:
        problem = record if isinstance(record, str) else _problem_of(record)
        if problem is None:
            pairs.append((record[0].strip(), record[1].strip()))
        elif not skip_bad_lines:
            raise DataError(path, number, problem)
    if not pairs:
        raise DataError(path, None, "no sentence pairs in this file")
    return pairs


def read_records(
    path: str | Path, columns: tuple[str, ...] | None, optional: tuple[str, ...] = (), texts_only: bool = True
) -> "Records":
    """
    Reads the fields `columns` of a tsv, csv or JSON lines file, then those of `optional`, which are None where the file
    has no such column. Without `columns` these are the first two of each line, and tables have no header. A field of a
    JSON line has to be text, unless `texts_only` is false.

    Yields the number of each line with its fields or, as one string, what is wrong with it. Raises `DataError` for what
    is wrong with the whole file, such as a column that a header lacks.
    """
    name = str(path).lower().removesuffix(".gz")
    if name.endswith(TSV_SUFFIXES):
        return _table_records(path, _tsv_rows(path), columns, optional)
    if name.endswith(".csv"):
        return _table_records(path, _csv_rows(path), columns, optional)
    if name.endswith(JSON_SUFFIXES):
        return _json_records(path, columns, optional, texts_only)
    raise DataError(path, None, "unknown kind of file: expected a name in .tsv, .csv or .jsonl (or any of them + .gz)")


def load_hub_split(name: str, config_name: str | None, split: str) -> Any:
    """A split of a data set of the Hub (or a local folder that `datasets` can load); `DataError` if there is none."""
    from datasets import get_dataset_split_names, load_dataset

    try:
        splits = get_dataset_split_names(name, config_name)
        if split not in splits:
            raise DataError(name, None, f"has no split {split!r}, only {', '.join(splits)}")
        return load_dataset(name, config_name, split=split)
    except DataError:
        raise
    except Exception as error:  # datasets raises many kinds, from network errors to unknown configurations
        raise DataError(name, None, f"cannot be loaded: {str(error).splitlines()[0]}") from error


def pairs_from_hub(
    name: str, config_name: str | None, split: str, source_column: str | None, target_column: str | None
) -> list[tuple[str, str]]:
    """
    Pairs of one split of a data set of the Hub (or a local folder that `datasets` can load).

    Columns are named as in `read_pairs`: flat columns, or the keys of a column `translation`. Rows with an empty side
    are left out. Raises `DataError` when the data set, the split or a column does not exist.
    """
    dataset = load_hub_split(name, config_name, split)
    columns = None if source_column is None else (source_column, target_column)
    pairs = []
    for number, row in enumerate(dataset, start=1):
        record = _fields_of_object(row, columns)
        if isinstance(record, str):
            raise DataError(f"{name} ({split})", number, record)
        if _problem_of(record) is None:
            pairs.append((record[0].strip(), record[1].strip()))
    if not pairs:
        raise DataError(f"{name} ({split})", None, "no sentence pairs in this split")
    return pairs


# The readers below yield (line number, record), where a record is a tuple of fields (for pairs two strings) or, as one
# string, what is wrong.
Records = Iterator[tuple[int, tuple | str]]


def _problem_of(pair: tuple[str, str]) -> str | None:
    sides = [side for side, text in zip(("source", "target"), pair, strict=True) if not text.strip()]
    return f"empty {' and '.join(sides)} sentence" if sides else None


def _tsv_rows(path: str | Path) -> Iterator[tuple[int, list[str]]]:
    for number, line in read_lines(path):
        yield number, line.removesuffix("\n").removesuffix("\r").split("\t")


def _csv_rows(path: str | Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader((line for _, line in read_lines(path)), strict=True)
    while True:
        first_line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(path, first_line, f"malformed csv record ({error})") from None
        yield first_line, row


def _table_records(
    path: str | Path, rows: Iterator[tuple[int, list[str]]], columns: tuple[str, ...] | None, optional: tuple[str, ...]
) -> Records:
    places, width = [0, 1], None
    for number, row in rows:
        if width is None:
            width = len(row)
            if columns is not None:
                for column in columns:
                    if column not in row:
                        raise DataError(path, number, f"no column {column!r} in the header, which has {row}")
                places = [row.index(column) if column in row else None for column in (*columns, *optional)]
                continue
            if width < 2:
                raise DataError(path, number, f"expected at least 2 fields, found {width}")
        if len(row) != width:
            yield number, f"expected {width} fields, found {len(row)}" if any(row) else "empty line"
        else:
            yield number, tuple(None if place is None else row[place] for place in places)


def _json_records(
    path: str | Path, columns: tuple[str, ...] | None, optional: tuple[str, ...], texts_only: bool
) -> Records:
    for number, line in read_lines(path):
        if not line.strip():
            yield number, "empty line"
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            yield number, f"not a JSON value ({error.msg}, column {error.colno}); one JSON object per line is expected"
            continue
        record = _fields_of_object(row, columns, optional, texts_only)
        if columns is None and isinstance(record, tuple):
            columns = tuple((row.get("translation") or row).keys())[:2]  # later lines may order their keys otherwise
        yield number, record


def _fields_of_object(
    row: Any, columns: tuple[str, ...] | None, optional: tuple[str, ...] = (), texts_only: bool = True
) -> tuple | str:
    if isinstance(row, dict) and isinstance(row.get("translation"), dict):
        row = row["translation"]
    if not isinstance(row, dict):
        return f"expected a JSON object, found {type(row).__name__}"
    if columns is None:
        if len(row) < 2:
            return f"expected an object with two fields, found {list(row)}"
        columns = tuple(row)[:2]
    for column in columns:
        if column not in row:
            return f"no field {column!r}, only {list(row)}"
        if texts_only and not isinstance(row[column], str):
            return f"field {column!r} is not text but {type(row[column]).__name__}"
    return tuple(row.get(column) for column in (*columns, *optional))


def _plain_records(source_path: str, target_path: str) -> Records:
    source_lines, target_lines = read_lines(source_path), read_lines(target_path)
    while True:
        source, target = next(source_lines, None), next(target_lines, None)
        if source is None and target is None:
            return
        if source is None or target is None:
            short, long, (number, _) = (
                (source_path, target_path, target) if source is None else (target_path, source_path, source)
            )
            count = number + sum(1 for _ in (target_lines if source is None else source_lines))
            raise DataError(
                short, number, f"the file ends after {number - 1} lines, but {long} has {count}: they have to match"
            )
        yield source[0], (source[1], target[1])
