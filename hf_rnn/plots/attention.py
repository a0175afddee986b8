"""Heat maps of attention."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .drawing import Font, font_for, make_figure, numbers, visible


if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL_INCHES = 0.42  # of a token, where there is room
MAX_INCHES = 14  # of one heat map, however many tokens it has
POINTS_PER_INCH = 72


def plot_attention(
    attention,
    source_tokens: Sequence[str],
    target_tokens: Sequence[str],
    *,
    heads: Sequence[str] | None = None,
    title: str | None = None,
    font: Font = None,
    colormap: str = "Blues",
) -> "Figure":
    """
    Heat maps of attention, one beside the other for several heads: a column for each source token, a row for each
    target token, darker where the weight is larger.

    Args:
        attention (`torch.Tensor` or array of shape `(target, source)` or `(heads, target, source)`):
            Weights between 0 and 1, such as `outputs.cross_attentions[-1][row]`.
        source_tokens (`Sequence[str]`): The labels of the columns.
        target_tokens (`Sequence[str]`): The labels of the rows.
        heads (`Sequence[str]`, *optional*): The names of the heads.
        title (`str`, *optional*): Stands above.
        font (`str`, path or `Sequence[str]`, *optional*):
            A font family, several of which each fills in what those before it lack, or a font file. By default
            installed fonts are looked for that have all characters; a warning names those that none has.
        colormap (`str`): A colormap of matplotlib.

    Returns:
        `matplotlib.figure.Figure`: Neither shown nor saved.

    Raises:
        `ValueError`: The numbers of weights, tokens and heads do not fit, a weight is not between 0 and 1, or there is
            no such font.
        `ImportError`: There is no matplotlib (extra `plots`).
    """
    weights = numbers(attention, "attention", (2, 3))
    if weights.dim() == 2:
        weights = weights[None]
    num_heads, rows, columns = weights.shape
    if (rows, columns) != (len(target_tokens), len(source_tokens)) or not weights.numel():
        raise ValueError(
            f"`attention` must have the shape ([heads,] {len(target_tokens)} target tokens, {len(source_tokens)} "
            f"source tokens), none of them 0, got {tuple(weights.shape)}."
        )
    if heads is not None and len(heads) != num_heads:
        raise ValueError(f"`heads` must be {num_heads} names, got {len(heads)}.")
    # In half precision a row may sum to a little more than one.
    if weights.min() < 0 or weights.max() > 1.01:
        raise ValueError(
            f"`attention` must lie between 0 and 1, got {weights.min().item():.3g} to {weights.max().item():.3g}."
        )
    if heads is None:
        heads = [f"head {index + 1}" for index in range(num_heads)] if num_heads > 1 else [""]
    source_labels, target_labels = [[visible(token) for token in tokens] for tokens in (source_tokens, target_tokens)]

    cell = min(CELL_INCHES, MAX_INCHES / max(rows, columns))
    size = min(12.0, 0.8 * cell * POINTS_PER_INCH)
    letters = size * 0.6 / POINTS_PER_INCH  # inches of a letter
    left, top = (letters * max(map(len, labels)) for labels in (target_labels, source_labels))
    height = cell * rows + 0.8 * top + 0.3 + (0.3 if title or num_heads > 1 else 0)
    figure = make_figure(num_heads * max(cell * columns, 1.2) + left + 1.4, max(height, 1.6))
    properties = font_for([*source_labels, *target_labels, *heads, title or ""], font)
    axes_of_heads = figure.subplots(1, num_heads, sharey=True, squeeze=False)[0]
    for axes, matrix, head in zip(axes_of_heads, weights, heads):
        image = axes.imshow(matrix.numpy(), cmap=colormap, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        if cell > 0.25:
            axes.set_xticks(range(columns), source_labels, rotation=50, ha="left", rotation_mode="anchor")
        else:
            axes.set_xticks(range(columns), source_labels, rotation=90)
        axes.set_yticks(range(rows), target_labels)
        axes.xaxis.tick_top()
        if cell > 0.25:
            axes.set_xticks([column - 0.5 for column in range(1, columns)], minor=True)
            axes.set_yticks([row - 0.5 for row in range(1, rows)], minor=True)
            axes.grid(which="minor", color="0.85", linewidth=0.6)
        axes.tick_params(which="both", length=0)
        for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
            label.set(fontproperties=properties, fontsize=size, parse_math=False)
        axes.set_xlabel(head, fontproperties=properties, fontsize=11, parse_math=False)
    figure.colorbar(image, ax=list(axes_of_heads), shrink=0.8, aspect=25, label="attention weight")
    if title is not None:
        figure.suptitle(title, fontproperties=properties, fontsize=11, parse_math=False)
    return figure
