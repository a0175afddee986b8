"""Traces of gates over a text."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .drawing import Font, font_for, make_figure, numbers, visible


if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOKEN_INCHES, MAX_INCHES, POINTS_PER_INCH = 0.2, 16, 72


def plot_gates(
    gates: Mapping[str, object],
    tokens: Sequence[str],
    *,
    units: Sequence[int] | None = None,
    title: str | None = None,
    font: Font = None,
) -> "Figure":
    """
    What the gates of a layer do over a text: for each unit a panel with a line for each gate; without `units` a single
    panel with the mean of all units, and in a lighter shade where the middle 80 percent of them lie.

    Args:
        gates (`dict` from `str` to `torch.Tensor` or array of shape `(tokens, hidden_size)`):
            The gates of one layer and one text: `{name: gate[row] for name, gate in outputs.gates[layer].items()}`.
        tokens (`Sequence[str]`): The characters or tokens.
        units (`Sequence[int]`, *optional*): Which units to show.
        title (`str`, *optional*): Stands above.
        font (`str`, path or `Sequence[str]`, *optional*): As in [`plot_attention`].

    Returns:
        `matplotlib.figure.Figure`: Neither shown nor saved.

    Raises:
        `ValueError`: There is no gate, the gates have not as many values as there are tokens, a unit that is not there,
            or there is no such font.
        `ImportError`: There is no matplotlib (extra `plots`).
    """
    values = {name: numbers(gate, f"gates[{name!r}]", (2,)) for name, gate in gates.items()}
    if not values:
        raise ValueError("`gates` must hold at least one gate.")
    for name, gate in values.items():
        if gate.shape[0] != len(tokens) or not gate.numel():
            raise ValueError(
                f"`gates[{name!r}]` must have the shape ({len(tokens)} tokens, units), none of them 0, got "
                f"{tuple(gate.shape)}."
            )
        for unit in units or ():
            if not 0 <= unit < gate.shape[1]:
                raise ValueError(f"`units` must be between 0 and {gate.shape[1] - 1}, got {unit}.")
    panels = [None] if units is None else list(units)
    if not panels:
        raise ValueError("`units` must name at least one unit, or be None for the mean of all.")

    width = min(max(TOKEN_INCHES * len(tokens), 3.0), MAX_INCHES)
    size = min(11.0, 0.9 * width / len(tokens) * POINTS_PER_INCH)
    figure = make_figure(width + 2.2, 1.7 * len(panels) + 0.7)
    labels = [visible(token) for token in tokens]
    properties = font_for([*labels, *values, title or ""], font)
    steps = range(len(tokens))
    axes_of_panels = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, unit in zip(axes_of_panels, panels):
        for name, gate in values.items():
            line = gate.mean(1) if unit is None else gate[:, unit]
            (drawn,) = axes.plot(steps, line.numpy(), label=name, marker=".", markersize=4, linewidth=1.2)
            if unit is None and gate.shape[1] > 1:
                low, high = gate.quantile(0.1, dim=1), gate.quantile(0.9, dim=1)
                axes.fill_between(steps, low.numpy(), high.numpy(), color=drawn.get_color(), alpha=0.12, linewidth=0)
        axes.axhline(0, color="0.7", linewidth=0.6, zorder=0)
        axes.axhline(1, color="0.7", linewidth=0.6, zorder=0)
        axes.set_ylabel("mean of units" if unit is None else f"unit {unit}")
        axes.margins(x=0.5 / max(len(tokens) - 1, 1))
    is_short = max(map(len, labels)) < 3
    axes.set_xticks(steps, labels, rotation=0 if is_short else 50, ha="center" if is_short else "right")
    for label in axes.get_xticklabels():
        label.set(fontproperties=properties, fontsize=size, parse_math=False, rotation_mode="anchor")
    axes_of_panels[0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, prop=properties)
    if title is not None:
        figure.suptitle(title, fontproperties=properties, fontsize=11, parse_math=False)
    return figure
