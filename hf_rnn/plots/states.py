"""What units do over a text, as coloured text."""

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from .drawing import SIGNS, SPACE, Font, font_for, make_figure, numbers, visible


if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMN_INCHES, LINE_INCHES, FONT_SIZE = 0.095, 0.22, 11


class Place(NamedTuple):
    """Where a token stands: its line, its first column and how many columns it has."""

    line: int
    column: int
    width: int


def plot_states(
    text: Sequence[str],
    states,
    *,
    names: Sequence[str] | None = None,
    columns: int = 80,
    limit: float | None = None,
    title: str | None = None,
    font: Font = None,
    colormap: str = "RdBu",
) -> "Figure":
    """
    Text over several lines on a background that shows what a unit did at each character, blue where it was positive and
    red where it was negative, as in [Karpathy et al. (2015)](https://huggingface.co/papers/1506.02078), figure 2.

    Args:
        text (`str` or `Sequence[str]`): The characters, or tokens of several characters. A line ends after a line feed
            or `columns` columns; one that begins with a right-to-left script runs from right to left.
        states (`torch.Tensor` or array of shape `(tokens,)` or `(units, tokens)`):
            One number for each token, such as `outputs.hidden_states[layer][row, :, unit]`; for several units the text
            is repeated.
        names (`Sequence[str]`, *optional*): What stands above the text of each unit.
        columns (`int`): The width of the text in letters.
        limit (`float`, *optional*): The number that is shown in full colour; by default the largest there is.
        title (`str`, *optional*): Stands above all.
        font (`str`, path or `Sequence[str]`, *optional*): As in [`plot_attention`]; of one width, if letters are to
            stand in the middle of their columns.
        colormap (`str`): A colormap of matplotlib with its neutral colour in the middle.

    Returns:
        `matplotlib.figure.Figure`: Neither shown nor saved.

    Raises:
        `ValueError`: There are not as many numbers as tokens or as many names as units, `columns` or `limit` is not
            positive, or there is no such font.
        `ImportError`: There is no matplotlib (extra `plots`).
    """
    states = numbers(states, "states", (1, 2))
    if states.dim() == 1:
        states = states[None]
    if states.shape[1] != len(text) or not states.numel():
        raise ValueError(f"`states` must have the shape ([units,] {len(text)} tokens), got {tuple(states.shape)}.")
    if names is not None and len(names) != len(states):
        raise ValueError(f"`names` must be {len(states)} names, got {len(names)}.")
    if columns < 1:
        raise ValueError(f"`columns` must be at least 1, got {columns}.")
    limit = states.abs().max().item() or 1.0 if limit is None else limit
    if not limit > 0:
        raise ValueError(f"`limit` must be positive, got {limit}.")
    places = lay_out(text, columns)
    num_lines = 1 + max(place.line for place in places)
    num_columns = max(place.column + place.width for place in places)

    width = max(num_columns * COLUMN_INCHES, 2.5) + 1.0
    height = len(states) * (num_lines * LINE_INCHES + (0.3 if names else 0.1)) + (0.4 if title else 0.1)
    figure = make_figure(width, max(height, 0.9))
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    labels = [visible(token) for token in text]
    properties = font_for([*labels, *(names or ()), title or ""], font, first="DejaVu Sans Mono")
    scale = ScalarMappable(Normalize(-limit, limit), colormaps[colormap])
    panels = figure.subplots(len(states), 1, squeeze=False)[:, 0]
    for index, (axes, values) in enumerate(zip(panels, states)):
        colors = scale.to_rgba(values.numpy())
        boxes = [Rectangle((place.column, place.line), place.width, 1) for place in places]
        axes.add_collection(PatchCollection(boxes, facecolors=colors, edgecolors="none"))
        for label, place, (red, green, blue, _) in zip(labels, places, colors):
            if label != SPACE:
                is_dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
                axes.text(
                    place.column + place.width / 2,
                    place.line + 0.5,
                    label,
                    color="white" if is_dark else "black",
                    alpha=0.5 if label in SIGNS else 1.0,
                    ha="center",
                    va="center_baseline",
                    fontproperties=properties,
                    fontsize=FONT_SIZE,
                    parse_math=False,
                )
        axes.set(xlim=(0, num_columns), ylim=(num_lines, 0))
        axes.set_axis_off()
        if names is not None:
            axes.set_title(names[index], loc="left", fontproperties=properties, fontsize=10, parse_math=False)
    figure.colorbar(scale, ax=list(panels), fraction=0.03, pad=0.01, aspect=12)
    if title is not None:
        figure.suptitle(title, fontproperties=properties, fontsize=11, parse_math=False)
    return figure


def lay_out(tokens: Sequence[str], columns: int) -> list[Place]:
    """
    A place for each token, none of which is parted; a line that begins with a right-to-left script is mirrored.
    """
    lines: list[list[tuple[int, int, int]]] = [[]]  # of each line: token, first column, width
    end, after_feed = 0, False
    for index, token in enumerate(tokens):
        width = max(1, sum(width_of(character) for character in token))
        if after_feed or (end and end + width > columns):
            lines.append([])
            end = 0
        lines[-1].append((index, end, width))
        end += width
        after_feed = token.endswith("\n")
    most = max(column + width for line in lines for _, column, width in line)
    places = {}
    for number, line in enumerate(lines):
        directions = (unicodedata.bidirectional(character) for index, _, _ in line for character in tokens[index])
        first = next((direction for direction in directions if direction in ("L", "R", "AL")), "L")
        for index, column, width in line:
            places[index] = Place(number, column if first == "L" else most - column - width, width)
    return [places[index] for index in range(len(tokens))]


def width_of(character: str) -> int:
    """How many columns a character takes: none on top of the one before it, two in East Asian scripts."""
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
