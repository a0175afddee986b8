"""Which classes a classifier takes for which others."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .attention import POINTS_PER_INCH
from .drawing import Font, font_for, make_figure, numbers, visible


if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL_INCHES = 0.36  # of a class, where there is room
MAX_INCHES = 11
MOST_NUMBERS = 30  # classes with which numbers still fit into the cells


def plot_confusion(
    matrix,
    labels: Sequence[str],
    *,
    most: int | None = None,
    title: str | None = None,
    font: Font = None,
    colormap: str = "Blues",
) -> "Figure":
    """
    A confusion matrix: a row for each class, a column for each answer, darker where more of the class got the answer.
    Numbers of texts stand in the cells where there is room.

    Args:
        matrix (`torch.Tensor` or array of shape `(classes, classes)`):
            How many texts of each class (rows) were given each class (columns).
        labels (`Sequence[str]`): The names of the classes.
        most (`int`, *optional*):
            Show at most so many classes, those that are most often part of an error; a last row and column stand for
            all others.
        title (`str`, *optional*): Stands above.
        font (`str`, path or `Sequence[str]`, *optional*): As in [`plot_attention`].
        colormap (`str`): A colormap of matplotlib.

    Returns:
        `matplotlib.figure.Figure`: Neither shown nor saved.

    Raises:
        `ValueError`: The matrix is not square, has other than whole numbers of at least 0, or not as many rows as there
            are labels, `most` is below 1, or there is no such font.
        `ImportError`: There is no matplotlib (extra `plots`).
    """
    counts = numbers(matrix, "matrix", (2,))
    if counts.shape != (len(labels), len(labels)) or not len(labels):
        raise ValueError(
            f"`matrix` must have a row and a column for each of {max(1, len(labels))} labels, got the shape "
            f"{tuple(counts.shape)}."
        )
    if (counts < 0).any() or (counts != counts.round()).any():
        raise ValueError("`matrix` must hold numbers of texts: whole numbers of at least 0.")
    if most is not None and most < 1:
        raise ValueError(f"`most` must be at least 1, got {most}.")
    names = [visible(str(label)) for label in labels]
    if most is not None and most < len(names):
        counts, names = _most_confused(counts, names, most)

    size = len(names)
    cell = min(CELL_INCHES, MAX_INCHES / size)
    letters = min(11.0, 0.75 * cell * POINTS_PER_INCH)
    margin = max(map(len, names)) * letters * 0.6 / POINTS_PER_INCH
    figure = make_figure(
        max(cell * size + margin + 1.4, 3.0), max(cell * size + margin + 0.6 + (0.3 if title else 0), 2.0)
    )
    properties = font_for([*names, title or ""], font)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), cmap=colormap, vmin=0, vmax=1, aspect="equal", interpolation="nearest")
    if size <= MOST_NUMBERS:
        for row in range(size):
            for column in range(size):
                if counts[row, column]:
                    axes.text(
                        column,
                        row,
                        f"{int(counts[row, column])}",
                        ha="center",
                        va="center",
                        fontsize=letters * 0.7,
                        color="white" if shares[row, column] > 0.5 else "black",
                    )
    axes.set_xticks(range(size), names, rotation=90)
    axes.set_yticks(range(size), names)
    axes.tick_params(length=0)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set(fontproperties=properties, fontsize=letters, parse_math=False)
    axes.set_xlabel("answer")
    axes.set_ylabel("class")
    figure.colorbar(image, ax=axes, shrink=0.8, aspect=25, label="share of the class")
    if title is not None:
        figure.suptitle(title, fontproperties=properties, fontsize=11, parse_math=False)
    return figure


def _most_confused(counts: torch.Tensor, names: list[str], most: int) -> tuple[torch.Tensor, list[str]]:
    """The matrix of the classes that are part of the most errors, in their order, and of all others together."""
    errors = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
    shown = errors.argsort(descending=True, stable=True)[:most].sort().values.tolist()
    others = [index for index in range(len(names)) if index not in set(shown)]
    groups = torch.zeros(most + 1, len(names), dtype=counts.dtype)
    for row, index in enumerate(shown):
        groups[row, index] = 1
    groups[most, others] = 1
    return groups @ counts @ groups.T, [*(names[index] for index in shown), f"{len(others)} others"]
