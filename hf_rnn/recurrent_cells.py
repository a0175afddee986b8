"""Recurrent cells: one class per cell, with its equations, its parameters and one step. Imports nothing of the package.

Time, padding, directions and layers are the business of `recurrent_layer.py`. A new cell is a subclass of
[`RecurrentCell`] and one line in `RECURRENT_CELLS`.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init


State = tuple[torch.Tensor, ...]
Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
# The methods that say what a cell computes.
EQUATIONS = ("step", "gate_values", "next_state", "project_inputs")


class RecurrentCell(nn.Module):
    r"""
    One step of a recurrence. Subclasses name their gates and states and write [`~RecurrentCell.step`] or, so that
    `output_gates` can return the gates, its two halves [`~RecurrentCell.gate_values`] and
    [`~RecurrentCell.next_state`].

    Parameters have the names, shapes and gate order of torch's cells: `weight_ih` `[gates * hidden_size, input_size]`,
    `weight_hh` `[gates * hidden_size, hidden_size]`, `bias_ih` and `bias_hh` `[gates * hidden_size]`. The weights of
    `nn.LSTM` and its like move in by renaming `weight_ih_l0` to `weight_ih` and so on.

    Class attributes:
        gate_names: The gates in the order in which their weights are stacked.
        state_names: What one step hands to the next; the first is the hidden state, which is also the output.
        torch_kernel: Name of the function in `torch._VF` that runs the same equations over a whole sequence, if any.
            A subclass that changes the equations loses it, unless it names one itself.
        hold_gates: For such a kernel with more states than the output: what to add to the gates so that a step leaves
            those states as they are, in units of "far beyond saturation".

    Args:
        input_size (`int`): Width of the inputs.
        hidden_size (`int`): Width of each state.
    """

    gate_names: ClassVar[tuple[str, ...]] = ("hidden",)
    state_names: ClassVar[tuple[str, ...]] = ("hidden_state",)
    torch_kernel: ClassVar[str | None] = None
    hold_gates: ClassVar[tuple[float, ...] | None] = None
    # What stands for `torch.tanh` in equations; whoever knows a faster way sets it.
    _tanh = staticmethod(torch.tanh)

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.input_size = input_size
        self.hidden_size = hidden_size
        rows = len(self.gate_names) * hidden_size
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size))
        self.weight_hh = nn.Parameter(torch.empty(rows, hidden_size))
        self.bias_ih = nn.Parameter(torch.empty(rows))
        self.bias_hh = nn.Parameter(torch.empty(rows))

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # Whoever names the kernel vouches for the equations; those found before it (mixins too) change them.
        owner = next(base for base in cls.__mro__ if "torch_kernel" in vars(base))
        if any(getattr(cls, name) is not getattr(owner, name) for name in EQUATIONS):
            cls.torch_kernel = None

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}"

    def init_weights(self, config) -> None:
        """
        Initialises the parameters that no checkpoint has filled: input weights Glorot uniform and recurrent weights
        orthogonal, both gate by gate, biases at zero.
        """
        bound = (6 / (self.input_size + self.hidden_size)) ** 0.5
        init.uniform_(self.weight_ih, -bound, bound)
        if not getattr(self.weight_hh, "_is_hf_initialized", False):
            # Filled gate by gate aside: a slice of the parameter would not carry the flag that protects loaded weights.
            weight = torch.empty_like(self.weight_hh, dtype=torch.float32)
            for gate in weight.chunk(len(self.gate_names)):
                init.orthogonal_(gate)
            init.copy_(self.weight_hh, weight.to(self.weight_hh.dtype))
        init.zeros_(self.bias_ih)
        init.zeros_(self.bias_hh)

    def forward(self, run: Callable[["RecurrentCell"], Any]) -> Any:
        """
        Calls `run(self)` and returns its result. Whoever reads the parameters of a cell that belongs to a model does it
        in here, because what others put around a module (adapters of PEFT, offloading of Accelerate) is in force
        during its forward, and because the cell may then be found behind such a wrapper only through a call.
        """
        return run(self)

    def initial_state(self, inputs: torch.Tensor) -> State:
        """Zero states `[batch, hidden]` for `inputs` `[batch, ...]`."""
        return tuple(inputs.new_zeros(inputs.shape[0], self.hidden_size) for _ in self.state_names)

    def project_inputs(self, inputs: torch.Tensor) -> torch.Tensor:
        """
        What the inputs contribute to the gates, for all steps at once.

        Args:
            inputs (`torch.Tensor` of shape `(..., input_size)`): The inputs.

        Returns:
            `torch.Tensor` of shape `(..., gates * hidden_size)`.
        """
        return F.linear(inputs, self.weight_ih, self.bias_ih)

    def step(self, projected: torch.Tensor, state: State, linear: Linear = F.linear) -> State:
        """
        The equations of the cell.

        Args:
            projected (`torch.Tensor` of shape `(batch, gates * hidden_size)`): `project_inputs` of this step's inputs.
            state (`tuple` of `torch.Tensor` of shape `(batch, hidden_size)`): One tensor for each of `state_names`.
            linear: What stands for `F.linear` in products of states with recurrent weights: the caller may drop units
                of the state there, or use a faster product.

        Returns:
            `tuple`: The new state.
        """
        return self.next_state(self.gate_values(projected, state, linear), state)

    def gate_values(self, projected: torch.Tensor, state: State, linear: Linear = F.linear) -> State:
        """
        The first half of a step: the gates behind their activation. Arguments as in [`~RecurrentCell.step`].

        Returns:
            `tuple` of `torch.Tensor` of shape `(batch, hidden_size)`: One tensor for each of `gate_names`.
        """
        raise NotImplementedError

    def next_state(self, gates: State, state: State) -> State:
        """The second half of a step: the new state, from the gates and the state before."""
        raise NotImplementedError


class RNNTanhCell(RecurrentCell):
    r"""
    The simple recurrent network of [Elman (1990)](https://doi.org/10.1207/s15516709cog1402_1):

        h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
    """

    torch_kernel = "rnn_tanh"

    def gate_values(self, projected, state, linear=F.linear):
        (hidden,) = state
        return (self._tanh(projected + linear(hidden, self.weight_hh, self.bias_hh)),)

    def next_state(self, gates, state):
        return gates


class RNNReLUCell(RecurrentCell):
    r"""
    The simple recurrent network with rectified units:

        h_t = max(0, W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
    """

    torch_kernel = "rnn_relu"

    def gate_values(self, projected, state, linear=F.linear):
        (hidden,) = state
        return (torch.relu(projected + linear(hidden, self.weight_hh, self.bias_hh)),)

    def next_state(self, gates, state):
        return gates


class GRUCell(RecurrentCell):
    r"""
    The gated recurrent unit of [Cho et al. (2014)](https://huggingface.co/papers/1406.1078), with the reset gate
    behind the recurrent product as in torch. Gate order: reset, update, new.

        r = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)
        z = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
        n = tanh(W_in x_t + b_in + r * (W_hn h_{t-1} + b_hn))
        h_t = (1 - z) * n + z * h_{t-1}
    """

    gate_names = ("reset", "update", "new")
    torch_kernel = "gru"

    def gate_values(self, projected, state, linear=F.linear):
        (hidden,) = state
        input_gates, input_new = projected.split([2 * self.hidden_size, self.hidden_size], dim=-1)
        recurrent = linear(hidden, self.weight_hh, self.bias_hh)
        hidden_gates, hidden_new = recurrent.split([2 * self.hidden_size, self.hidden_size], dim=-1)
        reset, update = torch.sigmoid(input_gates + hidden_gates).chunk(2, dim=-1)
        return reset, update, self._tanh(input_new + reset * hidden_new)

    def next_state(self, gates, state):
        _, update, new = gates
        (hidden,) = state
        return (new + update * (hidden - new),)


class LSTMCell(RecurrentCell):
    r"""
    The long short-term memory of [Hochreiter and Schmidhuber (1997)](https://doi.org/10.1162/neco.1997.9.8.1735) with
    the forget gate of [Gers et al. (2000)](https://doi.org/10.1162/089976600300015015). Gate order: input, forget,
    cell, output; the bias of the forget gate starts at `forget_gate_bias`.

        i = sigmoid(W_ii x_t + b_ii + W_hi h_{t-1} + b_hi)
        f = sigmoid(W_if x_t + b_if + W_hf h_{t-1} + b_hf)
        g = tanh(W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)
        o = sigmoid(W_io x_t + b_io + W_ho h_{t-1} + b_ho)
        c_t = f * c_{t-1} + i * g
        h_t = o * tanh(c_t)
    """

    gate_names = ("input", "forget", "cell", "output")
    state_names = ("hidden_state", "cell_state")
    torch_kernel = "lstm"
    hold_gates = (-1.0, 1.0, 0.0, 0.0)

    def init_weights(self, config):
        super().init_weights(config)
        bias = torch.zeros_like(self.bias_ih)
        bias.chunk(4)[1].fill_(config.forget_gate_bias)
        init.copy_(self.bias_ih, bias)

    def gate_values(self, projected, state, linear=F.linear):
        gates = projected + linear(state[0], self.weight_hh, self.bias_hh)
        input_gate, forget_gate, new, output_gate = gates.chunk(4, dim=-1)
        return torch.sigmoid(input_gate), torch.sigmoid(forget_gate), self._tanh(new), torch.sigmoid(output_gate)

    def next_state(self, gates, state):
        input_gate, forget_gate, new, output_gate = gates
        cell = forget_gate * state[1] + input_gate * new
        return output_gate * self._tanh(cell), cell


def masked_step(
    cell: RecurrentCell, projected: torch.Tensor, state: State, is_token: torch.Tensor | None, linear: Linear = F.linear
) -> State:
    """One step of a cell that leaves the state of rows without a token `[batch, 1]` as it is."""
    return where_token(is_token, cell.step(projected, state, linear), state)


def where_token(is_token: torch.Tensor | None, new_state: State, state: State) -> State:
    """The new state in rows with a token `[batch, 1]`, or in all of them, and the old one in the others."""
    if is_token is None:
        return new_state
    return tuple(torch.where(is_token, new, old) for new, old in zip(new_state, state))


RECURRENT_CELLS: dict[str, type[RecurrentCell]] = {
    "rnn_tanh": RNNTanhCell,
    "rnn_relu": RNNReLUCell,
    "gru": GRUCell,
    "lstm": LSTMCell,
}
