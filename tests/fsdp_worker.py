"""One process of a training with sharded parameters (FSDP2) on CPU, for torchrun; see `test_laws_distributed.py`.

Usage: fsdp_worker.py OUTPUT_FOLDER CASE..., where a case is a key of `CASES` there.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import default_data_collator
from transformers.distributed import DistributedConfig

from matrix import GENERATIVE, make_model, make_tokens
from test_laws_distributed import BATCH, CASES, loss_without_head, make_examples, train_one_step


def full_state(model):
    """The weights, put together on every process."""
    return {key: weight.full_tensor() for key, weight in model.state_dict().items()}


def shard_by_hand(name, options, seed=0):
    """
    A model whose parameters are shared out with torch alone: each layer by itself, and what is left. After a forward
    nothing is left of any of them.
    """
    model = make_model(name, seed=seed, **options).train()
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module)
    return fully_shard(model, reshard_after_forward=True)


def shard_while_loading(name, options, folder):
    """A model whose parameters transformers shares out while it loads them, as the configuration plans it."""
    if dist.get_rank() == 0:
        make_model(name, **options).save_pretrained(folder)
    dist.barrier()
    model_class = type(make_model(name, **options))
    config = DistributedConfig(fsdp_size=dist.get_world_size())
    return model_class.from_pretrained(folder, distributed_config=config, dtype=torch.float64)


def loss_of(model, batch, name, all_labels):
    """The part that a batch has in the loss of all examples: by labels, or for spans by rows."""
    if all_labels is None:
        return model(**batch).loss * len(batch["input_ids"]) / BATCH
    num_items = (all_labels[..., 1 if name == "RNNForCausalLM" else 0 :] != -100).sum()
    headless = loss_without_head(name)
    if headless:
        return headless["compute_loss_func"](model(**batch), batch["labels"], num_items)
    outputs = model(**batch, num_items_in_batch=num_items)
    # FSDP hangs hooks on all outputs, and does not compute logits by that.
    assert getattr(outputs.get("logits"), "waits", True)
    return outputs.loss


def train_by_hand(model, optimizer, name, options, accumulation_steps=1):
    """One step on all examples, which processes and accumulated steps share."""
    examples = make_examples(name, options)
    all_labels = default_data_collator(examples).get("labels")
    rows = BATCH // dist.get_world_size() // accumulation_steps
    for step in range(accumulation_steps):
        start = (dist.get_world_size() * step + dist.get_rank()) * rows
        model.set_requires_gradient_sync(step + 1 == accumulation_steps)
        batch = default_data_collator(examples[start : start + rows])
        loss = loss_of(model, batch, name, all_labels)
        (loss * dist.get_world_size()).backward()  # FSDP takes the mean over processes
    optimizer.step()
    optimizer.zero_grad()


def check_generation(model, name, options):
    """Two processes with prompts and lengths of their own generate what each does alone with the whole weights."""
    alone = make_model(name, **options)
    alone.load_state_dict(full_state(model))
    register_fsdp_forward_method(model, "generate")
    rank = dist.get_rank()
    inputs = make_tokens(3, 5, seed=rank)
    model.eval()
    for num_beams in (1, 3):
        search = {"max_new_tokens": 4 + 3 * rank, "num_beams": num_beams, "do_sample": False}
        assert torch.equal(model.generate(inputs, synced_gpus=True, **search), alone.generate(inputs, **search)), name


def check_further_steps(folder, name, options):
    """What a step changed is what the next one starts from, also where 29 tokens are divided between two processes."""
    alone = make_model(name, **options).train()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    for _ in range(3):
        batch = default_data_collator(make_examples(name, options))
        loss_of(alone, batch, name, batch.get("labels")).backward()
        optimizer.step()
        optimizer.zero_grad()
    for model in (shard_by_hand(name, options), shard_while_loading(name, options, folder).train()):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            train_by_hand(model, optimizer, name, options)
        state = full_state(model)
        for key, weight in alone.state_dict().items():
            torch.testing.assert_close(state[key], weight, rtol=1e-5, atol=1e-6)


def check_resuming(folder, name, options):
    """Law 8: save after the second of four steps, load into other weights, and go on: the same weights."""

    def make(seed):
        model = shard_by_hand(name, options, seed)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    model, optimizer = make(seed=0)
    for step in range(4):
        if step == 2:
            dcp.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer))), checkpoint_id=folder)
        train_by_hand(model, optimizer, name, options)
    resumed, optimizer = make(seed=1)
    states = dict(zip(("model", "optimizer"), get_state_dict(resumed, optimizer)))
    dcp.load(states, checkpoint_id=folder)
    set_state_dict(resumed, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    for _ in range(2):
        train_by_hand(resumed, optimizer, name, options)
    expected = full_state(model)
    for key, weight in full_state(resumed).items():
        assert torch.equal(weight, expected[key]), key


def main(folder: Path, cases: list[str]) -> None:
    """Trains, resumes and generates; the first process saves the weights for the comparison."""
    dist.init_process_group("gloo")

    def save(model, case, way, steps):
        assert isinstance(model, FSDPModule)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        state = full_state(model)
        if dist.get_rank() == 0:
            torch.save(state, folder / f"{case}-{way}-{steps}.pt")

    for case in cases:
        name, options = CASES[case]
        for steps in (1, 2):
            model = shard_by_hand(name, options)
            train_by_hand(model, torch.optim.SGD(model.parameters(), lr=1.0), name, options, steps)
            save(model, case, "torch", steps)
            loaded = shard_while_loading(name, options, folder / f"{case}-model")
            train_one_step(name, options, folder, BATCH // dist.get_world_size() // steps, steps, loaded)
            save(loaded, case, "transformers", steps)
        check_further_steps(folder / f"{case}-model", name, options)
        check_resuming(folder / f"{case}-checkpoint", name, options)
        if name in GENERATIVE:
            check_generation(model, name, options)
            check_generation(loaded, name, options)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
