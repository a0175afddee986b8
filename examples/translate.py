"""Trains an attention translator with `Seq2SeqTrainer`, loads what it saved and translates the test sentences with it.

    python examples/translate.py                                     # French to English, on the data beside this script
    python examples/translate.py --train_file de-en.tsv --validation_file dev.tsv --test_file test.tsv
    python examples/translate.py --train_file train.de,train.en --validation_file val.de,val.en --test_file t.de,t.en
    python examples/translate.py --dataset_name NAME --source_column de --target_column en
    python examples/translate.py options.json --num_train_epochs 8   # options from a file, some of them overridden
    python examples/translate.py --resume_from_checkpoint true       # goes on after Ctrl-C
    python examples/translate.py --do_train false --model_name_or_path FOLDER --test_file new.tsv
    torchrun --nproc_per_node 2 examples/translate.py

`text_pairs.py` says which files can be read. The output folder gets the model with its tokenizer, checkpoints, scores
(`all_results.json`), the translations (`test_translations.jsonl`) and an attention heat map (`attention.png`).
"""

import copy
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sacrebleu
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
from subword_tokenizer import token_pieces, train_subword_tokenizer
from text_pairs import DataError, pairs_from_hub, read_pairs
from training_helpers import (
    MixedPrecisionArguments,
    SeedSamplerByEpoch,
    StopOnSignal,
    UsageError,
    average_checkpoints,
    checkpoint_to_resume,
    load_pretrained,
    parse_arguments,
    prefers_bf16,
    report_stop,
    run_script,
    say,
)


DEFAULT_DATA = Path(__file__).parent / "data"
DEFAULT_FILES = {
    "train": DEFAULT_DATA / "tatoeba-eng-fra.train.tsv.gz",
    "validation": DEFAULT_DATA / "tatoeba-eng-fra.dev.tsv",
    "test": DEFAULT_DATA / "tatoeba-eng-fra.test.tsv",
}
Pairs = list[tuple[str, str]]


@dataclass
class ModelArguments:
    """A model and tokenizer to start from, or the shape of a new one: the fields of `RNNSeq2SeqConfig`."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model to train further, or with --do_train false to translate with."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer to use; otherwise the model's, or a new one trained on the data."}
    )
    vocab_size: int = field(default=4000, metadata={"help": "Tokens of a new tokenizer, shared by both languages."})
    embedding_size: int | None = field(default=None, metadata={"help": "Width of embeddings; default hidden_size."})
    hidden_size: int = field(default=256, metadata={"help": "Width of the hidden state, per direction."})
    cell_type: str = field(default="lstm", metadata={"help": "rnn_tanh, rnn_relu, gru, lstm."})
    encoder_layers: int = field(default=1, metadata={"help": "Recurrent layers of the encoder."})
    decoder_layers: int = field(default=1, metadata={"help": "Recurrent layers of the decoder."})
    encoder_bidirectional: bool = field(default=True, metadata={"help": "Whether the encoder reads both ways."})
    attention_score: str = field(default="general", metadata={"help": "dot, scaled_dot, general, additive."})
    num_attention_heads: int = field(default=1, metadata={"help": "Attention heads."})
    decoder_type: str = field(default="luong", metadata={"help": "luong, bahdanau, gnmt."})
    input_feeding: bool = field(default=False, metadata={"help": "Feed the attentional vector back (luong only)."})
    residual: bool = field(default=False, metadata={"help": "Residual connections between layers."})
    embedding_dropout: float = field(default=0.2, metadata={"help": "Dropout on the embeddings."})
    hidden_dropout: float = field(default=0.2, metadata={"help": "Dropout between layers."})
    output_dropout: float = field(default=0.2, metadata={"help": "Dropout on encoder output and attentional vector."})
    recurrent_dropout: float = field(default=0.0, metadata={"help": "Dropout in the recurrence (slow)."})
    initializer_range: float = field(default=0.1, metadata={"help": "Standard deviation of new embeddings."})
    forget_gate_bias: float = field(default=1.0, metadata={"help": "Initial bias of an LSTM's forget gate."})
    tie_word_embeddings: bool = field(default=True, metadata={"help": "Tie output projection to the embeddings."})
    config_overrides: str | None = field(
        default=None, metadata={"help": "Further config fields as a JSON object, such as those of a cell of your own."}
    )


@dataclass
class DataArguments:
    """Where the sentence pairs are, and how they become tokens."""

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
    normalization: str | None = field(
        default=None, metadata={"help": "nfc, nfkc or lowercase: what a new tokenizer does to text. Default: nothing."}
    )
    bpe_dropout: float = field(
        default=0.0,
        metadata={"help": "Probability to leave out a merge, so that each epoch sees other subwords (not seeded)."},
    )
    bleu_tokenize: str = field(default="13a", metadata={"help": "Tokenizer of sacreBLEU: 13a, zh, ja-mecab, ..."})
    num_samples_to_show: int = field(default=10, metadata={"help": "Translations printed at the end."})


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
class TranslationTrainingArguments(MixedPrecisionArguments, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with defaults for a small recurrent translator on a CPU."""

    output_dir: str | None = field(default="outputs/translator", metadata={"help": "Where everything is written."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Start anew in a folder that is not empty."})
    do_train: bool = field(default=True, metadata={"help": "Whether to train."})
    do_eval: bool = field(default=True, metadata={"help": "Whether to score the validation data after training."})
    do_predict: bool = field(default=True, metadata={"help": "Whether to translate the test data at the end."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Sentence pairs per step and device."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Sentences per evaluation batch."})
    num_train_epochs: float = field(
        default=3.0 if prefers_bf16() or torch.accelerator.is_available() else 2.0,
        metadata={"help": "Passes over the training data; by default 3, or 2 on a CPU that is not made for bfloat16."},
    )
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Shape of the learning rate."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps, or below 1 the share of all steps."})
    label_smoothing_factor: float = field(default=0.1, metadata={"help": "Label smoothing."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "group_by_length, random, sequential or batch_rebalance."}
    )
    logging_steps: float = field(default=50, metadata={"help": "Steps between two lines of the log."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to score the validation data."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Go back to the best checkpoint."})
    metric_for_best_model: str | None = field(default="bleu", metadata={"help": "What best means."})
    greater_is_better: bool | None = field(default=True, metadata={"help": "For the metric."})
    predict_with_generate: bool = field(default=True, metadata={"help": "Translate during evaluation, for BLEU."})
    generation_num_beams: int | None = field(default=1, metadata={"help": "Beams during training's evaluations."})
    generation_config: str | None = field(
        default=None,
        metadata={"help": "Any options of GenerationConfig: a JSON object, a JSON file, or a model's folder or name."},
    )
    average_checkpoints: int = field(
        default=1, metadata={"help": "The final model is the mean of this many last checkpoints."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave as it is: the sampler needs `length`."})
    dataloader_pin_memory: bool = field(default=torch.cuda.is_available(), metadata={"help": "Pin memory."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "All parameters are used."})

    def __post_init__(self):
        super().__post_init__()
        if self.average_checkpoints > 1 and self.save_total_limit is not None:
            # One more for the best checkpoint, one for a Ctrl-C.
            self.save_total_limit = max(self.save_total_limit, self.average_checkpoints + 2)


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


def load_pairs(args: DataArguments, training: bool, seed: int) -> dict[str, Pairs]:
    """Pairs of `"train"` (when training), `"validation"` and `"test"`; without validation data some are held out."""
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
            given = {split: str(path) for split, path in DEFAULT_FILES.items()}
            columns = columns if columns[0] else ("fra", "eng")
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
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples, "test": args.max_predict_samples}
    for split, limit in limits.items():
        if split in pairs and limit is not None and limit < len(pairs[split]):
            pairs[split] = [pairs[split][index] for index in sorted(rng.sample(range(len(pairs[split])), limit))]
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


def make_tokenizer(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TranslationTrainingArguments,
    pairs: Pairs | None,
    checkpoint: str | None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of the run to resume, the one asked for, the model's, or a new one, saved in the output folder."""
    name = checkpoint or model_args.tokenizer_name or model_args.model_name_or_path
    if name is not None:
        return load_pretrained(AutoTokenizer, name)
    with training_args.main_process_first(local=False, desc="training the tokenizer"):
        if training_args.process_index == 0:
            texts = (text for pair in pairs for text in pair)
            try:
                tokenizer = train_subword_tokenizer(texts, model_args.vocab_size, data_args.normalization)
            except ValueError as error:
                raise UsageError(str(error)) from error
            tokenizer.save_pretrained(training_args.output_dir)
    return AutoTokenizer.from_pretrained(training_args.output_dir)


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
def translate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: list[str],
    batch_size: int,
    args: TranslationTrainingArguments,
    **options: Any,
) -> list[str]:
    """Translates `sentences` in batches of similar length, shared among the processes; `options` go to `generate`."""
    model.eval()
    source_ids = tokenizer(sentences)["input_ids"]
    order = sorted(range(len(sentences)), key=lambda index: -len(source_ids[index]))
    share = order[args.process_index :: args.world_size]
    done = []
    with tqdm(total=len(share), desc="translating", unit=" sentences", disable=args.process_index != 0) as bar:
        for start in range(0, len(share), batch_size):
            batch = share[start : start + batch_size]
            inputs = tokenizer.pad({"input_ids": [source_ids[index] for index in batch]}, return_tensors="pt")
            output = model.generate(**inputs.to(model.device), **options)
            done += zip(batch, tokenizer.batch_decode(output, skip_special_tokens=True), strict=True)
            bar.update(len(batch))
    translations = dict(gather_object(done) if args.world_size > 1 else done)
    return [translations[index].strip() for index in range(len(sentences))]


@torch.no_grad()
def attention_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str, target: str
) -> tuple[torch.Tensor, list[str], list[str]]:
    """The last layer's attention while the model writes `target`, mean of heads `[target, source]`, and the tokens."""
    inputs = tokenizer(source, return_tensors="pt").to(model.device)
    labels = tokenizer(text_target=target, return_tensors="pt")["input_ids"].to(model.device)
    start = torch.full_like(labels[:, :1], model.config.decoder_start_token_id)
    decoder_input_ids = torch.cat([start, labels[:, :-1]], dim=1)
    outputs = model.eval()(**inputs, decoder_input_ids=decoder_input_ids, output_attentions=True)
    weights = outputs.cross_attentions[-1][0].mean(dim=0)  # [batch, heads, target, source]
    source_ids, target_ids = inputs["input_ids"][0].tolist(), labels[0].tolist()
    return weights, token_pieces(tokenizer, source_ids), token_pieces(tokenizer, target_ids)


def corpus_bleu(translations: list[str], references: list[str], tokenize: str) -> tuple[float, str]:
    """sacreBLEU, case as in the data, and its signature."""
    metric = sacrebleu.BLEU(tokenize=tokenize)
    return metric.corpus_score(translations, [references]).score, metric.get_signature().format()


def train(
    trainer: Seq2SeqTrainer, stop: StopOnSignal, checkpoint: str | None, args: TranslationTrainingArguments
) -> bool:
    """Trains, averages checkpoints if asked to, and saves the model. Returns whether training came to its end."""
    result = trainer.train(resume_from_checkpoint=checkpoint)
    if stop.requested:
        report_stop(trainer)
        return False
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    if args.average_checkpoints > 1:
        before = trainer.evaluate()
        names = average_checkpoints(trainer.model, args.output_dir, args.average_checkpoints)
        after = trainer.evaluate()
        score = "eval_bleu" if "eval_bleu" in after else "eval_loss"
        say(f"Mean of {', '.join(names)}: {score} {after[score]:.4g}, before {before[score]:.4g}.")
        trainer.save_metrics("eval", {f"{score}_before_averaging": before[score]})
    return True


def report(
    pairs: Pairs,
    data_args: DataArguments,
    args: TranslationTrainingArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """Translates the test pairs, prints some, writes translations and heat map, and returns the scores."""
    sources, references = [list(texts) for texts in zip(*pairs, strict=True)]
    metrics, generation = {}, model.generation_config
    started = time.perf_counter()
    translations = translate(model, tokenizer, sources, args.per_device_eval_batch_size, args)
    metrics["test_seconds"] = round(time.perf_counter() - started, 2)
    metrics["test_num_beams"], metrics["test_samples"] = generation.num_beams or 1, len(pairs)
    metrics["test_bleu"], signature = corpus_bleu(translations, references, data_args.bleu_tokenize)
    metrics["test_bleu_signature"] = signature
    if (generation.num_beams or 1) > 1:
        options = {"num_beams": 1, "length_penalty": 1.0, "early_stopping": False}
        greedy = translate(model, tokenizer, sources, args.per_device_eval_batch_size, args, **options)
        metrics["test_bleu_greedy"], _ = corpus_bleu(greedy, references, data_args.bleu_tokenize)
    if args.process_index != 0:
        return metrics

    count = min(data_args.num_samples_to_show, len(pairs))
    shown = sorted(random.Random(args.seed).sample(range(len(pairs)), count))
    for index in shown:
        say(f"\nsource       {sources[index]}\ntranslation  {translations[index]}\nreference    {references[index]}")
    search = f"{metrics['test_num_beams']} beams" if metrics["test_num_beams"] > 1 else "one beam"
    say(f"\nsacreBLEU, {search}: {metrics['test_bleu']:.2f}   {signature}")
    if "test_bleu_greedy" in metrics:
        say(f"sacreBLEU, greedy: {metrics['test_bleu_greedy']:.2f}")

    output_dir = Path(args.output_dir)
    with open(output_dir / "test_translations.jsonl", "w", encoding="utf-8") as file:
        for source, translation, reference in zip(sources, translations, references, strict=True):
            row = {"source": source, "translation": translation, "reference": reference}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    # A sentence of middle length shows most in a picture.
    plotted = min(shown or [0], key=lambda index: abs(len(sources[index].split()) - 9))
    try:
        from attention_plot import plot_attention

        weights, columns, rows = attention_of(model, tokenizer, sources[plotted], translations[plotted])
        plot_attention(weights, columns, rows, output_dir / "attention.png", title=sources[plotted])
        say(f"Attention of {sources[plotted]!r}: {output_dir / 'attention.png'}")
    except ImportError:
        say("No attention heat map: matplotlib is not installed (pip install matplotlib).")
    return metrics


def main() -> int | None:
    model_args, data_args, generation_args, training_args = parse_arguments(
        (ModelArguments, DataArguments, GenerationArguments, TranslationTrainingArguments)
    )
    training = training_args.do_train
    if not training and model_args.model_name_or_path is None:
        raise UsageError("--do_train false needs a --model_name_or_path")
    generation_options, training_args.generation_config = training_args.generation_config, None
    set_seed(training_args.seed)

    pairs = load_pairs(data_args, training, training_args.seed)
    say(" · ".join(f"{split} {len(pairs[split])} pairs" for split in pairs))
    checkpoint = checkpoint_to_resume(training_args) if training else None
    tokenizer = make_tokenizer(model_args, data_args, training_args, pairs.get("train"), checkpoint)
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

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        texts = []
        for ids in (prediction.predictions, prediction.label_ids):
            ids = np.where(ids < 0, tokenizer.pad_token_id, ids)
            texts.append([text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)])
        return {"bleu": corpus_bleu(*texts, data_args.bleu_tokenize)[0]}

    dropout_tokenizer = None
    if data_args.bpe_dropout > 0:
        dropout_tokenizer = copy.deepcopy(tokenizer)
        dropout_tokenizer.backend_tokenizer.model.dropout = data_args.bpe_dropout
    stop = StopOnSignal()
    limits = (data_args.max_source_length, data_args.max_target_length)
    trainer = Seq2SeqTrainer(
        model=model,
        args=training_args,
        train_dataset=encode_pairs(pairs["train"], tokenizer, limits, data_args.bpe_dropout > 0) if training else None,
        eval_dataset=encode_pairs(pairs["validation"], tokenizer),
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
        metrics = report(pairs["test"], data_args, training_args, model, tokenizer)
        trainer.save_metrics("test", metrics)
    say(f"Model, scores and translations: {training_args.output_dir}")
    return None


if __name__ == "__main__":
    run_script(main)
