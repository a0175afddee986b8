"""Schemes by which labels of tokens mark spans, such as B-PER I-PER O: which label may follow which.

Imports no torch and nothing of the package.
"""

from collections.abc import Sequence
from typing import NamedTuple


# Scheme, then the prefixes of its labels. What begins a span of several tokens is B, what goes on with one I; the last
# token of such a span is E or L, a span of one token S or U. O is no span. "bio" is also known as IOB2.
SCHEMES = {"bio": "BIO", "bioes": "BIOES", "bilou": "BILOU"}
OTHER_NAMES = {"iob2": "bio", "iobes": "bioes"}
CONSTRAINTS = ("auto", "none", *SCHEMES, *OTHER_NAMES)


class ForbiddenSteps(NamedTuple):
    """What a scheme does not allow, by the numbers of the labels."""

    transitions: list[list[bool]]  # True where the second label must not follow the first
    start: list[bool]  # True where a text must not begin with the label
    end: list[bool]  # True where a text must not end with the label


def _parse(label) -> tuple[str, str] | None:
    """The prefix and the type of a label; None where it has no such form."""
    prefix, _, kind = str(label).partition("-")
    if prefix == "O":
        return None if kind else ("O", "")
    return (prefix, kind) if len(prefix) == 1 else None


def _find_scheme(labels: Sequence[str]) -> str | None:
    parsed = [_parse(label) for label in labels]
    if None in parsed:
        return None
    prefixes = {prefix for prefix, _ in parsed}
    # Without a B, or in the longer schemes without an end, labels that look so may mean anything.
    for scheme, needed in (("bio", "B"), ("bioes", "BE"), ("bilou", "BL")):
        if set(needed) <= prefixes <= set(SCHEMES[scheme]):
            return scheme
    return None


def forbidden_steps(labels: Sequence[str], constraints: str = "auto") -> ForbiddenSteps | None:
    """
    Args:
        labels (`Sequence[str]`): The labels in the order of their numbers.
        constraints (`str`):
            `"bio"` (or `"iob2"`), `"bioes"` (or `"iobes"`), `"bilou"`, `"auto"` (the one of these that all labels fit,
            or none of them) or `"none"`.

    Returns:
        `ForbiddenSteps`, or None where everything is allowed.

    Raises:
        `ValueError`: A scheme is named, and a label does not fit it.
    """
    scheme = OTHER_NAMES.get(constraints, constraints)
    if scheme == "auto":
        scheme = _find_scheme(labels)
    if scheme is None or scheme == "none":
        return None
    parsed = [_parse(label) for label in labels]
    wrong = [
        label for label, parts in zip(labels, parsed, strict=True) if parts is None or parts[0] not in SCHEMES[scheme]
    ]
    if wrong:
        forms = ", ".join("O" if prefix == "O" else f"{prefix}-TYPE" for prefix in SCHEMES[scheme])
        raise ValueError(
            f"`crf_constraints` must name a scheme that every label of `id2label` fits, or be 'auto' or 'none': got "
            f"{constraints!r}, whose labels are {forms}, with {wrong[:5]}."
        )
    goes_on = [prefix in "IEL" for prefix, _ in parsed]
    is_open = [prefix in "BI" for prefix, _ in parsed]
    must_go_on = [scheme != "bio" and opened for opened in is_open]
    transitions = [
        [
            not (is_open[first] and parsed[first][1] == kind) if goes_on[second] else must_go_on[first]
            for second, (_, kind) in enumerate(parsed)
        ]
        for first in range(len(parsed))
    ]
    return ForbiddenSteps(transitions, goes_on, must_go_on)
