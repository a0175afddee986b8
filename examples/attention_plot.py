"""Draws attention weights as a heat map."""

from collections.abc import Sequence
from pathlib import Path

import torch


def plot_attention(
    weights: torch.Tensor,
    source_tokens: Sequence[str],
    target_tokens: Sequence[str],
    path: str | Path,
    title: str | None = None,
) -> None:
    """
    Writes a heat map: a row for each target token, a column for each source token, darker where the weight is larger.

    Args:
        weights (`torch.Tensor` of shape `(target_length, source_length)`): Attention weights between 0 and 1.
        source_tokens, target_tokens (`Sequence[str]`): Labels of the columns and the rows.
        path (`str` or `Path`): The picture; its suffix says the format.
        title (`str`, *optional*): Shown above.

    Needs matplotlib; raises `ImportError` where it is missing.
    """
    import matplotlib
    from matplotlib.figure import Figure

    rows, columns = len(target_tokens), len(source_tokens)
    if tuple(weights.shape) != (rows, columns):
        raise ValueError(f"weights {tuple(weights.shape)} do not fit {rows} target and {columns} source tokens")
    families = fonts_for("".join([*source_tokens, *target_tokens, title or ""]))
    with matplotlib.rc_context({"font.family": families, "text.parse_math": False}):
        figure = Figure(figsize=(0.55 * columns + 2.4, 0.42 * rows + 2.2), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(weights.float().cpu().numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(columns), source_tokens, rotation=50, ha="left", rotation_mode="anchor", fontsize=12)
        axes.set_yticks(range(rows), target_tokens, fontsize=12)
        axes.xaxis.tick_top()
        axes.set_xticks([column - 0.5 for column in range(1, columns)], minor=True)
        axes.set_yticks([row - 0.5 for row in range(1, rows)], minor=True)
        axes.grid(which="minor", color="0.85", linewidth=0.6)
        axes.tick_params(which="both", length=0)
        figure.colorbar(image, ax=axes, shrink=0.8, label="attention weight")
        if title is not None:
            figure.suptitle(title, fontsize=11)
        figure.savefig(path, dpi=150)


def fonts_for(text: str) -> list[str]:
    """Installed font families that together have the characters of `text`, DejaVu Sans (part of matplotlib) first."""
    from matplotlib import font_manager

    families, missing = [], {ord(character) for character in text if not character.isspace()}
    entries = sorted(font_manager.fontManager.ttflist, key=lambda entry: (entry.name != "DejaVu Sans", entry.name))
    for entry in entries:
        if families and not missing:
            break
        if entry.style != "normal" or entry.name in families:
            continue
        try:
            covered = missing & set(font_manager.get_font(entry.fname).get_charmap())
        except (OSError, RuntimeError):  # a font file that is gone or broken
            continue
        if covered or not families:
            families.append(entry.name)
            missing -= covered
    return families
