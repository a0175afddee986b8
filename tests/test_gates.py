"""`output_gates`: what the gates of every layer were at every token."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel

from clients import LowRankCell
from hf_rnn import RECURRENT_CELLS, recurrent_kernels
from hf_rnn.recurrent_cells import LSTMCell, RecurrentCell
from matrix import make_mask, make_model, make_tokens
from reference import CELL_GATES, CELL_STEPS, NUM_STATES, part, to_numpy


CELLS = pytest.mark.parametrize("cell_type", RECURRENT_CELLS)


def reference_gates(model, layer_idx: int, inputs: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """The gates of one layer in NumPy, token by token; zero at padding."""
    config, layer = model.config, model.layers[layer_idx]
    gates = {}
    for cell_name, suffix in (("cell", ""), ("cell_reverse", "_reverse"))[: 1 + config.bidirectional]:
        weights = part(to_numpy(model), f"layers.{layer_idx}.{cell_name}")
        values = np.zeros((len(layer.cell.gate_names), *inputs.shape[:2], config.hidden_size))
        for row, tokens in enumerate(mask.astype(bool)):
            state = tuple(np.zeros(config.hidden_size) for _ in range(NUM_STATES[config.cell_type]))
            for position in np.flatnonzero(tokens)[:: -1 if suffix else 1]:
                x = inputs[row, position]
                values[:, row, position] = CELL_GATES[config.cell_type](weights, x, state)
                state = CELL_STEPS[config.cell_type](weights, x, state)
        gates |= {name + suffix: value for name, value in zip(layer.cell.gate_names, values)}
    return gates


@CELLS
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one_direction", "two_directions"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_gates_are_those_of_the_equations(cell_type, bidirectional, padded):
    """In every layer, from the inputs that the layer had; the outputs are those without the option."""
    model = make_model("RNNModel", cell_type=cell_type, bidirectional=bidirectional, residual=True, num_hidden_layers=3)
    tokens, mask = make_tokens(6, 7), make_mask(7) if padded else torch.ones(6, 7, dtype=torch.long)
    outputs = model(tokens, mask, output_gates=True, output_hidden_states=True)
    assert len(outputs.gates) == 3
    for layer_idx, gates in enumerate(outputs.gates):
        expected = reference_gates(model, layer_idx, outputs.hidden_states[layer_idx].detach().numpy(), mask.numpy())
        assert list(gates) == list(expected)
        for name, values in gates.items():
            np.testing.assert_allclose(values.detach().numpy(), expected[name], rtol=1e-10, atol=1e-12, err_msg=name)
    plain = model(tokens, mask)
    assert "gates" not in plain
    assert len(plain.to_tuple()) == len(outputs.to_tuple()) - 2
    torch.testing.assert_close(outputs.last_hidden_state, plain.last_hidden_state)


@CELLS
def test_gates_lead_from_state_to_state(cell_type):
    """The states that the gates make, from the first token on, are the outputs, and at the end the cache."""
    model = make_model("RNNForCausalLM", cell_type=cell_type, num_hidden_layers=2)
    outputs = model(make_tokens(3, 6), output_gates=True, output_hidden_states=True, use_cache=True)
    for layer_idx, gates in enumerate(outputs.gates):
        state = tuple(torch.zeros(3, 6, dtype=torch.float64) for _ in range(NUM_STATES[cell_type]))
        for position in range(6):
            now = {name: values[:, position] for name, values in gates.items()}
            if cell_type == "lstm":  # C_t = f*C_{t-1} + i*C~, h_t = o*tanh(C_t)
                cell_state = now["forget"] * state[1] + now["input"] * now["cell"]
                state = now["output"] * torch.tanh(cell_state), cell_state
            elif cell_type == "gru":
                state = ((1 - now["update"]) * now["new"] + now["update"] * state[0],)
            else:
                state = (now["hidden"],)
            torch.testing.assert_close(state[0], outputs.hidden_states[layer_idx + 1][:, position])
        kept = outputs.past_key_values.layers[layer_idx]
        torch.testing.assert_close(torch.cat([kept.keys, kept.values], dim=-1), torch.cat(state, dim=-1))


@CELLS
def test_gates_do_not_depend_on_neighbours_or_cuts(cell_type):
    """A row's gates alone, in chunks with the state carried, and with two texts in one row are the same."""
    model = make_model("RNNForCausalLM", cell_type=cell_type)
    tokens, mask = make_tokens(6, 7), make_mask(7)
    together = model(tokens, mask, output_gates=True).gates
    for row in range(5):
        alone = model(tokens[row : row + 1, mask[row].bool()], output_gates=True).gates
        for one, many in zip(alone, together):
            for name, values in many.items():
                torch.testing.assert_close(one[name][0], values[row, mask[row].bool()])
                assert not values[row, ~mask[row].bool()].any()
    first = model(tokens[:, :3], mask[:, :3], use_cache=True, output_gates=True)
    second = model(tokens[:, 3:], mask, past_key_values=first.past_key_values, output_gates=True)
    for before, after, whole in zip(first.gates, second.gates, together):
        for name, values in whole.items():
            torch.testing.assert_close(torch.cat([before[name], after[name]], dim=1), values)
    packed = model(tokens.view(3, 14), position_ids=torch.arange(7).repeat(2)[None], output_gates=True).gates
    for one_row, whole in zip(packed, model(tokens, output_gates=True).gates):
        for name, values in whole.items():
            torch.testing.assert_close(one_row[name].view_as(values), values)
    assert model(tokens[:, :0], output_gates=True).gates[0].keys() == together[0].keys()


def test_gates_take_gradients():
    """Those of a loss on the gates are the central differences of it."""
    model = make_model("RNNModel", cell_type="lstm", bidirectional=True)
    tokens, mask = make_tokens(6, 7), make_mask(7)

    def loss():
        gates = model(tokens, mask, output_gates=True).gates
        return sum(
            (index + 1) * values.square().sum() for layer in gates for index, values in enumerate(layer.values())
        )

    weight = model.layers[0].cell.weight_hh
    loss().backward()
    move = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=weight.dtype)
    values = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            weight.add_(step * move)
            values.append(loss().item())
    assert (weight.grad * move).sum().item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


def test_only_the_option_leaves_the_fast_path(monkeypatch):
    """Without it, or with False, torch's kernel runs; the configuration may ask for gates as well."""
    calls = []
    kernel = recurrent_kernels.call_torch_kernel
    monkeypatch.setattr(recurrent_kernels, "call_torch_kernel", lambda *args: calls.append(1) or kernel(*args))
    model, tokens = make_model("RNNModel"), make_tokens(2, 5)
    model(tokens, output_gates=True)
    assert not calls
    assert "gates" not in model(tokens, output_gates=False)
    assert len(calls) == model.config.num_hidden_layers
    model.config.output_gates = True
    assert len(model(tokens).gates) == model.config.num_hidden_layers
    assert len(model(tokens, return_dict=False)) == 3  # output, state, gates
    assert len(calls) == model.config.num_hidden_layers


def test_generate_is_as_without():
    """Sampling with a seed and beams write the same; `torch.compile` without graph breaks gives the same gates."""
    model, prompt = make_model("RNNForCausalLM", eos_token_id=None), make_tokens(2, 4)
    for options in ({"do_sample": True}, {"num_beams": 3}):
        torch.manual_seed(0)
        plain = model.generate(prompt, max_new_tokens=5, **options)
        torch.manual_seed(0)
        assert torch.equal(model.generate(prompt, max_new_tokens=5, output_gates=True, **options), plain)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected = model(prompt, output_gates=True).gates
    torch.testing.assert_close(compiled(prompt, output_gates=True).gates, expected)
    assert "gates" not in compiled(prompt)


class MinimalGatedCell(RecurrentCell):
    """A user's cell that tells its gates: f = sigmoid(W_f x + U_f h), n = tanh(W_n x + U_n h), h' = (1 - f) h + f n"""

    gate_names = ("forget", "new")

    def gate_values(self, projected, state, linear=F.linear):
        forget, new = (projected + linear(state[0], self.weight_hh, self.bias_hh)).chunk(2, dim=-1)
        return torch.sigmoid(forget), torch.tanh(new)

    def next_state(self, gates, state):
        return (torch.lerp(state[0], gates[1], gates[0]),)


class CoupledCell(LSTMCell):
    """A variant of a cell that changes half of a step: C_t = f*C_{t-1} + (1 - f)*C~"""

    def next_state(self, gates, state):
        _, forget, new, output = gates
        cell_state = forget * state[1] + (1 - forget) * new
        return output * torch.tanh(cell_state), cell_state


def test_cells_of_users(monkeypatch, tmp_path):
    """A cell of two halves has gates and no kernel; one with a `step` of its own works, and is told what it lacks."""
    monkeypatch.setitem(RECURRENT_CELLS, "minimal_gated", MinimalGatedCell)
    monkeypatch.setitem(RECURRENT_CELLS, "coupled", CoupledCell)
    monkeypatch.setitem(RECURRENT_CELLS, "low_rank", LowRankCell)
    assert CoupledCell.torch_kernel is None
    tokens, mask = make_tokens(6, 7), make_mask(7)
    for cell_type, name in (("minimal_gated", "forget"), ("coupled", "output")):
        model = make_model("RNNModel", cell_type=cell_type, num_hidden_layers=1)
        model.save_pretrained(tmp_path / cell_type)
        model = AutoModel.from_pretrained(tmp_path / cell_type).eval()
        outputs = model(tokens, mask, output_gates=True, use_cache=False)
        assert 0 < outputs.gates[0][name][mask.bool()].min() <= outputs.gates[0][name].max() < 1
        torch.testing.assert_close(outputs.last_hidden_state, model(tokens, mask).last_hidden_state)
        state = torch.zeros(6, dtype=torch.float64)
        for values in zip(*(values[0] for values in outputs.gates[0].values())):  # the first row has no padding
            if cell_type == "coupled":
                state = values[1] * state + (1 - values[1]) * values[2]
                hidden = values[3] * torch.tanh(state)
            else:
                hidden = state = (1 - values[0]) * state + values[0] * values[1]
        torch.testing.assert_close(hidden, outputs.last_hidden_state[0, -1])
    model = make_model("RNNModel", cell_type="low_rank")
    assert model(tokens).last_hidden_state.isfinite().all()
    with pytest.raises(ValueError, match=r"`output_gates` must not be True with LowRankCell.*`gate_values`"):
        model(tokens, output_gates=True)
