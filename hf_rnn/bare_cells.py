"""Cells without weights of their own, to be called with those of others, and what tells them apart.

Where a graph or a recording stands for a loop over a cell, it is given the weights of the cell and not the cell itself.
Whatever else its equations read is in its description: its name in the table of cells and what was set on it or on a
part of it since it was made. Imports the table of cells.
"""

import functools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from .fast_paths import is_watched
from .recurrent_cells import RECURRENT_CELLS, RecurrentCell


# What every module has, but for the flag of the mode, which equations may read.
_OF_MODULES = vars(nn.Module()).keys() - {"training"}
# JSON keeps them as they are.
_SIMPLE = (type(None), bool, int, float, str)


def _aside(function: Callable[[], Any]) -> Any:
    """What a function returns in a thread of its own, where no tracing, mode or transformation of this one is on."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function).result()


def cell_class_of(description: str) -> type[RecurrentCell]:
    """The class of the cell with a description."""
    return RECURRENT_CELLS[json.loads(description)[0] if description.startswith("[") else description]


def make_cell(description: str, input_size: int, hidden_size: int, device: str = "meta") -> RecurrentCell:
    """A cell with a description, whose weights hold no numbers."""

    def make():
        with torch.device(device):
            return cell_class_of(description)(input_size, hidden_size)

    cell = _aside(make)
    attributes = json.loads(description)[1] if description.startswith("[") else {}
    for name, value in attributes.items():
        path, _, name = name.rpartition(".")
        setattr(cell.get_submodule(path), name, value)
    return cell


@functools.lru_cache(maxsize=64)
def _as_made(cell_class: type[RecurrentCell], name: str, input_size: int, hidden_size: int) -> RecurrentCell:
    return make_cell(name, input_size, hidden_size)


def _parts(cell: RecurrentCell) -> dict[str, nn.Module]:
    """A cell and its modules by their paths, without what others put around its weights."""
    return {path: part for path, part in cell.named_modules() if "parametrizations" not in path.split(".")}


def _are_equal(value: Any, other: Any) -> bool:
    if value is other:
        return True
    try:
        return type(value) is type(other) and not isinstance(value, torch.Tensor) and bool(value == other)
    except RuntimeError:  # of tensors in a list
        return False


def _differences(part: nn.Module, as_made: nn.Module, ignored: frozenset[str]) -> dict[str, Any] | None:
    """What was set on a part of a cell since it was made; None where that cannot be written down."""
    names = {name for name in vars(part).keys() - _OF_MODULES - ignored if hasattr(as_made, name)}
    differences = {}
    for name in names:
        value = getattr(part, name)
        if _are_equal(value, getattr(as_made, name)):
            continue
        if not isinstance(value, _SIMPLE):
            return None
        differences[name] = value
    return differences


def _written_down(cell: RecurrentCell) -> tuple[str, dict[str, Any]] | None:
    """The description of a cell and all attributes that it depends on, see [`describe`]."""
    cell_class = type_before_parametrizations(cell)
    name = next((name for name, known_class in RECURRENT_CELLS.items() if known_class is cell_class), None)
    if name is None:
        return None
    try:
        parts, of_made = (_parts(it) for it in (cell, _as_made(cell_class, name, cell.input_size, cell.hidden_size)))
    except Exception:  # it is not made from its sizes alone
        return None
    if parts.keys() != of_made.keys():
        return None
    # Whoever names a kernel of torch vouches for the equations, which read nothing but weights.
    ignored = frozenset(["forward", *(["training"] if cell_class.torch_kernel is not None else [])])
    attributes, read = {}, {}
    for path, part in parts.items():
        if path and (type(part) is not type(of_made[path]) or is_watched(part)):
            return None
        differences = _differences(part, of_made[path], ignored)
        if differences is None or not vars(of_made[path]).keys() <= vars(part).keys():
            return None
        prefix = f"{path}." if path else ""
        attributes |= {prefix + name: value for name, value in differences.items()}
        for name_of_attribute in sorted(vars(part).keys() - _OF_MODULES - ignored):
            if hasattr(of_made[path], name_of_attribute):
                read[prefix + name_of_attribute] = getattr(part, name_of_attribute)
    return (json.dumps([name, attributes], sort_keys=True) if attributes else name), read


def describe(cell: RecurrentCell) -> str:
    """
    What there is to know of a cell beside its weights, for [`make_cell`]. An empty string where a cell that was made
    from it would not do the same: its class is not in the table, something watches a part of it, or an attribute was
    set to something that cannot be written down.
    """
    written = _written_down(cell)
    return "" if written is None else written[0]


def attributes_of(cell: RecurrentCell) -> dict[str, Any]:
    """The attributes of a cell and of its parts on which its description depends, by their paths."""
    written = _written_down(cell)
    return {} if written is None else written[1]


def _effects(cell_class: type[RecurrentCell], description: str, sizes: tuple[int, int]) -> tuple[bool, bool] | None:
    def step():
        cell = make_cell(description, *sizes, device="cpu").float()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for tensor in (*cell.parameters(), *cell.buffers()):
                tensor.zero_()
            versions = [buffer._version for buffer in cell.buffers()]
            random_state = torch.get_rng_state()
            inputs = torch.zeros(2, sizes[0])
            cell.step(cell.project_inputs(inputs), cell.initial_state(inputs))
            draws = not torch.equal(random_state, torch.get_rng_state())
            return draws, versions != [buffer._version for buffer in cell.buffers()]

    try:
        return _aside(step)
    except Exception:
        return None


_effects_of_classes = functools.lru_cache(maxsize=64)(_effects)


def effects(cell: RecurrentCell) -> tuple[bool, bool] | None:
    """
    Whether a step of a cell draws random numbers, and whether it writes to its buffers; None where that is not known,
    because it cannot be called as it is. One step over zeros shows it.
    """
    cell_class = type_before_parametrizations(cell)
    if cell_class.torch_kernel is not None:
        return False, False
    return _effects_of_classes(cell_class, describe(cell), (cell.input_size, cell.hidden_size))
