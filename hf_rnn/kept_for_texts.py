"""What all steps of a text need of its source, made once. Imports nothing of the package but the choice of paths.

A text is known by its cache: what was made for it goes with the cache, and no other text, model or moment sees it.
"""

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch

from .fast_paths import autocast_dtype, may_take, transforms_are_active


class _Kept(NamedTuple):
    """A result, and what it was made of."""

    features: weakref.ref
    made_of: tuple
    result: tuple


_texts: "weakref.WeakKeyDictionary[Hashable, dict[str, _Kept]]" = weakref.WeakKeyDictionary()


def may_keep(*tensors: torch.Tensor) -> bool:
    """Whether what is made of these tensors can be kept: not in graphs, nor where tensors do not count changes."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing() or transforms_are_active():
        return False
    if not may_take("kept_for_texts") or any(tensor.is_inference() for tensor in tensors):
        return False
    return not (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())


def keep(
    text: Hashable, name: str, features: torch.Tensor, parameters: Sequence[torch.Tensor], make: Callable[[], tuple]
) -> tuple:
    """
    `make()`, kept for the next call with the same arguments.

    Args:
        text: What the calls have in common, the cache of a text. What is kept goes with it.
        name (`str`): What is made.
        features (`torch.Tensor`): Of which it is made.
        parameters (`Sequence[torch.Tensor]`): With which. Whatever has written to one of them makes it anew.
        make: Makes it; a tuple.
    """
    made_of = (
        autocast_dtype(features.device.type),
        *((id(tensor), tensor.data_ptr(), tensor._version) for tensor in (features, *parameters)),
    )
    of_text = _texts.setdefault(text, {})
    known = of_text.get(name)
    if known is None or known.features() is not features or known.made_of != made_of:
        known = of_text[name] = _Kept(weakref.ref(features), made_of, make())
    return known.result
