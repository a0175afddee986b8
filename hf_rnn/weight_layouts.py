"""The layout of a weight in which products with it are fastest, on CPUs. Imports the choice of paths.

`F.linear` reads a weight `[out, in]` row by row, which suits a few rows of inputs badly. A copy that lies column by
column is faster on some processors, and one in oneDNN's own layout on others, where the library that torch takes for
products reaches about half of what oneDNN does. Which one it is depends on the processor, on the size of the weight and
on the number of rows, and is measured once for each of them. Torch has oneDNN's layout as private operators: where they
are missing or wrong, nobody gets it.
"""

import functools

import torch
from torch.nn import functional as F

from .fast_paths import fastest, may_measure


# As it is; column by column; in the layout of oneDNN.
PLAIN, TRANSPOSED, ONEDNN = "plain", "transposed", "onednn"
# Multiplications of a product in float32 below which there is nothing to win.
LARGE = 2**18
# Beyond so many rows a product is not another one.
MANY_ROWS = 256

_layouts: dict[tuple, str] = {}


def pack(weight: torch.Tensor, layout: str) -> torch.Tensor:
    """A copy of a weight `[out, in]` for [`multiply`]. Takes a few times as long as a product with one row."""
    weight = weight.detach()
    if layout == ONEDNN:
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return weight.t().clone(memory_format=torch.contiguous_format).t()


def by_onednn(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` by oneDNN, without a gradient, with a weight as it is or in its layout."""
    # It reads a bias as if there were no gaps in it.
    bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


def multiply(inputs: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` with a weight as it is or packed, the latter without a gradient."""
    return (by_onednn if packed.is_mkldnn else F.linear)(inputs, packed, bias)


@functools.cache
def has_onednn(dtype: torch.dtype) -> bool:
    """Whether the operators of oneDNN are there for this type, and right."""
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            generator = torch.Generator("cpu").manual_seed(0)
            weight, inputs = (torch.randn(rows, 64, generator=generator, device="cpu").to(dtype) for rows in (96, 16))
            actual, expected = multiply(inputs, pack(weight, ONEDNN)), F.linear(inputs, weight)
            return bool((expected - actual).abs().max() <= (1e-3 if dtype == torch.float32 else 1.0))
    except (AttributeError, NotImplementedError, RuntimeError):
        return False


def can_pack(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a product of these two may take another layout."""
    return (
        inputs.device.type == "cpu"
        and inputs.dtype == weight.dtype
        and inputs.dtype in (torch.float32, torch.bfloat16)
        and inputs.numel() > 0
        and not torch.is_autocast_enabled("cpu")
    )


def is_large(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether there is something to win in a product of `inputs` `(..., in)` with a weight `[out, in]`."""
    # Narrow types go to oneDNN in any case.
    return inputs.numel() * weight.shape[0] >= LARGE or weight.dtype != torch.float32


def layout_for(inputs: torch.Tensor, weight: torch.Tensor) -> str:
    """
    The layout in which a product of `inputs` `(..., in)` with a weight `[out, in]` is fastest, `PLAIN` where it is to
    stay as it is.
    """
    if not (is_large(inputs, weight) and can_pack(inputs, weight) and may_measure()):
        return PLAIN
    rows = inputs.numel() // weight.shape[1]
    rows = min(MANY_ROWS, 1 << (rows - 1).bit_length())
    key = (rows, weight.dtype, weight.shape, weight.stride(), torch.get_num_threads())
    layout = _layouts.get(key)
    if layout is None:
        layout = _layouts[key] = _measured_layout(rows, weight)
    return layout


def in_fastest_layout(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What stands for a weight in [`multiply`] with `inputs` and others of as many rows: a copy, or the weight."""
    layout = layout_for(inputs, weight)
    return weight if layout == PLAIN else pack(weight, layout)


def _measured_layout(rows: int, weight: torch.Tensor) -> str:
    with torch.no_grad():
        inputs = torch.full((rows, weight.shape[1]), 0.5, dtype=weight.dtype, device="cpu")
        candidates = {PLAIN: weight.detach()}
        if not weight.t().is_contiguous():
            candidates[TRANSPOSED] = pack(weight, TRANSPOSED)
        if has_onednn(weight.dtype):
            candidates[ONEDNN] = pack(weight, ONEDNN)
        return fastest({layout: functools.partial(multiply, inputs, packed) for layout, packed in candidates.items()})
