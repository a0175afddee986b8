"""Memory of training on long texts, and of attending to them."""

import torch

from hf_rnn import attention

from .harness import Measurement, Settings, benchmark, peak_megabytes
from .language_model import make_language_model


def prepare_training(settings: Settings, checkpointing: bool, num_layers: int, batch: int, seq: int):
    """A forward and backward of a language model, with or without gradient checkpointing."""
    torch.manual_seed(0)
    model = make_language_model(settings, num_hidden_layers=num_layers).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    input_ids = torch.randint(3, model.config.vocab_size, (batch, seq), device=settings.device)

    def run():
        model(input_ids=input_ids, labels=input_ids).loss.backward()

    return run


@benchmark(
    "checkpointing",
    "peak memory of a training step, T = 1,024, 4 layers, checkpointed / not",
    {"cpu": 0.40, "cuda": 0.40},
    num_layers=4,
)
@benchmark(
    "checkpointing-2",
    "the same, 2 layers",
    {"cpu": 0.40, "cuda": 0.40},
    num_layers=2,
)
def checkpointing(settings: Settings, num_layers: int) -> Measurement:
    """What a forward and backward add to the model, batch 16, hidden 512; the floor are the gradients."""
    batch, seq = settings.size((16, 1024), (4, 64))
    sizes = {"num_layers": num_layers, "batch": batch, "seq": seq}
    without, with_checkpoints = (
        peak_megabytes(prepare_training, settings, checkpointing=checkpointing, **sizes)
        for checkpointing in (False, True)
    )
    without = max(without, 1e-3)
    model = make_language_model(settings, num_hidden_layers=num_layers)
    gradients = sum(parameter.numel() for parameter in model.parameters()) * 4 / 2**20
    note = f"{with_checkpoints:.0f} of {without:.0f} MB"
    return Measurement(with_checkpoints / without, floor=gradients / without, note=note)


def prepare_attention(
    settings: Settings, kept: bool, score: str, coverage: bool, batch: int, target: int, source: int, hidden: int
):
    """A forward and backward of additive attention, with all tanh kept or computed again."""
    torch.manual_seed(0)
    if kept:
        attention.MOST_TANH_KEPT = 2**62
    attend = attention.Attention(attention.ATTENTION_SCORES[score](hidden, hidden), coverage).to(settings.device)
    torch.nn.init.normal_(attend.score.vector)
    if coverage:
        torch.nn.init.normal_(attend.coverage.weight)
    queries, features = (
        torch.randn(batch, length, hidden, device=settings.device, requires_grad=True) for length in (target, source)
    )

    def run():
        context, *_ = attend.walk(queries, attend.prepare(features, None))
        context.sum().backward()

    return run


@benchmark(
    "additive-memory",
    "peak memory of additive attention, forward and backward, T = 64, S = 100, computed again / kept",
    {"cpu": 0.15, "cuda": 0.75},
    score="additive",
    coverage=False,
)
@benchmark(
    "coverage-memory",
    "the same with coverage, position by position",
    {"cpu": 0.25, "cuda": 0.75},
    score="additive",
    coverage=True,
)
@benchmark(
    "location-memory",
    "the same of location-aware attention, position by position",
    {"cpu": 0.50, "cuda": 0.75},
    score="location",
    coverage=False,
)
def additive(settings: Settings, score: str, coverage: bool) -> Measurement:
    """Batch 32, hidden 512; the floor are the gradients of queries, features and weights, and the projected keys."""
    batch, target, source, hidden = settings.size((32, 64, 100, 512), (2, 8, 8, 16))
    sizes = {"score": score, "coverage": coverage, "batch": batch, "target": target, "source": source, "hidden": hidden}
    most = attention.MOST_TANH_KEPT
    try:
        kept, again = (
            max(peak_megabytes(prepare_attention, settings, kept=kept, **sizes), 1e-3) for kept in (True, False)
        )
    finally:
        attention.MOST_TANH_KEPT = most  # set in this process where the sizes are tiny
    floor = 4 / 2**20 * (batch * (2 * target + 3 * source) * hidden + 2 * hidden**2)
    return Measurement(again / kept, floor=floor / kept, note=f"{again:.0f} of {kept:.0f} MB")
