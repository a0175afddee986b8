"""Words on a background that shows how much of a text's meaning came from them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .drawing import SPACE, Font, font_for, make_figure, numbers, visible
from .states import COLUMN_INCHES, FONT_SIZE, lay_out


if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROW_INCHES = 0.27


def plot_pooling(
    attention,
    tokens: Sequence[str] | Sequence[Sequence[str]],
    *,
    names: Sequence[str] | None = None,
    columns: int = 80,
    limit: float | None = None,
    title: str | None = None,
    font: Font = None,
    colormap: str = "Oranges",
) -> "Figure":
    """
    The words of one or several texts on a background that is darker where a classifier that pools by attention took
    more from them.

    Args:
        attention (`torch.Tensor` or array of shape `(tokens,)`, `(heads, tokens)` or `(heads, 1, tokens)`):
            The weights of a text, such as `outputs.attentions[0][row]`; for several heads the text is repeated. For
            several texts a sequence of them, or `outputs.attentions[0]` itself.
        tokens (`Sequence[str]` or `Sequence[Sequence[str]]`):
            The words of the text, or of each text. Weights behind the last word of a text are those of padding and are
            left out. A text that begins with a right-to-left script runs from right to left.
        names (`Sequence[str]`, *optional*): What stands above each text, such as its class.
        columns (`int`): The width of the texts in letters; longer ones go on in the next line.
        limit (`float`, *optional*): The weight that is shown in full colour; by default the largest there is.
        title (`str`, *optional*): Stands above all.
        font (`str`, path or `Sequence[str]`, *optional*): As in [`plot_attention`].
        colormap (`str`): A colormap of matplotlib that begins with white.

    Returns:
        `matplotlib.figure.Figure`: Neither shown nor saved.

    Raises:
        `ValueError`: Numbers of weights, words, texts and names that do not fit, a weight that is not between 0 and 1,
            `columns` or `limit` that is not positive, or no such font.
        `ImportError`: There is no matplotlib (extra `plots`).
    """
    if not len(tokens):
        raise ValueError("`tokens` must be the words of at least one text, got none.")
    if isinstance(tokens[0], str):
        attention, tokens = [attention], [tokens]
    if len(attention) != len(tokens):
        raise ValueError(f"`attention` must have the weights of {len(tokens)} texts, got {len(attention)}.")
    if names is not None and len(names) != len(tokens):
        raise ValueError(f"`names` must be {len(tokens)} names, got {len(names)}.")
    if columns < 1:
        raise ValueError(f"`columns` must be at least 1, got {columns}.")
    weights = [_weights_of(values, words, index) for index, (values, words) in enumerate(zip(attention, tokens))]
    limit = max(values.max().item() for values in weights) or 1.0 if limit is None else limit
    if not limit > 0:
        raise ValueError(f"`limit` must be positive, got {limit}.")

    # A word has room around it and stands apart from the next one; a column is as wide as a letter.
    labels = [[visible(word) for word in words] for words in tokens]
    rows = []  # (label above, words, places, weights)
    for index, values in enumerate(weights):
        places = lay_out([f"{label}  " for label in labels[index]], columns)
        for head, head_values in enumerate(values):
            above = [] if names is None else [names[index]]
            above += [f"head {head + 1}"] if len(values) > 1 else []
            rows.append((", ".join(above), labels[index], places, head_values))
    heights = [1 + max(place.line for place in places) for _, _, places, _ in rows]
    num_columns = max(place.column + place.width for _, _, places, _ in rows for place in places)
    titles = sum(bool(above) for above, *_ in rows)
    width = max(num_columns * COLUMN_INCHES, 2.5) + 1.2
    height = sum(heights) * ROW_INCHES + len(rows) * 0.12 + titles * 0.24 + (0.4 if title else 0.1)
    figure = make_figure(width, max(height, 0.9))
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    written = [label for words in labels for label in words]
    properties = font_for([*written, *(above for above, *_ in rows), title or ""], font, first="DejaVu Sans Mono")
    scale = ScalarMappable(Normalize(0, limit), colormaps[colormap])
    panels = figure.subplots(len(rows), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (above, words, places, values) in zip(panels, rows):
        colors = scale.to_rgba(values.numpy())
        boxes = [Rectangle((place.column, place.line + 0.06), place.width - 0.4, 0.88) for place in places]
        axes.add_collection(PatchCollection(boxes, facecolors=colors, edgecolors="0.85", linewidths=0.4))
        for word, place, (red, green, blue, _) in zip(words, places, colors):
            is_dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            axes.text(
                place.column + (place.width - 0.4) / 2,
                place.line + 0.5,
                word,
                color="white" if is_dark else "black",
                alpha=0.5 if word.strip(SPACE) == "" else 1.0,
                ha="center",
                va="center_baseline",
                fontproperties=properties,
                fontsize=FONT_SIZE,
                parse_math=False,
            )
        axes.set(xlim=(0, num_columns), ylim=(1 + max(place.line for place in places), 0))
        axes.set_axis_off()
        if above:
            axes.set_title(above, loc="left", fontproperties=properties, fontsize=10, parse_math=False)
    figure.colorbar(scale, ax=list(panels), fraction=0.03, pad=0.01, aspect=12, label="attention weight")
    if title is not None:
        figure.suptitle(title, fontproperties=properties, fontsize=11, parse_math=False)
    return figure


def _weights_of(values, words: Sequence[str], index: int):
    """The weights `(heads, words)` of a text."""
    weights = numbers(values, f"attention[{index}]", (1, 2, 3))
    if weights.dim() == 3 and weights.shape[1] == 1:
        weights = weights.squeeze(1)
    if weights.dim() == 1:
        weights = weights[None]
    if weights.dim() != 2 or not words or weights.shape[1] < len(words) or not len(weights):
        raise ValueError(
            f"`attention[{index}]` must have the shape ([heads,] at least {max(1, len(words))} words), got "
            f"{tuple(weights.shape)} for {len(words)} words."
        )
    # In half precision a row may sum to a little more than one.
    if weights.min() < 0 or weights.max() > 1.01:
        raise ValueError(
            f"`attention[{index}]` must lie between 0 and 1, got {weights.min().item():.3g} to "
            f"{weights.max().item():.3g}."
        )
    return weights[:, : len(words)]
