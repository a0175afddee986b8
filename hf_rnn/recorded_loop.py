"""Loops over time on GPUs, recorded once and played from then on. Imports the cells, what describes them, and
the products of their steps.

A step of a cell that no library knows is a dozen small operations, and starting them from Python takes a GPU many times
as long as computing them. What a loop has done in the same sizes before is recorded as CUDA graphs, forward and
backward, in pieces of a few steps; a piece is played with one call. Within the recording the products with recurrent
weights stand by themselves, and a compiler may fuse what lies between them. Inputs, states and weights are copied into
the recording each time, so that it holds for every layer of the same sizes, whatever becomes of its weights.
"""

import functools
import gc
import inspect
import itertools
import logging
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch.func import functional_call
from torch.nn import functional as F

from .bare_cells import describe, make_cell
from .fast_paths import autocast_dtype, current_backward, is_watched, may_take, transforms_are_active
from .linear_calls import project_inputs
from .recurrent_cells import RECURRENT_CELLS, RecurrentCell, State, masked_step
from .step_linear import StepLinear


logger = logging.getLogger(__name__)

# Steps of a piece: in short sequences little must be computed in vain at the end, in long ones pieces must be few.
SHORT_PIECE, LONG_PIECE, LONG_SEQUENCE = 16, 64, 256
# How often a loop runs in the same sizes before it is recorded, and how many pieces are kept.
RUNS_BEFORE, MOST_PIECES = 2, 512
SHORTEST = 4
DEVICE_TYPE = "cuda"


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """Where recordings are made: gradients are computed on the stream of what they belong to."""
    return torch.cuda.Stream(device)


class Recording:
    """What a function does on the GPU, to be done again with the same tensors."""

    def __init__(self, function: Callable[[], None]):
        stream = _stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # once aside: libraries set themselves up at first, compilers compile
                function()
            stream.synchronize()
            self.graph = _capture(function)
        torch.cuda.current_stream().wait_stream(stream)

    def play(self) -> None:
        self.graph.replay()


def _capture(function: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Records a function on the current stream."""
    graph = torch.cuda.CUDAGraph()
    collects = gc.isenabled()
    gc.disable()  # what is freed by the way could be another graph, and that would end this one
    try:
        # Other threads, which load data or compute gradients, may call what a recording rules out.
        graph.capture_begin(capture_error_mode="thread_local")
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


def _write(places: Sequence[torch.Tensor | None], values: Sequence[torch.Tensor | None]) -> None:
    """Copies values to where a recording reads them, all at once; either both of a pair are None or neither."""
    pairs = [(place.detach(), value.detach()) for place, value in zip(places, values) if place is not None]
    torch._foreach_copy_([place for place, _ in pairs], [value for _, value in pairs])


@functools.cache
def _bare_cell(cell_class: type[RecurrentCell], description: str, input_size: int, hidden_size: int) -> RecurrentCell:
    """[`make_cell`], the same one each time, as a compiler looks for that."""
    return make_cell(description, input_size, hidden_size)


class _Loop:
    """
    Room for one sequence at a time: copies of the weights of a cell, and the pieces that read a sequence with them.

    Args:
        cell (`RecurrentCell`): The cell.
        description (`str`): Its description, see [`describe`].
        inputs (`torch.Tensor` of shape `(batch, seq, input_size)`): A sequence.
        state (`tuple` of `torch.Tensor` of shape `(batch, hidden_size)`): The state before it.
        kept (`torch.Tensor` of shape `(batch, hidden_size)`, *optional*): What to multiply hidden states with first.
        trains (`bool`): Whether gradients are asked for.
    """

    def __init__(self, cell, description: str, inputs, state, kept, trains: bool):
        self.trains = trains
        self.in_use = False
        self.pieces: dict[tuple[int, bool], _Piece] = {}
        self.kept = None if kept is None else kept.detach().clone()
        self.cell = _bare_cell(type(cell), description, cell.input_size, cell.hidden_size)
        self.weights = {name: weight.detach().clone() for name, weight in cell.named_parameters()}
        self._look_at_a_step(project_inputs(cell, inputs[:, 0]).detach(), tuple(part.detach() for part in state))
        for weight in self.weights.values():
            weight.requires_grad_(trains)
        self._fused = None
        if self.products is not None and may_take("fused_steps"):
            self._fused = torch.compile(_step_behind_products, dynamic=False, fullgraph=True)

    def _look_at_a_step(self, projected: torch.Tensor, state: State) -> None:
        """Finds which weights a step reads, and which products of a state and a weight it could be given."""
        by_identity = {id(weight): name for name, weight in self.weights.items()}
        products = []

        def linear(inputs, weight, bias=None):
            index = next((index for index, part in enumerate(state) if part is inputs), None)
            names = by_identity.get(id(weight)), None if bias is None else by_identity.get(id(bias), "")
            products.append((index, *names))
            return F.linear(inputs, weight, bias)

        with torch.enable_grad():
            for weight in self.weights.values():
                weight.requires_grad_()
            results = self._call(lambda cell: cell.step(projected, state, linear))
            total = sum(result.float().sum() for result in results)
            gradients = torch.autograd.grad(total, list(self.weights.values()), allow_unused=True)
        self.weights = {
            name: weight for (name, weight), gradient in zip(self.weights.items(), gradients) if gradient is not None
        }
        # Of products of something else, or of parts of weights, nothing is known beforehand.
        known = all(index is not None and name is not None and bias != "" for index, name, bias in products)
        self.products = products if known and products else None

    def _call(self, run: Callable[[RecurrentCell], State]) -> State:
        return functional_call(self.cell, self.weights, (run,))

    def step(self, projected, state, is_token, linear) -> State:
        """[`masked_step`] with these weights."""

        def keeping(hidden, weight, bias=None):
            return linear(hidden if self.kept is None else hidden * self.kept, weight, bias)

        if self._fused is not None:
            products = tuple(
                keeping(state[index], self.weights[name], None if bias is None else self.weights[bias])
                for index, name, bias in self.products
            )
            try:
                return self._fused(self.cell, self.weights, projected, state, products, is_token)
            except Exception as error:  # there may be no compiler, or it may not understand the cell
                if _is_capturing():
                    raise
                logger.debug("Steps of %s are not fused: %s", type(self.cell).__name__, error)
                self._fused = None
        return self._call(lambda cell: masked_step(cell, projected, state, is_token, keeping))

    def fill(self, weights: list[torch.Tensor], kept: torch.Tensor | None) -> None:
        """Copies the weights of a cell, and what is kept, into this room."""
        _write([*self.weights.values(), self.kept], [*weights, kept])

    def piece(self, index: int, projected, state, is_token) -> "_Piece | None":
        """The piece at some place of a sequence, recorded if it is not there; None where that must not be done now."""
        key = index, is_token is not None
        if key not in self.pieces and may_record():
            self.pieces[key] = _Piece(self, projected, state, is_token)
        return self.pieces.get(key)


def _step_behind_products(cell, weights, projected, state, products, is_token) -> State:
    products = iter(products)
    return functional_call(
        cell, weights, (lambda cell: masked_step(cell, projected, state, is_token, lambda *_: next(products)),)
    )


class _Piece:
    """Some steps in the room of a loop, with a place for everything that goes in and comes out."""

    def __init__(self, loop: _Loop, projected, state, is_token):
        self.loop = loop
        self.inputs = [part.detach().clone().requires_grad_(loop.trains) for part in (projected, *state)]
        self.is_token = None if is_token is None else is_token.clone()
        with torch.set_grad_enabled(loop.trains):
            self.forward = Recording(self._read)
        if loop.trains:
            self.incoming = [torch.zeros_like(output) for output in self.outputs]
            self.backward = Recording(self._differentiate)

    def _read(self) -> None:
        linear = StepLinear() if self.loop.trains else F.linear
        projected, *state = self.inputs
        is_token = itertools.repeat(None) if self.is_token is None else self.is_token.unbind(0)
        hiddens = []
        for projected_now, is_token_now in zip(projected.unbind(0), is_token):
            state = self.loop.step(projected_now, tuple(state), is_token_now, linear)
            hiddens.append(state[0])
        self.outputs = [torch.stack(hiddens), *state]

    def _differentiate(self) -> None:
        # Kept, so that a graph that is asked twice for its gradients finds what it needs.
        self.gradients = torch.autograd.grad(
            self.outputs, [*self.inputs, *self.loop.weights.values()], self.incoming, retain_graph=True
        )

    def read(self, projected, state, is_token) -> list[torch.Tensor]:
        """The hidden states `(steps, batch, hidden_size)` and the final state, to be read before the next call."""
        _write([*self.inputs, self.is_token], [projected, *state, is_token])
        self.forward.play()
        return [output.detach() for output in self.outputs]

    def differentiate(self, gradients: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """The gradients of inputs, state and weights, from those of what [`~_Piece.read`] returned."""
        _write(self.incoming, gradients)
        self.backward.play()
        return [gradient.clone() for gradient in self.gradients]


class _Play(torch.autograd.Function):
    """A piece in a graph of autograd, which borrows the room of its loop for as long as it lives."""

    @staticmethod
    def forward(ctx, piece, borrowed, is_token, projected, *tensors):
        ctx.piece, ctx.borrowed = piece, borrowed
        return tuple(piece.read(projected, tensors[: len(piece.inputs) - 1], is_token))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        return None, None, None, *ctx.piece.differentiate(gradients)


class _Borrowed:
    """Holds a room; gives it back when nobody holds this any more."""

    def __init__(self, loop: _Loop):
        self.loop = loop
        loop.in_use = True

    def __del__(self):
        self.loop.in_use = False


class Recorder:
    """All recorded loops of a process, by what they depend on; those that were not played for long go first."""

    def __init__(self):
        self._lock = threading.Lock()
        self._runs: Counter = Counter()
        self._refused: set = set()
        self._loops: list[tuple[tuple, _Loop]] = []

    def borrow(self, key: tuple, make: Callable[[], _Loop]) -> _Borrowed | None:
        """Room for a loop; None where it ran too seldom, or cannot be recorded."""
        with self._lock:
            if key in self._refused:
                return None
            for index, (known, loop) in enumerate(self._loops):
                if known == key and not loop.in_use:
                    self._loops.append(self._loops.pop(index))
                    return _Borrowed(loop)
            if len(self._runs) > 10_000:
                self._runs.clear()
            self._runs[key] += 1
            if self._runs[key] <= RUNS_BEFORE or not self._has_room() or not may_record():
                return None
        loop = make()
        with self._lock:
            self._loops.append((key, loop))
        return _Borrowed(loop)

    def refuse(self, key: tuple) -> None:
        """Never records what depends on `key`."""
        with self._lock:
            self._refused.add(key)
            self._loops = [(known, loop) for known, loop in self._loops if known != key]

    def forget(self) -> None:
        """Drops all recordings."""
        with self._lock:
            self.__init__()

    def _has_room(self) -> bool:
        while sum(len(loop.pieces) for _, loop in self._loops) >= MOST_PIECES:
            free = next((index for index, (_, loop) in enumerate(self._loops) if not loop.in_use), None)
            if free is None:
                return False
            del self._loops[free]
        return True


recorder = Recorder()


def may_record() -> bool:
    """Whether a recording may be made now: not within a backward, whose work belongs to others."""
    return current_backward is not None and current_backward() == -1


@functools.cache
def _is_made_of_sizes(cell_class: type[RecurrentCell]) -> bool:
    return list(inspect.signature(cell_class.__init__).parameters) == ["self", "input_size", "hidden_size"]


def _is_plain(cell: RecurrentCell) -> bool:
    """Whether a cell is as it was made: no adapter, no hook, nothing that a step could change."""
    if type(cell) not in RECURRENT_CELLS.values() or any(True for _ in cell.buffers()):
        return False
    if any(map(is_watched, cell.modules())):
        return False
    return _is_made_of_sizes(type(cell)) and all(
        type(weight) in (torch.nn.Parameter, torch.Tensor) for weight in cell.parameters()
    )


# It has no public door; where it is missing, nothing is recorded.
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignores_tracing: "unknown")


def _current_stream(device: torch.device) -> "torch.cuda.Stream | None":
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def takes_recording(cell: RecurrentCell, inputs: torch.Tensor, needs_history: bool) -> bool:
    """Whether a loop over `inputs` `(batch, seq, input_size)` may be played from a recording."""
    return (
        inputs.device.type == DEVICE_TYPE
        and inputs.shape[0] > 0
        and inputs.shape[1] >= SHORTEST
        and not needs_history
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not _is_capturing()
        and not transforms_are_active()
        # Gradient checkpointing compares what is kept with what is kept when the same runs again.
        and _top_hooks(True) is None
        and may_take("recorded_loop")
        and _is_plain(cell)
    )


def play_loop(
    cell: RecurrentCell,
    inputs: torch.Tensor,
    state: State,
    mask: torch.Tensor | None,
    reverse: bool = False,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, State] | None:
    """
    A loop over the steps of a cell, from a recording.

    Args:
        cell (`RecurrentCell`): The cell, for which [`takes_recording`] is true.
        inputs (`torch.Tensor` of shape `(batch, seq, input_size)`): The inputs.
        state (`tuple` of `torch.Tensor` of shape `(batch, hidden_size)`): The state before the first step.
        mask (`torch.Tensor` of shape `(batch, seq)`, *optional*): True where there is a token.
        reverse (`bool`): Whether to read from right to left.
        kept (`torch.Tensor` of shape `(batch, hidden_size)`, *optional*): What to multiply hidden states with first.

    Returns:
        The outputs `(batch, seq, hidden_size)` and the final state; None where the loop is not recorded (yet).
    """
    description = describe(cell)
    if not description:
        return None
    seq, parameters = inputs.shape[1], dict(cell.named_parameters())
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (inputs, *state, *parameters.values()))
    length = LONG_PIECE if seq > LONG_SEQUENCE else SHORT_PIECE
    device = inputs.device.type
    autocast = autocast_dtype(device)
    key = (
        *(type(cell), description, cell.input_size, cell.hidden_size, inputs.shape[0], length),
        *(tuple((name, weight.shape, weight.dtype) for name, weight in parameters.items()), inputs.dtype),
        *(tuple(part.dtype for part in state), None if kept is None else kept.dtype, autocast, trains),
        *(may_take("fused_steps"), inputs.device, _current_stream(inputs.device)),
    )
    try:
        # What is recorded in here is used elsewhere, too: nothing may depend on what surrounds it.
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(trains),
            torch.autocast(device, autocast, autocast is not None, cache_enabled=False),
        ):
            borrowed = recorder.borrow(key, lambda: _Loop(cell, description, inputs, state, kept, trains))
            if borrowed is None:
                return None
            return _play(borrowed, cell, parameters, inputs, state, mask, reverse, kept, length)
    except Exception as error:  # whatever a recording does not allow, the plain loop does
        logger.debug("The loop over %s is not recorded: %s", type(cell).__name__, error)
        recorder.refuse(key)
        return None


def _play(
    borrowed: _Borrowed, cell, parameters, inputs, state, mask, reverse, kept, length
) -> tuple[torch.Tensor, State] | None:
    """[`play_loop`] in the room of a loop; None where a piece is missing and must not be recorded now."""
    loop, (batch, seq) = borrowed.loop, inputs.shape[:2]
    rest = -seq % length
    masks = [None] * ((seq + rest) // length)
    if mask is not None:
        by_time = mask.t().flip(0) if reverse else mask.t()
        masks = F.pad(by_time, (0, 0, 0, rest)).unsqueeze(-1).split(length)
    elif rest:  # the last piece reads on behind the end
        masks[-1] = torch.arange(length, device=inputs.device)[:, None, None].expand(-1, batch, -1) < length - rest
    projected = project_inputs(cell, inputs).transpose(0, 1)
    projected = F.pad(projected.flip(0) if reverse else projected, (0, 0, 0, 0, 0, rest))
    weights = [parameters[name] for name in loop.weights]
    loop.fill(weights, kept)
    hiddens = []
    for index, (steps, is_token) in enumerate(zip(projected.split(length), masks)):
        piece = loop.piece(index, steps, state, is_token)
        if piece is None:
            return None
        if loop.trains:
            read, *state = _Play.apply(piece, borrowed, is_token, steps, *state, *weights)
        else:
            read, *state = piece.read(steps, state, is_token)
        hiddens.append(read)
    outputs = torch.cat(hiddens)[:seq]
    return (outputs.flip(0) if reverse else outputs).transpose(0, 1), tuple(part.clone() for part in state)
