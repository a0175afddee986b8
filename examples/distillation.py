"""Learning from teachers (`--teachers` of `transduce.py` and `translate.py`): one model instead of several.

The teachers are models that were trained before, with the same tokenizer, recurrent or not. What they expect at each
place of a target is the mean of their probabilities,

    p(token) = mean over teachers of p_teacher(token | source, target so far),

and the new model is trained on it, by cross-entropy, instead of on the target's token alone (Hinton et al. 2015,
"Distilling the Knowledge in a Neural Network"): on `teacher_weight` p + (1 - `teacher_weight`) target. The target is
smoothed by `label_smoothing_factor`; of p the likeliest tokens are kept one by one, the rest is spread evenly over all.
Sources without targets (`--unlabelled_file`) get the target that the teachers write together, greedily (Kim and Rush
2016, "Sequence-Level Knowledge Distillation"), and there p alone counts (Sun et al. 2019, "Token-Level Ensemble
Distillation for Grapheme-to-Phoneme Conversion").
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from torch.nn.functional import log_softmax
from tqdm.auto import tqdm
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerBase, Seq2SeqTrainer
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from text_pairs import read_lines
from training_helpers import UsageError, load_pretrained, say


# What transformers calls the state of a decoder; the first since 5.24.
CACHE = "cache" if "cache" in {field.name for field in fields(Seq2SeqLMOutput)} else "past_key_values"


@dataclass
class DistillationArguments:
    """Models to learn from, if any."""

    teachers: list[str] | None = field(
        default=None, metadata={"help": "Models with the same tokenizer, whose mean probabilities are learnt."}
    )
    unlabelled_file: str | None = field(
        default=None, metadata={"help": "Sources without targets, one in a line, for which the teachers write some."}
    )
    teacher_weight: float = field(
        default=0.5, metadata={"help": "How much the teachers count where there is a target, from 0 to 1."}
    )
    teacher_top_k: int = field(default=8, metadata={"help": "Likeliest tokens that are kept of a teacher's guess."})

    def __post_init__(self):
        if self.unlabelled_file is not None and not self.teachers:
            raise ValueError("--unlabelled_file needs --teachers, which write the targets")
        if not 0 <= self.teacher_weight <= 1:
            raise ValueError(f"--teacher_weight must be from 0 to 1, got {self.teacher_weight}")
        if self.teacher_top_k < 1:
            raise ValueError(f"--teacher_top_k must be at least 1, got {self.teacher_top_k}")


class Teachers:
    """
    Several encoder-decoders that are asked together, recurrent or not.

    Args:
        args (`DistillationArguments`): Their names, and how much of what they say is kept.
        tokenizer: That of the model to be trained; theirs has to have the same tokens.
        training_args:
            Device, batch size (`per_device_eval_batch_size`), precision (`bf16`) and `label_smoothing_factor`.

    Raises:
        `UsageError`: For a model that cannot be loaded, or has other tokens.
    """

    def __init__(self, args: DistillationArguments, tokenizer: PreTrainedTokenizerBase, training_args: Any):
        self.args, self.tokenizer, self.device = args, tokenizer, training_args.device
        self.batch_size, self.bf16 = training_args.per_device_eval_batch_size, training_args.bf16
        self.smoothing = training_args.label_smoothing_factor
        for name in args.teachers:
            if load_pretrained(AutoTokenizer, name).get_vocab() != tokenizer.get_vocab():
                raise UsageError(f"--teachers: {name} has other tokens than the model to be trained")
        self.models = [load_pretrained(AutoModelForSeq2SeqLM, name).to(self.device).eval() for name in args.teachers]
        sizes = {model.config.vocab_size for model in self.models}
        if len(sizes) > 1:
            raise UsageError(f"--teachers must have vocabularies of one size, got {sorted(sizes)}")
        self.width = min(args.teacher_top_k, *sizes)

    @torch.no_grad()
    def read_pairs(self, dataset: Dataset) -> Dataset:
        """The pairs with the columns `target_ids` and `target_probabilities`, as [`SoftTargetCollator`] reads them."""
        rows: list[Any] = [None] * len(dataset)
        input_ids, labels = dataset["input_ids"], dataset["labels"]
        for batch, inputs in self._batches(list(input_ids), "teachers read"):
            targets = self.tokenizer.pad({"input_ids": [labels[index] for index in batch]}, return_tensors="pt")
            targets = targets["input_ids"].to(self.device)
            encoded, caches = self._encode(inputs), [None] * len(self.models)
            expected = self._expect(encoded, inputs, caches, targets[:, :-1])
            ids, probabilities = self._soften(expected, targets, self.args.teacher_weight)
            for index, *soft in zip(batch, ids, probabilities, strict=True):
                rows[index] = [part[: len(labels[index])].ravel() for part in soft]
        ids, probabilities = zip(*rows, strict=True)
        return dataset.add_column("target_ids", list(ids)).add_column("target_probabilities", list(probabilities))

    @torch.no_grad()
    def write_targets(self, source_ids: list[list[int]], limit: int) -> Dataset:
        """
        Greedy targets for sources, in the columns of [`read_pairs`]; those that have no end after `limit` tokens are
        left out.
        """
        rows: list[Any] = [None] * len(source_ids)
        eos = self.tokenizer.eos_token_id
        for batch, inputs in self._batches(source_ids, "teachers write"):
            encoded, caches = self._encode(inputs), [None] * len(self.models)
            tokens = torch.zeros(len(batch), 0, dtype=torch.long, device=self.device)
            going, written = torch.ones(len(batch), 1, dtype=torch.bool, device=self.device), []
            for _ in range(limit):
                expected = self._expect(encoded, inputs, caches, tokens)
                tokens = expected.argmax(-1)
                written.append((tokens, *self._soften(expected, tokens, 1.0)))
                going &= tokens != eos
                if not going.any():
                    break
            labels = torch.cat([tokens for tokens, *_ in written], dim=1).cpu().numpy()
            ids, probabilities = (np.concatenate([step[part] for step in written], axis=1) for part in (1, 2))
            lengths = (labels == eos).argmax(1) + 1
            for row, (index, length) in enumerate(zip(batch, lengths, strict=True)):
                if not going[row]:
                    soft = [part[row, :length].ravel() for part in (ids, probabilities)]
                    rows[index] = (source_ids[index], labels[row, :length], len(source_ids[index]) + length, *soft)
        kept = [row for row in rows if row is not None]
        if len(kept) < len(rows):
            say(f"{len(rows) - len(kept)} sources, for which the teachers came to no end, are left out.")
        names = ("input_ids", "labels", "length", "target_ids", "target_probabilities")
        return Dataset.from_dict({name: [row[place] for row in kept] for place, name in enumerate(names)})

    def _batches(self, source_ids: list[list[int]], title: str) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        """Indices and inputs of batches of similar length."""
        order = sorted(range(len(source_ids)), key=lambda index: -len(source_ids[index]))
        with tqdm(total=len(order), desc=title, unit=" texts") as bar:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                inputs = self.tokenizer.pad({"input_ids": [source_ids[index] for index in batch]}, return_tensors="pt")
                yield batch, inputs.to(self.device)
                bar.update(len(batch))

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def _encode(self, inputs: dict[str, torch.Tensor]) -> list[BaseModelOutput]:
        with self._precision():
            return [model.get_encoder()(**inputs) for model in self.models]

    def _expect(
        self,
        encoded: list[BaseModelOutput],
        inputs: dict[str, torch.Tensor],
        caches: list[Any],
        tokens: torch.Tensor,
    ) -> torch.Tensor:
        """
        Mean of the probabilities after each token `[batch, target, vocabulary]`, at the beginning after what a decoder
        starts with, too. `caches` go on by these tokens.
        """
        total = 0
        for place, (model, states) in enumerate(zip(self.models, encoded, strict=True)):
            start = tokens.new_full((len(tokens), 1), model.config.decoder_start_token_id)
            with self._precision():
                outputs = model(
                    encoder_outputs=states,
                    attention_mask=inputs["attention_mask"],
                    decoder_input_ids=torch.cat([start, tokens], dim=1) if caches[place] is None else tokens,
                    use_cache=True,
                    **{CACHE: caches[place]},
                )
            caches[place] = outputs[CACHE]
            total = total + outputs.logits.float().softmax(-1)
        return total / len(self.models)

    def _soften(self, expected: torch.Tensor, labels: torch.Tensor, weight: float) -> tuple[np.ndarray, np.ndarray]:
        """
        Tokens and their probabilities, both `[batch, target, 1 + top_k]`: first the label, smoothed, with `1 - weight`,
        then the likeliest with `weight`. What is missing to 1 is meant for all tokens alike.
        """
        likeliest, ids = expected.topk(self.width)
        ids = torch.cat([labels[..., None], ids], dim=-1).int()
        of_label = torch.full_like(likeliest[..., :1], (1 - weight) * (1 - self.smoothing))
        return ids.cpu().numpy(), torch.cat([of_label, weight * likeliest], dim=-1).cpu().numpy()


class SoftTargetCollator:
    """
    Pads a batch as `collator` does, and adds `target_ids` and `target_probabilities`, `[batch, target, candidates]`,
    where the features have them.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]):
        self.collator = collator

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.collator(features)
        if "target_ids" in features[0]:
            width = len(features[0]["target_ids"]) // len(features[0]["labels"])
            ids = np.zeros((*batch["labels"].shape, width), np.int64)
            probabilities = np.zeros(ids.shape, np.float32)
            for row, feature in enumerate(features):
                length = len(feature["labels"])
                ids[row, :length] = np.reshape(feature["target_ids"], (length, width))
                probabilities[row, :length] = np.reshape(feature["target_probabilities"], (length, width))
            batch["target_ids"], batch["target_probabilities"] = torch.from_numpy(ids), torch.from_numpy(probabilities)
        return batch


def soft_cross_entropy(
    logits: torch.Tensor, ids: torch.Tensor, probabilities: torch.Tensor, is_target: torch.Tensor
) -> torch.Tensor:
    """
    The sum of `-probability log softmax(logits)[id]` over all candidates of all targets, and over all tokens for what
    the probabilities lack.

    Args:
        logits (`torch.Tensor` of shape `(batch, target, vocabulary)`): Of the model.
        ids, probabilities (`torch.Tensor` of shape `(batch, target, candidates)`): As collated.
        is_target (`torch.Tensor` of shape `(batch, target)`): False at padding.
    """
    logarithms = log_softmax(logits.float(), dim=-1)
    of_candidates = (logarithms.gather(-1, ids) * probabilities).sum(-1)
    of_others = (1 - probabilities.sum(-1)) * logarithms.mean(-1)
    return -(of_candidates + of_others).masked_fill(~is_target, 0.0).sum()


class DistillationTrainer(Seq2SeqTrainer):
    """Trains on soft targets where a batch has them; evaluation is as ever."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "target_ids" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        soft = {name: inputs.pop(name) for name in ("target_ids", "target_probabilities")}
        is_target = inputs.pop("labels") != -100  # the collator has made decoder_input_ids of them
        outputs = model(**inputs)
        count = is_target.sum() if num_items_in_batch is None else num_items_in_batch
        loss = (
            soft_cross_entropy(outputs["logits"], soft["target_ids"], soft["target_probabilities"], is_target) / count
        )
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients of all processes are averaged
        return (loss, outputs) if return_outputs else loss


def read_sources(path: str, known: Iterable[str]) -> list[str]:
    """The lines of a text file, each once, without empty ones and without those that are `known`."""
    sources = dict.fromkeys(line.strip() for _, line in read_lines(path))
    known = {"", *known}
    sources = [source for source in sources if source not in known]
    if not sources:
        raise UsageError(f"{path} has no source that is not among the pairs")
    return sources


def with_soft_targets(
    dataset: Dataset,
    known: Iterable[str],
    args: DistillationArguments,
    tokenizer: PreTrainedTokenizerBase,
    training_args: Any,
    limits: tuple[int, int],
    resuming: bool,
) -> Dataset:
    """
    The training pairs with what the teachers make of them, and the unlabelled sources with theirs. They are kept in the
    folder `teacher_targets` of the output folder, and read from there by a run that is resumed and by other processes.

    Args:
        dataset: Encoded pairs.
        known: Sources of all pairs, of validation and test too, which are left out of the unlabelled ones.
        limits: Greatest lengths of source and target, in tokens, of unlabelled sources.
    """
    folder = Path(training_args.output_dir) / "teacher_targets"
    with training_args.main_process_first(local=False, desc="asking the teachers"):
        if training_args.process_index == 0 and not (resuming and folder.exists()):
            teachers = Teachers(args, tokenizer, training_args)
            soft = teachers.read_pairs(dataset)
            if args.unlabelled_file is not None:
                source_ids = tokenizer(read_sources(args.unlabelled_file, known))["input_ids"]
                short = [ids for ids in source_ids if len(ids) <= limits[0]]
                written = teachers.write_targets(short, limits[1])
                say(f"The teachers wrote targets for {len(written)} sources.")
                soft = concatenate_datasets([soft, written.cast(soft.features)])
            shutil.rmtree(folder, ignore_errors=True)
            unfinished = folder.with_suffix(".unfinished")
            soft.save_to_disk(unfinished)
            os.replace(unfinished, folder)
    return load_from_disk(folder)
