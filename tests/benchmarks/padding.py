"""Batches of sequences of different lengths, forward and backward, against packed `nn.LSTM`."""

import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from hf_rnn import RNNConfig, RNNModel

from .harness import (
    Measurement,
    Settings,
    benchmark,
    check_equal,
    interleave,
    matrix_products,
    measure,
    recurrence_shapes,
    summarize,
)
from .plain import recurrence_of, weights_of


def sentence_lengths(batch: int, longest: int = 30) -> torch.Tensor:
    """Lengths of sentences in a batch as it comes: about 13 tokens, skewed as in translation."""
    lengths = torch.exp(2.5 + 0.4 * torch.randn(batch, generator=torch.Generator().manual_seed(0)))
    return lengths.round().long().clamp(2, longest)


def text_lengths(batch: int, longest: int) -> torch.Tensor:
    """Lengths spread evenly from a quarter of the longest on."""
    return torch.linspace(longest / 4, longest, batch).long()[torch.randperm(batch)]


class _Padded:
    """A model of recurrent layers alone, a batch with padding at the right, and a forward and backward over it."""

    def __init__(self, settings: Settings, lengths: torch.Tensor, hidden_size: int, bidirectional: bool):
        config = RNNConfig(vocab_size=3, hidden_size=hidden_size, num_hidden_layers=1, bidirectional=bidirectional)
        self.model = RNNModel(config).to(settings.device).train()
        self.lengths = lengths
        seq = int(lengths.max())
        self.mask = (torch.arange(seq) < lengths[:, None]).long().to(settings.device)
        self.inputs = torch.randn(len(lengths), seq, hidden_size, device=settings.device, requires_grad=True)
        self.gradient = torch.randn(len(lengths), seq, config.output_size, device=settings.device)
        self.gradient *= self.mask.unsqueeze(-1)

    def _backward(self, outputs, parameters) -> list[torch.Tensor]:
        return torch.autograd.grad(outputs, [self.inputs, *parameters], self.gradient)

    def ours(self):
        """Outputs at tokens, and the gradients of inputs and weights."""
        outputs = self.model(inputs_embeds=self.inputs, attention_mask=self.mask).last_hidden_state
        return outputs.detach() * self.mask.unsqueeze(-1), *self._backward(
            outputs, weights_of(self.model.layers).values()
        )

    def packed(self, recurrence):
        """The same by a packed sequence."""
        packed = pack_padded_sequence(self.inputs, self.lengths, batch_first=True, enforce_sorted=False)
        outputs, _ = pad_packed_sequence(recurrence(packed)[0], batch_first=True)
        return outputs.detach(), *self._backward(outputs, recurrence.parameters())


@benchmark(
    "ragged-13", "ragged, one direction, about 13 tokens / packed nn.LSTM", {"cpu": 0.70, "cuda": None}, longest=13
)
@benchmark(
    "ragged-13-two",
    "ragged, two directions, about 13 tokens / packed nn.LSTM",
    {"cpu": 0.70, "cuda": None},
    longest=13,
    bidirectional=True,
)
@benchmark("ragged-512", "ragged, one direction, T = 512 / packed nn.LSTM", {"cpu": 0.25, "cuda": None}, longest=512)
@benchmark(
    "ragged-512-two",
    "ragged, two directions, T = 512 / packed nn.LSTM",
    {"cpu": 0.25, "cuda": None},
    longest=512,
    bidirectional=True,
)
@benchmark(
    "ragged-1024", "ragged, one direction, T = 1,024 / packed nn.LSTM", {"cpu": 0.15, "cuda": None}, longest=1024
)
@benchmark(
    "ragged-1024-two",
    "ragged, two directions, T = 1,024 / packed nn.LSTM",
    {"cpu": 0.15, "cuda": None},
    longest=1024,
    bidirectional=True,
)
def ragged(settings: Settings, longest: int, bidirectional: bool = False) -> Measurement:
    """Forward and backward of a layer; sentences with batch 64 and hidden 256, texts with batch 16 and hidden 128."""
    if longest == 13:
        batch, hidden_size = settings.size((64, 256), (3, 8))
        lengths = sentence_lengths(batch)
    else:
        batch, hidden_size = settings.size((16, 128), (3, 8))
        lengths = text_lengths(batch, settings.size(longest, 9))
    batch_of = _Padded(settings, lengths, hidden_size, bidirectional)
    recurrence = recurrence_of(batch_of.model.layers)
    check_equal("outputs and gradients", batch_of.ours(), batch_of.packed(recurrence))
    shapes = recurrence_shapes(int(lengths.sum()), hidden_size, hidden_size) * (2 if bidirectional else 1)
    return measure(
        settings,
        lambda: batch_of.packed(recurrence),
        batch_of.ours,
        matrix_products(shapes, settings, backward=True),
        rounds=None if longest == 13 else 5,
    )


@benchmark("ragged-linear", "time per token, one direction, T = 1,024 / T = 512", {"cpu": 1.10, "cuda": 1.10})
@benchmark(
    "ragged-linear-two",
    "time per token, two directions, T = 1,024 / T = 512",
    {"cpu": 1.10, "cuda": 1.10},
    bidirectional=True,
)
def linear_in_time(settings: Settings, bidirectional: bool = False) -> Measurement:
    """Twice the length takes twice the time, where there are twice the tokens."""
    batch, hidden_size, half = settings.size((16, 128, 512), (3, 8, 6))
    lengths = text_lengths(batch, half)
    short, long = (_Padded(settings, lengths * factor, hidden_size, bidirectional) for factor in (1, 2))
    times = interleave({"short": short.ours, "long": long.ours}, settings)
    return summarize([time_long / time_short / 2 for time_short, time_long in zip(times["short"], times["long"])])
