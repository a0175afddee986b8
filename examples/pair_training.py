"""What scripts on pairs of texts share (`translate.py`, `transduce.py`): options, data, model, training, generation."""

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

from hf_rnn import RNNSeq2SeqConfig
from text_pairs import DataError, pairs_from_hub, read_pairs
from training_helpers import (
    GroupedTrainingArguments,
    RecurrenceArguments,
    SeedSamplerByEpoch,
    StopOnSignal,
    UsageError,
    checkpoint_to_resume,
    limit_rows,
    load_pretrained,
    make_tokenizer,
    prefers_bf16,
    say,
    train,
)


Pairs = list[tuple[str, str]]


@dataclass
class ModelArguments(RecurrenceArguments):
    """A model and tokenizer to start from, or the shape of a new one: the fields of `RNNSeq2SeqConfig`."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model to train further, or with --do_train false to translate with."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer to use; otherwise the model's, or a new one trained on the data."}
    )
    embedding_size: int | None = field(default=None, metadata={"help": "Width of embeddings; default hidden_size."})
    hidden_size: int = field(default=256, metadata={"help": "Width of the hidden state, per direction."})
    encoder_layers: int = field(default=1, metadata={"help": "Recurrent layers of the encoder."})
    decoder_layers: int = field(default=1, metadata={"help": "Recurrent layers of the decoder."})
    encoder_bidirectional: bool = field(default=True, metadata={"help": "Whether the encoder reads both ways."})
    attention_score: str = field(
        default="general",
        metadata={"help": "dot, scaled_dot, general, local, additive, normalized_additive, location."},
    )
    attention_window: int = field(default=10, metadata={"help": "Tokens to each side that the local score sees."})
    location_filters: int = field(default=32, metadata={"help": "Filters of the location score, for each head."})
    location_width: int = field(default=31, metadata={"help": "Width of these filters, an odd number."})
    use_coverage: bool = field(default=False, metadata={"help": "Whether scores read what was attended to so far."})
    coverage_loss_weight: float = field(default=0.0, metadata={"help": "Weight of the loss for attending again."})
    scheduled_sampling: float = field(default=0.0, metadata={"help": "Chance to train on words of the model's own."})
    num_attention_heads: int = field(default=1, metadata={"help": "Attention heads."})
    decoder_type: str = field(default="luong", metadata={"help": "luong, bahdanau, gnmt."})
    input_feeding: bool = field(default=False, metadata={"help": "Feed the attentional vector back (luong only)."})
    embedding_dropout: float = field(default=0.2, metadata={"help": "Dropout on the embeddings."})
    output_dropout: float = field(default=0.2, metadata={"help": "Dropout on encoder output and attentional vector."})
    tie_word_embeddings: bool = field(default=True, metadata={"help": "Tie output projection to the embeddings."})


@dataclass
class PairArguments:
    """Where the pairs are, and which of them to use."""

    train_file: str | None = field(
        default=None, metadata={"help": "tsv, csv or json lines (also .gz), or SOURCE,TARGET: two plain-text files."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "As train_file; default: some pairs held out of the training data."}
    )
    test_file: str | None = field(default=None, metadata={"help": "As train_file; default: the validation data."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set of the Hub with the splits train, validation and test."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    source_column: str | None = field(
        default=None,
        metadata={
            "help": "Name of the source column or language; a tsv or csv then has to have a header. Default: first.",
            "aliases": ["--source_lang"],
        },
    )
    target_column: str | None = field(
        default=None, metadata={"help": "The same for the target. Default: second.", "aliases": ["--target_lang"]}
    )
    skip_bad_lines: bool = field(default=False, metadata={"help": "Leave out malformed lines instead of stopping."})
    max_source_length: int = field(default=64, metadata={"help": "Tokens; longer training pairs are left out."})
    max_target_length: int = field(default=64, metadata={"help": "Tokens; longer training pairs are left out."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use a random part of the training pairs."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use a random part of the validation pairs."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use a random part of the test pairs."})
    num_samples_to_show: int = field(default=10, metadata={"help": "Results printed at the end."})


@dataclass
class GenerationArguments:
    """How the final translations are made. An option left out is as the model has it; defaults are for a new model."""

    num_beams: int | None = field(default=None, metadata={"help": "Beams; default 5, 1 is greedy."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Default: max_target_length."})
    min_new_tokens: int | None = field(default=None, metadata={"help": "Shortest translation."})
    length_penalty: float | None = field(default=None, metadata={"help": "Above 1.0 favours longer translations."})
    early_stopping: bool | None = field(default=None, metadata={"help": "Stop when num_beams candidates are done."})
    no_repeat_ngram_size: int | None = field(default=None, metadata={"help": "No n-gram of this size twice."})
    repetition_penalty: float | None = field(default=None, metadata={"help": "1.0 is none."})
    do_sample: bool | None = field(default=None, metadata={"help": "Sample instead of searching."})
    temperature: float | None = field(default=None, metadata={"help": "Of sampling."})
    top_k: int | None = field(default=None, metadata={"help": "Of sampling."})
    top_p: float | None = field(default=None, metadata={"help": "Of sampling."})


@dataclass
class PairTrainingArguments(GroupedTrainingArguments, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with defaults for a small recurrent translator on a CPU."""

    output_dir: str | None = field(default="outputs/translator", metadata={"help": "Where everything is written."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Sentence pairs per step and device."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Sentences per evaluation batch."})
    num_train_epochs: float = field(
        default=3.0 if prefers_bf16() or torch.accelerator.is_available() else 2.0,
        metadata={"help": "Passes over the training data; by default 3, or 2 on a CPU that is not made for bfloat16."},
    )
    label_smoothing_factor: float = field(default=0.1, metadata={"help": "Label smoothing."})
    metric_for_best_model: str | None = field(default="bleu", metadata={"help": "What best means."})
    greater_is_better: bool | None = field(default=True, metadata={"help": "For the metric."})
    predict_with_generate: bool = field(default=True, metadata={"help": "Translate during evaluation, for BLEU."})
    generation_num_beams: int | None = field(default=1, metadata={"help": "Beams during training's evaluations."})
    generation_config: str | None = field(
        default=None,
        metadata={"help": "Any options of GenerationConfig: a JSON object, a JSON file, or a model's folder or name."},
    )


@dataclass
class PairCollator(DataCollatorForSeq2Seq):
    """Pads a batch of encoded pairs. Features with the texts themselves are encoded anew, with BPE dropout."""

    dropout_tokenizer: PreTrainedTokenizerBase | None = None

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> dict[str, torch.Tensor]:
        if "source" in features[0]:
            sources = self.dropout_tokenizer([feature["source"] for feature in features])["input_ids"]
            targets = self.dropout_tokenizer([feature["target"] for feature in features])["input_ids"]
            features = [{"input_ids": ids, "labels": labels} for ids, labels in zip(sources, targets, strict=True)]
        features = [{name: feature[name] for name in ("input_ids", "labels")} for feature in features]
        return super().__call__(features, return_tensors)


def load_pairs(
    args: PairArguments, training: bool, seed: int, default_files: dict[str, Path], default_columns: tuple[str, str]
) -> dict[str, Pairs]:
    """
    Pairs of `"train"` (when training), `"validation"` and `"test"`; without validation data some are held out. Where no
    data is named, the default files, with `default_columns` unless others are named.
    """
    if (args.source_column is None) != (args.target_column is None):
        raise UsageError("--source_column and --target_column have to be given together")
    given = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    splits = [split for split in given if training or split != "train"]
    columns = (args.source_column, args.target_column)
    pairs = {}
    if args.dataset_name is not None:
        if any(given.values()):
            raise UsageError("--dataset_name and --*_file exclude each other")
        for split in splits:
            try:
                pairs[split] = pairs_from_hub(args.dataset_name, args.dataset_config_name, split, *columns)
            except DataError:
                if split == "train" or (split == "validation" and not training):
                    raise
    else:
        if not any(given.values()):
            given = {split: str(path) for split, path in default_files.items()}
            columns = columns if columns[0] else default_columns
        for split in splits:
            if given[split] is not None:
                pairs[split] = read_pairs(given[split], *columns, skip_bad_lines=args.skip_bad_lines)
    if training and "train" not in pairs:
        raise UsageError("there is no --train_file to train on (--do_train false translates without training)")

    rng = random.Random(seed)
    if "validation" not in pairs and training:
        held_out = min(1000, len(pairs["train"]) // 20)
        if held_out == 0:
            raise UsageError("too few training pairs to hold any out: give a --validation_file")
        rng.shuffle(pairs["train"])
        pairs["validation"], pairs["train"] = pairs["train"][:held_out], pairs["train"][held_out:]
        say(f"No validation data: {held_out} pairs are held out of the training data.")
    if "test" not in pairs:
        say("No test data: the validation data are translated in their place.")
        pairs["test"] = pairs["validation"]
    pairs.setdefault("validation", pairs["test"])
    limit_rows(pairs, args, rng)
    return pairs


def encode_pairs(
    pairs: Pairs, tokenizer: PreTrainedTokenizerBase, limits: tuple[int, int] | None = None, keep_text: bool = False
) -> Dataset:
    """
    Token ids of the pairs as columns `input_ids` and `labels`, with the `length` that batches are grouped by. Pairs
    longer than the two `limits` (source, target; in tokens) are left out. `keep_text` adds `source` and `target`.
    """
    sources, targets = [list(texts) for texts in zip(*pairs, strict=True)]
    source_ids, target_ids = tokenizer(sources)["input_ids"], tokenizer(text_target=targets)["input_ids"]
    kept = [
        index
        for index, (source, target) in enumerate(zip(source_ids, target_ids, strict=True))
        if limits is None or (len(source) <= limits[0] and len(target) <= limits[1])
    ]
    if len(kept) < len(pairs):
        say(f"{len(pairs) - len(kept)} pairs are longer than {limits[0]} or {limits[1]} tokens and left out.")
    if not kept:
        raise UsageError("no training pair is short enough: raise --max_source_length and --max_target_length")
    columns = {
        "input_ids": [source_ids[index] for index in kept],
        "labels": [target_ids[index] for index in kept],
        "length": [len(source_ids[index]) + len(target_ids[index]) for index in kept],
    }
    if keep_text:
        columns |= {"source": [sources[index] for index in kept], "target": [targets[index] for index in kept]}
    return Dataset.from_dict(columns)


def make_model(args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model to train further, or a new one with the fields of `args`."""
    if args.model_name_or_path is not None:
        return load_pretrained(AutoModelForSeq2SeqLM, args.model_name_or_path)
    not_in_config = ("model_name_or_path", "tokenizer_name", "config_overrides")
    fields = {name: value for name, value in vars(args).items() if name not in not_in_config}
    try:
        fields |= json.loads(args.config_overrides or "{}")
        config = RNNSeq2SeqConfig(
            **fields
            | {
                "vocab_size": len(tokenizer),
                "pad_token_id": tokenizer.pad_token_id,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "decoder_start_token_id": tokenizer.bos_token_id,
            }
        )
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    return AutoModelForSeq2SeqLM.from_config(config)


def make_generation_config(
    base: GenerationConfig, args: GenerationArguments, options: str | None, defaults: dict[str, Any]
) -> GenerationConfig:
    """
    `base` with `defaults`, then `options` (a JSON object, a JSON file, or a model's folder or name), then `args`, each
    over what comes before. Raises `UsageError` for unknown options and for options that do not fit together.
    """
    config, given = copy.deepcopy(base), dict(defaults)
    config._from_model_config = False  # from here on it has a say of its own
    try:
        if options is not None and options.lstrip().startswith("{"):
            given |= json.loads(options)
        elif options is not None and Path(options).is_file():
            given |= json.loads(Path(options).read_text(encoding="utf-8"))
        elif options is not None:
            given |= GenerationConfig.from_pretrained(options).to_diff_dict()
        given |= {name: value for name, value in vars(args).items() if value is not None}
        given.pop("transformers_version", None)
        unknown = config.update(**given)
        if unknown:
            raise UsageError(f"unknown generation options: {', '.join(unknown)}")
        if config.num_beams is not None and config.num_beams < 1:
            raise UsageError(f"num_beams must be at least 1, got {config.num_beams}")
        if (config.num_return_sequences or 1) > 1:
            raise UsageError("num_return_sequences must be 1: every sentence gets one translation")
        config.validate(strict=True)
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        raise UsageError(f"generation options: {error}") from error
    return config


@torch.no_grad()
def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: list[str],
    batch_size: int,
    args: PairTrainingArguments,
    **options: Any,
) -> list[str]:
    """What the model generates for each of `sources`, in batches of similar length; `options` go to `generate`."""
    model.eval()
    source_ids = tokenizer(sources)["input_ids"]
    order = sorted(range(len(sources)), key=lambda index: -len(source_ids[index]))
    share = order[args.process_index :: args.world_size]
    done = []
    with tqdm(total=len(share), desc="generating", unit=" texts", disable=args.process_index != 0) as bar:
        for start in range(0, len(share), batch_size):
            batch = share[start : start + batch_size]
            inputs = tokenizer.pad({"input_ids": [source_ids[index] for index in batch]}, return_tensors="pt")
            output = model.generate(**inputs.to(model.device), **options)
            done += zip(batch, tokenizer.batch_decode(output, skip_special_tokens=True), strict=True)
            bar.update(len(batch))
    translations = dict(gather_object(done) if args.world_size > 1 else done)
    return [translations[index].strip() for index in range(len(sources))]


def run_pairs(
    arguments: tuple[ModelArguments, PairArguments, GenerationArguments, PairTrainingArguments],
    pairs: dict[str, Pairs],
    train_tokenizer: Callable[[], PreTrainedTokenizerBase],
    score_texts: Callable[[list[str], list[str], list[str]], dict[str, float]],
    report: Callable[[PreTrainedModel, PreTrainedTokenizerBase], dict[str, Any]],
    bpe_dropout: float = 0.0,
) -> int | None:
    """
    The whole run: tokenizer, model, training, saving, and a report on the test pairs by the model that was saved.

    Args:
        arguments: The options.
        pairs: What [`load_pairs`] returned.
        train_tokenizer: Makes a tokenizer, where none is given; a `ValueError` of it is shown as one line.
        score_texts: Scores by name of generated texts, given with the texts of their labels and their sources.
        report: Uses model and tokenizer, and returns scores to be saved.
        bpe_dropout: Probability to leave out a merge of the tokenizer while training.

    Returns:
        The exit status: 130 where training was stopped.
    """
    model_args, data_args, generation_args, training_args = arguments
    training = training_args.do_train
    generation_options, training_args.generation_config = training_args.generation_config, None
    set_seed(training_args.seed)

    training_args.include_for_metrics = [*training_args.include_for_metrics, "inputs"]
    say(" · ".join(f"{split} {len(pairs[split])} pairs" for split in pairs))
    checkpoint = checkpoint_to_resume(training_args) if training else None
    tokenizer = make_tokenizer(model_args, training_args, checkpoint, train_tokenizer)
    model = make_model(model_args, tokenizer)
    say(f"{type(model).__name__}, {model.num_parameters():,} parameters, vocabulary of {len(tokenizer)}")
    defaults = {}
    if model_args.model_name_or_path is None:
        defaults = {"num_beams": 5, "max_new_tokens": data_args.max_target_length}
    generation_config = make_generation_config(model.generation_config, generation_args, generation_options, defaults)
    # Training's own evaluations are greedy unless --generation_num_beams says otherwise.
    # (By max_length, as `Seq2SeqTrainer` fills in its default where there is only max_new_tokens.)
    limit = generation_config.max_new_tokens or data_args.max_target_length
    model.generation_config.update(max_length=limit + 1, max_new_tokens=None)

    validation = encode_pairs(pairs["validation"], tokenizer)
    sources = {
        tuple(ids): source for ids, (source, _) in zip(validation["input_ids"], pairs["validation"], strict=True)
    }

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        # In the order of the sampler, which groups by length.
        texts = []
        for ids in (prediction.predictions, prediction.label_ids):
            ids = np.where(ids < 0, tokenizer.pad_token_id, ids)
            texts.append([text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)])
        read = (tuple(row[(row >= 0) & (row != tokenizer.pad_token_id)].tolist()) for row in prediction.inputs)
        return score_texts(*texts, [sources[ids] for ids in read])

    dropout_tokenizer = None
    if bpe_dropout > 0:
        dropout_tokenizer = copy.deepcopy(tokenizer)
        dropout_tokenizer.backend_tokenizer.model.dropout = bpe_dropout
    stop = StopOnSignal()
    limits = (data_args.max_source_length, data_args.max_target_length)
    trainer = Seq2SeqTrainer(
        model=model,
        args=training_args,
        train_dataset=encode_pairs(pairs["train"], tokenizer, limits, bpe_dropout > 0) if training else None,
        eval_dataset=validation,
        data_collator=PairCollator(tokenizer, model=model, dropout_tokenizer=dropout_tokenizer),
        processing_class=tokenizer,
        compute_metrics=compute_metrics if training_args.predict_with_generate else None,
        callbacks=[stop, SeedSamplerByEpoch()],
    )
    if training and not train(trainer, stop, checkpoint, training_args):
        return 130
    if training_args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    model.generation_config = generation_config
    if training:
        model.config.use_cache = True  # the Trainer turns it off
        trainer.save_model()

    if training_args.do_predict:
        trainer.accelerator.wait_for_everyone()
        name = training_args.output_dir if training else model_args.model_name_or_path
        model = AutoModelForSeq2SeqLM.from_pretrained(name).to(training_args.device)
        if not training:
            model.generation_config = generation_config
        tokenizer = AutoTokenizer.from_pretrained(name) if training else tokenizer
        trainer.save_metrics("test", report(model, tokenizer))
    return None
