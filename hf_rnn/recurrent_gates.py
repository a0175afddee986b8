"""The gates of a layer at every position, for `output_gates`. Imports the cells, what runs them and the padding.

The cells run as the plain loop over their steps, and what the gates were is noted on the way: the values are those that
the outputs were made of.
"""

from collections.abc import Sequence

import torch

from .packed_sequences import PackedPadding
from .recurrent_cells import Linear, RecurrentCell, State
from .recurrent_kernels import run_sequence
from .recurrent_padding import Padding


Gates = dict[str, torch.Tensor]


class _NotedCell:
    """A cell as [`run_sequence`] sees it, which keeps the gates of each step and leaves only the loop to choose."""

    torch_kernel = None

    def __init__(self, cell: RecurrentCell):
        if type(cell).step is not RecurrentCell.step:
            raise ValueError(
                f"`output_gates` must not be True with {type(cell).__name__}, whose `step` does not tell its gates: "
                "write the two methods `gate_values` and `next_state` in place of `step`."
            )
        self.cell = cell
        self.state_names, self.hidden_size = cell.state_names, cell.hidden_size
        self.steps: list[State] = []  # in order of reading

    def project_inputs(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.cell.project_inputs(inputs)

    def step(self, projected: torch.Tensor, state: State, linear: Linear) -> State:
        gates = self.cell.gate_values(projected, state, linear)
        self.steps.append(gates)
        return self.cell.next_state(gates, state)


def run_with_gates(
    cells: Sequence[RecurrentCell],
    inputs: torch.Tensor,
    state: State,
    padding: Padding | None = None,
    kept: Sequence[torch.Tensor] = (),
    needs_state: bool = True,
    needs_history: bool = False,
) -> tuple[torch.Tensor, State, State | None, Gates]:
    """
    [`run_sequence`] by the plain loop, and the gates.

    Returns:
        What [`run_sequence`] returns, and for each of `gate_names` the values `(batch, seq, hidden_size)`, zero at
        padding, where no step is taken; those of the second cell under the same names with `_reverse` behind them.

    Raises:
        `ValueError`: The `step` of a cell does not consist of `gate_values` and `next_state`.
    """
    noted = [_NotedCell(cell) for cell in cells]
    results = run_sequence(noted, inputs, state, padding, kept, needs_state, needs_history)
    gates = {}
    for cell, suffix in zip(noted, ("", "_reverse")):
        steps = list(zip(*(reversed(cell.steps) if suffix else cell.steps)))
        for index, name in enumerate(cell.cell.gate_names):
            if not steps:
                gates[name + suffix] = inputs.new_empty(*inputs.shape[:2], cell.hidden_size)
                continue
            values = torch.stack(steps[index], dim=1)
            if isinstance(padding, PackedPadding):
                values = padding.join(values)
            if padding is not None:
                values = values.masked_fill(~padding.mask.unsqueeze(-1), 0)
            gates[name + suffix] = values
    return *results, gates
