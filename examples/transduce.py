"""Trains a model from symbols to symbols with `Seq2SeqTrainer`: words to pronunciations, commands to actions.

    python examples/transduce.py                                  # letters to phonemes, on the data beside this script
    python examples/transduce.py --train_file train.tsv --test_file test.tsv --source_level words --target_level words
    python examples/transduce.py --do_train false --model_name_or_path FOLDER --test_file new.tsv

A symbol is a character or a word between white space. Sources that occur several times have several right targets: a
result counts as right if it is any of them, and its errors are counted against the nearest. Files are read as by
`translate.py`. The output folder gets the model with its tokenizer, checkpoints, scores (`all_results.json`) and the
results on the test data (`test_results.jsonl`).
"""

import json
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rapidfuzz.distance import Levenshtein
from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
from subword_tokenizer import train_symbol_tokenizer
from training_helpers import DEFAULT_DATA, UsageError, parse_arguments, run_script, say


DEFAULT_FILES = {
    "train": DEFAULT_DATA / "cmudict.train.tsv.gz",
    "validation": DEFAULT_DATA / "cmudict.dev.tsv.gz",
    "test": DEFAULT_DATA / "cmudict.test.tsv.gz",
}
DEFAULT_COLUMNS = ("word", "phones")


@dataclass
class DataArguments(PairArguments):
    """Where the pairs are, and what their symbols are."""

    source_level: str = field(default="characters", metadata={"help": "Symbols of the source: characters or words."})
    target_level: str = field(default="words", metadata={"help": "Symbols of the target: characters or words."})
    ignore: str = field(
        default="", metadata={"help": "Characters left out of results and targets for a second score, such as 012."}
    )
    leave_out: str = field(
        default="", metadata={"help": "Characters left out of every target, in training too, such as 012."}
    )


@dataclass
class TransductionTrainingArguments(PairTrainingArguments):
    """With defaults for short sequences of few symbols."""

    output_dir: str | None = field(default="outputs/transducer", metadata={"help": "Where everything is written."})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Sources per evaluation batch."})
    metric_for_best_model: str | None = field(default="sequence_error_rate", metadata={"help": "What best means."})
    greater_is_better: bool | None = field(default=False, metadata={"help": "For the metric."})


def error_rates(results: list[list[str]], references: list[list[list[str]]]) -> dict[str, float]:
    """
    Errors in per cent, as sequences of symbols.

    Args:
        results (`list[list[str]]`): What the model wrote for each source.
        references (`list[list[list[str]]]`): All right targets of each source.

    Returns:
        `sequence_error_rate`, the share of sources with a result that is no right one, and `symbol_error_rate`, the
        insertions, deletions and replacements that lead from the results to the nearest right ones (of equally near
        ones the first), by the number of symbols in these.
    """
    wrong, edits, symbols = 0, 0, 0
    for result, targets in zip(results, references, strict=True):
        distances = [Levenshtein.distance(result, target) for target in targets]
        nearest = min(range(len(targets)), key=distances.__getitem__)
        wrong += distances[nearest] > 0
        edits += distances[nearest]
        symbols += len(targets[nearest])
    return {"sequence_error_rate": 100 * wrong / len(results), "symbol_error_rate": 100 * edits / symbols}


def symbols_of(text: str, level: str) -> list[str]:
    """The symbols of a text: its characters, or the words between white space."""
    return list(text) if level == "characters" else text.split()


def without(symbols: list[str], characters: str) -> list[str]:
    """The symbols without these characters, as far as something is left of them."""
    table = str.maketrans("", "", characters)
    return [symbol for symbol in (symbol.translate(table) for symbol in symbols) if symbol]


def leave_out(pairs: Pairs, args: DataArguments) -> Pairs:
    """
    The pairs without the characters to be left out of the targets; each that then occurs several times, once. Raises
    `UsageError` for a target of which nothing is left.
    """
    joint = "" if args.target_level == "characters" else " "
    shortened = [
        (source, joint.join(without(symbols_of(target, args.target_level), args.leave_out))) for source, target in pairs
    ]
    for (source, target), (_, rest) in zip(pairs, shortened, strict=True):
        if not rest.strip():
            raise UsageError(f"--leave_out {args.leave_out} leaves nothing of {target!r}, the target of {source!r}")
    return list(dict.fromkeys(shortened))


def group_targets(pairs: Pairs) -> dict[str, list[str]]:
    """All targets of each source, in the order of the pairs."""
    targets: dict[str, list[str]] = {}
    for source, target in pairs:
        targets.setdefault(source, []).append(target)
    return targets


def score(results: Iterable[str], references: Iterable[list[str]], args: DataArguments) -> dict[str, float]:
    """Error rates, and those without the characters that are to be ignored, with the prefix `ignoring_`."""
    split_results = [symbols_of(result, args.target_level) for result in results]
    split_references = [[symbols_of(target, args.target_level) for target in targets] for targets in references]
    rates = error_rates(split_results, split_references)
    if args.ignore:
        split_references = [[without(target, args.ignore) for target in targets] for targets in split_references]
        ignoring = error_rates([without(result, args.ignore) for result in split_results], split_references)
        rates |= {f"ignoring_{name}": rate for name, rate in ignoring.items()}
    return rates


def report(
    targets: dict[str, list[str]],
    data_args: DataArguments,
    args: PairTrainingArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """Runs the model over the test sources, prints some results, writes them all, and returns the scores."""
    sources, generation = list(targets), model.generation_config
    searches = {"": {}}
    if (generation.num_beams or 1) > 1:
        searches["greedy_"] = {"num_beams": 1, "length_penalty": 1.0, "early_stopping": False}
    metrics = {"test_num_beams": generation.num_beams or 1, "test_samples": len(sources)}
    results: dict[str, list[str]] = {}
    for prefix, options in searches.items():
        started = time.perf_counter()
        results[prefix] = generate_texts(model, tokenizer, sources, args.per_device_eval_batch_size, args, **options)
        rates = score(results[prefix], targets.values(), data_args)
        rates["sources_per_second"] = len(sources) / (time.perf_counter() - started)
        metrics |= {f"test_{prefix}{name}": round(rate, 4) for name, rate in rates.items()}
    if args.process_index != 0:
        return metrics

    rows = [
        {"source": source, "result": result, "targets": targets[source]}
        for source, result in zip(sources, results[""], strict=True)
    ]
    for row in random.Random(args.seed).sample(rows, min(data_args.num_samples_to_show, len(rows))):
        mark = "right" if row["result"] in row["targets"] else f"wrong, {' or '.join(row['targets'])}"
        say(f"{row['source']}  ->  {row['result']}   ({mark})")
    with open(Path(args.output_dir) / "test_results.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    for name, value in metrics.items():
        say(f"{name:>40}  {value}")
    return metrics


def main() -> int | None:
    arguments = parse_arguments((ModelArguments, DataArguments, GenerationArguments, TransductionTrainingArguments))
    model_args, data_args, _, training_args = arguments
    if not training_args.do_train and model_args.model_name_or_path is None:
        raise UsageError("--do_train false needs a --model_name_or_path")
    pairs = load_pairs(data_args, training_args.do_train, training_args.seed, DEFAULT_FILES, DEFAULT_COLUMNS)
    if data_args.leave_out:
        pairs = {split: leave_out(of_split, data_args) for split, of_split in pairs.items()}
    # Sources are judged once, with the first target as the label of the loss; training sees every pair.
    targets = {split: group_targets(pairs[split]) for split in ("validation", "test")}
    pairs |= {split: [(source, known[0]) for source, known in targets[split].items()] for split in targets}

    def train_tokenizer() -> PreTrainedTokenizerBase:
        sources, labels = zip(*pairs["train"], strict=True)
        return train_symbol_tokenizer(sources, labels, data_args.source_level, data_args.target_level)

    def score_texts(results: list[str], _: list[str], sources: list[str]) -> dict[str, float]:
        return score(results, [targets["validation"][source] for source in sources], data_args)

    status = run_pairs(
        arguments, pairs, train_tokenizer, score_texts, partial(report, targets["test"], data_args, training_args)
    )
    if status is None:
        say(f"Model, scores and results: {training_args.output_dir}")
    return status


if __name__ == "__main__":
    run_script(main)
