"""What the tutorial's scripts share: their options, a plain training loop, and the verdict at the end."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import set_seed


STARTED = time.perf_counter()


def parse_arguments(description: str, **options) -> argparse.Namespace:
    """
    The options of a script, `--seed`, `--steps` and `--output_dir` among them; `options` are more, name to default.
    Seeds everything.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, help="training steps of each model, where it should be other than usual")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/tutorial"))
    for name, default in options.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    set_seed(arguments.seed)
    return arguments


def train(
    model: nn.Module,
    loss_of_batch: Callable[[], torch.Tensor],
    steps: int,
    learning_rate: float,
    name: str,
    clip: float = 1.0,
) -> list[float]:
    """
    Adam with a rate that rises for a tenth of the steps and then falls to zero. `loss_of_batch()` makes a batch and
    returns its loss. Returns the norm of the gradient before clipping at each step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), 1.0) * (1 - step / steps)
    )
    norms = []
    model.train()
    with tqdm(range(steps), desc=name) as bar:
        for step in bar:
            loss = loss_of_batch()
            loss.backward()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip).item())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}")
    model.eval()
    return norms


def finish(picture: Path, marks: dict[str, bool]) -> None:
    """Prints each pass mark with whether it was met, and ends with the status 0 if all were."""
    for mark, is_met in marks.items():
        print(f"{'passed' if is_met else 'MISSED'}: {mark}")
    seconds, computing = time.perf_counter() - STARTED, time.process_time()
    print(f"{picture}, {seconds:.0f} seconds, of a processor {computing:.0f}")
    sys.exit(0 if all(marks.values()) else 1)
