"""
Classifying sentences against transformers of known sizes, and long texts in little memory. As a program of its own it
measures a saved classifier, tagger or reader on the texts of a file, and transformers with random weights on as many
tokens (of a model of words, as many words, which is less than their tokenizers would make of them).

Usage: python tests/benchmarks/classification.py --model FOLDER --file TEXTS.tsv [--text_column text]
                                                 [--rounds N] [--samples N] [--max_length N]
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2] / "examples")]

import torch
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    PreTrainedModel,
)

from benchmarks.harness import (
    Measurement,
    Settings,
    benchmark,
    interleave,
    matrix_products,
    measure,
    peak_megabytes,
    recurrence_shapes,
    summarize,
)
from benchmarks.padding import sentence_lengths
from hf_rnn import RNNConfig, RNNForSequenceClassification, classify_in_chunks


# The sizes of distilbert-base and of the smallest BERT (google/bert_uncased_L-2_H-128_A-2), by the names of the lines.
TRANSFORMERS = {
    "distilbert": DistilBertConfig,
    "tiny-bert": lambda **fields: BertConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512, **fields
    ),
}
VOCAB_SIZE = 30_522


def make_transformer(name: str, num_labels: int = 2) -> PreTrainedModel:
    """A transformer of this size with random weights."""
    config = TRANSFORMERS[name](vocab_size=VOCAB_SIZE, num_labels=num_labels)
    return AutoModelForSequenceClassification.from_config(config).eval()


def make_classifier(settings: Settings, **options) -> RNNForSequenceClassification:
    """A classifier of the size of the recipes: one layer, in two directions unless options say otherwise."""
    sizes = {"vocab_size": VOCAB_SIZE, "embedding_size": settings.size(256, 8), "hidden_size": settings.size(192, 8)}
    config = RNNConfig(**sizes | {"num_hidden_layers": 1, "bidirectional": True, "pooling": "max"} | options)
    return RNNForSequenceClassification(config).to(settings.device).eval()


def batches_of(lengths: list[int], batch_size: int) -> list[dict[str, torch.Tensor]]:
    """Random tokens in batches of similar length; the mask is left out where there is no padding."""
    lengths = sorted(lengths)
    batches = []
    for start in range(0, len(lengths), batch_size):
        rows = torch.tensor(lengths[start : start + batch_size])
        seq = int(rows.max())
        batch = {"input_ids": torch.randint(1000, VOCAB_SIZE, (len(rows), seq))}
        if (rows < seq).any():
            batch["attention_mask"] = (torch.arange(seq) < rows[:, None]).long()
        batches.append(batch)
    return batches


def reader(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]]) -> Callable[[], None]:
    """A function that reads all batches."""

    @torch.no_grad()
    def read():
        for batch in batches:
            model(**batch)

    return read


@benchmark(
    "classify-1", "classifying a sentence, batch 1 / DistilBERT's size", {"cpu": 0.10}, batch_size=1, other="distilbert"
)
@benchmark("classify-32", "the same, batch 32", {"cpu": 0.05}, batch_size=32, other="distilbert")
@benchmark(
    "classify-tiny-1",
    "classifying a sentence, batch 1 / the smallest BERT's size",
    {"cpu": None},
    batch_size=1,
    other="tiny-bert",
)
@benchmark("classify-tiny-32", "the same, batch 32", {"cpu": None}, batch_size=32, other="tiny-bert")
def sentences(settings: Settings, batch_size: int, other: str) -> Measurement:
    """Sentences of about 13 tokens, a BiLSTM of hidden size 192; the note says microseconds for a sentence."""
    count = settings.size(64, 4)
    lengths = sentence_lengths(count).tolist()
    batches = batches_of(lengths, batch_size)
    shapes = recurrence_shapes(sum(lengths), settings.size(256, 8), settings.size(192, 8)) * 2
    result = measure(
        settings,
        reader(make_transformer(other), batches),
        reader(make_classifier(settings), batches),
        matrix_products(shapes, settings),
        rounds=5,
    )
    ours, theirs = (float(number) * 1000 / count for number in result.note.removesuffix(" ms").split(" of "))
    return result._replace(note=f"{ours:.0f} of {theirs:.0f} microseconds a sentence")


def prepare_long_text(settings: Settings, length: int, in_chunks: bool, pooling: str):
    """Classifies a text, in chunks whose tokens are made one after the other or as a whole."""
    torch.manual_seed(0)
    model = make_classifier(settings, bidirectional=False, pooling=pooling)
    size = settings.size(512, 4)

    @torch.no_grad()
    def run():
        pieces = (torch.randint(0, VOCAB_SIZE, (1, size)) for _ in range(length // size))
        if in_chunks:
            classify_in_chunks(model, pieces)
        else:
            model(torch.cat(list(pieces), dim=1))

    return run


@benchmark(
    "long-text-memory",
    "peak memory of classifying 100,000 tokens, max pooling, in chunks / at once",
    {"cpu": 0.05},
    pooling="max",
)
@benchmark("long-text-memory-attention", "the same, attention pooling", {"cpu": 0.05}, pooling="attention")
def long_text_memory(settings: Settings, pooling: str) -> Measurement:
    """What reading adds to the model; the state that is carried is a few kilobytes."""
    length = settings.size(102_400, 16)
    sizes = {"length": length, "pooling": pooling}
    whole, chunks = (
        peak_megabytes(prepare_long_text, settings, in_chunks=in_chunks, **sizes) for in_chunks in (False, True)
    )
    return Measurement(chunks / max(whole, 1e-3), note=f"{chunks:.1f} of {whole:.0f} MB")


@benchmark("long-text-growth", "peak memory in chunks, 400,000 tokens / 100,000 tokens", {"cpu": 1.25})
def long_text_growth(settings: Settings) -> Measurement:
    """Memory does not grow with the text."""
    lengths = settings.size((102_400, 409_600), (16, 64))
    short, long = (
        peak_megabytes(prepare_long_text, settings, length=length, in_chunks=True, pooling="attention")
        for length in lengths
    )
    return Measurement(long / max(short, 1e-3), note=f"{long:.1f} of {short:.1f} MB")


def plain_texts(path: str, text_column: str) -> list[tuple[str, ...]]:
    """The texts of a file for a classifier."""
    from labelled_texts import Columns, read_texts

    return [(row.text,) for row in read_texts(path, Columns(text_column, "label", "id"), needs_label=False)["train"]]


def tagged_texts(path: str, text_column: str) -> list[tuple[str, ...]]:
    """The sentences of a file for a tagger."""
    from tagged_text import read_sentences

    return [(" ".join(sentence.words),) for sentence in read_sentences(path, needs_tags=False)]


def questions_and_texts(path: str, text_column: str) -> list[tuple[str, ...]]:
    """The questions of a file for a reader, each with its text."""
    from question_data import read_questions

    return [(question.question, question.context) for question in read_questions(path)]


# The class of a saved model and how its file is read, by the end of the name of its architecture.
TASKS = {
    "ForTokenClassification": (AutoModelForTokenClassification, tagged_texts),
    "ForSequenceClassification": (AutoModelForSequenceClassification, plain_texts),
    "ForQuestionAnswering": (AutoModelForQuestionAnswering, questions_and_texts),
}


def measure_checkpoint(options: argparse.Namespace, settings: Settings) -> None:
    """
    Prints microseconds of processor time for a text of a file, for a reader with its question, of a saved model and of
    transformers, on one core. What else the machine does is left out.
    """
    folder = options.model
    architecture = AutoConfig.from_pretrained(folder).architectures[0]
    auto_class, read = next(task for name, task in TASKS.items() if architecture.endswith(name))
    model, tokenizer = auto_class.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    texts = read(options.file, options.text_column)
    texts = [texts[index] for index in torch.randperm(len(texts))[: options.samples].tolist()]
    # A reader's text is cut to the first window.
    columns, strategy = zip(*texts, strict=True), "longest_first" if len(texts[0]) == 1 else "only_second"
    encoded = tokenizer(*map(list, columns), truncation=strategy, max_length=options.max_length)
    ids = sorted((row for row in encoded["input_ids"] if row), key=len)
    unit, first = "tokens", getattr(model.config, "first_continuation_id", None)
    lengths = [len(row) for row in ids]
    if first is not None:
        unit, lengths = "words", [sum(token < first for token in row) for row in ids]
    print(f"{len(ids)} texts of {sum(lengths) / len(ids):.1f} {unit} on average, one core")
    print("| model | parameters | batch | microseconds a text | spread |\n| --- | ---: | ---: | ---: | ---: |")
    models = {Path(folder).name: model}
    models |= {name: make_transformer(name, model.config.num_labels) for name in TRANSFORMERS}
    for batch_size in (1, 32):
        own = []
        for start in range(0, len(ids), batch_size):
            batch = tokenizer.pad({"input_ids": ids[start : start + batch_size]}, return_tensors="pt")
            own.append({"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]})
        others = batches_of(lengths, batch_size)
        times = interleave(
            {name: reader(other, own if other is model else others) for name, other in models.items()}, settings
        )
        for name, values in times.items():
            result = summarize([1e6 * value / len(ids) for value in values])
            size = sum(parameter.numel() for parameter in models[name].parameters())
            print(f"| {name} | {size:,} | {batch_size} | {result.value:.0f} | {result.low:.0f} to {result.high:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a saved classifier, tagger or reader")
    parser.add_argument("--file", required=True, help="what the scripts read: a column of texts, sentences, questions")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--max_length", type=int, default=384, help="tokens after which a text is cut")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    measure_checkpoint(options, Settings(1, options.rounds))


if __name__ == "__main__":
    main()
