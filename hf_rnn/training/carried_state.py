"""
Language models on a long text whose state is carried from batch to batch (truncated backpropagation through time): the
text as streams that are read side by side, block after block, and a `Trainer` that keeps the state of every stream.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer
from transformers.cache_utils import Cache, DynamicCache

from ..recurrent_cache import cache_of, detach_state


class StreamBlocks(Dataset):
    r"""
    One long text as `num_streams` streams of equal length, each cut into blocks: first the first block of every stream,
    then the second of every stream, and so on. Every token of a stream but its first is predicted once. What cannot be
    divided by the number of streams is left out at the end; the last block of the streams may be shorter.

    Args:
        input_ids (`list[int]`): The tokens of the text.
        block_size (`int`): Tokens per block: how far gradients go back.
        num_streams (`int`): How many parts of the text are read side by side: a multiple of the number of rows of a
            batch on all processes together. With that number itself, gradient accumulation adds up blocks that follow
            one another; with that number times `gradient_accumulation_steps` it adds up blocks of other streams.

    Raises:
        `ValueError`: A number below 1, or a text of less than two tokens per stream.
    """

    def __init__(self, input_ids: list[int], block_size: int, num_streams: int):
        for name, value in (("block_size", block_size), ("num_streams", num_streams)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if len(input_ids) < 2 * num_streams:
            raise ValueError(
                f"`input_ids` must hold at least two tokens for each of {num_streams} streams, got {len(input_ids)}."
            )
        length = (len(input_ids) - 1) // num_streams  # tokens read, each of which is followed by one to predict
        self.input_ids = torch.as_tensor(input_ids[: num_streams * length + 1])
        self.starts = range(0, num_streams * length, length)
        self.length = length
        self.block_size = block_size

    def __len__(self) -> int:
        return len(self.starts) * -(-self.length // self.block_size)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} blocks, got {index}.")
        block, stream = divmod(index, len(self.starts))
        start = self.starts[stream] + block * self.block_size
        end = min(start + self.block_size, self.starts[stream] + self.length)
        tokens = self.input_ids[start : end + 1]
        return {
            "input_ids": tokens[:-1],
            "labels": tokens[:-1],
            "shift_labels": tokens[1:],
            "stream": stream,
            "block": block,
        }


def collate_blocks(features: list[dict[str, Any]]) -> dict[str, Any]:
    """
    A batch of tensors `(batch, block_size)`, with the streams of its rows and the number of their block.

    Raises:
        `ValueError`: The blocks have different numbers.
    """
    blocks = {feature["block"] for feature in features}
    if len(blocks) > 1:
        raise ValueError(
            f"A batch must hold one block of each of its streams, got blocks {sorted(blocks)}: the number of streams "
            "must be a multiple of the rows of a batch on all processes together, and blocks must be read in order."
        )
    names = ("input_ids", "labels", "shift_labels")
    batch = {name: torch.stack([feature[name] for feature in features]) for name in names}
    # Numbers and not tensors: to look at them must not wait for a device.
    return batch | {"streams": tuple(feature["stream"] for feature in features), "block": blocks.pop()}


class CarriedStateTrainer(Trainer):
    r"""
    A `Trainer` of recurrent language models on [`StreamBlocks`], in which every block goes on from the state that the
    block before it in the same stream ended with. The first block of a stream starts from nothing, at the beginning of
    every epoch and of every evaluation; gradients stop at the beginning of a block.

    Data are read in order. Each process keeps the states of its own streams. Evaluation has states of its own, for
    which the number of streams of `eval_dataset` must be a multiple of the rows of an evaluation batch likewise. A
    checkpoint holds the states, so that training goes on from the middle of an epoch as well.

    Args:
        model, args, kwargs: As in `Trainer`.
        data_collator: As in `Trainer`; by default blocks are stacked.

    Raises:
        `ValueError`: A model that is no recurrent language model, or options that do not go together with states that
            are carried: several devices in one process, grouping by length, label smoothing.
    """

    def __init__(self, model=None, args=None, data_collator=collate_blocks, **kwargs):
        super().__init__(model, args, data_collator, **kwargs)
        self._check_options()
        # While training and while not: streams of a batch, the number of their next block, and their state before it.
        self._carried: dict[bool, dict[tuple[int, ...], tuple[int, Cache]]] = {True: {}, False: {}}

    def _check_options(self) -> None:
        model = self.accelerator.unwrap_model(self.model)
        layer_types = set(getattr(model.config, "layer_types", None) or [])
        if layer_types != {"recurrent_state"} or model.config.is_encoder_decoder or not model.can_generate():
            raise ValueError(f"`model` must be a recurrent language model, got a {type(model).__name__}.")
        if self.args.n_gpu > 1:
            raise ValueError(
                f"State cannot be carried over {self.args.n_gpu} devices of one process, whose replicas forget it: "
                "start one process for each device, with torchrun or `accelerate launch`."
            )
        if self.args.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                "`train_sampling_strategy` must be left alone where state is carried, which needs the blocks in order, "
                f"got {self.args.train_sampling_strategy!r}."
            )
        if self.label_smoother is not None:
            raise ValueError(
                "`label_smoothing_factor` must be 0 where state is carried: it knows nothing of the token that follows "
                f"a block, got {self.args.label_smoothing_factor}."
            )

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = list({*self._signature_columns, "shift_labels", "stream", "block"})

    def _get_train_sampler(self, train_dataset=None):
        return self._in_order(self.train_dataset if train_dataset is None else train_dataset, self._train_batch_size)

    def _get_eval_sampler(self, eval_dataset):
        return self._in_order(eval_dataset, self.args.eval_batch_size)

    def _in_order(self, dataset: Dataset, batch_size: int) -> SequentialSampler:
        # Seen here by every process at once: where only one of them stopped, the others would wait for it.
        rows, num_streams = batch_size * self.args.world_size, len(getattr(dataset, "starts", ()))
        if num_streams % rows != 0:
            raise ValueError(
                f"`num_streams` must be a multiple of the rows of a batch on all processes together ({rows}), got "
                f"{num_streams}."
            )
        return SequentialSampler(dataset)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        """
        As in `Trainer`, from the state that the streams of the batch have reached.

        Raises:
            `ValueError`: The batch does not go on where its streams have stopped.
        """
        if "streams" not in inputs:
            raise ValueError("A batch must name its `streams`: the data must be `StreamBlocks`.")
        inputs = dict(inputs)
        streams, block = inputs.pop("streams"), inputs.pop("block")
        states = self._carried[model.training]
        state = self._state_before(states, streams, block)
        inputs |= {"cache": state, "use_cache": True}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        states[streams] = (block + 1, detach_state(cache_of(outputs)))
        return (loss, outputs) if return_outputs else loss

    @staticmethod
    def _state_before(states, streams: tuple[int, ...], block: int) -> Cache | None:
        if block == 0:
            return None
        expected, state = states.get(streams, (0, None))
        if expected != block:
            raise ValueError(
                f"Block {block} of streams {streams[0]} to {streams[-1]} came where block {expected} should have. The "
                "number of streams must be a multiple of the rows of a batch on all processes together, blocks must be "
                "read in order, and training can go on from the middle of an epoch only from a checkpoint with the "
                "states of the same number of processes and rows."
            )
        return state

    def _states_path(self, folder) -> Path:
        return Path(folder) / f"carried_state_{self.args.process_index}.safetensors"

    # The states go where those of the random numbers go: into each full checkpoint, one file for each process.

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        tensors, groups = {}, []
        for index, (streams, (block, state)) in enumerate(self._carried[True].items()):
            groups.append({"streams": streams, "block": block, "num_tokens": int(state.get_seq_length())})
            for layer_idx, layer in enumerate(state.layers):
                tensors[f"{index}.{layer_idx}.keys"] = layer.keys.contiguous()
                tensors[f"{index}.{layer_idx}.values"] = layer.values.contiguous()
        save_file(tensors, self._states_path(output_dir), metadata={"groups": json.dumps(groups)})

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if checkpoint is None or not self._states_path(checkpoint).is_file():
            return
        self._carried[True].clear()
        with safe_open(self._states_path(checkpoint), "pt") as file:
            for index, group in enumerate(json.loads(file.metadata()["groups"])):
                state = DynamicCache(config=self.accelerator.unwrap_model(self.model).config)
                for layer_idx, layer in enumerate(state.layers):
                    states = (file.get_tensor(f"{index}.{layer_idx}.{name}") for name in ("keys", "values"))
                    layer.update(*(tensor.to(self.args.device) for tensor in states), num_tokens=group["num_tokens"])
                self._carried[True][tuple(group["streams"])] = (group["block"], state)
