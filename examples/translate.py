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

import json
import random
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import sacrebleu
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_rnn import plot_attention
from pair_training import (
    GenerationArguments,
    ModelArguments,
    PairArguments,
    Pairs,
    PairTrainingArguments,
    generate_texts,
    load_pairs,
    run_pairs,
)
from subword_tokenizer import token_pieces, train_subword_tokenizer
from training_helpers import DEFAULT_DATA, UsageError, parse_arguments, run_script, say


DEFAULT_FILES = {
    "train": DEFAULT_DATA / "tatoeba-eng-fra.train.tsv.gz",
    "validation": DEFAULT_DATA / "tatoeba-eng-fra.dev.tsv",
    "test": DEFAULT_DATA / "tatoeba-eng-fra.test.tsv",
}
DEFAULT_COLUMNS = ("fra", "eng")


@dataclass
class DataArguments(PairArguments):
    """Where the sentence pairs are, and how they become tokens."""

    vocab_size: int = field(default=4000, metadata={"help": "Tokens of a new tokenizer, shared by both languages."})
    normalization: str | None = field(
        default=None, metadata={"help": "nfc, nfkc or lowercase: what a new tokenizer does to text. Default: nothing."}
    )
    bpe_dropout: float = field(
        default=0.0,
        metadata={"help": "Probability to leave out a merge, so that each epoch sees other subwords (not seeded)."},
    )
    bleu_tokenize: str = field(default="13a", metadata={"help": "Tokenizer of sacreBLEU: 13a, zh, ja-mecab, ..."})


@torch.no_grad()
def attention_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str, target: str
) -> tuple[torch.Tensor, list[str], list[str]]:
    """The last layer's attention while the model writes `target` `[heads, target, source]`, and the tokens."""
    inputs = tokenizer(source, return_tensors="pt").to(model.device)
    labels = tokenizer(text_target=target, return_tensors="pt")["input_ids"].to(model.device)
    start = torch.full_like(labels[:, :1], model.config.decoder_start_token_id)
    decoder_input_ids = torch.cat([start, labels[:, :-1]], dim=1)
    outputs = model.eval()(**inputs, decoder_input_ids=decoder_input_ids, output_attentions=True)
    weights = outputs.cross_attentions[-1][0]
    source_ids, target_ids = inputs["input_ids"][0].tolist(), labels[0].tolist()
    return weights, token_pieces(tokenizer, source_ids), token_pieces(tokenizer, target_ids)


def corpus_bleu(translations: list[str], references: list[str], tokenize: str) -> tuple[float, str]:
    """sacreBLEU, case as in the data, and its signature."""
    metric = sacrebleu.BLEU(tokenize=tokenize)
    return metric.corpus_score(translations, [references]).score, metric.get_signature().format()


def report(
    pairs: Pairs,
    data_args: DataArguments,
    args: PairTrainingArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """Translates the test pairs, prints some, writes translations and heat map, and returns the scores."""
    sources, references = [list(texts) for texts in zip(*pairs, strict=True)]
    metrics, generation = {}, model.generation_config
    started = time.perf_counter()
    translations = generate_texts(model, tokenizer, sources, args.per_device_eval_batch_size, args)
    metrics["test_seconds"] = round(time.perf_counter() - started, 2)
    metrics["test_num_beams"], metrics["test_samples"] = generation.num_beams or 1, len(pairs)
    metrics["test_bleu"], signature = corpus_bleu(translations, references, data_args.bleu_tokenize)
    metrics["test_bleu_signature"] = signature
    if (generation.num_beams or 1) > 1:
        options = {"num_beams": 1, "length_penalty": 1.0, "early_stopping": False}
        greedy = generate_texts(model, tokenizer, sources, args.per_device_eval_batch_size, args, **options)
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
        weights, columns, rows = attention_of(model, tokenizer, sources[plotted], translations[plotted])
        figure = plot_attention(weights, columns, rows, title=sources[plotted])
        figure.savefig(output_dir / "attention.png", dpi=150)
        say(f"Attention of {sources[plotted]!r}: {output_dir / 'attention.png'}")
    except ImportError:
        say("No attention heat map: matplotlib is not installed (pip install matplotlib).")
    return metrics


def main() -> int | None:
    arguments = parse_arguments((ModelArguments, DataArguments, GenerationArguments, PairTrainingArguments))
    model_args, data_args, _, training_args = arguments
    if not training_args.do_train and model_args.model_name_or_path is None:
        raise UsageError("--do_train false needs a --model_name_or_path")
    pairs = load_pairs(data_args, training_args.do_train, training_args.seed, DEFAULT_FILES, DEFAULT_COLUMNS)

    def train_tokenizer() -> PreTrainedTokenizerBase:
        texts = (text for pair in pairs["train"] for text in pair)
        return train_subword_tokenizer(texts, data_args.vocab_size, data_args.normalization)

    def score_texts(translations: list[str], references: list[str], _: list[str]) -> dict[str, float]:
        return {"bleu": corpus_bleu(translations, references, data_args.bleu_tokenize)[0]}

    status = run_pairs(
        arguments,
        pairs,
        train_tokenizer,
        score_texts,
        partial(report, pairs["test"], data_args, training_args),
        data_args.bpe_dropout,
    )
    if status is None:
        say(f"Model, scores and translations: {training_args.output_dir}")
    return status


if __name__ == "__main__":
    run_script(main)
