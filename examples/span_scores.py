"""Exact match and F1 of answers, as the official script of SQuAD computes them, and the same by characters.

By words (SQuAD 1.1 and 2.0): lower case, without punctuation and the articles a, an and the; F1 counts common words. By
characters, for languages without spaces between words: NFKC, lower case, without punctuation and white space; F1 counts
common characters. A question counts with the best of its right answers; one without an answer is right where nothing
is answered.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence


def words(text: str) -> list[str]:
    """The words that are compared."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def characters(text: str) -> list[str]:
    """The characters that are compared."""
    text = unicodedata.normalize("NFKC", text).lower()
    return [character for character in text if unicodedata.category(character)[0] not in "PZC"]


UNITS: dict[str, Callable[[str], list[str]]] = {"words": words, "characters": characters}


def compare(answer: str, right: str, unit: str = "words") -> tuple[float, float]:
    """Exact match and F1, from 0 to 1, of an answer and a right one."""
    found, wanted = UNITS[unit](answer), UNITS[unit](right)
    exact = float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    if not found or not wanted or common == 0:
        return exact, exact
    return exact, 2 * common / (len(found) + len(wanted))


def score_answers(answers: Sequence[str], references: Sequence[Sequence[str]], unit: str = "words") -> dict[str, float]:
    """
    Means in per cent.

    Args:
        answers: One for each question; empty where there is said to be none.
        references: For each question all right answers; none where it has no answer.
        unit: `"words"` or `"characters"`.

    Returns:
        `exact_match` and `f1`; where some questions have no answer and others do, also `answerable_exact_match`,
        `answerable_f1` and `unanswerable_accuracy`.
    """
    scores = []
    for answer, rights in zip(answers, references, strict=True):
        # As in SQuAD 2.0, an answer of which nothing is left (an article, a comma) is none.
        compared = [compare(answer, right, unit) for right in rights if UNITS[unit](right)]
        scores.append([max(pair) for pair in zip(*compared or [compare(answer, "", unit)])])

    def mean(index: int, chosen: list[bool]) -> float:
        values = [pair[index] for pair, is_chosen in zip(scores, chosen, strict=True) if is_chosen]
        return 100 * sum(values) / len(values)

    everything, has_answer = [True] * len(scores), [bool(rights) for rights in references]
    metrics = {"exact_match": mean(0, everything), "f1": mean(1, everything)}
    if any(has_answer) and not all(has_answer):
        metrics["answerable_exact_match"], metrics["answerable_f1"] = mean(0, has_answer), mean(1, has_answer)
        metrics["unanswerable_accuracy"] = mean(0, [not answerable for answerable in has_answer])
    return metrics
