"""Loops over time on GPUs, recorded once and played from then on. Imports the cells, what describes them, the products
of their steps, and recordings.

A step of a cell that no library knows is a dozen small operations, and starting them from Python takes a GPU many times
as long as computing them. What a loop has done in the same sizes before is recorded as CUDA graphs, forward and
backward, in pieces of a few steps; a piece is played with one call. Within the recording the products with recurrent
weights stand by themselves, and a compiler may fuse what lies between them. Inputs, states and weights are copied into
the recording each time, so that it holds for every layer of the same sizes, whatever becomes of its weights.
"""

import functools
import inspect
import logging
import weakref
from collections.abc import Callable, Sequence

import torch
from torch.func import functional_call
from torch.nn import functional as F

from .bare_cells import describe, make_cell
from .cuda_graphs import is_capturing
from .fast_paths import are_plain, is_watched, may_take
from .linear_calls import project_inputs
from .recordings import Borrowed, Player, Room, in_surroundings, may_play, may_record, play, recorder, write
from .recurrent_cells import RECURRENT_CELLS, Linear, RecurrentCell, State, masked_step
from .step_linear import StepLinear


logger = logging.getLogger(__name__)

# Steps of a piece: in short sequences little must be computed in vain at the end, in long ones pieces must be few.
SHORT_PIECE, LONG_PIECE, LONG_SEQUENCE = 16, 64, 256
SHORTEST = 4


@functools.cache
def _bare_cell(
    cell_class: type[RecurrentCell], description: str, input_size: int, hidden_size: int, device: torch.device
) -> RecurrentCell:
    """[`make_cell`], the same one each time for loops on one device, as a compiler looks for that."""
    return make_cell(description, input_size, hidden_size)


class _Loop(Room):
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
        super().__init__()
        self.trains = trains
        self.pieces: dict[tuple[int, bool], Player] = {}
        self.kept = None if kept is None else kept.detach().clone()
        self.cell = _bare_cell(type(cell), description, cell.input_size, cell.hidden_size, inputs.device)
        self.weights = {name: weight.detach().clone() for name, weight in cell.named_parameters()}
        # Copies, as what was made in inference mode cannot be kept for a backward.
        projected = project_inputs(cell, inputs[:, 0]).detach().clone()
        self._look_at_a_step(projected, tuple(part.detach().clone() for part in state))
        for weight in self.hold(self.weights.values()):
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
            results = self._call(self.weights, lambda cell: cell.step(projected, state, linear))
            total = sum(result.float().sum() for result in results)
            gradients = torch.autograd.grad(total, list(self.weights.values()), allow_unused=True)
        self.weights = {
            name: weight for (name, weight), gradient in zip(self.weights.items(), gradients) if gradient is not None
        }
        # Of products of something else, or of parts of weights, nothing is known beforehand.
        known = all(index is not None and name is not None and bias != "" for index, name, bias in products)
        self.products = products if known and products else None

    def _call(self, weights: dict[str, torch.Tensor], run: Callable[[RecurrentCell], State]) -> State:
        return functional_call(self.cell, weights, (run,))

    def plain_step(self, weights: dict[str, torch.Tensor], kept, projected, state, is_token) -> State:
        """[`masked_step`] with other weights, and other factors of hidden states."""
        linear = _keeping(F.linear, kept)
        return self._call(weights, lambda cell: masked_step(cell, projected, state, is_token, linear))

    def step(self, projected, state, is_token, linear) -> State:
        """[`masked_step`] with these weights."""
        linear = _keeping(linear, self.kept)
        if self._fused is not None:
            products = tuple(
                linear(state[index], self.weights[name], None if bias is None else self.weights[bias])
                for index, name, bias in self.products
            )
            try:
                return self._fused(self.cell, self.weights, projected, state, products, is_token)
            except Exception as error:  # there may be no compiler, or it may not understand the cell
                if is_capturing(projected.device.type):
                    raise
                logger.debug("Steps of %s are not fused: %s", type(self.cell).__name__, error)
                self._fused = None
        return self._call(self.weights, lambda cell: masked_step(cell, projected, state, is_token, linear))

    def fill(self, weights: list[torch.Tensor], kept: torch.Tensor | None) -> None:
        """Copies the weights of a cell, and what is kept, into this room."""
        with torch.no_grad():
            write(list(self.weights.values()), weights)
            if kept is not None:
                self.kept.copy_(kept)

    def has_pieces(self, masks: Sequence[torch.Tensor | None], device: torch.device) -> bool:
        """Whether the pieces of a sequence are there, or may be recorded now."""
        are_there = all((index, mask is not None) in self.pieces for index, mask in enumerate(masks))
        return are_there or (may_record(device) and (not self.pieces or recorder.has_space(device)))

    def piece(self, index: int, projected, state, is_token) -> Player:
        """The piece at some place of a sequence, recorded if it is not there."""
        key = index, is_token is not None
        if key not in self.pieces:
            if self.pieces and recorder.is_full(projected.device):
                raise RuntimeError("There is no space for so many pieces.")
            with in_surroundings(projected.device, self.trains):
                self.pieces[key] = _make_piece(self, projected, state, is_token)
        return self.pieces[key]


def _keeping(linear: Linear, kept: torch.Tensor | None) -> Linear:
    """`linear` of hidden states multiplied with `kept`."""

    def product(hidden, weight, bias=None):
        return linear(hidden if kept is None else hidden * kept, weight, bias)

    return product


def _step_behind_products(cell, weights, projected, state, products, is_token) -> State:
    products = iter(products)
    return functional_call(
        cell, weights, (lambda cell: masked_step(cell, projected, state, is_token, lambda *_: next(products)),)
    )


def _make_piece(loop: _Loop, projected, state, is_token) -> Player:
    """
    Some steps in the room of a loop, as a function of their inputs, the state before them, the mask if there is one,
    and the weights of the cell, to hidden states `(steps, batch, hidden_size)` and the final state.
    """
    num_states, num_weights = len(state), len(loop.weights)
    inputs = [part.detach().clone().requires_grad_(loop.trains) for part in (projected, *state)]
    if is_token is not None:
        inputs.append(is_token.clone())
    names, loop = list(loop.weights), weakref.proxy(loop)  # which holds its pieces

    def unroll(step, projected, *others):
        state, is_token = others[:num_states], others[num_states : len(others) - num_weights]
        hiddens = []
        for position, projected_now in enumerate(projected.unbind(0)):
            state = step(projected_now, tuple(state), is_token[0][position] if is_token else None)
            hiddens.append(state[0])
        return [torch.stack(hiddens), *state]

    def recorded(*tensors):
        linear = StepLinear() if loop.trains else F.linear
        return unroll(lambda *arguments: loop.step(*arguments, linear), *tensors)

    def plain(*tensors):
        weights = dict(zip(names, tensors[len(tensors) - num_weights :]))
        kept = None if loop.kept is None else loop.kept.clone()  # which is there for the next forward, too
        return unroll(lambda *arguments: loop.plain_step(weights, kept, *arguments), *tensors)

    return Player(loop, recorded, inputs, list(loop.weights.values()), plain, copies=False)


@functools.cache
def _is_made_of_sizes(cell_class: type[RecurrentCell]) -> bool:
    return list(inspect.signature(cell_class.__init__).parameters) == ["self", "input_size", "hidden_size"]


def _is_plain(cell: RecurrentCell) -> bool:
    """Whether a cell is as it was made: no adapter, no hook, nothing that a step could change."""
    if type(cell) not in RECURRENT_CELLS.values() or any(True for _ in cell.buffers()):
        return False
    if any(map(is_watched, cell.modules())):
        return False
    return _is_made_of_sizes(type(cell)) and are_plain(*cell.parameters())


def takes_recording(cell: RecurrentCell, inputs: torch.Tensor, needs_history: bool) -> bool:
    """Whether a loop over `inputs` `(batch, seq, input_size)` may be played from a recording."""
    return (
        not needs_history
        and inputs.shape[0] > 0
        and inputs.shape[1] >= SHORTEST
        and may_play(inputs)
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
    key = (
        *(type(cell).__name__, type(cell), description, cell.input_size, cell.hidden_size, inputs.shape[0], length),
        *(tuple((name, weight.shape, weight.dtype) for name, weight in parameters.items()), inputs.dtype),
        *(tuple(part.dtype for part in state), None if kept is None else kept.dtype, may_take("fused_steps")),
    )
    return play(
        key,
        inputs.device,
        trains,
        lambda: _Loop(cell, description, inputs, state, kept, trains),
        lambda borrowed: _play(borrowed, cell, parameters, inputs, state, mask, reverse, kept, length),
    )


def _play(
    borrowed: Borrowed, cell, parameters, inputs, state, mask, reverse, kept, length
) -> tuple[torch.Tensor, State] | None:
    """[`play_loop`] in the room of a loop; None where a piece is missing and may not be recorded now."""
    loop, (batch, seq) = borrowed.room, inputs.shape[:2]
    rest = -seq % length
    masks = [None] * ((seq + rest) // length)
    if mask is not None:
        by_time = mask.t().flip(0) if reverse else mask.t()
        masks = F.pad(by_time, (0, 0, 0, rest)).unsqueeze(-1).split(length)
    elif rest:  # the last piece reads on behind the end
        masks[-1] = torch.arange(length, device=inputs.device)[:, None, None].expand(-1, batch, -1) < length - rest
    if not loop.has_pieces(masks, inputs.device):
        return None
    projected = project_inputs(cell, inputs).transpose(0, 1)
    projected = F.pad(projected.flip(0) if reverse else projected, (0, 0, 0, 0, 0, rest))
    weights = [parameters[name] for name in loop.weights]
    loop.fill(weights, kept)
    hiddens = []
    for index, (steps, is_token) in enumerate(zip(projected.split(length), masks)):
        piece = loop.piece(index, steps, state, is_token)
        values = [steps, *state, *([] if is_token is None else [is_token])]
        read, *state = piece.play(borrowed, values, weights)
        hiddens.append(read)
    # In memory as the loop leaves them, so that a dropout behind it draws the same.
    hiddens[-1] = hiddens[-1][: length - rest]
    outputs = torch.cat([hidden.transpose(0, 1) for hidden in hiddens], dim=1)
    return outputs.flip(1) if reverse else outputs, tuple(part.clone() for part in state)
