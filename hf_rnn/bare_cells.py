"""Cells without weights of their own, to be called with those of others, and what tells them apart.

Where a graph or a recording stands for a loop over a cell, it is given the weights of the cell and not the cell itself.
Whatever else its equations read is in its description: its name in the table of cells and what was set on it or on a
part of it since it was made. Imports the table of cells.
"""

import functools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
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


def aside(function: Callable[[], Any]) -> Any:
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

    cell = aside(make)
    set_attributes(cell, json.loads(description)[1] if description.startswith("[") else {})
    return cell


def set_attributes(module: nn.Module, attributes: dict[str, Any]) -> None:
    """Sets attributes of a module and of its modules by their paths."""
    for name, value in attributes.items():
        path, _, name = name.rpartition(".")
        setattr(module.get_submodule(path), name, value)


@functools.lru_cache(maxsize=64)
def _as_made(cell_class: type[RecurrentCell], name: str, input_size: int, hidden_size: int) -> RecurrentCell:
    return make_cell(name, input_size, hidden_size)


def parts_of(module: nn.Module) -> dict[str, nn.Module]:
    """A module and its modules by their paths, without what others put around its weights."""
    return {path: part for path, part in module.named_modules() if "parametrizations" not in path.split(".")}


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


def compare(
    parts: dict[str, nn.Module], as_made: dict[str, nn.Module], ignored: frozenset[str]
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """
    What was set on modules since they were made, and all attributes that were compared, by their paths. None where
    something was set that cannot be written down, or something watches or replaces a module (but for the one without a
    path, which is called by its owner).

    Args:
        parts, as_made: The modules by their paths, and those that were made alike and left alone.
        ignored (`frozenset[str]`): Attributes that do not count.
    """
    if parts.keys() != as_made.keys():
        return None
    attributes, read = {}, {}
    for path, part in parts.items():
        other = as_made[path]
        if path and (type_before_parametrizations(part) is not type(other) or is_watched(part)):
            return None
        differences = _differences(part, other, ignored)
        if differences is None or not vars(other).keys() - ignored <= vars(part).keys():
            return None
        prefix = f"{path}." if path else ""
        attributes |= {prefix + name: value for name, value in differences.items()}
        for name in sorted(vars(part).keys() - _OF_MODULES - ignored):
            if hasattr(other, name):
                read[prefix + name] = getattr(part, name)
    return attributes, read


def is_as_compared(module: nn.Module, numbers: list[tuple[str, float]], others: list[str]) -> bool:
    """
    Whether attributes of a module are those that were compared, by their paths. What a compiler was told of them it
    takes for constant; because it looks here, it makes another graph when one of them changes. Numbers would become
    variables of the graph, were they not compared.
    """
    are_equal = [attrgetter(name)(module) == value for name, value in numbers]
    are_there = [attrgetter(name)(module) is not ... for name in others]
    return all(are_equal) and all(are_there)


def _written_down(cell: RecurrentCell) -> tuple[str, dict[str, Any]] | None:
    """The description of a cell and all attributes that it depends on, see [`describe`]."""
    cell_class = type_before_parametrizations(cell)
    name = next((name for name, known_class in RECURRENT_CELLS.items() if known_class is cell_class), None)
    if name is None:
        return None
    try:
        as_made = _as_made(cell_class, name, cell.input_size, cell.hidden_size)
    except Exception:  # it is not made from its sizes alone
        return None
    # Whoever names a kernel of torch vouches for the equations, which read nothing but weights.
    ignored = frozenset(["forward", *(["training"] if cell_class.torch_kernel is not None else [])])
    found = compare(parts_of(cell), parts_of(as_made), ignored)
    if found is None:
        return None
    attributes, read = found
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
        return aside(step)
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
