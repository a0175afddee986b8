"""Layouts of weights: what each computes, and how one of them is chosen."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_rnn import fast_paths, hyperbolic_tangent, large_products, packed_linear, weight_layouts
from hf_rnn.weight_layouts import ONEDNN, PLAIN, TRANSPOSED, has_onednn, layout_for, multiply, pack
from matrix import ON_A_CPU


pytestmark = ON_A_CPU


@pytest.fixture
def measured(monkeypatch):
    """The names among which one was chosen by time, each time; it is always the last one."""
    choices = []

    def fastest(functions):
        choices.append(tuple(functions))
        for function in functions.values():
            function()
        return choices[-1][-1]

    monkeypatch.setattr(weight_layouts, "_layouts", {})
    monkeypatch.setattr(weight_layouts, "fastest", fastest)
    return choices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize("layout", [PLAIN, TRANSPOSED, ONEDNN])
def test_products(dtype, rows, layout):
    """With a weight in one piece, the transposed one of such a weight, and columns of a larger one."""
    if layout == ONEDNN and not has_onednn(dtype):
        pytest.skip("Torch has no operators of oneDNN here.")
    bias, inputs = torch.randn(70, dtype=dtype), torch.randn(rows, 40, dtype=dtype)
    for weight in (torch.randn(70, 40), torch.randn(40, 70).t(), torch.randn(70, 50)[:, 10:]):
        weight = weight.to(dtype)
        packed = weight if layout == PLAIN else pack(weight, layout)
        assert packed.shape == weight.shape
        tolerance = 1e-5 if dtype == torch.float32 else 0.3
        for b in (bias, None, torch.randn(140).to(dtype)[::2]):
            expected = F.linear(inputs.double(), weight.double(), None if b is None else b.double())
            actual = multiply(inputs, packed, b)
            torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def test_a_copy_is_a_copy():
    for layout in (TRANSPOSED, *([ONEDNN] if has_onednn(torch.float32) else [])):
        for weight in (torch.ones(64, 32), torch.ones(32, 64).t()):
            packed = pack(weight, layout)
            weight.zero_()
            torch.testing.assert_close(multiply(torch.ones(1, 32), packed), torch.full((1, 64), 32.0))


def test_the_layout_is_measured_once_for_sizes_and_rows(measured):
    weight = torch.randn(512, 512)
    for rows, number in ((1, 1), (1, 1), (5, 2), (8, 2), (6, 2), (9, 3), (300, 4), (2000, 4)):
        layout_for(torch.ones(rows, 512), weight)
        assert len(measured) == number
    layout_for(torch.ones(4, 2, 512), torch.zeros(512, 512))
    assert len(measured) == 4
    layout_for(torch.ones(8, 512), torch.randn(1024, 512))
    layout_for(torch.ones(8, 512, dtype=torch.bfloat16), weight.bfloat16())
    assert len(measured) == 6


def test_what_is_chosen_from(measured):
    """A weight that lies column by column already needs no copy for that."""
    names = (PLAIN, TRANSPOSED) + ((ONEDNN,) if has_onednn(torch.float32) else ())
    for weight in (torch.randn(512, 768), torch.randn(512, 1024)[:, 256:]):
        assert layout_for(torch.ones(8, 768), weight) == names[-1]
        assert measured[-1] == names
    for weight in (torch.randn(768, 768), torch.randn(768, 512)):
        layout_for(torch.ones(8, weight.shape[1]), weight)
        layout_for(torch.ones(8, weight.shape[0]), weight.t())
        assert measured[-2:] == [names, tuple(name for name in names if name != TRANSPOSED)]


def test_what_is_not_measured(measured):
    """Small products, other types and devices, what is under autocast, and nothing where all is to be deterministic."""
    weight, inputs = torch.randn(512, 512), torch.ones(1, 512)
    assert layout_for(inputs, weight[:511]) == PLAIN
    assert layout_for(inputs.double(), weight.double()) == PLAIN
    assert layout_for(inputs.half(), weight.half()) == PLAIN
    assert layout_for(inputs.bfloat16(), weight) == PLAIN
    assert layout_for(inputs.to("meta"), weight.to("meta")) == PLAIN
    assert layout_for(inputs[:0], weight) == PLAIN
    assert layout_for(torch.ones(3, 0), torch.ones(5, 0)) == PLAIN
    with torch.autocast("cpu"):
        assert layout_for(inputs, weight) == PLAIN
    assert not measured
    assert layout_for(inputs, weight) != PLAIN
    torch.use_deterministic_algorithms(True)
    try:
        assert layout_for(inputs, weight) == PLAIN
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(measured) == 1


def test_nothing_else_is_chosen_by_time_where_all_is_to_be_deterministic(monkeypatch):
    monkeypatch.setattr(large_products, "onednn_pays", lambda num_threads: True)
    monkeypatch.setattr(hyperbolic_tangent, "sigmoid_pays", lambda dtype: True)
    inputs = torch.ones(512, 512)
    for is_asked_for in (False, True):
        torch.use_deterministic_algorithms(is_asked_for)
        try:
            assert large_products.takes_onednn(inputs, inputs) != is_asked_for
            assert hyperbolic_tangent._takes_sigmoid(inputs) != is_asked_for
        finally:
            torch.use_deterministic_algorithms(False)


def test_without_the_private_operators(monkeypatch):
    """Where torch has none or they are wrong, there is one layout less."""
    by_onednn = weight_layouts.by_onednn
    for stand_in in (
        lambda *arguments: torch.ops.mkldnn._no_such_operator(*arguments),
        lambda *arguments: by_onednn(*arguments) + 1,
    ):
        monkeypatch.setattr(weight_layouts, "by_onednn", stand_in)
        monkeypatch.setattr(weight_layouts, "_layouts", {})
        has_onednn.cache_clear()
        large_products.onednn_pays.cache_clear()
        try:
            assert not has_onednn(torch.float32)
            assert not large_products.onednn_pays(1)
            weight, inputs = nn.Parameter(torch.randn(512, 512)), torch.randn(2, 512)
            with torch.no_grad():
                for _ in range(3):
                    actual = packed_linear.packed_linear(inputs, weight)
                    torch.testing.assert_close(actual, F.linear(inputs, weight), rtol=1e-4, atol=1e-4)
            assert set(weight_layouts._layouts.values()) <= {PLAIN, TRANSPOSED}
        finally:
            has_onednn.cache_clear()
            large_products.onednn_pays.cache_clear()


def test_the_fastest(monkeypatch):
    """The first one, unless another is clearly faster."""
    now = [0.0]
    for clock in ("perf_counter", "thread_time"):
        monkeypatch.setattr(fast_paths.time, clock, lambda: now[0])

    def taking(seconds):
        return lambda: now.__setitem__(0, now[0] + seconds)

    assert fast_paths.fastest({"one": taking(1)}) == "one"
    assert fast_paths.fastest({"one": taking(1), "two": taking(0.95)}) == "one"
    assert fast_paths.fastest({"one": taking(1), "two": taking(0.8)}) == "two"
    assert fast_paths.fastest({"one": taking(1e-4), "two": taking(8e-5), "three": taking(7e-5)}) == "three"
    assert fast_paths.is_faster(taking(0.8), taking(1))
    assert not fast_paths.is_faster(taking(0.95), taking(1))


def test_random_numbers_stay_as_they_are():
    """To measure draws none."""
    weight_layouts._layouts.clear()
    has_onednn.cache_clear()
    state = torch.get_rng_state()
    layout_for(torch.ones(8, 512), torch.ones(512, 512))
    assert torch.equal(state, torch.get_rng_state())
