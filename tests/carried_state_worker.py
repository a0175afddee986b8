"""One process of a data-parallel training with carried state on CPU, for torchrun; see `test_carried_state.py`.

Usage: carried_state_worker.py OUTPUT_FOLDER
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fsdp_worker import full_state, shard_while_loading
from test_carried_state import NAME, make_trainer
from test_laws_distributed import StopAfter


def main(folder: Path) -> None:
    """Trains with two rows on each process, also in two parts and with sharded parameters, and tries what cannot be."""
    options = {"batch_size": 2, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1, "ddp_backend": "gloo"}

    def train(name, resume_from=None, **more):
        trainer = make_trainer(folder / name, **options, **more)
        trainer.train(resume_from_checkpoint=resume_from)
        return trainer

    whole = train("whole")
    assert dist.get_world_size() == 2
    rank = dist.get_rank()
    assert list(whole._carried[True]) == [(2 * rank, 2 * rank + 1)]
    train("parts", trainer={"callbacks": [StopAfter(5)]})
    resumed = train("parts", str(folder / "parts" / "checkpoint-5"))
    if rank == 0:
        torch.save(whole.model.state_dict(), folder / "whole.pt")
        torch.save(resumed.model.state_dict(), folder / "resumed.pt")
    options.pop("save_strategy")  # full checkpoints of sharded parameters are saved otherwise
    sharded = full_state(train("sharded", model=shard_while_loading(NAME, {}, folder / "model")).model)
    if rank == 0:
        torch.save(sharded, folder / "sharded.pt")
    try:
        train("refused", num_streams=2)
    except ValueError as error:
        if rank == 0:
            (folder / "refused.txt").write_text(str(error))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
