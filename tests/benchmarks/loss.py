"""
The loss of a language model, forward and backward from the hidden states on, against plain cross-entropy: time, and the
memory on top of what was there before, gradients included.

Also a program of its own for other sizes:
python tests/benchmarks/loss.py [--threads N] [--rounds N] [--vocab_size N]... [--rows N] [--hidden_size N]
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import (
    Benchmark,
    Measurement,
    Settings,
    Skipped,
    benchmark,
    cells_of,
    check_equal,
    markdown_line,
    matrix_products,
    measure,
    peak_megabytes,
)


def plain_cross_entropy(hidden_states, weight, bias, labels):
    """What the stock losses do."""
    return F.cross_entropy(F.linear(hidden_states, weight, bias), labels)


def chunked_cross_entropy(hidden_states, weight, bias, labels):
    """What models of the library do while training."""
    try:
        from hf_rnn.vocabulary_loss import linear_cross_entropy
    except ImportError:
        raise Skipped("there is no hf_rnn.vocabulary_loss") from None
    return linear_cross_entropy(hidden_states, weight, bias, labels)


def torch_cross_entropy(hidden_states, weight, bias, labels):
    """What torch has for the same purpose since 2.13."""
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        raise Skipped(f"torch {torch.__version__} has no loss in chunks")
    options = nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden_states, weight, labels, linear_bias=bias, options=options)


VARIANTS = {"plain": plain_cross_entropy, "chunked": chunked_cross_entropy, "torch": torch_cross_entropy}


def prepare_loss(settings: Settings, variant: str, vocab_size: int, rows: int, hidden_size: int, ignored: float):
    """A forward and backward, which returns loss and gradients."""
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(rows, hidden_size, generator=generator).to(settings.device).requires_grad_()
    weight = torch.randn(vocab_size, hidden_size, generator=generator).mul_(0.05).to(settings.device).requires_grad_()
    bias = torch.zeros(vocab_size, device=settings.device, requires_grad=True)
    labels = torch.randint(0, vocab_size, (rows,), generator=generator)
    labels[: int(rows * ignored)] = -100
    labels = labels.to(settings.device)

    def run():
        loss = VARIANTS[variant](hidden_states, weight, bias, labels)
        return loss.detach(), *torch.autograd.grad(loss, [hidden_states, weight, bias])

    return run


SIZES = {"rows": 1600, "hidden_size": 512, "ignored": 0.0}
GOAL_TIME, GOAL_MEMORY, GOAL_VOCABULARY = 0.80, 0.25, 32_000


@benchmark(
    "loss-time",
    "loss, vocabulary 32,000, 1,600 rows / plain cross-entropy",
    {"cpu": GOAL_TIME, "cuda": None},
    vocab_size=GOAL_VOCABULARY,
    **SIZES,
)
@benchmark(
    "loss-time-padding",
    "the same, of which 30 % are padding",
    {"cpu": GOAL_TIME, "cuda": None},
    vocab_size=GOAL_VOCABULARY,
    **(SIZES | {"ignored": 0.3}),
)
@benchmark(
    "loss-time-torch",
    "loss, vocabulary 32,000, 1,600 rows / torch's own in chunks",
    {"cpu": None, "cuda": None},
    baseline="torch",
    vocab_size=GOAL_VOCABULARY,
    **SIZES,
)
def loss_time(settings: Settings, baseline: str = "plain", **sizes) -> Measurement:
    """Time, where the floor is three products for each row that has a label."""
    sizes |= settings.size({}, {"vocab_size": 50, "rows": 7, "hidden_size": 6})
    theirs, ours = (prepare_loss(settings, variant, **sizes) for variant in (baseline, "chunked"))
    check_equal("losses and gradients", ours(), theirs(), 1e-3)
    rows = round(sizes["rows"] * (1 - sizes["ignored"]))
    floor = matrix_products([(rows, sizes["hidden_size"], sizes["vocab_size"])], settings, backward=True)
    return measure(settings, theirs, ours, floor)


@benchmark(
    "loss-memory",
    "extra memory of the loss, vocabulary 32,000 / plain cross-entropy",
    {"cpu": GOAL_MEMORY, "cuda": GOAL_MEMORY},
    vocab_size=GOAL_VOCABULARY,
    **SIZES,
)
def loss_memory(settings: Settings, **sizes) -> Measurement:
    """Memory, where the floor are the gradients."""
    sizes |= settings.size({}, {"vocab_size": 500, "rows": 70, "hidden_size": 16})
    prepare_loss(settings, "chunked", 3, 2, 2, 0.0)()  # whether it is there
    plain, chunked = (
        peak_megabytes(prepare_loss, settings, variant=variant, **sizes) for variant in ("plain", "chunked")
    )
    gradients = (sizes["rows"] * sizes["hidden_size"] + sizes["vocab_size"] * (sizes["hidden_size"] + 1)) * 4 / 2**20
    plain = max(plain, 1e-3)
    return Measurement(chunked / plain, floor=gradients / plain, note=f"{chunked:.0f} of {plain:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--vocab_size", type=int, nargs="+", default=[8_000, 32_000])
    parser.add_argument("--rows", type=int, default=1600)
    parser.add_argument("--hidden_size", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = Settings(options.threads, options.rounds)
    for vocab_size in options.vocab_size:
        has_goal = vocab_size >= GOAL_VOCABULARY
        for ignored in (0.0, 0.3):
            sizes = {"vocab_size": vocab_size, "rows": options.rows, "hidden_size": options.hidden_size}
            sizes["ignored"] = ignored
            for name, run, goal in (("time", loss_time, GOAL_TIME), ("memory", loss_memory, GOAL_MEMORY)):
                compared = f"vocabulary {vocab_size}, {options.rows} rows, {ignored:.0%} ignored"
                line = Benchmark(name, compared, {"cpu": goal if has_goal else None}, "", run)
                try:
                    result = run(settings, **sizes)
                except Skipped as reason:
                    result = reason
                print(markdown_line(cells_of(line, settings, result)), flush=True)


if __name__ == "__main__":
    # By its name in the package, under which the process that measures memory finds it.
    from benchmarks import loss

    loss.main()
