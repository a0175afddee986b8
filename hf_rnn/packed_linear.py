"""Products of single steps with copies of the weights in faster layouts, on CPUs. Imports the layouts and what is known
of rows.
"""

import functools
import weakref

import torch
from torch import nn
from torch.nn import functional as F

from .fast_paths import may_take, transforms_are_active
from .repeated_rows import different_rows
from .weight_layouts import PLAIN, is_large, layout_for, multiply, pack


class _Copy:
    """A packed weight, and what tells whether it still is the weight."""

    SAMPLES = 64

    def __init__(self, weight: nn.Parameter):
        key = id(weight)
        # Of the memory: `torch.utils.swap_tensors`, by which modules may load and move, refuses a weight that somebody
        # refers to in this way.
        self.storage = weakref.ref(weight.untyped_storage(), lambda _: _copies.pop(key, None))
        self.place, self.version, self.text, self.long_text = _place(weight), weight._version, _text, _long_text
        self.distance = max(1, weight.numel() // self.SAMPLES)
        self.sampled = _every(weight, self.distance).clone()
        self.of_rows = _every(weight, weight.shape[1] + 1).clone()  # a number of each row
        self.packed: dict[tuple[int, str], torch.Tensor] = {}  # by the first column that is in it, and the layout
        self.digest: torch.Tensor | None = None

    def is_of(self, weight: nn.Parameter) -> bool:
        """Whether the weight is still what it was."""
        if self.storage() is not weight.untyped_storage() or self.place != _place(weight):
            return False
        # Whoever writes through `weight.data`, as LoRA does when it is merged, changes neither place nor version:
        # some of the numbers are compared at every step, one of each row once for each text, and all of them where the
        # text begins with several tokens, beside which that takes no time.
        if self.version != weight._version or not torch.equal(_every(weight, self.distance), self.sampled):
            return False
        if self.text != _text and not torch.equal(_every(weight, weight.shape[1] + 1), self.of_rows):
            return False
        if self.long_text != _long_text and (self.digest is None or not torch.equal(self.digest, _digest(weight))):
            return False
        self.text, self.long_text = _text, _long_text
        return True

    def get(self, weight: nn.Parameter, first_column: int, layout: str) -> torch.Tensor:
        """The columns from one on in a layout."""
        packed = self.packed.get((first_column, layout))
        if packed is None:
            if self.digest is None:
                self.digest = _digest(weight)
            packed = self.packed[first_column, layout] = pack(weight[:, first_column:], layout)
        return packed


def _place(weight: torch.Tensor) -> tuple:
    """Where a contiguous weight lies."""
    return weight.data_ptr(), weight.shape, weight.dtype


def _every(weight: torch.Tensor, distance: int) -> torch.Tensor:
    """The numbers of a contiguous weight at a distance from each other. Nobody may keep them: they are its memory."""
    return weight.as_strided((-(-weight.numel() // distance),), (distance,))


@functools.cache
def _factors(size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(dtype)


def _digest(weight: torch.Tensor) -> torch.Tensor:
    """
    What tells whether a weight is still what it was: its product with a vector, in which every row shows that has
    changed by more than rounding; of narrow types, for which that takes long, the sum of its bits.
    """
    weight = weight.detach()
    if weight.element_size() >= 4:
        return weight @ _factors(weight.shape[1], weight.dtype)
    return weight.view(torch.int16 if weight.shape[1] % 2 else torch.int32).sum(dtype=torch.int32)


_copies: dict[int, _Copy] = {}
_text = _long_text = 0


def begin_text(is_long: bool = True) -> None:
    """Says that a new text begins, with several tokens or with one: all copies are compared with their weights once."""
    global _text, _long_text
    _text += 1
    _long_text += bool(is_long)  # sizes are tensors while a step is traced


def forget_copies(module: nn.Module) -> None:
    """Drops the packed copies of the weights of a module."""
    for parameter in module.parameters():
        _copies.pop(id(parameter), None)


def packed_linear(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, first_column: int = 0
) -> torch.Tensor:
    """
    `F.linear` for single steps without gradients: from the second time on with a copy of the weight in the layout that
    is the fastest for so many rows, if it is not that of the weight. The copy is made anew when the weight has changed
    since. With `first_column` the inputs belong to the columns of the weight from there on.
    """
    part = weight[:, first_column:] if first_column else weight
    takes_copy = (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and is_large(inputs, weight)  # early, because small products take no longer than the rest
        and not torch.is_grad_enabled()
        and not transforms_are_active()
        # Neither what a parametrization computed nor what is sharded or quantised.
        and type(weight) is nn.Parameter
        and weight.is_contiguous()
        and not weight.is_inference()  # such tensors do not count their versions
        and may_take("packed_linear")
    )
    if not takes_copy:
        return F.linear(inputs, part, bias)
    different = different_rows(inputs)
    if different is not None:
        inputs = different.rows
    packed = part
    layout = layout_for(inputs, part)
    if layout != PLAIN:
        copy = _copies.get(id(weight))
        if copy is None or not copy.is_of(weight):
            _copies[id(weight)] = _Copy(weight)
        else:
            packed = copy.get(weight, first_column, layout)
    outputs = multiply(inputs, packed, bias)
    return outputs if different is None else outputs.index_select(0, different.places)
