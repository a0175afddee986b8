"""Pretrained word vectors: text files of GloVe, word2vec and fastText, and how they get into the embeddings of a model.

[`read_word_vectors`] knows files and words alone, [`place_word_vectors`] models and tokenizers.
"""

import gzip
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers.decoders import ByteLevel
from tqdm.auto import tqdm


# What marks the tokens of subword tokenizers that begin a word: byte-level BPE, and SentencePiece.
WORD_MARKS = ("Ġ", "▁")


@dataclass
class WordVectors:
    """
    Vectors by word.

    Args:
        words (`list[str]`): The words that were asked for.
        vectors (`torch.FloatTensor` of shape `(words, dimension)`): A row for each word, zero where there is none.
        found (`torch.BoolTensor` of shape `(words,)`): Whether the file has a vector for the word.
    """

    words: list[str]
    vectors: torch.Tensor
    found: torch.Tensor

    @property
    def dimension(self) -> int:
        """Width of a vector."""
        return self.vectors.shape[1]

    @property
    def num_found(self) -> int:
        """How many of the words have a vector."""
        return int(self.found.sum())


def read_word_vectors(
    path: str | os.PathLike,
    words: Iterable[str] | None = None,
    *,
    dimension: int | None = None,
    lowercase_fallback: bool = True,
    on_duplicate: str = "error",
    show_progress: bool = True,
) -> WordVectors:
    """
    Reads a text file of vectors, one line for each word: the word and its numbers, separated by single spaces. A first
    line of two integers, as word2vec and fastText write it, says how many words and numbers follow. A word may hold
    spaces, as some of GloVe do.

    Only the vectors of the words asked for are kept, so that a file may be larger than the memory. Of all other lines
    only their number of fields is looked at.

    Args:
        path (`str` or path): A UTF-8 file, gzipped if its name ends in `.gz`.
        words (`Iterable[str]`, *optional*): The words whose vectors are wanted; all of the file where not given.
        dimension (`int`, *optional*): How many numbers a line has; by default as the first line says or shows.
        lowercase_fallback (`bool`, *optional*, defaults to `True`):
            Whether a word that the file lacks gets the vector of the same word in lower case.
        on_duplicate (`str`, *optional*, defaults to `"error"`):
            What to do where a word that is wanted comes again: `"error"`, or `"first"` to keep its first vector.
        show_progress (`bool`, *optional*, defaults to `True`): Whether to show how much of the file is read.

    Returns:
        [`WordVectors`]: The words in their order, each once, with their vectors.

    Raises:
        `ValueError`: With the file and the line, for a line that has not as many numbers as the others, something that
            is no finite number in float32, a word that comes again, bytes that are not UTF-8, a damaged gzip file, or
            not as many lines as the first one says. Also for an empty file, an unknown `on_duplicate`, or no `words`.
        `FileNotFoundError`: There is no such file.
    """
    if on_duplicate not in ("error", "first"):
        raise ValueError(f"`on_duplicate` must be one of ['error', 'first'], got {on_duplicate!r}.")
    if dimension is not None and dimension < 1:
        raise ValueError(f"`dimension` must be at least 1, got {dimension}.")
    asked_for = None if words is None else list(dict.fromkeys(words))
    if asked_for is not None and not asked_for:
        raise ValueError("`words` must hold at least one word, got none.")
    wanted = None if asked_for is None else set(asked_for)
    if wanted is not None and lowercase_fallback:
        wanted.update([word.lower() for word in asked_for])

    vectors: dict[str, torch.Tensor] = {}
    lines_of: dict[str, int] = {}
    promised = None
    number = 0
    for number, line in _lines(path, show_progress):
        fields = line.rstrip("\r\n ").split(" ")
        if number == 1:
            promised, width = _header_of(fields)
            if dimension is not None and width not in (None, dimension):
                raise ValueError(f"{path}:1: expected vectors of {dimension} numbers, the header says {width}")
            dimension = dimension if width is None else width
            if promised is not None:
                continue
            dimension = _numbers_at_end(fields) if dimension is None else dimension
        if len(fields) <= dimension or dimension == 0:
            raise ValueError(
                f"{path}:{number}: expected a word and {dimension or 'some'} numbers, found {len(fields)} fields"
            )
        # Of a word with spaces no part in front of the numbers is a number itself.
        if len(fields) > dimension + 1 and _is_number(fields[-dimension - 1]):
            raise ValueError(f"{path}:{number}: expected {dimension} numbers, found {_numbers_at_end(fields)}")
        word = " ".join(fields[:-dimension])
        if wanted is not None and word not in wanted:
            continue
        if word in vectors:
            if on_duplicate == "error":
                raise ValueError(f"{path}:{number}: {word!r} has a vector in line {lines_of[word]} already")
            continue
        vectors[word] = _vector_of(fields[-dimension:], path, number)
        lines_of[word] = number
    if number == 0 or (number == 1 and promised is not None and promised > 0):
        raise ValueError(f"{path}: no vectors in this file")
    if promised is not None and promised != number - 1:
        raise ValueError(f"{path}: the first line says {promised} words, but {number - 1} lines follow")

    asked_for = list(vectors) if asked_for is None else asked_for
    rows = [vectors.get(word, vectors.get(word.lower()) if lowercase_fallback else None) for word in asked_for]
    found = torch.tensor([row is not None for row in rows], dtype=torch.bool)
    zeros = torch.zeros(dimension)
    stacked = torch.stack([zeros if row is None else row for row in rows]) if rows else torch.zeros(0, dimension)
    return WordVectors(asked_for, stacked, found)


def _lines(path: str | os.PathLike, show_progress: bool) -> Iterator[tuple[int, str]]:
    """Number and text of each line, with a bar that shows how many bytes of the file are read."""
    number = 0
    with (
        open(path, "rb") as file,
        tqdm(
            total=os.path.getsize(path),
            desc=f"reading {Path(path).name}",
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=not show_progress,
        ) as bar,
    ):
        try:
            for number, raw in enumerate(gzip.GzipFile(fileobj=file) if str(path).endswith(".gz") else file, start=1):
                try:
                    line = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{path}:{number}: not valid UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1} of "
                        "the line"
                    ) from None
                yield number, line.removeprefix("\ufeff") if number == 1 else line
                if number % 1000 == 0:
                    bar.update(file.tell() - bar.n)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}:{number + 1}: damaged gzip file ({error})") from None
        bar.update(file.tell() - bar.n)


def _header_of(fields: list[str]) -> tuple[int | None, int | None]:
    """The numbers of words and of dimensions that a first line promises; None twice where it is a vector."""
    if len(fields) == 2 and all(field.isdecimal() for field in fields):
        return int(fields[0]), int(fields[1])
    return None, None


def _numbers_at_end(fields: list[str]) -> int:
    """How many of the fields behind the first are numbers, counted from the end."""
    count = 0
    while count < len(fields) - 1 and _is_number(fields[-1 - count]):
        count += 1
    return count


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return "_" not in field  # which Python reads as part of a number


def _vector_of(fields: list[str], path: str | os.PathLike, number: int) -> torch.Tensor:
    vector = torch.tensor([float(field) if _is_number(field) else math.nan for field in fields], dtype=torch.float32)
    wrong = (~vector.isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"{path}:{number}: number {wrong[0] + 1} is not a finite number in float32 but {fields[wrong[0]]!r}"
        )
    return vector


def words_of_tokens(tokenizer) -> dict[int, str]:
    """
    The word that each token of a tokenizer stands for by its id. Special tokens stand for none, nor do those of subword
    tokenizers that continue a word or, with a mark of WordPiece (`##`), are part of one.
    """
    vocabulary = tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids)
    mark = next((mark for mark in WORD_MARKS if sum(token.startswith(mark) for token in vocabulary) > 1), None)
    words = {}
    for token, index in vocabulary.items():
        word = token
        if mark is not None:
            word = token.removeprefix(mark) if token.startswith(mark) else ""
            word = ByteLevel().decode([word]) if mark == "Ġ" and word else word
        if word and index not in special and not token.startswith("##"):
            words[index] = word
    return words


@torch.no_grad()
def place_word_vectors(model, tokenizer, vectors: WordVectors) -> int:
    """
    Puts vectors in place of the embeddings of those tokens that are words and have one. All others stay as they are.

    Args:
        model (`PreTrainedModel`): The model; its embeddings are changed in place.
        tokenizer (`PreTrainedTokenizerBase`): Says which token is which word.
        vectors ([`WordVectors`]): What [`read_word_vectors`] returned, best for `words_of_tokens(tokenizer).values()`.

    Returns:
        `int`: How many embeddings were replaced.

    Raises:
        `ValueError`: The embeddings have another width than the vectors, or fewer rows than the tokenizer has tokens.

    Example:

    ```py
    >>> vectors = read_word_vectors("glove.6B.100d.txt", words_of_tokens(tokenizer).values())
    >>> f"{place_word_vectors(model, tokenizer, vectors)} of {len(tokenizer)} tokens have a vector"
    ```"""
    weight = model.get_input_embeddings().weight
    if weight.shape[1] != vectors.dimension:
        raise ValueError(
            f"The embeddings of the model must be as wide as the vectors, got {weight.shape[1]} and "
            f"{vectors.dimension}: make the model with `embedding_size={vectors.dimension}`."
        )
    rows = {word: row for row, word in enumerate(vectors.words) if vectors.found[row]}
    placed = [(index, rows[word]) for index, word in words_of_tokens(tokenizer).items() if word in rows]
    if placed and max(index for index, _ in placed) >= len(weight):
        raise ValueError(f"The tokenizer has tokens beyond the {len(weight)} embeddings of the model.")
    if placed:
        tokens, sources = torch.tensor(placed).T
        weight[tokens.to(weight.device)] = vectors.vectors[sources].to(weight)
    return len(placed)
