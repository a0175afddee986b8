"""Trains a reader, which finds the answer to a question in a text, loads what it saved and lets it answer.

    python examples/read.py                                     # English, on the part of SQuAD beside this script
    python examples/read.py --question_attention none           # without a look from the question at the text
    python examples/read.py --train_file train-v2.0.json --validation_file dev-v2.0.json
    python examples/read.py --dataset_name NAME --tokenizer_level characters --answer_unit characters
    python examples/read.py options.json --num_train_epochs 8   # options from a file, some of them overridden
    python examples/read.py --resume_from_checkpoint true       # goes on after Ctrl-C
    python examples/read.py --do_train false --model_name_or_path FOLDER --test_file new.json
    torchrun --nproc_per_node 2 examples/read.py

`question_data.py` says which files can be read, `span_scores.py` how answers are scored. Texts that do not fit beside
their question are read in windows that overlap. Where some questions of the test data have no answer, none is an answer
of the model, too. The output folder gets the model with its tokenizer, checkpoints, scores (`all_results.json`) and the
answers (`test_answers.jsonl`; `test_predictions.json` is what the official scripts read).
"""

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

from hf_rnn import RNNConfig
from question_data import Question, questions_from_hub, read_questions
from span_scores import UNITS, score_answers
from subword_tokenizer import train_character_tokenizer, train_subword_tokenizer
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


DEFAULT_FILES = {
    "train": DEFAULT_DATA / "squad-cut.train.json.gz",
    "validation": DEFAULT_DATA / "squad-cut.dev.json.gz",
}
NO_ANSWER = 0  # the position of a window's first token, which stands for it


@dataclass
class ModelArguments(RecurrenceArguments):
    """A model and tokenizer to start from, or the shape of a new one: the fields of `RNNConfig`."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model to train further, or with --do_train false to answer with."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer to use; otherwise the model's, or a new one trained on the data."}
    )
    question_attention: str = field(
        default="aligned", metadata={"help": "none, aligned (as in DrQA) or flow (as in BiDAF)."}
    )
    embedding_size: int | None = field(default=128, metadata={"help": "Width of embeddings; null for hidden_size."})
    hidden_size: int = field(default=128, metadata={"help": "Width of the hidden state, per direction."})
    num_hidden_layers: int = field(default=1, metadata={"help": "Recurrent layers below the attention."})
    bidirectional: bool = field(default=True, metadata={"help": "Whether the layers read both ways."})
    embedding_dropout: float = field(default=0.4, metadata={"help": "Dropout on the embeddings."})
    hidden_dropout: float = field(default=0.3, metadata={"help": "Dropout between layers."})
    output_dropout: float = field(default=0.3, metadata={"help": "Dropout on the output of the last layer."})
    classifier_dropout: float = field(default=0.2, metadata={"help": "Dropout before the logits."})


@dataclass
class DataArguments:
    """Where the questions are, which of them to use, and how they become tokens and windows."""

    train_file: str | None = field(default=None, metadata={"help": "SQuAD JSON or JSON lines (also .gz)."})
    validation_file: str | None = field(
        default=None, metadata={"help": "As train_file; default: the questions on some texts of the training data."}
    )
    test_file: str | None = field(default=None, metadata={"help": "As train_file; default: the validation data."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set of the Hub with the splits train, validation and test."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    skip_bad_questions: bool = field(default=False, metadata={"help": "Leave out malformed questions, do not stop."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use a random part of the training data."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use a random part of the validation data."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use a random part of the test data."})
    tokenizer_level: str = field(default="subwords", metadata={"help": "subwords or characters, for a new tokenizer."})
    vocab_size: int = field(default=8000, metadata={"help": "Tokens of a new tokenizer of subwords."})
    normalization: str | None = field(
        default="nfc", metadata={"help": "nfc, nfkc, lowercase, or null: what a new tokenizer does to text."}
    )
    max_seq_length: int = field(default=384, metadata={"help": "Tokens of a window, question included."})
    doc_stride: int = field(default=128, metadata={"help": "Tokens of the text that neighbouring windows share."})
    max_question_length: int = field(default=64, metadata={"help": "Tokens after which a question is cut."})
    max_answer_length: int = field(default=15, metadata={"help": "Tokens of the longest answer."})
    align_to_words: bool = field(
        default=True, metadata={"help": "Answer in whole words, as far as the tokenizer tells what they are."}
    )
    null_threshold: float = field(
        default=0.0,
        metadata={"help": "How much likelier than the best answer none has to be (logarithm), to be the answer."},
    )
    answer_unit: str = field(default="words", metadata={"help": "words or characters: what F1 counts."})
    num_samples_to_show: int = field(default=5, metadata={"help": "Answered questions printed at the end."})

    def __post_init__(self):
        for name, allowed in {"tokenizer_level": ("subwords", "characters"), "answer_unit": tuple(UNITS)}.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"--{name} must be {' or '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("max_question_length", "max_answer_length"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} must be at least 1, got {getattr(self, name)}")
        room = self.max_seq_length - self.max_question_length
        if not 0 <= self.doc_stride < room - 8:
            raise UsageError(
                f"--doc_stride must be at least 0 and leave room in a window: with a --max_seq_length of "
                f"{self.max_seq_length} and a --max_question_length of {self.max_question_length} less than "
                f"{room - 8}, got {self.doc_stride}"
            )


@dataclass
class ReaderTrainingArguments(GroupedTrainingArguments, TrainingArguments):
    """`TrainingArguments` with defaults for a small recurrent reader on a CPU."""

    output_dir: str | None = field(default="outputs/reader", metadata={"help": "Where everything is written."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Windows per step and device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Windows per evaluation batch."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the training data."})
    metric_for_best_model: str | None = field(default="f1", metadata={"help": "What best means."})
    greater_is_better: bool | None = field(default=True, metadata={"help": "For the metric."})


@dataclass
class Window:
    """
    Part of a text beside a question. `offsets` say where in the text each token stands; None at all other tokens.
    `spans` say the same of the word to which a token belongs, where answers consist of whole words. `start` and `end`
    are the positions of the answer's first and last token, `NO_ANSWER` where it is not in the window.
    """

    question: int  # its index
    input_ids: list[int]
    offsets: list[tuple[int, int] | None]
    spans: list[tuple[int, int] | None]
    start: int = NO_ANSWER
    end: int = NO_ANSWER


def load_questions(args: DataArguments, training: bool, seed: int) -> dict[str, list[Question]]:
    """
    Questions of `"train"` (when training), `"validation"` and `"test"`; without validation data those on some texts are
    held out.
    """
    given = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    splits = [split for split in given if training or split != "train"]
    questions = {}
    if args.dataset_name is not None:
        if any(given.values()):
            raise UsageError("--dataset_name and --*_file exclude each other")
        for split in splits:
            try:
                questions[split] = questions_from_hub(
                    args.dataset_name, args.dataset_config_name, split, args.skip_bad_questions
                )
            except DataError:
                if split == "train" or (split == "validation" and not training):
                    raise
    else:
        if not any(given.values()):
            given |= {split: str(path) for split, path in DEFAULT_FILES.items()}
        for split in splits:
            if given[split] is not None:
                questions[split] = read_questions(given[split], args.skip_bad_questions)
    if training and "train" not in questions:
        raise UsageError("there is no --train_file to train on (--do_train false answers without training)")

    rng = random.Random(seed)
    if "validation" not in questions and training:
        texts = sorted({question.context for question in questions["train"]})
        held_out = set(rng.sample(texts, len(texts) // 20))
        if not held_out:
            raise UsageError("too few texts in the training data to hold any out: give a --validation_file")
        questions["validation"] = [question for question in questions["train"] if question.context in held_out]
        questions["train"] = [question for question in questions["train"] if question.context not in held_out]
        say(f"No validation data: the questions on {len(held_out)} texts of the training data are held out.")
    if "test" not in questions:
        say("No test data: the validation data are answered in their place.")
        questions["test"] = questions["validation"]
    questions.setdefault("validation", questions["test"])
    limit_rows(questions, args, rng)
    return questions


def make_windows(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, args: DataArguments
) -> list[Window]:
    """The windows of all questions, each with the place of its usual answer."""
    asked = [cut(question.question, tokenizer, args.max_question_length) for question in questions]
    encoded = tokenizer(
        asked,
        [question.context for question in questions],
        truncation="only_second",
        max_length=args.max_seq_length,
        stride=args.doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    windows = []
    for index, (input_ids, offsets) in enumerate(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)):
        parts = encoded.sequence_ids(index)
        places = [tuple(place) if part == 1 else None for place, part in zip(offsets, parts, strict=True)]
        spans = whole_words(places, encoded.word_ids(index)) if args.align_to_words else places
        window = Window(encoded["overflow_to_sample_mapping"][index], input_ids, places, spans)
        answer = questions[window.question].usual_answer
        if answer is not None:
            text, begin = answer
            first = next((i for i, place in enumerate(places) if place and place[0] <= begin < place[1]), None)
            last = begin + len(text) - 1
            last = next((i for i, place in enumerate(places) if place and place[0] <= last < place[1]), None)
            if first is not None and last is not None:
                window.start, window.end = first, last
        windows.append(window)
    return windows


def whole_words(offsets: Sequence[tuple[int, int] | None], words: Sequence[int | None]) -> list[tuple[int, int] | None]:
    """For each token of the text where its word begins and ends."""
    begins, ends = {}, {}
    for place, word in zip(offsets, words, strict=True):
        if place is not None:
            begins.setdefault(word, place[0])
            ends[word] = place[1]
    return [place and (begins[word], ends[word]) for place, word in zip(offsets, words, strict=True)]


def cut(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    """The text up to its token number `max_length`."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return text if len(offsets) <= max_length else text[: offsets[max_length - 1][1]]


def windows_dataset(windows: Sequence[Window]) -> Dataset:
    """The columns that training and evaluation read, and the `length` that batches are grouped by."""
    return Dataset.from_dict(
        {
            "input_ids": [window.input_ids for window in windows],
            "start_positions": [window.start for window in windows],
            "end_positions": [window.end for window in windows],
            "length": [len(window.input_ids) for window in windows],
        }
    )


def collate(features: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """Pads a batch of windows at the right."""
    batch = tokenizer.pad(
        {"input_ids": [feature["input_ids"] for feature in features]}, padding_side="right", return_tensors="pt"
    )
    for name in ("start_positions", "end_positions"):
        batch[name] = torch.tensor([feature[name] for feature in features])
    return dict(batch)


def best_span(
    window: Window, start_logits: torch.Tensor, end_logits: torch.Tensor, max_length: int
) -> tuple[float, tuple[int, int] | None, float]:
    """
    The most likely span of a window.

    Args:
        window: The window.
        start_logits, end_logits: Its logits `[seq]`, padded or not.
        max_length: Tokens of the longest span.

    Returns:
        Its score, that is, the logarithm of the probabilities of its first and its last token, taken over the tokens of
        the text and the place for no answer; the span `(start, end)` of the text, None if the window shows no text;
        and the score of no answer.
    """
    places = [index for index, place in enumerate(window.offsets) if place and place[0] < place[1]]
    chosen = torch.tensor([NO_ANSWER, *places])
    starts, ends = (logits[chosen].double().log_softmax(0) for logits in (start_logits, end_logits))
    none = (starts[0] + ends[0]).item()
    if not places:
        return -math.inf, None, none
    starts, ends = starts[1:], ends[1:]
    width = min(max_length, len(places))
    padded = torch.nn.functional.pad(ends, (0, width - 1), value=-torch.inf)
    scores = starts[:, None] + padded.unfold(0, width, 1)  # [first token, length - 1]
    best = int(scores.argmax())
    first, last = best // width, best // width + best % width
    return scores.flatten()[best].item(), (window.spans[places[first]][0], window.spans[places[last]][1]), none


def choose_answers(
    questions: Sequence[Question],
    windows: Sequence[Window],
    logits: Sequence[tuple[torch.Tensor, torch.Tensor]],
    args: DataArguments,
    may_be_none: bool,
) -> list[str]:
    """
    For each question the best span of all its windows, without white space around it; empty for no answer, where that
    is allowed and likelier by more than `args.null_threshold`. No answer is as likely as the window says that
    believes least in it.
    """
    best = [(-math.inf, None)] * len(questions)
    none = [math.inf] * len(questions)
    for window, (start_logits, end_logits) in zip(windows, logits, strict=True):
        score, span, none_score = best_span(window, start_logits, end_logits, args.max_answer_length)
        if span is not None:
            best[window.question] = max(best[window.question], (score, span), key=lambda found: found[0])
        none[window.question] = min(none[window.question], none_score)
    answers = []
    for question, (score, span), none_score in zip(questions, best, none, strict=True):
        is_none = span is None or (may_be_none and none_score - score > args.null_threshold)
        answers.append("" if is_none else question.context[span[0] : span[1]].strip())
    return answers


def has_unanswerable(questions: Sequence[Question]) -> bool:
    """Whether a question has no answer."""
    return any(not question.answers for question in questions)


@torch.no_grad()
def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    data_args: DataArguments,
    args: TrainingArguments,
) -> list[str]:
    """The model's answers, computed in batches of windows of similar length."""
    model.eval()
    windows = make_windows(questions, tokenizer, data_args)
    order = sorted(range(len(windows)), key=lambda index: -len(windows[index].input_ids))
    share = order[args.process_index :: args.world_size]
    done = []
    with tqdm(total=len(share), desc="reading", unit=" windows", disable=args.process_index != 0) as bar:
        for begin in range(0, len(share), args.per_device_eval_batch_size):
            batch = share[begin : begin + args.per_device_eval_batch_size]
            ids = {"input_ids": [windows[index].input_ids for index in batch]}
            inputs = tokenizer.pad(ids, padding_side="right", return_tensors="pt")
            output = model(**inputs.to(model.device))
            done += zip(batch, output.start_logits.float().cpu(), output.end_logits.float().cpu(), strict=True)
            bar.update(len(batch))
    logits = {index: pair for index, *pair in (gather_object(done) if args.world_size > 1 else done)}
    in_order = [logits[index] for index in range(len(windows))]
    return choose_answers(questions, windows, in_order, data_args, has_unanswerable(questions))


def make_compute_metrics(
    questions: Sequence[Question], windows: Sequence[Window], args: DataArguments
) -> Callable[[EvalPrediction], dict[str, float]]:
    """What scores the validation data while training."""
    # The sampler groups by length, so that rows have to be told by what they read.
    rows: dict[tuple[int, ...], list[int]] = {}
    for index, window in enumerate(windows):
        rows.setdefault(tuple(window.input_ids), []).append(index)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = {}
        for ids, starts, ends in zip(prediction.inputs, *prediction.predictions[:2], strict=True):
            pair = (torch.from_numpy(starts), torch.from_numpy(ends))
            length = int(np.count_nonzero(ids >= 0))
            while tuple(ids[:length].tolist()) not in rows:  # what is left of the padding of its batch
                length -= 1
            logits |= dict.fromkeys(rows[tuple(ids[:length].tolist())], pair)
        in_order = [logits[index] for index in range(len(windows))]
        answers = choose_answers(questions, windows, in_order, args, has_unanswerable(questions))
        return score_answers(answers, [question.texts for question in questions], args.answer_unit)

    return compute_metrics


def train_tokenizer(questions: Sequence[Question], args: DataArguments) -> PreTrainedTokenizerBase:
    """A tokenizer of the kind asked for, made from questions and texts, each text once."""
    texts = dict.fromkeys(text for question in questions for text in (question.context, question.question))
    if args.tokenizer_level == "characters":
        return train_character_tokenizer(texts, add_eos=True, normalization=args.normalization)
    return train_subword_tokenizer(texts, args.vocab_size, args.normalization)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `UsageError` for a tokenizer that questions and texts cannot be read with."""
    if not tokenizer.is_fast:
        raise UsageError("the tokenizer must be a fast one, which knows where in the text a token stands")
    if tokenizer.pad_token_id is None:
        raise UsageError("the tokenizer must have a pad_token")
    ids = tokenizer("a", "b")["input_ids"]
    if not {tokenizer.sep_token_id, tokenizer.eos_token_id}.intersection(ids):
        raise UsageError("the tokenizer must put its sep_token or eos_token between a question and a text")


def make_model(args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model to train further, or a new one with the fields of `args`."""
    if args.model_name_or_path is not None:
        return load_pretrained(AutoModelForQuestionAnswering, args.model_name_or_path)
    not_in_config = ("model_name_or_path", "tokenizer_name", "config_overrides")
    fields = {name: value for name, value in vars(args).items() if name not in not_in_config}
    fields["question_attention"] = None if args.question_attention == "none" else args.question_attention
    fields |= {"vocab_size": len(tokenizer), "use_cache": False}
    fields |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "sep")}
    try:
        fields |= json.loads(args.config_overrides or "{}")
        config = RNNConfig(**fields)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    return AutoModelForQuestionAnswering.from_config(config)


def show_answers(
    questions: Sequence[Question],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataArguments,
    seed: int,
) -> None:
    """Lets the pipeline answer a few questions, and prints them."""
    reader = pipeline("extractive-question-answering", model=model, tokenizer=tokenizer, device=model.device)
    count = min(data_args.num_samples_to_show, len(questions))
    for index in sorted(random.Random(seed).sample(range(len(questions)), count)):
        question = questions[index]
        found = reader(
            question=question.question,
            context=question.context,
            max_seq_len=data_args.max_seq_length,
            doc_stride=data_args.doc_stride,
            max_question_len=data_args.max_question_length,
            max_answer_len=data_args.max_answer_length,
            handle_impossible_answer=has_unanswerable(questions),
            align_to_words=data_args.align_to_words,
        )
        right = " | ".join(dict.fromkeys(question.texts)) or "(none)"
        say(f"\nquestion  {question.question}\nanswer    {found['answer'] or '(none)'}\nright     {right}")


def report(
    questions: Sequence[Question],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataArguments,
    args: ReaderTrainingArguments,
) -> dict[str, Any]:
    """Answers the test questions, prints some, writes the answers, and returns the scores."""
    started = time.perf_counter()
    answers = answer_questions(model, tokenizer, questions, data_args, args)
    metrics = {"test_seconds": round(time.perf_counter() - started, 2), "test_samples": len(questions)}
    scores = score_answers(answers, [question.texts for question in questions], data_args.answer_unit)
    metrics |= {f"test_{name}": score for name, score in scores.items()}
    if args.process_index != 0:
        return metrics
    show_answers(questions, model, tokenizer, data_args, args.seed)
    say(f"\nExact match {scores['exact_match']:.2f}, F1 {scores['f1']:.2f} (by {data_args.answer_unit})")
    output_dir = Path(args.output_dir)
    with open(output_dir / "test_answers.jsonl", "w", encoding="utf-8") as file:
        for question, answer in zip(questions, answers, strict=True):
            row = {"id": question.id, "question": question.question, "answer": answer, "right": question.texts}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    predictions = {question.id: answer for question, answer in zip(questions, answers, strict=True)}
    text = json.dumps(predictions, ensure_ascii=False, indent=0)
    (output_dir / "test_predictions.json").write_text(text, encoding="utf-8")
    return metrics


def main() -> int | None:
    model_args, data_args, training_args = parse_arguments((ModelArguments, DataArguments, ReaderTrainingArguments))
    training = training_args.do_train
    if not training and model_args.model_name_or_path is None:
        raise UsageError("--do_train false needs a --model_name_or_path")
    set_seed(training_args.seed)
    training_args.include_for_metrics = [*training_args.include_for_metrics, "inputs"]

    questions = load_questions(data_args, training, training_args.seed)
    say(" · ".join(f"{split} {len(part):,} questions" for split, part in questions.items()))
    checkpoint = checkpoint_to_resume(training_args) if training else None
    tokenizer = make_tokenizer(
        model_args, training_args, checkpoint, partial(train_tokenizer, questions.get("train", ()), data_args)
    )
    check_tokenizer(tokenizer)
    model = make_model(model_args, tokenizer)
    say(f"{type(model).__name__}, {model.num_parameters():,} parameters, vocabulary of {len(tokenizer)}")

    windows = {split: make_windows(questions[split], tokenizer, data_args) for split in questions if split != "test"}
    say(" · ".join(f"{split} {len(part):,} windows" for split, part in windows.items()))
    stop = StopOnSignal()
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=windows_dataset(windows["train"]) if training else None,
        eval_dataset=windows_dataset(windows["validation"]),
        data_collator=partial(collate, tokenizer=tokenizer),
        processing_class=tokenizer,
        compute_metrics=make_compute_metrics(questions["validation"], windows["validation"], data_args),
        callbacks=[stop, SeedSamplerByEpoch()],
    )
    name = model_args.model_name_or_path
    if training:
        if not train(trainer, stop, checkpoint, training_args):
            return 130
        trainer.save_model()
        name = training_args.output_dir
    if training_args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if training_args.do_predict:
        trainer.accelerator.wait_for_everyone()
        model = AutoModelForQuestionAnswering.from_pretrained(name).to(training_args.device)
        tokenizer = AutoTokenizer.from_pretrained(name) if training else tokenizer
        trainer.save_metrics("test", report(questions["test"], model, tokenizer, data_args, training_args))
    say(f"Model, scores and answers: {training_args.output_dir}")
    return None


if __name__ == "__main__":
    run_script(main)
