"""Work of a GPU that is recorded once as CUDA graphs and played from then on. Imports CUDA graphs.

Whoever records keeps a room: tensors into which the inputs are copied, and recordings that read them and leave their
results beside them. A room serves one forward at a time, until its gradients have been computed or nobody can ask for
them any more, so that several rooms of the same kind may be needed. [`recorder`] holds all of them by what they depend
on. Where something else than these gradients is asked for, what was recorded is computed again without a recording.
"""

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import torch

from .cuda_graphs import Recording, is_capturing
from .fast_paths import (
    asks_for_numbers,
    autocast_dtype,
    current_backward,
    operations_are_watched,
    saved_tensors_are_watched,
    transforms_are_active,
)
from .higher_derivatives import gradients_with_graph


logger = logging.getLogger(__name__)

# How often something runs in the same sizes before it is recorded.
RUNS_BEFORE = 2
# How many recordings are kept, in what share of the memory of a GPU, and after how many plays of others one may go.
MOST_RECORDINGS, MEMORY_SHARE, LONG_UNUSED = 1024, 1 / 16, 1000
DEVICE_TYPE = "cuda"


def may_play(inputs: torch.Tensor) -> bool:
    """Whether work on `inputs` may be played from a recording."""
    return (
        inputs.device.type == DEVICE_TYPE
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not is_capturing(inputs.device.type)
        and not transforms_are_active()
        # Who looks at every operation would not see what is played.
        and not operations_are_watched()
        # Gradient checkpointing compares what is kept with what is kept when the same runs again.
        and not saved_tensors_are_watched()
    )


def may_record(device: torch.device) -> bool:
    """
    Whether a recording may be made now: not while there is no space, nor within a backward, whose work belongs to
    others, nor in two threads at a time, nor on a stream of somebody who is about to record and has memory of their own
    for it.
    """
    return (
        current_backward is not None
        and current_backward() == -1
        and threading.current_thread() is threading.main_thread()
        and not recorder.waits
        and (device.type != "cuda" or torch.cuda.current_stream(device) == torch.cuda.default_stream(device))
    )


def surroundings(device: torch.device) -> tuple:
    """What work on a device depends on beside its arguments: stream, autocast, and how exact products are."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return (
        device,
        torch.cuda.current_stream(device) if device.type == "cuda" else None,
        autocast_dtype(device.type),
        *(cudnn.rnn.fp32_precision, cudnn.enabled, cudnn.deterministic, torch.are_deterministic_algorithms_enabled()),
        *(matmul.fp32_precision, matmul.allow_bf16_reduced_precision_reduction),
        *(matmul.allow_fp16_reduced_precision_reduction, matmul.allow_fp16_accumulation),
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


def write(places: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Copies values to where a recording reads them, all of a type at once, without a graph of autograd around it."""
    types = {place.dtype for place in places}
    if len(types) == 1:
        torch._foreach_copy_(places, values)
        return
    for dtype in types:
        pairs = [(place, value) for place, value in zip(places, values) if place.dtype == dtype]
        torch._foreach_copy_(*zip(*pairs))


def read(places: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of what recordings left in some places, which the next play does not change."""
    copies = [torch.empty_like(place) for place in places]
    write(copies, places)
    return copies


class Room:
    """Where recordings of one kind read and leave what belongs to one forward at a time."""

    def __init__(self):
        self.in_use = False
        self.last_use = 0
        self.recordings: list[Recording] = []
        self._num_bytes = 0

    def record(self, function: Callable[[], None], beside: Recording | None = None) -> Recording:
        """A [`Recording`] in this room."""
        self.recordings.append(Recording(function, beside))
        return self.recordings[-1]

    def hold(self, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """These tensors, counted as memory of the room."""
        tensors = list(tensors)
        self._num_bytes += sum(tensor.nbytes for tensor in tensors)
        return tensors

    @property
    def num_bytes(self) -> int:
        """What it takes of the memory of the GPU."""
        return self._num_bytes + sum(recording.num_bytes for recording in self.recordings)


AnyRoom = TypeVar("AnyRoom", bound=Room)
Result = TypeVar("Result")


class Borrowed:
    """Holds a room; gives it back when nobody holds this any more."""

    def __init__(self, room: Room):
        self.room = room
        room.in_use = True

    def __del__(self):
        self.room.in_use = False


Function = Callable[..., Sequence[torch.Tensor]]


class Player:
    """
    A function of tensors that is recorded in a room, with its gradients where some of the tensors require them.

    Args:
        room (`Room`): The room.
        function: What is recorded, in operations that autograd knows.
        places: Its first arguments, into which values are copied for each play.
        shared: Its other arguments, into which somebody else does.
        plain: The same function of tensors that lie elsewhere; `function` where not given.
        copies (`bool`): Whether results are copied; otherwise they must be read before the next play.
    """

    def __init__(
        self,
        room: Room,
        function: Function,
        places: Sequence[torch.Tensor],
        shared: Sequence[torch.Tensor] = (),
        plain: Function | None = None,
        copies: bool = True,
    ):
        self.places, self._shared = room.hold(places), shared
        self._function, self.plain, self._copies = function, plain or function, copies
        self._trained = [tensor for tensor in (*places, *shared) if tensor.requires_grad]
        with torch.set_grad_enabled(bool(self._trained)):
            self._forward = room.record(self._run)
        if self._trained:
            self._forward.play()
            self._incoming = room.hold(torch.zeros_like(output) for output in self._outputs)
            self._are_zero = [True] * len(self._incoming)
            self._backward = room.record(self._differentiate, beside=self._forward)

    def _run(self) -> None:
        self._outputs = list(self._function(*self.places, *self._shared))

    def _differentiate(self) -> None:
        # Kept, so that a graph that is asked twice for its gradients finds what it needs.
        self._gradients = torch.autograd.grad(self._outputs, self._trained, self._incoming, retain_graph=True)

    def play(
        self, borrowed: Borrowed, values: Sequence[torch.Tensor], shared: Sequence[torch.Tensor] = ()
    ) -> tuple[torch.Tensor, ...]:
        """The results of the function in a borrowed room, with a graph of autograd where there are gradients."""
        return _Play.apply(borrowed, self, *values, *shared) if self._trained else self.run(values)

    def run(self, values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The results of the function, without a graph."""
        write(self.places, values)
        self._forward.play()
        return tuple(read(self._outputs) if self._copies else [output.detach() for output in self._outputs])

    def differentiate(self, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """The gradients of all arguments, from those of the results; None stands for zero."""
        given = [(place, gradient) for place, gradient in zip(self._incoming, gradients) if gradient is not None]
        if not given:
            return [None] * (len(self.places) + len(self._shared))
        for index, gradient in enumerate(gradients):
            if gradient is None and not self._are_zero[index]:
                self._incoming[index].zero_()
            self._are_zero[index] = gradient is None
        write(*zip(*given))
        self._backward.play()
        results = iter(read(self._gradients))
        return [next(results) if tensor.requires_grad else None for tensor in (*self.places, *self._shared)]


class _Play(torch.autograd.Function):
    """A player in a graph of autograd, which borrows its room until the graph is freed."""

    @staticmethod
    def forward(ctx, borrowed, player, *tensors):
        ctx.player, ctx.autocast = player, autocast_dtype(tensors[0].device.type)
        ctx.set_materialize_grads(False)
        # It lives as long as what is saved, and that is freed when gradients have been computed.
        holder = torch.empty(0)
        holder.borrowed = borrowed
        ctx.save_for_backward(holder, *tensors)
        return player.run(tensors[: len(player.places)])

    @staticmethod
    def backward(ctx, *gradients):
        _, *tensors = ctx.saved_tensors
        given = [index for index, gradient in enumerate(gradients) if gradient is not None]
        if asks_for_numbers(*(gradients[index] for index in given)):
            return None, None, *ctx.player.differentiate(gradients)

        def run(*tensors):
            with torch.autocast(tensors[0].device.type, ctx.autocast, ctx.autocast is not None):
                results = ctx.player.plain(*tensors)
            return [results[index] for index in given]

        with torch.enable_grad():
            needed = ctx.needs_input_grad[2:]
            found = gradients_with_graph(run, tensors, needed, [gradients[index] for index in given])
        return None, None, *found


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

    @property
    def waits(self) -> bool:
        """Whether there was no space a short time ago."""
        return self._clock < self._full_until

    def borrow(self, key: Hashable, device: torch.device, make: Callable[[], Room]) -> Borrowed | None:
        """A room on a device; None where what it is for ran too seldom, or cannot be recorded now."""
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
            if self._runs[key] <= RUNS_BEFORE or not may_record(device) or not self.has_space(device):
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

    def wait(self) -> None:
        """Records nothing more for some time."""
        with self._lock:
            self._full_until = self._clock + LONG_UNUSED

    def forget(self) -> None:
        """Drops all recordings."""
        with self._lock:
            self.__init__()

    def has_space(self, device: torch.device) -> bool:
        """Whether there may be one more recording; rooms go that were not played for long, but no others."""
        if self.is_full(device):
            oldest = self._clock - LONG_UNUSED
            for key, rooms in list(self._rooms.items()):
                self._rooms[key] = [room for room in rooms if room.in_use or room.last_use > oldest]
                if not self._rooms[key]:
                    del self._rooms[key]
            if self.is_full(device):
                self._full_until = self._clock + LONG_UNUSED // 10
                return False
        return True

    def is_full(self, device: torch.device) -> bool:
        """Whether recordings take all that they may."""
        rooms, (memory, peak) = self.rooms, _memory(device)
        share = MEMORY_SHARE * memory
        if sum(len(room.recordings) for room in rooms) >= MOST_RECORDINGS:
            return True
        # What others may need is left to them: as much again was never in use.
        return sum(room.num_bytes for room in rooms) > share or memory - peak < share


def _memory(device: torch.device) -> tuple[int, int]:
    """Bytes of the memory of a GPU, and the most that was in use at a time, as far as it is not forgotten."""
    # What is reserved falls when the cache is emptied, as after an attempt with a batch that was too large.
    peak = min(torch.cuda.max_memory_allocated(device), torch.cuda.memory_reserved(device))
    return torch.cuda.get_device_properties(device).total_memory, peak


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
        borrowed = recorder.borrow(key, device, make_here)
        return None if borrowed is None else run(borrowed)
    except torch.OutOfMemoryError as error:
        logger.debug("%s is not recorded now: %s", key[0], error)
        recorder.wait()
        return None
    except Exception as error:  # whatever a recording does not allow can be done without one
        logger.debug("%s is not recorded: %s", key[0], error)
        recorder.refuse(key)
        return None
