"""Trains a recurrent classifier of texts with `Trainer`, loads what it saved and judges texts with it.

    python examples/classify.py                                      # intents of questions, data beside this script
    python examples/classify.py --train_file examples/data/names.tsv.gz --text_column name --label_column language \\
        --split_column split --tokenization characters --word_dropout 0.05     # languages of names
    python examples/classify.py --train_file train.tsv --validation_file dev.tsv --vectors_file glove.6B.100d.txt
    python examples/classify.py --train_file tagged.jsonl --label_separator ,  # several labels for each text
    python examples/classify.py --model_name_or_path outputs/language-model    # fine-tunes its layers
    python examples/classify.py options.json --num_train_epochs 3
    python examples/classify.py --resume_from_checkpoint true                  # goes on after Ctrl-C
    python examples/classify.py --do_train false --model_name_or_path FOLDER --predict_file new.tsv
    torchrun --nproc_per_node 2 examples/classify.py

Files are tsv, csv or JSON lines (also .gz) with named columns. Labels are classes; several labels where they are lists
or there is a `--label_separator`; or numbers, where all are and one has a fraction. Without validation data some texts
are held out. The output folder gets the model with its tokenizer, checkpoints, scores (`all_results.json`), the results
on the test data (`test_results.jsonl`), pictures of what is taken for what (`confusion.png`) and of the words that a
model with `--pooling attention` goes by (`attention.png`), and the labels of a `--predict_file` (`predictions.tsv`).
"""

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
    set_seed,
)

from classification_metrics import confusion_matrix, score_classes, score_labels, score_numbers
from hf_rnn import RNNConfig, plot_confusion, plot_pooling
from hf_rnn.training import WordVectors, place_word_vectors, read_word_vectors, words_of_tokens
from labelled_texts import (
    MULTI,
    PROBLEM_TYPES,
    REGRESSION,
    SINGLE,
    Columns,
    LabelledText,
    find_problem_type,
    label_names,
    label_of,
    read_texts,
    texts_from_hub,
)
from subword_tokenizer import train_character_tokenizer, train_subword_tokenizer, train_word_tokenizer
from text_pairs import DataError
from training_helpers import (
    DEFAULT_DATA,
    GroupedTrainingArguments,
    RecurrenceArguments,
    SeedSamplerByEpoch,
    StopOnSignal,
    UsageError,
    checkpoint_to_resume,
    limit_rows,
    load_pretrained,
    make_tokenizer,
    parse_arguments,
    run_script,
    say,
    train,
)


DEFAULT_FILES = {split: DEFAULT_DATA / f"clinc150.{split}.tsv.gz" for split in ("train", "validation", "test")}
DEFAULT_COLUMNS, DEFAULT_RECALL = ("text", "intent"), "oos"
TOKENIZATIONS = ("words", "subwords", "characters")
BEST = {SINGLE: "accuracy", MULTI: "micro_f1", REGRESSION: "loss"}


@dataclass
class ModelArguments(RecurrenceArguments):
    """
    A model and tokenizer to start from, or the shape of a new one: the fields of `RNNConfig`. Those without a default
    are as a classifier that is trained further has them.
    """

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Classifier or language model to train further, or with --do_train false to judge with."},
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer to use; otherwise the model's, or a new one made from the data."}
    )
    embedding_size: int | None = field(
        default=None, metadata={"help": "Width of embeddings; default 256, or that of the vectors."}
    )
    hidden_size: int = field(default=192, metadata={"help": "Width of the hidden state, per direction."})
    num_hidden_layers: int = field(default=1, metadata={"help": "Recurrent layers."})
    bidirectional: bool = field(default=True, metadata={"help": "Whether the text is read both ways."})
    pooling: str | None = field(
        default=None, metadata={"help": "last, mean, max, concat or attention; default max for a new classifier."}
    )
    pooling_heads: int | None = field(default=None, metadata={"help": "Heads of attention pooling; default 1."})
    pooling_attention_size: int | None = field(
        default=None, metadata={"help": "Width of a tanh layer before the scores of attention pooling; default none."}
    )
    embedding_dropout: float | None = field(default=None, metadata={"help": "On the embeddings; default 0.5."})
    output_dropout: float | None = field(default=None, metadata={"help": "On the last layer's output; default 0."})
    classifier_dropout: float | None = field(default=None, metadata={"help": "Before the classifier; default 0.5."})


# What a new classifier gets where nothing is said, on the layers of a language model too.
HEAD_DEFAULTS = {
    "pooling": "max",
    "pooling_heads": 1,
    "pooling_attention_size": None,
    "embedding_dropout": 0.5,
    "output_dropout": 0.0,
    "classifier_dropout": 0.5,
}


@dataclass
class DataArguments:
    """Where the texts are, which of them to use, and how they become tokens."""

    train_file: str | None = field(
        default=None, metadata={"help": "tsv, csv or JSON lines (also .gz); several are joined by commas."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "As train_file; default: some texts held out of the training data."}
    )
    test_file: str | None = field(default=None, metadata={"help": "As train_file; default: the validation data."})
    predict_file: str | None = field(default=None, metadata={"help": "Texts to label at the end; as train_file."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set of the Hub with the splits train, validation and test."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    text_column: str | None = field(default=None, metadata={"help": "Name of the column of texts; default text."})
    label_column: str | None = field(default=None, metadata={"help": "Of the labels; default label."})
    id_column: str = field(default="id", metadata={"help": "Of names of the texts to predict, if they have any."})
    split_column: str | None = field(
        default=None, metadata={"help": "Column that says of a row of train_file: train, validation or test."}
    )
    problem_type: str | None = field(
        default=None, metadata={"help": f"{', '.join(PROBLEM_TYPES)}; default: what the labels look like."}
    )
    label_separator: str | None = field(default=None, metadata={"help": "Between several labels of one text."})
    report_recall_of: str | None = field(
        default=None, metadata={"help": "A class such as `out of scope`: its recall, and the accuracy on all others."}
    )
    skip_bad_lines: bool = field(default=False, metadata={"help": "Leave out malformed lines instead of stopping."})
    vocabulary_files: str | None = field(
        default=None,
        metadata={"help": "More texts, as train_file, whose words a new tokenizer knows: those of later data."},
    )
    tokenization: str = field(default="words", metadata={"help": "words, subwords or characters, if it is new."})
    vocab_size: int = field(default=30000, metadata={"help": "Tokens of a new tokenizer of words or subwords."})
    min_frequency: int = field(default=1, metadata={"help": "How often a word must occur to be one."})
    lowercase: bool = field(default=True, metadata={"help": "Whether words and subwords are in lower case."})
    max_length: int = field(default=512, metadata={"help": "Tokens of a text that are read."})
    vectors_file: str | None = field(
        default=None, metadata={"help": "Pretrained vectors: a text file of GloVe, word2vec or fastText (also .gz)."}
    )
    freeze_embeddings: bool = field(default=False, metadata={"help": "Leave the embeddings as they are."})
    word_dropout: float = field(default=0.1, metadata={"help": "Chance that a token of a training text is unknown."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use a random part of the training texts."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use a random part of the validation texts."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use a random part of the test texts."})
    num_samples_to_show: int = field(default=10, metadata={"help": "Results printed at the end."})


@dataclass
class ClassificationTrainingArguments(GroupedTrainingArguments, TrainingArguments):
    """`TrainingArguments` with defaults for a small recurrent classifier on a CPU."""

    output_dir: str | None = field(default="outputs/classifier", metadata={"help": "Where everything is written."})
    bf16: bool = field(default=False, metadata={"help": "Mixed precision."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Texts per step and device."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Texts per evaluation batch."})
    num_train_epochs: float = field(default=12.0, metadata={"help": "Passes over the training data."})
    label_smoothing_factor: float = field(default=0.1, metadata={"help": "Label smoothing, of classes."})
    logging_steps: float = field(default=100, metadata={"help": "Steps between two lines of the log."})
    metric_for_best_model: str | None = field(
        default="auto", metadata={"help": "What best means; auto: accuracy, micro_f1, or the loss of numbers."}
    )


Arguments = tuple[ModelArguments, DataArguments, ClassificationTrainingArguments]


@dataclass
class TextCollator(DataCollatorWithPadding):
    """
    Pads a batch of encoded texts. Of texts to train on some tokens become unknown: which, follows from the seed, the
    epoch and the texts alone, so that a resumed run sees what it would have seen.
    """

    word_dropout: float = 0.0
    seed: int = 0
    epoch: int = 0

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        drops = self.word_dropout > 0 and features[0].get("is_training", False)
        labels = [feature["labels"] for feature in features] if "labels" in features[0] else None
        batch = super().__call__([{"input_ids": feature["input_ids"]} for feature in features])
        if drops:
            ids, mask = batch["input_ids"], batch["attention_mask"]
            key = hash((self.seed, self.epoch, *ids.flatten().tolist()))
            chances = torch.rand(ids.shape, generator=torch.Generator().manual_seed(key % 2**63))
            dropped = (chances < self.word_dropout) & mask.bool()
            batch["input_ids"] = ids.masked_fill(dropped, self.tokenizer.unk_token_id)
        if labels is not None:
            batch["labels"] = torch.tensor(labels)
        return batch


class CountEpochs(TrainerCallback):
    """Tells the collator which epoch it is."""

    def __init__(self, collator: TextCollator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.epoch = int(state.epoch or 0)


def load_texts(args: DataArguments, training: bool, seed: int) -> dict[str, list[LabelledText]]:
    """
    Rows of `"train"` (when training), `"validation"`, `"test"` and `"predict"`, as far as there are any. Without
    validation data some training texts are held out. Where no data is named, the default.
    """
    given = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    if args.dataset_name is not None and any(given.values()):
        raise UsageError("--dataset_name and --*_file exclude each other")
    if args.split_column is not None and (args.train_file is None or args.validation_file or args.test_file):
        raise UsageError("--split_column needs a --train_file that has all texts, and no other file beside it")
    is_default = args.dataset_name is None and not any((*given.values(), args.predict_file))
    text_column, label_column = args.text_column, args.label_column
    if is_default:
        given = {split: str(path) for split, path in DEFAULT_FILES.items()}
        text_column, label_column = text_column or DEFAULT_COLUMNS[0], label_column or DEFAULT_COLUMNS[1]
        args.report_recall_of = args.report_recall_of or DEFAULT_RECALL
    columns = Columns(text_column or "text", label_column or "label", args.id_column)

    rows: dict[str, list[LabelledText]] = {}
    if args.dataset_name is not None:
        for split in ("train", "validation", "test") if training else ("validation", "test"):
            try:
                rows[split] = texts_from_hub(args.dataset_name, args.dataset_config_name, split, columns)
            except DataError:
                if split == "train":
                    raise
    elif args.split_column is not None:
        rows = read_texts(
            args.train_file, columns._replace(split=args.split_column), skip_bad_lines=args.skip_bad_lines
        )
    else:
        for split, paths in given.items():
            if paths is not None and (training or split != "train"):
                rows[split] = read_texts(paths, columns, skip_bad_lines=args.skip_bad_lines)["train"]
    if not training:
        rows.pop("train", None)
    if args.predict_file is not None:
        rows["predict"] = read_texts(args.predict_file, columns, False, args.skip_bad_lines)["train"]
    if training and "train" not in rows:
        raise UsageError("there is no --train_file to train on (--do_train false judges without training)")
    if not rows:
        raise UsageError("there are no texts to judge: give a --validation_file, --test_file or --predict_file")

    rng = random.Random(seed)
    if training and "validation" not in rows:
        held_out = min(1000, len(rows["train"]) // 10)
        if held_out == 0:
            raise UsageError("too few training texts to hold any out: give a --validation_file")
        rng.shuffle(rows["train"])
        rows["validation"], rows["train"] = rows["train"][:held_out], rows["train"][held_out:]
        say(f"No validation data: {held_out} texts are held out of the training data.")
    if "test" not in rows and "validation" in rows:
        say("No test data: the validation data are judged in their place.")
        rows["test"] = rows["validation"]
    if "validation" not in rows and "test" in rows:
        rows["validation"] = rows["test"]
    return rows


def make_label_names(
    rows: dict[str, list[LabelledText]], args: DataArguments, training: bool, config: Any
) -> tuple[str, list[str]]:
    """
    What is to be predicted, and the names of the labels: those of a classifier that knows them, or those of the
    training data.
    """
    known = [config.id2label[index] for index in range(config.num_labels)] if is_classifier(config) else None
    labelled = [row for split, texts in rows.items() if split != "predict" for row in texts]
    problem_type = args.problem_type or (config.problem_type if known and not training else None)
    if problem_type is not None and problem_type not in PROBLEM_TYPES:
        raise UsageError(f"--problem_type must be one of {', '.join(PROBLEM_TYPES)}, got {problem_type!r}")
    problem_type = problem_type or (find_problem_type(labelled, args.label_separator) if labelled else SINGLE)
    if args.label_separator is not None and problem_type != MULTI:
        raise UsageError(f"--label_separator is for {MULTI}, not for {problem_type}")
    if problem_type == REGRESSION:
        return problem_type, ["LABEL_0"]
    if not training:
        return problem_type, known
    names = label_names(rows["train"], problem_type, args.label_separator)
    if len(names) < 2:
        raise DataError(
            rows["train"][0].path, None, f"all texts have the same label {names}: there is nothing to learn"
        )
    return problem_type, known if known is not None and sorted(known) == sorted(names) else names


def is_classifier(config: Any) -> bool:
    """Whether a configuration is that of a model that was saved as a classifier of texts."""
    return any("ForSequenceClassification" in name for name in getattr(config, "architectures", None) or ())


def encode_labels(rows: list[LabelledText], problem_type: str, names: list[str], separator: str | None) -> list[Any]:
    """The labels of rows as a model wants them. Raises `DataError` for a label that is none of `names`."""
    index = {name: position for position, name in enumerate(names)}
    encoded = []
    for row in rows:
        label = label_of(row, problem_type, separator)
        if problem_type == REGRESSION:
            encoded.append(label)
            continue
        for part in label if problem_type == MULTI else [label]:
            if part not in index:
                shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
                raise row.error(f"the label {part!r} is none that the model knows ({shown})")
        if problem_type == MULTI:
            encoded.append([float(name in label) for name in names])
        else:
            encoded.append(index[label])
    return encoded


def encode_texts(
    rows: list[LabelledText], labels: list[Any], tokenizer: PreTrainedTokenizerBase, max_length: int, training: bool
) -> Dataset:
    """Token ids and labels of the rows, with the `length` that batches are grouped by."""
    ids = tokenizer([row.text for row in rows], truncation=True, max_length=max_length)["input_ids"]
    # A text of white space alone for the tokenizer has no token; it is read as one unknown word.
    ids = [row_ids or [tokenizer.unk_token_id or 0] for row_ids in ids]
    columns = {"input_ids": ids, "labels": labels, "length": list(map(len, ids))}
    return Dataset.from_dict(columns | {"is_training": [training] * len(ids)})


def new_tokenizer(rows: list[LabelledText], args: DataArguments) -> PreTrainedTokenizerBase:
    """A tokenizer made from the training texts, and from others that it is to know."""
    if args.vocabulary_files is not None:
        columns = Columns(args.text_column or "text", args.label_column or "label", args.id_column)
        rows = rows + read_texts(args.vocabulary_files, columns, False, args.skip_bad_lines)["train"]
    texts = (row.text for row in rows)
    if args.tokenization == "words":
        tokenizer = train_word_tokenizer(texts, args.vocab_size, args.min_frequency, args.lowercase)
    elif args.tokenization == "subwords":
        normalization = "lowercase" if args.lowercase else None
        tokenizer = train_subword_tokenizer(texts, args.vocab_size, normalization, add_eos=False)
    else:
        tokenizer = train_character_tokenizer(texts)
    tokenizer.model_max_length = args.max_length
    return tokenizer


def read_vectors(path: str, tokenizer: PreTrainedTokenizerBase) -> WordVectors:
    """The vectors of the tokenizer's words, with a bar on the main process."""
    try:
        words = list(words_of_tokens(tokenizer).values())
        if not words:
            raise UsageError("the tokenizer has no whole words that --vectors_file could have vectors for")
        return read_word_vectors(path, words, on_duplicate="first")
    except FileNotFoundError:
        raise DataError(path, None, "no such file") from None
    except IsADirectoryError:
        raise DataError(path, None, "is a folder, not a file") from None
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error


def make_model(
    args: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    config: Any,
    problem_type: str,
    names: list[str],
    vectors: WordVectors | None,
) -> PreTrainedModel:
    """The model to train further with a head for these labels, or a new one with the fields of `args`."""
    fields = {
        "problem_type": problem_type,
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }
    given = {name: getattr(args, name) for name in HEAD_DEFAULTS if getattr(args, name) is not None}
    try:
        overrides = json.loads(args.config_overrides or "{}")
        if args.model_name_or_path is not None:
            if isinstance(config, RNNConfig):
                fields |= ({} if is_classifier(config) else HEAD_DEFAULTS) | given
            config = AutoConfig.from_pretrained(args.model_name_or_path, **fields | overrides)
            return AutoModelForSequenceClassification.from_pretrained(
                args.model_name_or_path, config=config, ignore_mismatched_sizes=True
            )
        not_in_config = ("model_name_or_path", "tokenizer_name", "config_overrides")
        fields |= {name: value for name, value in vars(args).items() if name not in not_in_config}
        fields |= HEAD_DEFAULTS | given
        if args.embedding_size is None:
            fields["embedding_size"] = 256 if vectors is None else vectors.dimension
        fields |= {"vocab_size": len(tokenizer)}
        fields |= {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        return AutoModelForSequenceClassification.from_config(RNNConfig(**fields | overrides))
    except (OSError, TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def make_scorer(
    problem_type: str, names: list[str], recall_of: str | None
) -> Callable[[np.ndarray, np.ndarray], dict[str, float]]:
    """Scores by name of logits `(texts, labels)` and of the labels as the model wants them."""
    if recall_of is not None and (problem_type != SINGLE or recall_of not in names):
        raise UsageError(f"--report_recall_of must be a class of the data, got {recall_of!r}")

    def score(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        if problem_type == REGRESSION:
            return score_numbers(logits.reshape(-1), labels.reshape(-1))
        if problem_type == MULTI:
            return score_labels(logits > 0, labels > 0.5)
        if recall_of is None:
            return score_classes(logits.argmax(-1), labels)
        return score_classes(logits.argmax(-1), labels, names.index(recall_of), recall_of)

    return score


@torch.no_grad()
def judge(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], batch_size: int, max_length: int
) -> np.ndarray:
    """The logits `(texts, labels)`, computed in batches of similar length."""
    model.eval()
    ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    ids = [row or [tokenizer.unk_token_id or 0] for row in ids]
    order = sorted(range(len(texts)), key=lambda index: -len(ids[index]))
    logits = np.zeros((len(texts), model.config.num_labels), dtype=np.float32)
    for start in tqdm(range(0, len(order), batch_size), desc="judging", unit=" batches"):
        batch = order[start : start + batch_size]
        inputs = tokenizer.pad({"input_ids": [ids[index] for index in batch]}, return_tensors="pt").to(model.device)
        logits[batch] = model(**inputs).logits.float().cpu().numpy()
    return logits


def answer_of(logits: np.ndarray, problem_type: str, names: list[str]) -> Any:
    """What a row of logits says: a class, a list of labels, or a number."""
    if problem_type == REGRESSION:
        return round(float(logits[0]), 4)
    if problem_type == MULTI:
        return [name for name, logit in zip(names, logits, strict=True) if logit > 0]
    return names[int(logits.argmax())]


def report(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[LabelledText],
    problem_type: str,
    names: list[str],
    score: Callable[[np.ndarray, np.ndarray], dict[str, float]],
    data_args: DataArguments,
    args: ClassificationTrainingArguments,
) -> dict[str, Any]:
    """Judges the test texts, prints some results, writes them all, draws what can be drawn, and returns the scores."""
    folder = Path(args.output_dir)
    labels = np.array(encode_labels(rows, problem_type, names, data_args.label_separator))
    started = time.perf_counter()
    texts = [row.text for row in rows]
    logits = judge(model, tokenizer, texts, args.per_device_eval_batch_size, data_args.max_length)
    metrics: dict[str, Any] = {"test_samples": len(rows)}
    metrics["test_texts_per_second"] = round(len(rows) / (time.perf_counter() - started), 1)
    metrics |= {f"test_{name}": round(value, 4) for name, value in score(logits, labels).items()}
    answers = [answer_of(row, problem_type, names) for row in logits]
    wanted = [label_of(row, problem_type, data_args.label_separator) for row in rows]
    with open(folder / "test_results.jsonl", "w", encoding="utf-8") as file:
        for text, answer, label in zip(texts, answers, wanted, strict=True):
            file.write(json.dumps({"text": text, "answer": answer, "label": label}, ensure_ascii=False) + "\n")

    chosen = random.Random(args.seed).sample(range(len(rows)), min(data_args.num_samples_to_show, len(rows)))
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device=model.device)
    # Numbers are shown as they are, of several labels all that are more likely than not.
    shown = classify([texts[index] for index in chosen], top_k=None, truncation=True) if chosen else []
    for index, found in zip(chosen, shown, strict=True):
        if problem_type == REGRESSION:
            said = f"{found[0]['score']:.3f}"
        elif problem_type == MULTI:
            said = ", ".join(f"{item['label']} {item['score']:.2f}" for item in found if item["score"] > 0.5) or "none"
        else:
            said = f"{found[0]['label']} {found[0]['score']:.2f}"
        mark = "" if problem_type == REGRESSION else "right, " if answers[index] == wanted[index] else "wrong, "
        # A number may be 0, but a list of labels empty.
        right = "none" if wanted[index] == [] else wanted[index]
        say(f"{texts[index][:200]}\n    {said}   ({mark}{right})")

    if problem_type == SINGLE:
        matrix = confusion_matrix(logits.argmax(-1), labels, len(names))
        plot_confusion(matrix, names, most=40).savefig(folder / "confusion.png", dpi=150)
    if getattr(model.config, "pooling", None) == "attention" and chosen:
        draw_attention(model, tokenizer, [texts[index] for index in chosen], data_args.max_length, folder)
    for name, value in metrics.items():
        say(f"{name:>32}  {value}")
    return metrics


@torch.no_grad()
def draw_attention(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int, folder: Path
) -> None:
    """A picture of the tokens that the model goes by in some texts."""
    texts = [text for text in texts if tokenizer(text)["input_ids"]][:10]
    inputs = tokenizer(
        texts,
        truncation=True,
        max_length=min(100, max_length),
        padding=True,
        return_tensors="pt",
        return_offsets_mapping=True,
    )
    offsets = inputs.pop("offset_mapping")
    outputs = model(**inputs.to(model.device), output_attentions=True)
    # As they stand in the text, unknown words too; what stands for nothing in it by its name.
    tokens = [
        [
            text[start:end].strip() or tokenizer.decode([index])
            for index, (start, end), is_token in zip(ids.tolist(), places.tolist(), mask.tolist(), strict=True)
            if is_token
        ]
        for text, ids, places, mask in zip(texts, inputs["input_ids"], offsets, inputs["attention_mask"], strict=True)
    ]
    weights = [row[..., mask.bool()] for row, mask in zip(outputs.attentions[0], inputs["attention_mask"], strict=True)]
    said = [
        "" if model.config.problem_type != SINGLE else model.config.id2label[int(logits.argmax())]
        for logits in outputs.logits
    ]
    plot_pooling(weights, tokens, names=said if any(said) else None).savefig(folder / "attention.png", dpi=150)


def write_predictions(
    rows: list[LabelledText], answers: list[Any], problem_type: str, separator: str | None, path: Path
) -> None:
    """A tsv file of ids (or the numbers of the lines, where there are none) and labels."""
    with open(path, "w", encoding="utf-8") as file:
        file.write("id\tlabel\n")
        for row, answer in zip(rows, answers, strict=True):
            answer = (separator or ",").join(answer) if problem_type == MULTI else answer
            file.write(f"{row.line if row.row_id is None else row.row_id}\t{answer}\n")


def main() -> int | None:
    model_args, data_args, training_args = parse_arguments(
        (ModelArguments, DataArguments, ClassificationTrainingArguments)
    )
    training, name = training_args.do_train, model_args.model_name_or_path
    check_arguments(model_args, data_args, training)
    set_seed(training_args.seed)

    rows = load_texts(data_args, training, training_args.seed)
    checkpoint = checkpoint_to_resume(training_args) if training else None
    config = None if name is None else load_pretrained(AutoConfig, name)
    if not training and not is_classifier(config):
        raise UsageError(f"{name} is no classifier: --do_train false needs one")
    problem_type, names = make_label_names(rows, data_args, training, config)
    score = make_scorer(problem_type, names, data_args.report_recall_of)
    limit_rows(rows, data_args, random.Random(training_args.seed))
    say(" · ".join(f"{split} {len(texts)} texts" for split, texts in rows.items()))
    separator = data_args.label_separator
    labels = {
        split: encode_labels(texts, problem_type, names, separator)
        for split, texts in rows.items()
        if split != "predict"
    }

    tokenizer = make_tokenizer(model_args, training_args, checkpoint, lambda: new_tokenizer(rows["train"], data_args))
    if data_args.word_dropout > 0 and tokenizer.unk_token_id is None and training:
        raise UsageError("--word_dropout needs a tokenizer with an unknown token")
    vectors = None
    if training and data_args.vectors_file is not None and checkpoint is None:
        vectors = read_vectors(data_args.vectors_file, tokenizer)
    if training:
        model = make_model(model_args, tokenizer, config, problem_type, names, vectors)
    else:
        model = load_pretrained(AutoModelForSequenceClassification, name)
    if vectors is not None:
        try:
            placed = place_word_vectors(model, tokenizer, vectors)
        except ValueError as error:
            raise UsageError(str(error)) from error
        say(
            f"{placed} of {len(tokenizer)} tokens have a vector of {vectors.dimension} numbers in "
            f"{data_args.vectors_file}"
        )
    model.get_input_embeddings().weight.requires_grad_(not data_args.freeze_embeddings)
    what = {SINGLE: f"one of {len(names)} classes", MULTI: f"any of {len(names)} labels", REGRESSION: "a number"}
    say(f"{type(model).__name__}, {model.num_parameters():,} parameters, vocabulary of {len(tokenizer)}")
    say(f"Every text gets {what[problem_type]}.")

    if training_args.metric_for_best_model == "auto":
        training_args.metric_for_best_model = BEST[problem_type]
        training_args.greater_is_better = problem_type != REGRESSION
    if problem_type != SINGLE:
        training_args.label_smoothing_factor = 0.0

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        return score(logits, prediction.label_ids)

    def encode(split: str) -> Dataset | None:
        if split not in labels:
            return None
        return encode_texts(rows[split], labels[split], tokenizer, data_args.max_length, split == "train")

    stop = StopOnSignal()
    collator = TextCollator(tokenizer, word_dropout=data_args.word_dropout, seed=training_args.seed)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=encode("train"),
        eval_dataset=encode("validation"),
        data_collator=collator,
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        callbacks=[stop, SeedSamplerByEpoch(), CountEpochs(collator)],
    )
    if training:
        if not train(trainer, stop, checkpoint, training_args):
            return 130
        model.config.use_cache = True  # the Trainer turns it off
        trainer.save_model()
        name = training_args.output_dir
    if training_args.do_eval and "validation" in labels:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.accelerator.wait_for_everyone()
    if training_args.process_index != 0:
        return None

    Path(training_args.output_dir).mkdir(parents=True, exist_ok=True)
    model = AutoModelForSequenceClassification.from_pretrained(name).to(training_args.device)
    tokenizer = AutoTokenizer.from_pretrained(
        name if model_args.tokenizer_name is None or training else model_args.tokenizer_name
    )
    if training_args.do_predict and "test" in rows:
        metrics = report(model, tokenizer, rows["test"], problem_type, names, score, data_args, training_args)
        trainer.save_metrics("test", metrics)
    if "predict" in rows:
        texts = [row.text for row in rows["predict"]]
        logits = judge(model, tokenizer, texts, training_args.per_device_eval_batch_size, data_args.max_length)
        answers = [answer_of(row, problem_type, names) for row in logits]
        path = Path(training_args.output_dir) / "predictions.tsv"
        write_predictions(rows["predict"], answers, problem_type, separator, path)
        say(f"Labels of {len(answers)} texts: {path}")
    say(f"Model, scores and results: {training_args.output_dir}")
    return None


def check_arguments(model_args: ModelArguments, data_args: DataArguments, training: bool) -> None:
    """Raises `UsageError` for options that cannot work, before anything is read."""
    if not training and model_args.model_name_or_path is None:
        raise UsageError("--do_train false needs a --model_name_or_path")
    if data_args.tokenization not in TOKENIZATIONS:
        raise UsageError(f"--tokenization must be one of {', '.join(TOKENIZATIONS)}, got {data_args.tokenization!r}")
    if data_args.max_length < 1:
        raise UsageError(f"--max_length must be at least 1, got {data_args.max_length}")
    if not 0 <= data_args.word_dropout < 1:
        raise UsageError(f"--word_dropout must be a probability in [0, 1), got {data_args.word_dropout}")
    if data_args.label_separator == "":
        raise UsageError("--label_separator must not be empty")


if __name__ == "__main__":
    run_script(main)
