"""Memory of training on long texts."""

import torch

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
