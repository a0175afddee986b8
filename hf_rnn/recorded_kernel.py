"""Torch's kernels over whole sequences on GPUs, recorded once and played from then on. Imports recordings.

cuDNN starts two or three small kernels for each step of each layer, which takes a CPU longer than it takes a GPU to run
them, as long as the products of a step are small. What a kernel has done in the same sizes before is played with one
call, forward and backward. Inputs, states and weights are copied into the recording each time, so that it holds for all
weights of the same sizes; there weights lie side by side, as cuDNN reads them fastest.
"""

from collections.abc import Callable, Sequence

import torch

from .fast_paths import are_plain, autocast_dtype, may_take
from .recordings import Player, Room, may_play, play


# Shorter sequences are not worth it, nor are steps of so many multiplications (of four bytes each), during which a CPU
# starts the next one. Found by measurement.
SHORTEST, MOST_MULTIPLICATIONS = 4, 2**29

# From inputs, initial states and weights to outputs and final states.
Kernel = Callable[[torch.Tensor, Sequence[torch.Tensor], Sequence[torch.Tensor]], Sequence[torch.Tensor]]


def side_by_side(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of weights in one piece of memory, as cuDNN wants them: the matrices of all cells, then their biases."""
    order = sorted(range(len(weights)), key=lambda index: weights[index].dim() == 1)
    piece = torch.cat([weights[index].reshape(-1) for index in order])
    parts = piece.split([weights[index].numel() for index in order])
    copies = {index: part.view(weights[index].shape) for index, part in zip(order, parts)}
    return [copies[index] for index in range(len(weights))]


class _Call(Room):
    """
    Room for one sequence at a time, and the kernel that reads it.

    Args:
        kernel: The kernel.
        tensors: Inputs, initial states and weights of the first sequence.
        num_weights (`int`): How many of them are weights.
        wanted: For each of the tensors whether its gradient is asked for.
    """

    def __init__(self, kernel: Kernel, tensors: Sequence[torch.Tensor], num_weights: int, wanted: Sequence[bool]):
        super().__init__()
        with torch.no_grad():
            copies = [tensor.clone() for tensor in tensors[:-num_weights]]
            copies += [weight.detach() for weight in side_by_side(tensors[-num_weights:])]

        def run(inputs, *others):
            return kernel(inputs, others[:-num_weights], others[-num_weights:])

        self.player = Player(self, run, [copy.requires_grad_(is_wanted) for copy, is_wanted in zip(copies, wanted)])


def _size_of_number(inputs: torch.Tensor) -> int:
    return (autocast_dtype(inputs.device.type) or inputs.dtype).itemsize


def takes_recorded_kernel(batch: int, seq: int, inputs: torch.Tensor, weights: Sequence[torch.Tensor]) -> bool:
    """
    Whether a kernel over sequences may be played from a recording.

    Args:
        batch, seq (`int`): Number of sequences and of steps.
        inputs (`torch.Tensor`): The inputs.
        weights: Four for each cell: the matrices of inputs and of hidden states, and their biases.
    """
    return (
        may_play(inputs)
        and batch > 0
        and seq >= SHORTEST
        and batch * weights[1].numel() * _size_of_number(inputs) <= 4 * MOST_MULTIPLICATIONS
        and may_take("recorded_kernel")
        and are_plain(*weights)
    )


def play_kernel(
    key: tuple, kernel: Kernel, inputs: torch.Tensor, initial: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
) -> Sequence[torch.Tensor] | None:
    """
    A kernel over sequences, from a recording.

    Args:
        key (`tuple`): What tells the kernel from others, its name first.
        kernel: The kernel.
        inputs (`torch.Tensor`): The inputs, as the kernel takes them.
        initial: The initial states.
        weights: The weights.

    Returns:
        Outputs and final states; None where the kernel is not recorded (yet).
    """
    tensors = (inputs, *initial, *weights)
    wanted = (False,) * len(tensors)
    if torch.is_grad_enabled():
        wanted = tuple(tensor.requires_grad for tensor in tensors)

    return play(
        (*key, tuple((tensor.shape, tensor.dtype) for tensor in tensors), wanted),
        inputs.device,
        any(wanted),
        lambda: _Call(kernel, tensors, len(weights), wanted),
        lambda borrowed: borrowed.room.player.play(borrowed, tensors),
    )
