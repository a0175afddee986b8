"""Trains a tagger with `Trainer`: parts of speech, names, or the slots of a query together with its intent.

    python examples/tag.py                                   # slots and intents, on the data beside this script
    python examples/tag.py --train_file train.conllu --validation_file dev.conllu --test_file test.conllu
    python examples/tag.py --do_train false --model_name_or_path FOLDER --predict_file sentences.txt

Words are spelled in bytes: a convolution or a recurrence over them makes a vector of each word, beside the embedding of
the word where it is frequent (`--word_encoder`, `--min_word_count`). Files are read as `tagged_text.py` says. Tags that
begin with `B-` and `I-` are scored as entities (seqeval), others by accuracy; what the training data lack counts as an
error. The output folder gets the model with its tokenizer, checkpoints, scores (`all_results.json`), and the tags of
the test data (`test_predictions.conll`) and of a `--predict_file` (`predictions.conll`).
"""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

from hf_rnn import RNNConfig
from hf_rnn.training import (
    first_continuation_id,
    frequent_words,
    ids_without_label,
    make_word_tokenizer,
    read_word_vectors,
    set_word_table,
    whole_words,
)
from tagged_text import Sentence, Split, read_sentences, sentences_from_hub
from text_pairs import DataError, read_lines
from training_helpers import (
    DEFAULT_DATA,
    GroupedTrainingArguments,
    RecurrenceArguments,
    SeedSamplerByEpoch,
    StopOnSignal,
    UsageError,
    checkpoint_to_resume,
    load_pretrained,
    make_tokenizer,
    parse_arguments,
    run_script,
    say,
    train,
)


DEFAULT_FILES = {"train": DEFAULT_DATA / "snips.train.jsonl.gz", "validation": DEFAULT_DATA / "snips.dev.jsonl.gz"}
IGNORED = -100


@dataclass
class ModelArguments(RecurrenceArguments):
    """A model to start from, or the shape of a new one: the fields of `RNNConfig`."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model to train further, or with --do_train false to tag with."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer of sub-words; otherwise the model's, or words spelled in bytes."}
    )
    hidden_size: int = field(default=200, metadata={"help": "Width of the hidden state, per direction."})
    num_hidden_layers: int = field(default=1, metadata={"help": "Recurrent layers."})
    bidirectional: bool = field(default=True, metadata={"help": "Whether sentences are read both ways."})
    use_crf: bool = field(default=True, metadata={"help": "Tags by the best path (a conditional random field)."})
    word_encoder: str | None = field(
        default="cnn",
        metadata={"help": "What reads the bytes of a word: cnn, lstm, gru, rnn_tanh, rnn_relu, or none."},
    )
    embedding_size: int = field(default=32, metadata={"help": "Width of the embeddings of bytes (or of sub-words)."})
    word_encoder_size: int = field(default=100, metadata={"help": "Width of what is made of the bytes of a word."})
    word_encoder_width: int = field(default=3, metadata={"help": "Width of the filters of cnn, an odd number."})
    word_embedding_size: int | None = field(
        default=None, metadata={"help": "Width of the embeddings of known words; default 100, or that of the vectors."}
    )
    vectors_file: str | None = field(
        default=None, metadata={"help": "Pretrained vectors of words: text of GloVe, word2vec or fastText (also .gz)."}
    )
    min_word_count: int = field(default=2, metadata={"help": "How often a word occurs that has an embedding."})
    max_words: int | None = field(default=None, metadata={"help": "Most words with an embedding; 0 for none."})
    all_vectors: bool = field(
        default=False, metadata={"help": "Know all words of the vectors, not those of the data alone, for later texts."}
    )
    word_dropout: float = field(default=0.1, metadata={"help": "Chance to read a known word as unknown in training."})
    embedding_dropout: float = field(default=0.3, metadata={"help": "Dropout on the vectors of words."})
    output_dropout: float = field(default=0.3, metadata={"help": "Dropout on the output of the last layer."})
    pooling: str = field(default="max", metadata={"help": "What intents are read from: last, mean, max, ..."})


@dataclass
class DataArguments:
    """Where the sentences are, and which of them to use."""

    train_file: str | None = field(default=None, metadata={"help": "conllu, conll, tsv, txt or json lines (also .gz)."})
    validation_file: str | None = field(
        default=None, metadata={"help": "As train_file; default: some sentences held out of the training data."}
    )
    test_file: str | None = field(default=None, metadata={"help": "As train_file; default: the validation data."})
    predict_file: str | None = field(
        default=None, metadata={"help": "Sentences to tag at the end: a text per line (.txt), or as train_file."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set of the Hub with the splits train, validation and test."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    word_column: str | None = field(default=None, metadata={"help": "Column of words, see tagged_text.py."})
    tag_column: str | None = field(default=None, metadata={"help": "Column of tags, such as upos or xpos."})
    use_intents: bool = field(default=True, metadata={"help": "Learn the intents of sentences where they are given."})
    lower_case: bool = field(default=False, metadata={"help": "Write everything in small letters first."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training sentences."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many validation sentences."})
    num_samples_to_show: int = field(default=5, metadata={"help": "Tagged sentences printed at the end."})


@dataclass
class TaggingArguments(GroupedTrainingArguments, TrainingArguments):
    """`TrainingArguments` with defaults for a small tagger on a CPU."""

    output_dir: str | None = field(default="outputs/tagger", metadata={"help": "Where everything is written."})
    bf16: bool = field(default=False, metadata={"help": "Mixed precision."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Sentences per step and device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Sentences per evaluation batch."})
    num_train_epochs: float = field(default=10.0, metadata={"help": "Passes over the training data."})
    max_grad_norm: float = field(default=5.0, metadata={"help": "Longest gradient."})
    metric_for_best_model: str | None = field(
        default="score", metadata={"help": "What best means; score: F1 of entities, or accuracy."}
    )
    greater_is_better: bool | None = field(default=True, metadata={"help": "For the metric."})
    report_to: str | None = field(default="none", metadata={"help": "Where to log to besides."})


class TokenCollator(DataCollatorForTokenClassification):
    """Pads a batch; what only the sampler reads is left out."""

    def torch_call(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        kept = ("input_ids", "attention_mask", "labels", "intents")
        return super().torch_call([{name: row[name] for name in kept if name in row} for row in features])


def load_sentences(args: DataArguments, training: bool, seed: int) -> dict[str, list[Sentence]]:
    """
    Sentences of `"train"` (when training), `"validation"` and `"test"`; without validation data some are held out.
    """
    given = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    splits = [split for split in given if training or split != "train"]
    sentences, split_text = {}, make_split()
    if args.dataset_name is not None:
        if any(given.values()):
            raise UsageError("--dataset_name and --*_file exclude each other")
        for split in splits:
            try:
                sentences[split] = sentences_from_hub(
                    args.dataset_name, args.dataset_config_name, split, args.word_column, args.tag_column, split_text
                )
            except DataError:
                if split == "train" or (split == "validation" and not training):
                    raise
    else:
        if not any(given.values()) and args.predict_file is None:
            given |= {split: str(path) for split, path in DEFAULT_FILES.items()}
        if training and given["train"] is None:
            raise UsageError("there is no --train_file to train on (--do_train false tags without training)")
        for split in splits:
            if given[split] is not None:
                sentences[split] = read_sentences(given[split], args.word_column, args.tag_column, split=split_text)
    rng = np.random.default_rng(seed)
    if training and "validation" not in sentences:
        order = rng.permutation(len(sentences["train"]))
        held_out = min(1000, len(order) // 10)
        if held_out == 0:
            raise UsageError("too few training sentences to hold any out: give a --validation_file")
        train = sentences["train"]
        sentences["validation"] = [train[index] for index in order[:held_out]]
        sentences["train"] = [train[index] for index in sorted(order[held_out:])]
        say(f"No validation data: {held_out} sentences are held out of the training data.")
    if "test" not in sentences and "validation" in sentences:
        say("No test data: the validation data are tagged in their place.")
        sentences["test"] = sentences["validation"]
    if "validation" not in sentences and "test" in sentences:
        sentences["validation"] = sentences["test"]
    for split, limit in (("train", args.max_train_samples), ("validation", args.max_eval_samples)):
        if split in sentences and limit is not None and limit < len(sentences[split]):
            chosen = sorted(rng.choice(len(sentences[split]), limit, replace=False))
            sentences[split] = [sentences[split][index] for index in chosen]
    if args.lower_case:
        sentences = {split: in_lower_case(rows) for split, rows in sentences.items()}
    return sentences


def load_sentences_to_tag(args: DataArguments, tokenizer: PreTrainedTokenizerBase) -> list[Sentence]:
    """The sentences of the `predict_file`, read as the others are; plain text is parted by the tokenizer."""
    path = args.predict_file
    if path.lower().removesuffix(".gz").endswith(".txt"):
        tokenize = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
        texts = [line.strip() for _, line in read_lines(path) if line.strip()]
        words = [[text[start:end] for _, (start, end) in tokenize(text)] for text in texts]
        sentences = [Sentence(row, None) for row in words if row]
    else:
        sentences = read_sentences(path, args.word_column, needs_tags=False, split=make_split())
    if not sentences:
        raise DataError(path, None, "no sentences in this file")
    return in_lower_case(sentences) if args.lower_case else sentences


def make_split() -> Split:
    """Parts texts that come with spans into words, as the tokenizer of words does."""
    pre_tokenizer = make_word_tokenizer().backend_tokenizer.pre_tokenizer
    return lambda text: [span for _, span in pre_tokenizer.pre_tokenize_str(text)]


def in_lower_case(sentences: Sequence[Sentence]) -> list[Sentence]:
    """The sentences in small letters."""
    return [sentence._replace(words=[word.lower() for word in sentence.words]) for sentence in sentences]


def label_names(sentences: Sequence[Sentence]) -> list[str]:
    """The tags in order, `O` first."""
    return sorted({tag for sentence in sentences for tag in sentence.tags}, key=lambda tag: (tag != "O", tag))


def intent_names(sentences: Sequence[Sentence]) -> list[str]:
    """The intents in order; none where a sentence has none."""
    intents = {sentence.intent for sentence in sentences}
    return [] if None in intents else sorted(intents)


def encode(sentences: Sequence[Sentence], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Dataset:
    """
    Token ids, and for the first token of each word its label; `intents` where the model has any, `length`, and the
    places of these first tokens, `word_starts`. Tags and intents that the model does not know are no labels: words with
    such a tag are left out of the chain of a random field in the Trainer's evaluations, though not in the report.
    """
    label2id = model.config.label2id
    intent2id = {name: index for index, name in (getattr(model.config, "id2intent", None) or {}).items()}
    # White space within a word would part it.
    words = [["".join(word.split()) or "?" for word in sentence.words] for sentence in sentences]
    encoded = whole_words(tokenizer)(words, is_split_into_words=True)
    labels, word_starts = [], []
    for index, sentence in enumerate(sentences):
        starts: dict[int, int] = {}
        for place, word in enumerate(encoded.word_ids(index)):
            if word is not None:
                starts.setdefault(word, place)
        row = [IGNORED] * len(encoded["input_ids"][index])
        for word, place in starts.items() if sentence.tags else ():
            row[place] = label2id.get(sentence.tags[word], IGNORED)
        labels.append(row)
        word_starts.append([starts.get(word) for word in range(len(sentence.words))])
    columns = {
        "input_ids": encoded["input_ids"],
        "attention_mask": encoded["attention_mask"],
        "labels": labels,
        "length": [len(sentence.words) for sentence in sentences],
        "word_starts": word_starts,
    }
    if intent2id:
        columns["intents"] = [intent2id.get(sentence.intent, IGNORED) for sentence in sentences]
    return Dataset.from_dict(columns)


def say_what_is_unknown(split: str, sentences: Sequence[Sentence], model: PreTrainedModel) -> None:
    """Names the tags and intents that the model cannot predict, and how often they occur."""
    tags = Counter(tag for sentence in sentences for tag in sentence.tags)
    intents = Counter(sentence.intent for sentence in sentences if sentence.intent is not None)
    known_intents = (getattr(model.config, "id2intent", None) or {}).values()
    for what, counts, known in (("tags", tags, model.config.label2id), ("intents", intents, known_intents)):
        unknown = [f"{name} ({count})" for name, count in counts.most_common() if name not in known]
        if unknown and known:
            names = ", ".join(unknown[:10]) + (", ..." if len(unknown) > 10 else "")
            say(f"Warning: {len(unknown)} {what} of the {split} data are unknown to the model, so errors: {names}")


def make_label_fields(
    sentences: Sequence[Sentence], config: PreTrainedConfig | None, use_intents: bool
) -> dict[str, dict[Any, Any]]:
    """
    The fields of a configuration for the tags and intents of training data, where that of the model to train further
    does not know all of them already.
    """
    fields: dict[str, dict[Any, Any]] = {}
    labels, intents = label_names(sentences), intent_names(sentences) if use_intents else []
    if config is None or not set(labels) <= set(config.label2id):
        fields["id2label"] = dict(enumerate(labels))
        fields["label2id"] = {name: i for i, name in enumerate(labels)}
    if not set(intents) <= set((getattr(config, "id2intent", None) or {}).values()):
        fields["id2intent"] = dict(enumerate(intents))
    return fields


def make_model(
    args: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    sentences: dict[str, list[Sentence]],
    label_fields: dict[str, dict[Any, Any]],
) -> PreTrainedModel:
    """The model of `args`, with a head for these labels where it had others, or a new one with the fields of `args`."""
    if args.model_name_or_path is not None:
        return load_pretrained(
            AutoModelForTokenClassification, args.model_name_or_path, ignore_mismatched_sizes=True, **label_fields
        )
    fields: dict[str, Any] = dict(label_fields)
    not_in_config = (
        "model_name_or_path",
        "tokenizer_name",
        "config_overrides",
        "min_word_count",
        "max_words",
        "vectors_file",
        "all_vectors",
    )
    fields |= {name: value for name, value in vars(args).items() if name not in not_in_config}
    if args.word_encoder in (None, "none"):
        fields["word_encoder"] = None
    words, vectors = [], None
    try:
        if fields["word_encoder"] is not None:
            fields["first_continuation_id"] = first_continuation_id(tokenizer)
            if args.max_words != 0:
                words, vectors = known_words(args, sentences)
                fields["word_vocab_size"] = len(words) + 1 if words else 0
            width = 100 if vectors is None else vectors.shape[1]
            fields["word_embedding_size"] = args.word_embedding_size or width
        elif args.vectors_file is not None:
            raise ValueError("--vectors_file is for words, which there are none of without a --word_encoder")
        elif args.use_crf:
            fields["crf_ignored_ids"] = ids_without_label(tokenizer)
        fields |= json.loads(args.config_overrides or "{}")
        config = RNNConfig(
            **fields
            | {
                "vocab_size": len(tokenizer),
                "pad_token_id": tokenizer.pad_token_id,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
            }
        )
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    model = AutoModelForTokenClassification.from_config(config)
    if words:
        try:
            set_word_table(model, tokenizer, words, vectors)
        except ValueError as error:
            raise UsageError(str(error)) from error
    return model


def known_words(args: ModelArguments, sentences: dict[str, list[Sentence]]) -> tuple[list[str], torch.Tensor | None]:
    """
    The words that are to have an embedding: those that are frequent in the training data, and with pretrained vectors
    also those of all data that have one, or all of them; with the vectors, NaN where there is none.
    """
    words = frequent_words((word for row in sentences["train"] for word in row.words), args.min_word_count)
    if args.vectors_file is None:
        return words[: args.max_words], None
    seen = [*words, *(word for rows in sentences.values() for row in rows for word in row.words)]
    try:
        if args.all_vectors:
            seen += read_word_vectors(args.vectors_file, on_duplicate="first", show_progress=False).words
        read = read_word_vectors(args.vectors_file, seen, on_duplicate="first")
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    frequent = set(words)
    kept = [i for i, (word, found) in enumerate(zip(read.words, read.found.tolist())) if found or word in frequent]
    kept = kept[: args.max_words]
    say(f"{int(read.found[kept].sum())} of {len(kept)} words have a vector in {args.vectors_file}")
    vectors = read.vectors.masked_fill(~read.found.unsqueeze(-1), float("nan"))
    return [read.words[index] for index in kept], vectors[kept]


def is_entity_scheme(labels: Sequence[str]) -> bool:
    """Whether tags mark entities: all but `O` begin with a letter and a hyphen, one of them with `B-`."""
    tags = [label for label in labels if label != "O"]
    return any(tag.startswith("B-") for tag in tags) and all(tag[1:2] == "-" for tag in tags)


def score_tags(predicted: list[list[str]], right: list[list[str]], labels: Sequence[str]) -> dict[str, float]:
    """
    Accuracy over words in per cent, and for entities precision, recall and F1 of seqeval; `score` is the main one.
    """
    pairs = [pair for rows in zip(predicted, right, strict=True) for pair in zip(*rows, strict=True)]
    scores = {"accuracy": 100 * sum(first == second for first, second in pairs) / max(len(pairs), 1)}
    if is_entity_scheme(labels):
        from seqeval.metrics import f1_score, precision_score, recall_score

        for name, function in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
            scores[name] = 100 * float(function(right, predicted, zero_division=0))
    return scores | {"score": scores.get("f1", scores["accuracy"])}


def score_sentences(
    sentences: Sequence[Sentence], results: Sequence[tuple[list[str], str | None]], labels: Sequence[str]
) -> dict[str, float]:
    """Scores of the tags, and of the intents of the sentences that have one, alone and together with their tags."""
    scores = score_tags([tags for tags, _ in results], [sentence.tags for sentence in sentences], labels)
    pairs = [
        (intent == sentence.intent, tags == sentence.tags)
        for sentence, (tags, intent) in zip(sentences, results, strict=True)
        if sentence.intent is not None and intent is not None
    ]
    if pairs:
        scores["intent_accuracy"] = 100 * float(np.mean([is_right for is_right, _ in pairs]))
        scores["whole_accuracy"] = 100 * float(np.mean([all(pair) for pair in pairs]))
    return scores


def all_labels(model: PreTrainedModel, sentences: Sequence[Sentence]) -> list[str]:
    """The tags of a model and of data."""
    return sorted({*model.config.id2label.values(), *label_names(sentences)})


def tags_of_words(labels: Any, word_starts: Sequence[int | None], model: PreTrainedModel) -> list[str]:
    """The tags of words by the labels of the tokens of a text; `O` for a word that has no token."""
    return ["O" if place is None else model.config.id2label[int(labels[place])] for place in word_starts]


def make_metrics(
    sentences: Sequence[Sentence], data: Dataset, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> Callable[[EvalPrediction], dict[str, float]]:
    """What `Trainer` scores an evaluation with, which compares with the sentences: labels lack what is unknown."""
    labels, id2intent = all_labels(model, sentences), getattr(model.config, "id2intent", None)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        # In the order of the sampler, which groups by length; sentences of the same tokens have the same results.
        encoded: dict[tuple[int, ...], list[tuple[Sentence, list[int | None]]]] = defaultdict(list)
        for ids, *pair in zip(data["input_ids"], sentences, data["word_starts"]):
            encoded[tuple(ids)].append(pair)
        outputs, intents = prediction.predictions, None
        if isinstance(outputs, tuple):
            outputs, intents = outputs
        read, results = [], []
        for index, ids in enumerate(prediction.inputs):
            is_token = (ids >= 0) & (ids != tokenizer.pad_token_id)
            sentence, word_starts = encoded[tuple(ids[is_token].tolist())].pop()
            intent = None if intents is None else id2intent[int(intents[index])]
            read.append(sentence)
            results.append((tags_of_words(outputs[index][is_token], word_starts, model), intent))
        return score_sentences(read, results, labels)

    return compute_metrics


def best_labels(logits: Any, labels: Any) -> Any:
    """The best label of each token (and the best intent); those of a CRF's logits are its best path."""
    if isinstance(logits, tuple):
        return tuple(part.argmax(-1) for part in logits[:2])
    return logits.argmax(-1)


@torch.no_grad()
def tag_sentences(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[Sentence], batch_size: int
) -> list[tuple[list[str], str | None]]:
    """The tags of the words of each sentence, and its intent where the model has any."""
    model.eval()
    data = encode(sentences, tokenizer, model).to_dict()
    ids, word_starts = data["input_ids"], data["word_starts"]
    results: dict[int, tuple[list[str], str | None]] = {}
    order = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
    for start in tqdm(range(0, len(order), batch_size), desc="tagging", unit=" batches"):
        batch = order[start : start + batch_size]
        inputs = tokenizer.pad({"input_ids": [ids[index] for index in batch]}, return_tensors="pt").to(model.device)
        outputs = model(**inputs)
        labels, intents = outputs.logits.argmax(-1), getattr(outputs, "intent_logits", None)
        for row, index in enumerate(batch):
            tags = tags_of_words(labels[row][inputs["attention_mask"][row].bool()].tolist(), word_starts[index], model)
            intent = None if intents is None else model.config.id2intent[intents[row].argmax().item()]
            results[index] = tags, intent
    return [results[index] for index in range(len(ids))]


def report(
    sentences: Sequence[Sentence], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: TaggingArguments
) -> dict[str, float]:
    """Tags the test sentences, writes them beside their right tags, and returns the scores."""
    started = time.perf_counter()
    results = tag_sentences(model, tokenizer, sentences, args.per_device_eval_batch_size)
    seconds = time.perf_counter() - started
    labels = all_labels(model, sentences)
    scores = score_sentences(sentences, results, labels)
    scores |= {"samples": len(sentences), "sentences_per_second": len(sentences) / seconds}
    with open(Path(args.output_dir) / "test_predictions.conll", "w", encoding="utf-8") as file:
        for sentence, (tags, intent) in zip(sentences, results):
            if intent is not None:
                given = "" if sentence.intent is None else f"intent = {sentence.intent} "
                file.write(f"# {given}predicted = {intent}\n")
            file.writelines(f"{word}\t{tag}\t{own}\n" for word, tag, own in zip(sentence.words, sentence.tags, tags))
            file.write("\n")
    predicted, right = [tags for tags, _ in results], [sentence.tags for sentence in sentences]
    has_entities = any(tag != "O" for tags in predicted + right for tag in tags)
    if is_entity_scheme(labels) and has_entities:
        from seqeval.metrics import classification_report

        say(classification_report(right, predicted, digits=3, zero_division=0))
    return {f"test_{name}": round(value, 4) for name, value in scores.items()}


def predict(
    sentences: Sequence[Sentence], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: TaggingArguments
) -> None:
    """Tags sentences and writes them as `predictions.conll` into the output folder."""
    results = tag_sentences(model, tokenizer, sentences, args.per_device_eval_batch_size)
    out = Path(args.output_dir) / "predictions.conll"
    with open(out, "w", encoding="utf-8") as file:
        for sentence, (tags, intent) in zip(sentences, results):
            if intent is not None:
                file.write(f"# intent = {intent}\n")
            file.writelines(f"{word}\t{tag}\n" for word, tag in zip(sentence.words, tags))
            file.write("\n")
    say(f"{len(sentences)} tagged sentences: {out}")


def show(sentences: Sequence[Sentence], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Some sentences through the stock pipeline."""
    tagger = pipeline("token-classification", model=model, tokenizer=tokenizer, aggregation_strategy="first")
    for sentence in sentences:
        text = " ".join(sentence.words)
        groups = [f"[{group['word']} {group['entity_group']} {group['score']:.2f}]" for group in tagger(text)]
        say(f"\n{text}\n  {' '.join(groups)}")


def check_label_smoothing(
    args: TaggingArguments,
    model_args: ModelArguments,
    config: PreTrainedConfig | None,
    label_fields: dict[str, dict[Any, Any]],
) -> None:
    """
    Raises `UsageError` where the Trainer, which smooths labels in place of the model's own loss, would leave out the
    random field and the intents.
    """
    use_crf = model_args.use_crf if config is None else getattr(config, "use_crf", False)
    has_intents = "id2intent" in label_fields or bool(getattr(config, "id2intent", None))
    if args.label_smoothing_factor != 0 and (use_crf or has_intents):
        raise UsageError(
            "--label_smoothing_factor must be 0 for models with a random field (--use_crf) or intents (--use_intents), "
            f"got {args.label_smoothing_factor}"
        )


def main() -> int | None:
    arguments = parse_arguments((ModelArguments, DataArguments, TaggingArguments))
    model_args, data_args, training_args = arguments
    training = training_args.do_train
    if not training and model_args.model_name_or_path is None:
        raise UsageError("--do_train false needs a --model_name_or_path")
    set_seed(training_args.seed)
    sentences = load_sentences(data_args, training, training_args.seed)
    say(" · ".join(f"{split} {len(rows)} sentences" for split, rows in sentences.items()))
    name = model_args.model_name_or_path
    config = None if name is None else load_pretrained(AutoConfig, name)
    label_fields = make_label_fields(sentences["train"], config, data_args.use_intents) if training else {}
    check_label_smoothing(training_args, model_args, config, label_fields)
    checkpoint = checkpoint_to_resume(training_args) if training else None
    tokenizer = make_tokenizer(model_args, training_args, checkpoint, make_word_tokenizer)
    model = make_model(model_args, tokenizer, sentences, label_fields)
    say(f"{type(model).__name__}, {model.num_parameters():,} parameters, {model.config.num_labels} tags")
    has_intents = getattr(model.config, "id2intent", None) is not None
    training_args.label_names = ["labels", "intents"] if has_intents else ["labels"]
    for split in ("validation", "test"):
        if split in sentences and (split == "validation" or sentences["test"] is not sentences["validation"]):
            say_what_is_unknown(split, sentences[split], model)
    data = {split: encode(rows, tokenizer, model) for split, rows in sentences.items() if split != "test"}
    compute_metrics = None
    if "validation" in data:
        training_args.include_for_metrics = [*training_args.include_for_metrics, "inputs"]
        compute_metrics = make_metrics(sentences["validation"], data["validation"], tokenizer, model)
    stop = StopOnSignal()
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=data.get("train"),
        eval_dataset=data.get("validation"),
        data_collator=TokenCollator(tokenizer),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=best_labels,
        callbacks=[stop, SeedSamplerByEpoch()],
    )
    if training and not train(trainer, stop, checkpoint, training_args):
        return 130
    if training_args.do_eval and "validation" in sentences:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if training:
        trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    if training_args.process_index != 0:
        return None
    name = training_args.output_dir if training else name
    model = AutoModelForTokenClassification.from_pretrained(name).to(training_args.device)
    if training:
        tokenizer = AutoTokenizer.from_pretrained(name)
    Path(training_args.output_dir).mkdir(parents=True, exist_ok=True)
    if training_args.do_predict and "test" in sentences:
        metrics = report(sentences["test"], model, tokenizer, training_args)
        trainer.log_metrics("test", metrics)
        trainer.save_metrics("test", metrics)
        show(sentences["test"][: data_args.num_samples_to_show], model, tokenizer)
    if data_args.predict_file is not None:
        predict(load_sentences_to_tag(data_args, tokenizer), model, tokenizer, training_args)
    say(f"Model, scores and tags: {training_args.output_dir}")
    return None


if __name__ == "__main__":
    run_script(main)
