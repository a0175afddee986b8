"""Tanh through the sigmoid: the same numbers and derivatives, where it is taken, and in which cases not."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from hf_rnn import hyperbolic_tangent, without_fast_paths
from hf_rnn.hyperbolic_tangent import tanh, tanh_
from hf_rnn.recurrent_cells import LSTMCell
from matrix import cases
from test_laws_paths import check_model


@pytest.fixture
def taken(monkeypatch):
    """Few numbers of any type go through the sigmoid, on every machine; how many calls did."""
    calls = []

    def sigmoid_pays(dtype):
        calls.append(dtype)
        return True

    monkeypatch.setattr(hyperbolic_tangent, "FEWEST", 0)
    monkeypatch.setattr(hyperbolic_tangent, "sigmoid_pays", sigmoid_pays)
    return calls


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-15), (torch.float32, 2e-7), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)],
    ids=str,
)
@pytest.mark.parametrize("function", [tanh, tanh_])
def test_numbers(taken, dtype, tolerance, function):
    """Of all sizes, also where they do not lie side by side; no narrow type loses digits near zero."""
    numbers = torch.cat([torch.linspace(-12, 12, 9001), torch.logspace(-8, 0, 999)]).to(dtype)
    for inputs in (numbers, numbers.view(100, 100)[:, 3:60], numbers.view(100, 100).t()):
        expected = torch.tanh(inputs.double())
        actual = function(inputs.clone(memory_format=torch.preserve_format))
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance)
        if dtype.itemsize == 2:
            torch.testing.assert_close(actual, torch.tanh(inputs), rtol=2 * torch.finfo(dtype).eps, atol=2e-7)
    assert len(taken) >= 3
    limits = function(torch.tensor([torch.inf, -torch.inf, torch.nan, 3e4, -3e4], dtype=dtype))
    assert torch.equal(limits[[0, 1, 3, 4]], torch.tensor([1, -1, 1, -1], dtype=dtype))
    assert limits[2].isnan()


@pytest.mark.parametrize("function", [tanh, lambda inputs: tanh_(inputs + 0)], ids=["tanh", "tanh_"])
def test_derivatives(taken, function):
    """Of the first and the second order, backwards and forwards."""
    inputs = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)
    with torch.no_grad(), forward_ad.dual_level():
        outputs = function(forward_ad.make_dual(inputs.detach(), torch.ones_like(inputs)))
        torch.testing.assert_close(forward_ad.unpack_dual(outputs).tangent, 1 - torch.tanh(inputs) ** 2)
    assert taken
    taken.clear()
    torch.func.vmap(torch.func.grad(lambda row: tanh(row).sum()))(inputs.detach())
    assert not taken


def test_memory_of_the_argument(taken):
    """`tanh` leaves it as it is; `tanh_` writes to it where nothing needs it any more."""
    inputs = torch.randn(50)
    before = inputs.clone()
    tanh(inputs)
    assert torch.equal(inputs, before)
    assert tanh_(inputs).data_ptr() == inputs.data_ptr()
    assert len(taken) == 2


def test_when_it_is_taken(monkeypatch):
    """Many numbers in float32 and narrower, on CPUs, outside of graphs."""
    asked = []
    monkeypatch.setattr(hyperbolic_tangent, "sigmoid_pays", lambda dtype: asked.append(dtype) or True)
    takes, numbers = hyperbolic_tangent._takes_sigmoid, torch.zeros(hyperbolic_tangent.FEWEST)
    assert takes(numbers)
    assert takes(nn.Parameter(numbers))
    assert len(asked) == 2
    assert not takes(numbers[1:])
    assert not takes(numbers.to("meta"))
    assert not takes(numbers.as_subclass(type("Other", (torch.Tensor,), {})))
    with without_fast_paths("tanh_by_sigmoid"):
        assert not takes(numbers)
    assert len(asked) == 2
    monkeypatch.undo()
    assert not takes(numbers.double())
    graph = torch.export.export(_Module(), (numbers,)).graph
    assert torch.ops.aten.tanh.default in [node.target for node in graph.nodes]


class _Module(nn.Module):
    def forward(self, numbers):
        return tanh(numbers)


@pytest.mark.parametrize("faster", [True, False])
def test_the_faster_one_is_taken(monkeypatch, faster):
    monkeypatch.setattr(hyperbolic_tangent, "is_faster", lambda candidate, baseline: faster)
    hyperbolic_tangent.sigmoid_pays.cache_clear()
    assert hyperbolic_tangent.sigmoid_pays(torch.float32) == faster
    hyperbolic_tangent.sigmoid_pays.cache_clear()


@pytest.mark.parametrize(("name", "options"), cases(), ids=str)
def test_models(taken, name, options):
    """Outputs, loss and every gradient of a model in training mode, without torch's kernels."""
    check_model(name, options, taken, ["torch_kernel"])
    assert taken or "rnn_relu" in options.values()


def test_a_cell_with_another_activation(taken):
    """What a program calls `tanh` in a cell of its own is its own."""

    class HardLSTMCell(LSTMCell):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.tanh = nn.Hardtanh()

        def next_state(self, gates, state):
            _, cell = super().next_state(gates, state)
            return gates[3] * self.tanh(cell), cell

    cell = HardLSTMCell(2, 3)
    cell.requires_grad_(False)
    for parameter in cell.parameters():
        parameter.fill_(3)
    hidden, cell_state = cell.step(torch.full((1, 12), 9.0), (torch.ones(1, 3), torch.ones(1, 3)))
    assert torch.equal(hidden, torch.ones(1, 3))
    assert (cell_state > 1.5).all()
    assert taken
