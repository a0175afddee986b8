"""
What tests of recordings share: small models, what they compute, and recordings that work everywhere. On a GPU they are
what they are, elsewhere they do their work anew each time they are played.
"""

import pytest
import torch

from hf_rnn import RNNConfig, RNNModel, loop_only, recordings


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, SEQ, HIDDEN = 6, 21, 8


class DoneAnew:
    """
    In the place of a recording: does the same again when played, and leaves the results where they were the first time,
    as a recording does.
    """

    num_bytes = 0

    def __init__(self, function, beside=None):
        self.function, self.has_graph, self.beside = function, torch.is_grad_enabled(), beside
        self.player = function.__self__
        self.name = {"_run": "_outputs", "_differentiate": "_gradients"}[function.__name__]
        self.places = self._do()

    def _do(self) -> list[torch.Tensor]:
        if self.beside is not None:  # the gradients are those of what was computed last
            self.player._outputs = self.beside.results
        with torch.set_grad_enabled(self.has_graph):
            self.function()
        self.results = list(getattr(self.player, self.name))
        return self.results

    def play(self):
        for place, result in zip(self.places, self._do(), strict=True):
            place.data.copy_(result)
        setattr(self.player, self.name, self.places)
        if self.beside is not None:
            self.player._outputs = self.beside.places


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    """An empty recorder, and recordings that work here."""
    monkeypatch.setattr(recordings, "DEVICE_TYPE", DEVICE)
    if DEVICE == "cpu":
        monkeypatch.setattr(recordings, "Recording", DoneAnew)
        monkeypatch.setattr(recordings, "_memory", lambda device: (2**40, 0))
    recordings.recorder.forget()
    yield recordings.recorder
    recordings.recorder.forget()


def make_model(cell_type: str, dtype=torch.float64, **options) -> RNNModel:
    torch.manual_seed(0)
    config = RNNConfig(vocab_size=9, hidden_size=HIDDEN, num_hidden_layers=2, cell_type=cell_type, **options)
    model = RNNModel(config).to(DEVICE, dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def make_inputs(seq: int = SEQ, batch: int = BATCH, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, seq, HIDDEN, dtype=torch.float64, generator=generator).to(DEVICE, dtype)


def results_of(model: RNNModel, inputs: torch.Tensor, mask=None, kept_seed: int | None = None) -> dict:
    """Outputs, states and gradients of everything."""
    inputs = inputs.clone().requires_grad_()
    if kept_seed is not None:
        torch.manual_seed(kept_seed)
    outputs = model(inputs_embeds=inputs, attention_mask=None if mask is None else mask.to(DEVICE), use_cache=True)
    cache = outputs.past_key_values
    states = {f"state {index}": part for index, part in enumerate(parts_of(cache))}
    factors = torch.linspace(-1, 1, outputs.last_hidden_state.numel(), device=DEVICE, dtype=inputs.dtype)
    total = (outputs.last_hidden_state.flatten() * factors).sum() + sum(part.square().sum() for part in states.values())
    model.zero_grad()
    total.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    results = {"outputs": outputs.last_hidden_state, "inputs": inputs.grad} | states | gradients
    return {name: result.detach().clone() for name, result in results.items()}


def parts_of(cache) -> list[torch.Tensor]:
    layers = () if cache is None else cache.layers  # there is none for two directions
    return [part for layer in layers for part in (layer.keys, layer.values) if part is not None]


def assert_same(actual: dict, expected: dict, tolerance: float = 1e-9):
    assert actual.keys() == expected.keys()
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def plain(function, *arguments):
    """What the plain loop gives."""
    with loop_only():
        return function(*arguments)
