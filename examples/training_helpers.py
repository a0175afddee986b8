"""What the training scripts share: arguments, one-line errors, stopping and resuming, averaging of checkpoints."""

import json
import os
import random
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils.logging import disable_progress_bar

from text_pairs import DataError


try:
    import resource
except ImportError:  # on Windows
    resource = None

DEFAULT_DATA = Path(__file__).parent / "data"
TRAINER_STATE_NAME = "trainer_state.json"
# Lies in a checkpoint that was saved because of a signal, not by `save_strategy`.
INTERRUPTED_NAME = "interrupted"


class UsageError(ValueError):
    """Options that cannot work; shown as one line."""


def say(*values: Any) -> None:
    """Prints on the main process alone."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*values, flush=True)


def run_script(main: Callable[[], int | None]) -> None:
    """Runs `main` and exits with its status: 2 with one line `error: ...` for bad data or options, 130 after Ctrl-C."""
    disable_progress_bar()  # those of loading and saving; training keeps its own
    try:
        status = main()
    except (DataError, UsageError) as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print("error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
        status = 2
    except KeyboardInterrupt:
        say(f"\nInterrupted. If the run has saved a checkpoint, this continues from it:\n  {resume_command()}")
        status = 130
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(status)


def parse_arguments(
    dataclass_types: Sequence[type], argv: Sequence[str] | None = None, description: str | None = None
) -> tuple:
    """
    Parses options into one instance per dataclass. The first argument may be a JSON file with options; options after it
    override what the file says. Raises `UsageError` for an unknown key or for values that do not fit together.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(dataclass_types, description=description)
    if argv and argv[0].endswith(".json"):
        path = argv.pop(0)
        try:
            options = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(f"{path}: no such file") from None
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
        known = {action.dest for action in parser._actions}
        unknown = sorted(set(options) - known)
        if unknown:
            raise UsageError(f"{path}: unknown options {', '.join(unknown)}")
        parser.set_defaults(**options)
    try:
        return parser.parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    except ValueError as error:
        raise UsageError(str(error)) from error


def prefers_bf16() -> bool:
    """Whether there is no GPU, but a CPU that multiplies bfloat16: matrix products then take half the time."""
    if torch.accelerator.is_available() or not hasattr(torch.cpu, "get_capabilities"):
        return False
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))


@dataclass
class MixedPrecisionArguments:
    """To be put before `TrainingArguments`: mixed precision by default on a CPU that is made for it, not on a GPU."""

    bf16: bool = field(default=prefers_bf16(), metadata={"help": "Mixed precision; default: on a CPU made for it."})

    def __post_init__(self):
        # The Trainer wants to hear that a CPU is meant before it computes in bfloat16 or on several processes there.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()


@dataclass
class ScriptTrainingArguments(MixedPrecisionArguments):
    """
    To be put before `TrainingArguments`: defaults that all scripts share, for small recurrent models on a CPU. Without
    training `eval_strategy` is `"no"`, as there may be no validation data, and `do_eval` is as it was given.
    """

    overwrite_output_dir: bool = field(default=False, metadata={"help": "Start anew in a folder that is not empty."})
    do_train: bool = field(default=True, metadata={"help": "Whether to train."})
    do_eval: bool = field(default=True, metadata={"help": "Whether to score the validation data after training."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Shape of the learning rate."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps, or below 1 the share of all steps."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between two lines of the log."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to score the validation data."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Go back to the best checkpoint."})
    dataloader_pin_memory: bool = field(default=torch.cuda.is_available(), metadata={"help": "Pin memory."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "All parameters are used."})

    def __post_init__(self):
        if not self.do_train:
            self.eval_strategy, self.load_best_model_at_end = "no", False
        super().__post_init__()


@dataclass
class GroupedTrainingArguments(ScriptTrainingArguments):
    """The same for scripts on texts of many lengths, which have test data and average checkpoints."""

    do_predict: bool = field(default=True, metadata={"help": "Whether to use the model on the test data at the end."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "group_by_length, random, sequential or batch_rebalance."}
    )
    average_checkpoints: int = field(
        default=1, metadata={"help": "The final model is the mean of this many last checkpoints."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave as it is: the sampler needs `length`."})

    def __post_init__(self):
        super().__post_init__()
        if self.average_checkpoints > 1 and self.save_total_limit is not None:
            # One more for the best checkpoint, one for a Ctrl-C.
            self.save_total_limit = max(self.save_total_limit, self.average_checkpoints + 2)


@dataclass
class RecurrenceArguments:
    """The fields that the configurations of all models have, with the same defaults for each."""

    cell_type: str = field(default="lstm", metadata={"help": "rnn_tanh, rnn_relu, gru, lstm."})
    residual: bool = field(default=False, metadata={"help": "Residual connections between layers."})
    hidden_dropout: float = field(default=0.2, metadata={"help": "Dropout between layers."})
    recurrent_dropout: float = field(default=0.0, metadata={"help": "Dropout in the recurrence (slow)."})
    initializer_range: float = field(default=0.1, metadata={"help": "Standard deviation of new embeddings."})
    forget_gate_bias: float = field(default=1.0, metadata={"help": "Initial bias of an LSTM's forget gate."})
    config_overrides: str | None = field(
        default=None, metadata={"help": "Further config fields as a JSON object, such as those of a cell of your own."}
    )


def load_pretrained(auto_class: type, name: str, **options: Any) -> Any:
    """`auto_class.from_pretrained(name)` with these options; `UsageError` where that is not possible."""
    try:
        return auto_class.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot load {name}: {str(error).splitlines()[0]}") from error


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """
    The checkpoint that `--resume_from_checkpoint` means: a path, or with `true` the last complete one in the output
    folder. None for a new run, for which the output folder must be empty or `--overwrite_output_dir` given; the latter
    removes the checkpoints of the run before.
    """
    wanted = args.resume_from_checkpoint
    wanted = wanted.lower() if str(wanted).lower() in ("true", "false") else wanted
    if wanted not in (None, False, "false"):
        checkpoint = last_checkpoint(args.output_dir) if wanted in (True, "true") else wanted
        if checkpoint is None:
            raise UsageError(f"there is no complete checkpoint in {args.output_dir} to resume from")
        if not _is_complete(checkpoint):
            raise UsageError(f"{checkpoint} is not a complete checkpoint")
        return checkpoint
    if args.process_index == 0 and os.path.isdir(args.output_dir) and os.listdir(args.output_dir):
        if not args.overwrite_output_dir:
            raise UsageError(
                f"{args.output_dir} is not empty: give --resume_from_checkpoint true to continue the run in it, "
                "--overwrite_output_dir to start anew, or another --output_dir"
            )
        for checkpoint in _checkpoints(args.output_dir):
            shutil.rmtree(checkpoint)
    return None


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The complete checkpoint with the most steps; one that was cut off while it was written does not count."""
    complete = [checkpoint for checkpoint in _checkpoints(output_dir) if _is_complete(checkpoint)]
    return str(complete[-1]) if complete else None


def _checkpoints(output_dir: str | Path) -> list[Path]:
    """All checkpoint folders, by steps."""
    folders = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name[11:].isdigit()]
    return sorted(folders, key=lambda path: int(path.name[11:]))


def _is_complete(checkpoint: str | Path) -> bool:
    try:  # the Trainer writes this file last
        return "global_step" in json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False


def average_checkpoints(model: PreTrainedModel, output_dir: str | Path, count: int) -> list[str]:
    """
    Puts the mean of the weights of the last `count` checkpoints into `model`. Checkpoints that only a Ctrl-C caused are
    left out. Returns the names of those used.
    """
    checkpoints = [
        path for path in _checkpoints(output_dir) if _is_complete(path) and not (path / INTERRUPTED_NAME).exists()
    ][-count:]
    if not checkpoints:
        raise UsageError(f"there is no checkpoint in {output_dir} to average")
    mean: dict[str, torch.Tensor] = {}
    for checkpoint in checkpoints:
        state = type(model).from_pretrained(checkpoint, dtype=torch.float32).state_dict()
        for name, tensor in state.items():
            if tensor.is_floating_point():
                mean[name] = mean.get(name, 0) + tensor / len(checkpoints)
            else:
                mean[name] = tensor
    model.load_state_dict(mean)
    return [path.name for path in checkpoints]


def make_tokenizer(
    model_args: Any,
    training_args: TrainingArguments,
    checkpoint: str | None,
    train_tokenizer: Callable[[], PreTrainedTokenizerBase],
) -> PreTrainedTokenizerBase:
    """
    The tokenizer of the run to resume, the one asked for, the model's, or a new one, saved in the output folder.
    A `ValueError` of `train_tokenizer` is shown as one line.
    """
    name = checkpoint or model_args.tokenizer_name or model_args.model_name_or_path
    if name is not None:
        return load_pretrained(AutoTokenizer, name)
    with training_args.main_process_first(local=False, desc="training the tokenizer"):
        if training_args.process_index == 0:
            try:
                tokenizer = train_tokenizer()
            except ValueError as error:
                raise UsageError(str(error)) from error
            tokenizer.save_pretrained(training_args.output_dir)
    return AutoTokenizer.from_pretrained(training_args.output_dir)


def limit_rows(rows: dict[str, list], args: Any, rng: random.Random) -> None:
    """Leaves random parts of the splits, in their order, where `max_*_samples` say how many rows."""
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples, "test": args.max_predict_samples}
    for split, limit in limits.items():
        if split in rows and limit is not None and limit < len(rows[split]):
            rows[split] = [rows[split][index] for index in sorted(rng.sample(range(len(rows[split])), limit))]


def resume_command() -> str:
    """The command line of this run with `--resume_from_checkpoint true` in place of what it said about that."""
    words, skip_value = [], False
    for word in sys.argv:
        name = word.partition("=")[0].replace("-", "_")
        is_dropped = name in ("__resume_from_checkpoint", "__overwrite_output_dir")
        if not is_dropped and not (skip_value and not word.startswith("--")):
            words.append(word)
        skip_value = is_dropped and "=" not in word
    launcher = ["python"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = ["torchrun", "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
    return shlex.join([*launcher, *words, "--resume_from_checkpoint", "true"])


def report_stop(trainer: Trainer) -> None:
    """Says where a run stopped and how to continue it."""
    checkpoint = last_checkpoint(trainer.args.output_dir)
    say(f"\nStopped after step {trainer.state.global_step}, saved in {checkpoint}. To continue:\n  {resume_command()}")


def train(trainer: Trainer, stop: "StopOnSignal", checkpoint: str | None, args: TrainingArguments) -> bool:
    """
    Trains, and averages checkpoints if asked to. Returns whether training came to its end. What it cost is saved with
    the metrics: the time of all threads of this process, evaluations included (other programs do not count), what the
    column `length` of the data counts, and the greatest memory.
    """
    computing = time.process_time()
    result = trainer.train(resume_from_checkpoint=checkpoint)
    if stop.requested:
        report_stop(trainer)
        return False
    if checkpoint is None:
        result.metrics["train_processor_seconds"] = round(time.process_time() - computing, 2)
        if "length" in getattr(trainer.train_dataset, "column_names", ()):
            result.metrics["train_tokens"] = round(sum(trainer.train_dataset["length"]) * trainer.state.epoch)
    result.metrics["parameters"] = trainer.model.num_parameters()
    if resource is not None:
        kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
        result.metrics["peak_mebibytes"] = round(kibibytes / 1024, 1)
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    if args.average_checkpoints > 1:
        before = trainer.evaluate()
        names = average_checkpoints(trainer.model, args.output_dir, args.average_checkpoints)
        after = trainer.evaluate()
        score = f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}"
        score = score if score in after else "eval_loss"
        say(f"Mean of {', '.join(names)}: {score} {after[score]:.4g}, before {before[score]:.4g}.")
        trainer.save_metrics("eval", {f"{score}_before_averaging": before[score]})
    return True


class StopOnSignal(TrainerCallback):
    """
    On Ctrl-C (or SIGTERM) finishes the step under way, saves a checkpoint and stops; `requested` is then true. A second
    Ctrl-C stops at once. With several processes all stop after the same step.
    """

    def __init__(self):
        self.requested = False
        self._first_signal = None
        self._saved_step = None
        self._is_extra_save = False
        self._handlers = {}

    def _on_signal(self, signal_number, frame):
        # torchrun passes on the Ctrl-C that its children have already received.
        if self._first_signal is not None and time.monotonic() - self._first_signal > 2:
            raise KeyboardInterrupt
        if self._first_signal is None:
            self._first_signal = time.monotonic()
            say("\nStopping after this step and saving a checkpoint; Ctrl-C again stops at once, without saving.")

    def on_train_begin(self, args, state, control, **kwargs):
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._on_signal)

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _agree(self, args) -> bool:
        self.requested = self.requested or self._first_signal is not None
        if args.world_size > 1:
            requested = torch.tensor(int(self.requested), device=args.device)
            torch.distributed.all_reduce(requested, op=torch.distributed.ReduceOp.MAX)
            self.requested = bool(requested.item())
        return self.requested

    def on_step_end(self, args, state, control, **kwargs):
        # After the last step of an epoch the Trainer evaluates and saves by itself, which `on_epoch_end` waits for.
        if self._agree(args) and not float(state.epoch).is_integer():
            self._saved_step = state.global_step
            self._is_extra_save = not control.should_save
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self._saved_step == state.global_step:  # the epoch was cut off: it has no end to evaluate or save
            control.should_evaluate = control.should_save = False
        elif self._agree(args):
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        if not args.should_save:
            return
        current = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        for checkpoint in _checkpoints(args.output_dir):  # of an earlier interruption, and now superseded
            if checkpoint != current and (checkpoint / INTERRUPTED_NAME).exists():
                shutil.rmtree(checkpoint)
        if self._saved_step == state.global_step and self._is_extra_save:
            (current / INTERRUPTED_NAME).touch()


class SeedSamplerByEpoch(TrainerCallback):
    """
    Gives the sampler of `train_sampling_strategy="group_by_length"` a generator that depends on the seed and the epoch
    alone. Without it a resumed epoch would see its batches in another order than the epoch that was interrupted.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        batch_sampler = train_dataloader.batch_sampler
        while hasattr(batch_sampler, "batch_sampler"):  # wrapped once for each process
            batch_sampler = batch_sampler.batch_sampler
        sampler = getattr(batch_sampler, "sampler", None)
        if args.train_sampling_strategy == "group_by_length" and hasattr(sampler, "generator"):
            seed = args.seed if args.data_seed is None else args.data_seed
            sampler.generator = torch.Generator().manual_seed(seed + 1000003 * int(state.epoch or 0))
