"""Which fast paths may be taken. Imports nothing of the package.

Whatever a fast path computes, the plain loop over a cell's step computes too; each can be ruled out by its name, for a
block of code or for a whole process.
"""

import contextlib
import os
import time
from collections.abc import Callable
from contextvars import ContextVar

import torch
from torch import nn
from torch.autograd import forward_ad


FAST_PATHS = {
    "torch_kernel": "torch's kernels (oneDNN, cuDNN or ATen) over whole sequences, for the cells that they know",
    "stacked_layers": "on a GPU several layers in one call of cuDNN, where nothing happens between them",
    "recorded_kernel": "on a GPU those kernels recorded as CUDA graphs, once they have run in the same small sizes",
    "segments": "those kernels over padded batches on a CPU in pieces of time, for the rows that are not at their end",
    "sequence_functions": "on a CPU GRUs and plain RNNs over sequences as one autograd function",
    "step_linear": "in loops that are trained on a CPU, weights in the fastest layout, one product for a gradient",
    "cell_functions": "on a GPU single steps by torch's functions for cells, one kernel for all behind the products",
    "recorded_loop": "on a GPU, loops over sequences recorded as CUDA graphs, once they have run in the same sizes",
    "fused_steps": "in recorded loops, what lies between the products of a step fused by `torch.compile`",
    "large_products": "large products of float32 on a CPU by oneDNN, also in the layout of torch",
    "packed_linear": "in single steps without gradients on a CPU, copies of the weights in the fastest layout",
    "shared_sources": "in generation, several beams or samples that attend to one copy of their source",
    "repeated_rows": "on a CPU the recurrent products of beams once for all that go on from the same one",
    "kept_for_texts": "in decoding, keys and values of a source made once for all steps of a text",
    "keys_for_plain_queries": "in single steps without gradients, the map of queries applied once, to the keys",
    "mapped_values": "in single steps without gradients, the map that reads the context applied once, to the values",
    "kept_for_backward": "in compiled graphs on a CPU, layers and decoders not computed anew in the backward",
    "crf_products": "on a CPU the sums over paths of labels as products of matrices, where no number gets too small",
    "tanh_by_sigmoid": "on CPUs where it is the faster way, tanh of many numbers as 2 sigmoid(2x) - 1",
    "chunked_loss": "the cross-entropy of a vocabulary in pieces, without the logits of a whole batch in memory",
}


def _checked(names) -> frozenset[str]:
    names = frozenset(names)
    if names - FAST_PATHS.keys():
        raise ValueError(f"Fast paths must be among {sorted(FAST_PATHS)}, got {sorted(names - FAST_PATHS.keys())}.")
    return names


def _from_environment() -> frozenset[str]:
    if os.environ.get("HF_RNN_LOOP_ONLY", "0") == "1":
        return frozenset(FAST_PATHS)
    return _checked(name.strip() for name in os.environ.get("HF_RNN_WITHOUT", "").split(",") if name.strip())


_RULED_OUT_BY_ENVIRONMENT = _from_environment()
_ruled_out: ContextVar[frozenset[str]] = ContextVar("hf_rnn_ruled_out", default=_RULED_OUT_BY_ENVIRONMENT)


def may_take(name: str) -> bool:
    """Whether the fast path `name` is not ruled out."""
    return name not in _ruled_out.get()


@contextlib.contextmanager
def _ruling_out(names: frozenset[str]):
    token = _ruled_out.set(names)
    try:
        yield
    finally:
        _ruled_out.reset(token)


@contextlib.contextmanager
def without_fast_paths(*names: str):
    """
    Within this context the named fast paths are ruled out beside those that are already; all where none is named. The
    environment variable `HF_RNN_WITHOUT=name,name` does the same for a whole process.

    Args:
        names (`str`): Keys of `FAST_PATHS`.

    Raises:
        `ValueError`: There is no fast path of that name.
    """
    with _ruling_out(_ruled_out.get() | _checked(names or FAST_PATHS)):
        yield


@contextlib.contextmanager
def loop_only(enabled: bool = True):
    """
    Within this context every layer runs the plain loop over its cell's step, and no fast path; with `enabled=False`
    any fast path. The environment variable `HF_RNN_LOOP_ONLY=1` does the same for a whole process.
    """
    with _ruling_out(frozenset(FAST_PATHS) if enabled else frozenset()):
        yield


def as_now(function: Callable) -> Callable:
    """A function that takes the fast paths that may be taken now, wherever it is called: threads know no contexts."""
    ruled_out = _ruled_out.get()

    def run(*args, **kwargs):
        with _ruling_out(ruled_out):
            return function(*args, **kwargs)

    return run


# What decides over more than one fast path.


# What others must be faster by to be taken, so that what is about as fast is not chosen by chance.
MARGIN = 0.9


def fastest(functions: dict[str, Callable[[], object]]) -> str:
    """The name of the function that takes the least time here; the first one where no other is clearly faster."""
    first, *others = functions
    if not others:
        return first
    # Of one thread the time of the processor, in which other programs have no part.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds, rounds, passed = dict.fromkeys(functions, float("inf")), 0, 0.0
    # What takes long needs few rounds. Cold caches and other programs only ever add to a time.
    while rounds < 4 or (rounds < 12 and passed < 0.02):
        for name, function in functions.items():
            start = clock()
            function()
            taken = clock() - start
            seconds[name], passed = min(seconds[name], taken), passed + taken
        rounds += 1
    best = min(others, key=seconds.get)
    return best if seconds[best] < MARGIN * seconds[first] else first


def is_faster(candidate: Callable[[], object], baseline: Callable[[], object]) -> bool:
    """Whether the first of two functions takes clearly less time here than the second."""
    return fastest({"baseline": baseline, "candidate": candidate}) == "candidate"


def may_measure() -> bool:
    """Whether a path may be chosen by the time that it takes: not where results must be those of another process."""
    return not torch.are_deterministic_algorithms_enabled()


def are_plain(*tensors: torch.Tensor) -> bool:
    """Whether tensors are nothing but tensors: neither sharded, quantised nor wrapped otherwise."""
    # A list, into which compilers can look.
    return all([type(tensor) in (torch.Tensor, nn.Parameter) for tensor in tensors])  # noqa: C419


def is_watched(module: nn.Module) -> bool:
    """Whether somebody watches or replaces the calls of a module, and would not see those that go around it."""
    hooks = module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    return bool(hooks) or "forward" in vars(module)


_functorch_is_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_number_of_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)


def derivatives_go_forward() -> bool:
    """Whether what is computed may carry derivatives with it (forward-mode differentiation)."""
    return getattr(forward_ad, "_current_level", -1) >= 0


def transforms_are_active() -> bool:
    """Whether a transformation of `torch.func` wraps what is computed, or derivatives go forward with it."""
    return _functorch_is_active() or derivatives_go_forward()


def operations_are_watched() -> bool:
    """Whether somebody (a tracer, a counter) sees every operation that is computed."""
    return _number_of_modes() > 0


# The hooks through which autograd puts what it saves. Where there is no such door, somebody may be behind it.
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignores_tracing: "unknown")
_is_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda tensor: False)
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def saved_tensors_are_watched() -> bool:
    """Whether somebody sees what autograd saves (gradient checkpointing, offloading), or may see it."""
    return _top_hooks(True) is not None


def asks_for_numbers(*gradients: torch.Tensor) -> bool:
    """
    Whether a backward that was given these gradients is asked for numbers alone: neither for a graph of them, nor for
    many at once, nor wrapped in a transformation.
    """
    return not (torch.is_grad_enabled() or transforms_are_active() or any(map(_is_batched, gradients)))


def graph_is_freed() -> bool:
    """Whether the backward that is running frees its graph, so that nobody can ask it again."""
    return not _graph_is_kept()


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The type to which autocast brings products on a device, None where it is off."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


# Which backward is running, -1 outside of any. It has no public door; where it is None, nobody can depend on it.
current_backward: Callable[[], int] | None = getattr(torch._C, "_current_graph_task_id", None)
