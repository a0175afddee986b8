"""Work of a GPU that is recorded once as CUDA graphs and played from then on. Imports the fast paths.

Whoever records keeps a room: tensors into which the inputs are copied, and recordings that read them and leave their
results beside them. A room serves one forward at a time, until its gradients have been computed or nobody can ask for
them any more, so that several rooms of the same kind may be needed. [`recorder`] holds all of them by what they depend
on.
"""

import contextlib
import functools
import gc
import logging
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch

from .fast_paths import autocast_dtype, current_backward, transforms_are_active


logger = logging.getLogger(__name__)

# How often something runs in the same sizes before it is recorded.
RUNS_BEFORE = 2
# How many recordings are kept, in what share of the memory of a GPU, and after how many plays of others one may go.
MOST_RECORDINGS, MEMORY_SHARE, LONG_UNUSED = 1024, 1 / 16, 1000
DEVICE_TYPE = "cuda"


def is_capturing(device_type: str) -> bool:
    """Whether what is done on the GPU goes into a graph."""
    return device_type == "cuda" and torch.cuda.is_current_stream_capturing()


# It has no public door; where it is missing, nothing is recorded.
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignores_tracing: "unknown")


def may_play(inputs: torch.Tensor) -> bool:
    """Whether work on `inputs` may be played from a recording."""
    return (
        inputs.device.type == DEVICE_TYPE
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not is_capturing(inputs.device.type)
        and not transforms_are_active()
        # Gradient checkpointing compares what is kept with what is kept when the same runs again.
        and _top_hooks(True) is None
    )


def may_record() -> bool:
    """Whether a recording may be made now: not within a backward, whose work belongs to others."""
    return current_backward is not None and current_backward() == -1


def surroundings(device: torch.device) -> tuple:
    """What work on a device depends on beside its arguments: stream, autocast, and how exact products are."""
    backends = torch.backends
    return (
        device,
        torch.cuda.current_stream(device) if device.type == "cuda" else None,
        autocast_dtype(device.type),
        *(backends.cuda.matmul.fp32_precision, backends.cudnn.rnn.fp32_precision, backends.cudnn.enabled),
        *(backends.cudnn.deterministic, torch.are_deterministic_algorithms_enabled()),
    )


@contextlib.contextmanager
def in_surroundings(device: torch.device, trains: bool):
    """
    Within this context nothing depends on what is around it but for [`surroundings`]: what is recorded here is used
    elsewhere, too.
    """
    dtype = autocast_dtype(device.type)
    with (
        torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext(),
        torch.inference_mode(False),
        torch.set_grad_enabled(trains),
        torch.autocast(device.type, dtype, dtype is not None, cache_enabled=False),
    ):
        yield


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
            self.graph = _capture(function, None if beside is None else beside.graph.pool())
            self.num_bytes = max(0, torch.cuda.memory_reserved() - before)
        torch.cuda.current_stream().wait_stream(stream)

    def play(self) -> None:
        self.graph.replay()


def _capture(function: Callable[[], None], pool: tuple[int, int] | None = None) -> torch.cuda.CUDAGraph:
    """Records a function on the current stream."""
    graph = torch.cuda.CUDAGraph()
    collects = gc.isenabled()
    gc.disable()  # what is freed by the way could be another graph, and that would end this one
    try:
        # Other threads, which load data or compute gradients, may call what a recording rules out.
        graph.capture_begin(*([] if pool is None else [pool]), capture_error_mode="thread_local")
        try:
            function()
        finally:
            graph.capture_end()
    except Exception:
        _end_capture_of_random_numbers()
        raise
    finally:
        if collects:
            gc.enable()
    return graph


def _end_capture_of_random_numbers() -> None:
    """After a recording that failed random generators believe that it goes on; one that succeeds ends that."""
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
        graph.capture_begin(capture_error_mode="thread_local")
        graph.capture_end()


def write(places: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Copies values to where a recording reads them, all at once, without a graph of autograd around it."""
    torch._foreach_copy_(places, values)


def read(places: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of what recordings left in some places, which the next play does not change."""
    copies = [torch.empty_like(place) for place in places]
    torch._foreach_copy_(copies, places)
    return copies


class Room:
    """Where recordings of one kind read and leave what belongs to one forward at a time."""

    def __init__(self):
        self.in_use = False
        self.last_use = 0
        self.recordings: list[Recording] = []

    def record(self, function: Callable[[], None], beside: Recording | None = None) -> Recording:
        """A [`Recording`] in this room."""
        self.recordings.append(Recording(function, beside))
        return self.recordings[-1]

    @property
    def num_bytes(self) -> int:
        """What its recordings take of the memory of the GPU."""
        return sum(recording.num_bytes for recording in self.recordings)


AnyRoom = TypeVar("AnyRoom", bound=Room)
Result = TypeVar("Result")


class Borrowed:
    """Holds a room; gives it back when nobody holds this any more."""

    def __init__(self, room: Room):
        self.room = room
        room.in_use = True

    def __del__(self):
        self.room.in_use = False


class Recorder:
    """All rooms of a process, by what they depend on."""

    def __init__(self):
        self._lock = threading.Lock()
        self._clock, self._full_until = 0, 0
        self._runs: Counter = Counter()
        self._refused: set[Hashable] = set()
        self._rooms: dict[Hashable, list[Room]] = {}

    @property
    def rooms(self) -> list[Room]:
        """All of them."""
        return [room for rooms in self._rooms.values() for room in rooms]

    def borrow(self, key: Hashable, make: Callable[[], Room]) -> Borrowed | None:
        """A room; None where what it is for ran too seldom, or cannot be recorded now."""
        with self._lock:
            self._clock += 1
            for room in self._rooms.get(key, ()):
                if not room.in_use:
                    room.last_use = self._clock
                    return Borrowed(room)
            if key in self._refused:
                return None
            if len(self._runs) > 10_000:
                self._runs.clear()
            self._runs[key] += 1
            if self._runs[key] <= RUNS_BEFORE or not may_record() or not self._has_space():
                return None
        room = make()
        with self._lock:
            room.last_use = self._clock
            self._rooms.setdefault(key, []).append(room)
            return Borrowed(room)

    def refuse(self, key: Hashable) -> None:
        """Never records what depends on `key`."""
        with self._lock:
            self._refused.add(key)
            self._rooms.pop(key, None)

    def forget(self) -> None:
        """Drops all recordings."""
        with self._lock:
            self.__init__()

    def _has_space(self) -> bool:
        """Whether there may be one more room; those go that were not played for long, but no others."""
        if self._clock < self._full_until:
            return False
        if self._is_full():
            oldest = self._clock - LONG_UNUSED
            for key, rooms in list(self._rooms.items()):
                self._rooms[key] = [room for room in rooms if room.in_use or room.last_use > oldest]
                if not self._rooms[key]:
                    del self._rooms[key]
            if self._is_full():
                self._full_until = self._clock + LONG_UNUSED // 10
                return False
        return True

    def _is_full(self) -> bool:
        rooms = self.rooms
        if sum(len(room.recordings) for room in rooms) >= MOST_RECORDINGS:
            return True
        return sum(room.num_bytes for room in rooms) > MEMORY_SHARE * _memory()


@functools.cache
def _memory() -> int:
    """Bytes of the memory of the smallest GPU."""
    devices = range(torch.cuda.device_count())
    return min((torch.cuda.get_device_properties(device).total_memory for device in devices), default=0)


recorder = Recorder()


def play(
    key: tuple,
    device: torch.device,
    trains: bool,
    make: Callable[[], AnyRoom],
    run: Callable[[Borrowed], Result | None],
) -> Result | None:
    """
    What `run` returns in a room of its own.

    Args:
        key (`tuple`): What a recording depends on, beside device, mode and [`surroundings`].
        device (`torch.device`): Where the work is done.
        trains (`bool`): Whether gradients are asked for.
        make: Makes a room, within [`in_surroundings`]. An error says that what is to be done cannot be recorded.
        run: Does the work in a room, and keeps what it is given for as long as the room is needed.

    Returns:
        What `run` returned; None where it was not called, or did not succeed, and the work is to be done otherwise.
    """
    key = (*key, trains, *surroundings(device))

    def make_here() -> AnyRoom:
        with in_surroundings(device, trains):
            return make()

    try:
        borrowed = recorder.borrow(key, make_here)
        return None if borrowed is None else run(borrowed)
    except Exception as error:  # whatever a recording does not allow can be done without one
        logger.debug("%s is not recorded: %s", key[0], error)
        recorder.refuse(key)
        return None
