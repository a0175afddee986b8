"""Products with a weight in the layout of oneDNN, on CPUs. Imports the choice of paths and what is known of rows.

`F.linear` in float32 takes another library on many CPUs, which reaches about half of what oneDNN does, and reads a
weight in an order that suits it badly for a few rows. Both disappear where the weight was brought into oneDNN's own
layout before. Torch has that as private operators: where they are missing, or not faster, nobody gets packed weights.
"""

import functools
import weakref

import torch
from torch import nn
from torch.nn import functional as F

from .fast_paths import is_faster, may_take, transforms_are_active
from .repeated_rows import different_rows


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A copy of a weight `[out, in]` for [`multiply`]. Takes a few times as long as a product with one row."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)


def multiply(inputs: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` with the weight that was packed, without a gradient."""
    # It reads a bias as if there were no gaps in it.
    bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")


@functools.cache
def packing_pays(dtype: torch.dtype) -> bool:
    """Whether packed weights of this type work here and are faster than plain ones; measured once, in milliseconds."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False

    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            generator = torch.Generator("cpu").manual_seed(0)
            weight, inputs = (
                torch.randn(rows, 256, generator=generator, device="cpu").to(dtype) for rows in (1024, 16)
            )
            packed = pack(weight)
            expected, actual = F.linear(inputs, weight), multiply(inputs, packed)
            tolerance = 1e-3 if dtype == torch.float32 else 1.0
            if (expected - actual).abs().max() > tolerance:
                return False
            return is_faster(lambda: multiply(inputs, packed), lambda: F.linear(inputs, weight))
    except (AttributeError, NotImplementedError, RuntimeError):
        return False


def can_pack(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a product of these two may take a packed weight."""
    return (
        inputs.device.type == "cpu"
        and inputs.dtype == weight.dtype
        and inputs.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and packing_pays(weight.dtype)
    )


# Multiplications of a product in float32 below which a call of oneDNN takes longer to set up than it saves.
LARGE = 2**20


def is_large(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a packed weight is worth the call in a product of `inputs` `(..., in)` with a weight `[out, in]`."""
    if weight.dtype != torch.float32:  # for which torch calls oneDNN in any case
        return True
    return inputs.numel() // weight.shape[1] * weight.numel() >= LARGE


class _Copy:
    """A packed weight, and what tells whether it still is the weight."""

    SAMPLES = 64

    def __init__(self, weight: nn.Parameter):
        key = id(weight)
        self.weight = weakref.ref(weight, lambda _: _copies.pop(key, None))
        self.pointer, self.version, self.text, self.long_text = weight.data_ptr(), weight._version, _text, _long_text
        flat = weight.detach().view(-1)
        self.sample = flat[:: max(1, flat.numel() // self.SAMPLES)]
        self.sampled = self.sample.clone()
        # A number of each row.
        self.diagonal = flat[:: weight.shape[1] + 1]
        self.of_rows = self.diagonal.clone()
        self.packed: dict[int, torch.Tensor] = {}  # by the first column that is in it
        self.digest: torch.Tensor | None = None

    def is_of(self, weight: nn.Parameter) -> bool:
        """Whether the weight is still what it was."""
        if self.weight() is not weight or self.pointer != weight.data_ptr() or self.version != weight._version:
            return False
        # Whoever writes through `weight.data`, as LoRA does when it is merged, changes neither pointer nor version:
        # some of the numbers are compared at every step, one of each row once for each text, and all of them where the
        # text begins with several tokens, beside which that takes no time.
        if not torch.equal(self.sample, self.sampled):
            return False
        if self.text != _text and not torch.equal(self.diagonal, self.of_rows):
            return False
        if self.long_text != _long_text and (self.digest is None or not torch.equal(self.digest, _digest(weight))):
            return False
        self.text, self.long_text = _text, _long_text
        return True

    def pack(self, weight: nn.Parameter, first_column: int) -> None:
        if self.digest is None:
            self.digest = _digest(weight)
        self.packed[first_column] = pack(weight[:, first_column:].contiguous())


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
    `F.linear` for single steps without gradients: with a packed copy of the weight from the second time on, where the
    product is large enough. The copy is made anew when the weight has changed since. With `first_column` the inputs
    belong to the columns of the weight from there on.
    """
    part = weight[:, first_column:] if first_column else weight
    takes_copy = (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and is_large(inputs, part)
        and not torch.jit.is_tracing()
        and not transforms_are_active()
        # Neither what a parametrization computed nor what is sharded or quantised.
        and type(weight) is nn.Parameter
        and weight.is_contiguous()
        and not weight.is_inference()  # such tensors do not count their versions
        and may_take("packed_linear")
        and can_pack(inputs, weight)
    )
    if not takes_copy:
        return F.linear(inputs, part, bias)
    copy = _copies.get(id(weight))
    if copy is None or not copy.is_of(weight):
        _copies[id(weight)] = _Copy(weight)
        return F.linear(inputs, part, bias)
    if first_column not in copy.packed:
        copy.pack(weight, first_column)
    packed = copy.packed[first_column]
    different = different_rows(inputs)
    if different is not None:
        return multiply(different.rows, packed, bias).index_select(0, different.places)
    return multiply(inputs, packed, bias)
