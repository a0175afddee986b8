"""One process of a data-parallel training on CPU, for torchrun: trains models as `test_laws_distributed.py` does.

Usage: ddp_worker.py OUTPUT_FOLDER CASE..., where a case is a key of `CASES` there.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from test_laws_distributed import BATCH, CASES, check_resuming, train_one_step


def main(folder: Path, names: list[str]) -> None:
    """Trains each case with half of the batch on each process; the first saves the weights. Then law 8 on both."""
    for name in names:
        for steps in (1, 2):
            model = train_one_step(*CASES[name], folder, batch_size=BATCH // 2 // steps, accumulation_steps=steps)
            assert dist.get_world_size() == 2
            if dist.get_rank() == 0:
                torch.save(model.state_dict(), folder / f"{name}-{steps}.pt")
        check_resuming(*CASES[name], folder / name)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
