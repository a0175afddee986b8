"""Rows that beams have in common: known as long as they are the same, and multiplied once."""

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_rnn import RECURRENT_CELLS, packed_linear, repeated_rows, without_fast_paths
from hf_rnn.repeated_rows import different_rows, select_rows
from hf_rnn.weight_layouts import TRANSPOSED
from matrix import GENERATIVE, make_inputs, make_mask, make_model


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch):
    monkeypatch.setattr(repeated_rows, "FEWEST_NUMBERS", 1)
    monkeypatch.setattr(repeated_rows, "_known", {})
    monkeypatch.setattr(repeated_rows, "_last", None)


@pytest.fixture
def rows_multiplied(monkeypatch):
    """How many rows each product of a single step had; with products that work everywhere."""
    numbers = []

    def multiply(inputs, packed, bias=None):
        numbers.append(inputs.shape[0])
        return F.linear(inputs, packed, bias)

    for name, stand_in in {
        "pack": lambda weight, layout: weight.detach().clone(),
        "multiply": multiply,
        "is_large": lambda inputs, weight: True,
        "layout_for": lambda inputs, weight: TRANSPOSED,
        "_copies": {},
    }.items():
        monkeypatch.setattr(packed_linear, name, stand_in)
    return numbers


INDEX = torch.tensor([2, 2, 0, 5, 5, 5, 0, 2, 2, 2])


@torch.no_grad()
def test_rows_and_places():
    states = torch.randn(6, 4)
    selected = select_rows(states, INDEX)
    assert torch.equal(selected, states[INDEX])
    rows, places = different_rows(selected)
    assert torch.equal(rows[:3], states[[2, 0, 5]])
    assert len(rows) == repeated_rows.MULTIPLE
    assert torch.equal(rows[places], selected)
    assert different_rows(states) is None
    assert different_rows(selected.clone()) is None


@torch.no_grad()
def test_what_is_not_known(monkeypatch):
    states = torch.randn(20, 4)
    assert different_rows(select_rows(states, torch.arange(20))) is None
    most = torch.arange(20)
    most[:2] = 7  # the third of its kind
    assert different_rows(select_rows(states, most)) is not None
    most[1] = 1
    assert different_rows(select_rows(states, most)) is None  # the same index, which somebody has changed
    assert different_rows(select_rows(states.view(20, 2, 2), INDEX)) is None
    with torch.enable_grad():
        assert different_rows(select_rows(states, INDEX)) is None
    with torch.inference_mode():
        assert different_rows(select_rows(states.clone(), INDEX.clone())) is None
    selected = select_rows(states, INDEX)
    with without_fast_paths("repeated_rows"):
        assert different_rows(selected) is None
        assert different_rows(select_rows(states, INDEX)) is None
    assert different_rows(selected) is not None
    selected[0, 0] += 1
    assert different_rows(selected) is None
    monkeypatch.setattr(repeated_rows, "FEWEST_NUMBERS", INDEX.numel() * 4 + 1)
    assert different_rows(select_rows(states, INDEX)) is None


@torch.no_grad()
def test_goes_with_its_tensor():
    selected = select_rows(torch.randn(6, 4), INDEX)
    assert len(repeated_rows._known) == 1
    del selected
    gc.collect()
    assert not repeated_rows._known


@torch.no_grad()
def test_products(rows_multiplied):
    weight, bias = nn.Parameter(torch.randn(5, 4)), torch.randn(5)
    selected = select_rows(torch.randn(6, 4), INDEX)
    for _ in range(3):
        product = packed_linear.packed_linear(selected, weight, bias)
        torch.testing.assert_close(product, F.linear(selected, weight, bias))
    assert rows_multiplied == [repeated_rows.MULTIPLE] * 3


@pytest.mark.parametrize("cell_type", RECURRENT_CELLS)
@pytest.mark.parametrize("name", GENERATIVE)
def test_beams(name, cell_type, rows_multiplied):
    """The same numbers from fewer products, with any cell."""
    model = make_model(name, cell_type=cell_type)
    inputs = {"input_ids": make_inputs(name, batch=6, with_labels=False)["input_ids"], "attention_mask": make_mask()}
    options = {"max_new_tokens": 6, "num_beams": 4, "return_dict_in_generate": True, "output_scores": True}
    results, numbers = [], []
    for paths in ([], ["repeated_rows"]):
        with without_fast_paths(*paths or ["crf_products"]):
            model.generate(**inputs, **options)  # makes copies of the weights
            rows_multiplied.clear()
            results.append(model.generate(**inputs, **options))
            numbers.append(list(rows_multiplied))
    assert torch.equal(results[0].sequences, results[1].sequences)
    torch.testing.assert_close(results[0].scores, results[1].scores, rtol=1e-9, atol=1e-10)
    assert len(numbers[0]) == len(numbers[1])
    assert sum(numbers[0]) < sum(numbers[1])
