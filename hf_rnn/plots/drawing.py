"""What the pictures share: figures, fonts for any script, and numbers out of tensors. Imports the extras."""

import os
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from ..extras import require


if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties


Font = str | os.PathLike | Sequence[str] | None
FONT_FILES = (".ttf", ".otf", ".ttc", ".otc")
SPACE, EMPTY, LINE_SIGNS = "␣", "∅", {"\n": "↵", "\t": "⇥", "\r": "␍"}
SIGNS = {SPACE, EMPTY, *LINE_SIGNS.values()}
# A font that comes with matplotlib and has a box for every character that there is.
LAST_RESORT = "Last Resort"
# What a font has no glyph for and needs none.
_INVISIBLE = {"Cc", "Cf", "Zs", "Zl", "Zp"}


def make_figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches that belongs to no window."""
    require("matplotlib")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def numbers(values, name: str, dimensions: tuple[int, ...]) -> torch.Tensor:
    """
    `values` as a tensor of float64 on the CPU.

    Raises:
        `ValueError`: They are no numbers, have another number of dimensions, or are not finite.
    """
    try:
        values = torch.as_tensor(values).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"`{name}` must be a tensor or nested lists of numbers: {error}") from error
    if values.dim() not in dimensions:
        allowed = " or ".join(map(str, dimensions))
        raise ValueError(f"`{name}` must have {allowed} dimensions, got the shape {tuple(values.shape)}.")
    if not values.isfinite().all():
        raise ValueError(f"`{name}` must be finite numbers.")
    return values


def font_for(texts: Iterable[str], font: Font = None, first: str = "DejaVu Sans") -> "FontProperties":
    """
    A font, or several of which each fills in what those before it lack, for the characters of `texts`.

    Args:
        texts (`Iterable[str]`): What will be written.
        font (`str`, path or `Sequence[str]`, *optional*):
            The name of an installed family, several of them, or a font file. By default `first` and, for characters
            that it lacks, whichever installed fonts have them.
        first (`str`): The family to begin with by default; it comes with matplotlib.

    Raises:
        `ValueError`: A family or file that is not there.

    Warns where no font has a character, which is then drawn as a box.
    """
    from matplotlib import font_manager

    characters = {char for text in texts for char in text if unicodedata.category(char) not in _INVISIBLE}
    if font is not None and str(font).lower().endswith(FONT_FILES):
        if not os.path.isfile(font):
            raise ValueError(f"`font` must be an installed family or a font file, got {os.fspath(font)!r}.")
        _warn_of(characters - _characters_of(os.fspath(font)), f"{os.path.basename(font)} has")
        return font_manager.FontProperties(fname=os.fspath(font))
    wanted = [] if font is None else [font] if isinstance(font, str) else list(font)
    installed = _installed_families()
    # Matplotlib keeps a list of the fonts that were there when it ran for the first time.
    if not installed.keys() >= set(wanted) and _add_new_fonts():
        installed = _installed_families()
    for family in wanted:
        if family not in installed:
            raise ValueError(f"`font` must be an installed family or a font file, got {family!r}.")
    families, missing = _choose(installed, wanted, characters, first)
    if missing and _add_new_fonts():
        families, missing = _choose(_installed_families(), wanted, characters, first)
    _warn_of(missing, f"{', '.join(wanted)} has" if wanted else "installed font has")
    return font_manager.FontProperties(family=families)


def _choose(
    installed: dict[str, str], wanted: list[str], characters: set[str], first: str
) -> tuple[list[str], set[str]]:
    """The families that are `wanted`, or those that have the characters, and the characters that none of them has."""
    if wanted:
        return wanted, characters.difference(*(_characters_of(installed[family]) for family in wanted))
    families, missing = [], characters
    for family, path in sorted(installed.items(), key=lambda item: (item[0] != first, item[0])):
        if families and not missing:
            break
        covered = missing & _characters_of(path)
        if covered or family == first:
            families.append(family)
            missing = missing - covered
    return families, missing


def _installed_families() -> dict[str, str]:
    """For each family that matplotlib knows of the file of its plainest font, but for the one that is all boxes."""
    from matplotlib.font_manager import fontManager

    installed: dict[str, str] = {}
    for entry in sorted(fontManager.ttflist, key=_plainness):
        if not entry.name.startswith(LAST_RESORT):
            installed.setdefault(entry.name, entry.fname)
    return installed


def _add_new_fonts() -> bool:
    """Makes matplotlib know of fonts that were installed since it made its list; whether there are any."""
    from matplotlib.font_manager import findSystemFonts, fontManager

    before = len(fontManager.ttflist)
    for path in sorted(set(findSystemFonts()) - {entry.fname for entry in fontManager.ttflist}):
        try:
            fontManager.addfont(path)
        except (OSError, RuntimeError):  # one that matplotlib cannot read, which is why it is not in the list
            continue
    return len(fontManager.ttflist) > before


def _plainness(entry) -> tuple:
    """Upright fonts of usual weight and width before all others, so that they stand for their family."""
    return entry.style != "normal", entry.stretch != "normal", abs(_weight(entry.weight) - 400), entry.name


def _weight(weight: int | str) -> int:
    from matplotlib.font_manager import weight_dict

    return weight_dict.get(weight, 400) if isinstance(weight, str) else weight


def _characters_of(path: str) -> set[str]:
    """What a font file has glyphs for; nothing, if it is gone or broken."""
    from matplotlib import font_manager

    try:
        return {chr(code) for code in font_manager.get_font(path).get_charmap()}
    except (OSError, RuntimeError):
        return set()


def _warn_of(missing: set[str], which: str) -> None:
    if missing:
        shown = " ".join(sorted(missing)[:20]) + (" ..." if len(missing) > 20 else "")
        warnings.warn(
            f"No {which} {shown} - boxes stand in their place. Install a font for this script (for example from "
            "https://fonts.google.com/noto) or name one with `font`.",
            stacklevel=4,
        )


def visible(token: str) -> str:
    """A token as a label, with signs for what cannot be seen."""
    if not token.strip(" "):
        return SPACE * len(token) or EMPTY
    for character, sign in LINE_SIGNS.items():
        token = token.replace(character, sign)
    return token
