"""Recurrent layers as nodes of ONNX. Imports the cells, what describes them and the padding.

A cell that one of torch's kernels computes becomes one node
[RNN](https://onnx.ai/onnx/operators/onnx__RNN.html), [GRU](https://onnx.ai/onnx/operators/onnx__GRU.html) or
[LSTM](https://onnx.ai/onnx/operators/onnx__LSTM.html), every other cell a
[Scan](https://onnx.ai/onnx/operators/onnx__Scan.html) over its step.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from .bare_cells import cell_class_of, make_cell
from .recurrent_cells import RecurrentCell
from .recurrent_padding import Padding, gather_positions


class OnnxNode(NamedTuple):
    """How ONNX says what one of torch's kernels computes."""

    operator: str
    gates: tuple[int, ...]  # for each gate in ONNX's order its place in torch's
    attributes: dict[str, int | str]


# By the name of torch's kernel, which says for certain what a cell computes.
ONNX_NODES = {
    "rnn_tanh": OnnxNode("RNN", (0,), {"activation": "Tanh"}),
    "rnn_relu": OnnxNode("RNN", (0,), {"activation": "Relu"}),
    "gru": OnnxNode("GRU", (1, 0, 2), {"linear_before_reset": 1}),
    "lstm": OnnxNode("LSTM", (0, 3, 1, 2), {}),
}


def in_onnx(
    inputs: torch.Tensor,
    states: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    kept: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
    cell_type: str,
    starts: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """
    What the operator `recurrent_layer` of the same arguments is in ONNX. It reads each row as one text: `starts`, which
    come of the `position_ids` that exported models are commonly given, are ignored.

    Raises:
        `ValueError`: Units are dropped.
    """
    cell_class = cell_class_of(cell_type)
    if kept or cell_class.torch_kernel not in ONNX_NODES:
        return in_scan(inputs, states, weights, kept, mask, cell_type, None, seed)
    node = ONNX_NODES[cell_class.torch_kernel]
    return _in_node(node, inputs, states, weights, mask, len(cell_class.state_names))


def _in_node(
    node: OnnxNode,
    inputs: torch.Tensor,
    states: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
    num_states: int,
) -> list[torch.Tensor]:
    """One node, and around it the moving of tokens to the left and back where there is a mask."""
    num_directions = len(states) // num_states
    hidden_size = states[0].shape[-1]

    def gates_of(weight: torch.Tensor) -> torch.Tensor:
        return torch.cat([weight[gate * hidden_size : (gate + 1) * hidden_size] for gate in node.gates])

    weights = [gates_of(weight) for weight in weights]
    weight_ih, weight_hh, bias_ih, bias_hh = (torch.stack(weights[kind::4]) for kind in range(4))
    batch, seq = inputs.shape[:2]
    padding = None if mask is None else Padding(mask)
    lengths = None
    if padding is not None:
        inputs = gather_positions(inputs, padding.direction(False).gather)
        lengths = padding.lengths.clamp(min=1).int()
    attributes = {"hidden_size": hidden_size, "direction": "bidirectional" if num_directions > 1 else "forward"}
    for name, value in node.attributes.items():
        attributes |= {"activations": [value] * num_directions} if name == "activation" else {name: value}
    initial = [torch.stack(states[index::num_states]) for index in range(num_states)]
    outputs, *final = torch.onnx.ops.symbolic_multi_out(
        node.operator,
        [inputs.transpose(0, 1), weight_ih, weight_hh, torch.cat([bias_ih, bias_hh], dim=-1), lengths, *initial],
        attributes,
        dtypes=[inputs.dtype] * (1 + num_states),
        shapes=[(seq, num_directions, batch, hidden_size)] + [(num_directions, batch, hidden_size)] * num_states,
        version=14,
    )
    outputs = outputs.permute(2, 0, 1, 3)  # [batch, seq, directions, hidden]
    final = [final[index][direction] for direction in range(num_directions) for index in range(num_states)]
    if padding is None:
        return [outputs.flatten(2), *final]
    parts = [
        padding.spread(outputs[:, :, direction], states[direction * num_states], direction == 1)
        for direction in range(num_directions)
    ]
    is_empty = (padding.lengths == 0)[:, None]
    return [torch.cat(parts, dim=-1), *(torch.where(is_empty, *pair) for pair in zip(states, final))]


class _BareCell(nn.Module):
    """A cell whose methods can be called with the weights that are given."""

    def __init__(self, cell: RecurrentCell, weights: Sequence[torch.Tensor]):
        super().__init__()
        self.cell = cell
        names = [name for name, _ in [*cell.named_parameters(), *cell.named_buffers()]]
        self.weights = {f"cell.{name}": weight for name, weight in zip(names, weights)}

    def forward(self, method: str, *arguments):
        return getattr(self.cell, method)(*arguments)

    def run(self, method: str, *arguments):
        return functional_call(self, self.weights, (method, *arguments))


def in_scan(
    inputs: torch.Tensor,
    states: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    kept: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
    cell_type: str,
    starts: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """
    The operator `recurrent_layer` of the same arguments as the cell's own step in a `scan` for each direction. Where
    `starts` are given, each text begins with the initial state; the final states are those of the last text that was
    read, from right to left the first one.

    Raises:
        `ValueError`: Units are dropped, or the cell draws random numbers.
    """
    if kept:
        raise ValueError("`recurrent_dropout` must be zero for an export, or the model in evaluation mode.")
    if seed is not None:
        raise ValueError(f"A cell that draws random numbers cannot be exported, got {cell_type}: try `model.eval()`.")
    from torch._dynamo import config
    from torch._higher_order_ops import scan  # has no public door

    cell = make_cell(cell_type, inputs.shape[-1], states[0].shape[-1])
    num_states = len(cell.state_names)
    num_directions = len(states) // num_states
    num_weights = len(weights) // num_directions
    outputs, final = [], []
    for direction in range(num_directions):
        bare = _BareCell(cell, weights[direction * num_weights : (direction + 1) * num_weights])
        # No result of a scan may be one of its arguments, nor may these be one another.
        own_states = states[direction * num_states : (direction + 1) * num_states]
        initial, first = ([state.clone() for state in own_states] for _ in range(2))
        steps = {"inputs": bare.run("project_inputs", inputs).transpose(0, 1)}
        if mask is not None:
            steps["is_token"] = mask.transpose(0, 1).unsqueeze(-1)
        if starts is not None:
            begins = starts if direction == 0 else nn.functional.pad(starts, (0, 1))[:, 1:]
            steps["begins"] = begins.transpose(0, 1).unsqueeze(-1)

        def step(state, step_inputs, bare=bare, first=first):
            if starts is not None:
                state = [torch.where(step_inputs["begins"], *pair) for pair in zip(first, state)]
            new = bare.run("step", step_inputs["inputs"], tuple(state))
            if mask is not None:
                new = [torch.where(step_inputs["is_token"], *pair) for pair in zip(new, state)]
            return list(new), new[0].clone()

        # Sizes that differ from scan to scan would become variables of the graph.
        with config.patch(automatic_dynamic_shapes=False):
            last, shown = scan(step, initial, steps, reverse=direction == 1)
        outputs.append(shown.transpose(0, 1))
        final.extend(last)
    return [torch.cat(outputs, dim=-1), *final]
