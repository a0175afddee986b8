"""CUDA graphs: what a function does on a GPU, to be done again with the same tensors.

Imports nothing of the package.
"""

import contextlib
import functools
import gc
import warnings
from collections.abc import Callable

import torch


# It has no public door.
_clear_workspaces = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)


def is_capturing(device_type: str) -> bool:
    """Whether what is done on the GPU goes into a graph."""
    return device_type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """Where recordings are made: gradients are computed on the stream of what they belong to."""
    return torch.cuda.Stream(device)


class Recording:
    """
    What a function does on the GPU, to be done again with the same tensors.

    Args:
        function: What to record. It runs twice before.
        beside (`Recording`, *optional*): One that is always played before this one, and whose memory may be used for
            what nobody reads after this one.
    """

    def __init__(self, function: Callable[[], None], beside: "Recording | None" = None):
        stream = _stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # once aside: libraries set themselves up at first, compilers compile
                function()
            stream.synchronize()
            before = torch.cuda.memory_reserved()
            # What cuBLAS works in belongs to a stream. Here it is to be memory of the graph, as others may free theirs.
            _clear_workspaces()
            try:
                self.graph = _capture(function, None if beside is None else beside.graph.pool())
            finally:
                _clear_workspaces()
            self.num_bytes = max(0, torch.cuda.memory_reserved() - before)
        torch.cuda.current_stream().wait_stream(stream)

    def play(self) -> None:
        self.graph.replay()


def _capture(function: Callable[[], None], pool: tuple[int, int] | None = None) -> torch.cuda.CUDAGraph:
    """Records a function on the current stream."""
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle() if pool is None else pool
    collects = gc.isenabled()
    gc.disable()  # what is freed by the way could be another graph, and that would end this one
    try:
        # Other threads, which load data or compute gradients, may call what a recording rules out.
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            function()
        finally:
            _end_capture(graph, pool)
    except Exception:
        _end_capture_of_random_numbers()
        raise
    finally:
        if collects:
            gc.enable()
    return graph


def _end_capture(graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
    try:
        graph.capture_end()
    except Exception:
        # Torch 2.11 raises this before it tells the allocator, which would believe for ever that a graph is made.
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise


def _end_capture_of_random_numbers() -> None:
    """After a recording that failed random generators believe that it goes on; one that succeeds ends that."""
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
        graph.capture_begin(capture_error_mode="thread_local")
        graph.capture_end()
