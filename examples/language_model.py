"""Trains a recurrent language model with `Trainer`, loads what it saved and lets it write.

    python examples/language_model.py                                # tiny-shakespeare, by characters
    python examples/language_model.py --train_file my.txt --tokenization subwords --vocab_size 4000
    python examples/language_model.py options.json --num_train_epochs 3
    python examples/language_model.py --resume_from_checkpoint true  # goes on after Ctrl-C
    python examples/language_model.py --do_train false --model_name_or_path FOLDER --prompt "ROMEO:"
    torchrun --nproc_per_node 2 examples/language_model.py

Files are UTF-8 text, plain or gzipped. Without `--train_file` the folder `tiny-shakespeare` is looked for in
`--data_dir`, then in the environment variable `HF_RNN_DATA`, then in `shared/data` beside the repository. The output
folder gets the model with its tokenizer, checkpoints, scores (`all_results.json`) and the samples (`samples.txt`).
"""

import io
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_rnn import RNNConfig
from subword_tokenizer import train_character_tokenizer, train_subword_tokenizer
from text_pairs import read_text
from training_helpers import (
    RecurrenceArguments,
    ScriptTrainingArguments,
    StopOnSignal,
    UsageError,
    checkpoint_to_resume,
    load_pretrained,
    parse_arguments,
    report_stop,
    run_script,
    say,
)


@dataclass
class ModelArguments(RecurrenceArguments):
    """A model and tokenizer to start from, or the shape of a new one: the fields of `RNNConfig`."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model to train further, or with --do_train false to evaluate and sample."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer to use; otherwise the model's, or a new one made from the data."}
    )
    vocab_size: int = field(default=4000, metadata={"help": "Tokens of a new tokenizer of subwords."})
    embedding_size: int | None = field(default=128, metadata={"help": "Width of embeddings; null for hidden_size."})
    hidden_size: int = field(default=512, metadata={"help": "Width of the hidden state."})
    num_hidden_layers: int = field(default=1, metadata={"help": "Recurrent layers."})
    embedding_dropout: float = field(default=0.0, metadata={"help": "Dropout on the embeddings."})
    output_dropout: float = field(default=0.2, metadata={"help": "Dropout on the output of the last layer."})
    tie_word_embeddings: bool = field(default=False, metadata={"help": "Tie output projection to the embeddings."})


@dataclass
class DataArguments:
    """Where the text is, and how it becomes tokens."""

    train_file: str | None = field(default=None, metadata={"help": "Text to train on."})
    validation_file: str | None = field(
        default=None, metadata={"help": "Text to score; default: the last part of the training text."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder that has `tiny-shakespeare/input.txt`."})
    validation_split: float = field(default=0.1, metadata={"help": "Share of the text held out without a file."})
    tokenization: str = field(default="characters", metadata={"help": "characters or subwords, for a new tokenizer."})
    block_size: int = field(default=128, metadata={"help": "Tokens predicted per training example."})
    max_train_characters: int | None = field(default=None, metadata={"help": "Use only the start of the text."})
    max_eval_characters: int | None = field(default=None, metadata={"help": "Use only the start of the text."})


@dataclass
class SamplingArguments:
    """What the model writes at the end."""

    prompt: str = field(default="\n", metadata={"help": "Text to continue."})
    num_return_sequences: int = field(default=2, metadata={"help": "Texts written."})
    max_new_tokens: int = field(default=400, metadata={"help": "Length of each, in tokens."})
    do_sample: bool = field(default=True, metadata={"help": "Sample; otherwise the most likely token each time."})
    temperature: float = field(default=0.8, metadata={"help": "Below 1.0 the model dares less."})
    top_k: int = field(default=0, metadata={"help": "Sample from this many tokens only; 0 is all."})
    top_p: float = field(default=1.0, metadata={"help": "Sample from the tokens that make up this probability."})
    generation_options: str | None = field(
        default=None, metadata={"help": "Any other options of GenerationConfig as a JSON object."}
    )


@dataclass
class LanguageModelTrainingArguments(ScriptTrainingArguments, TrainingArguments):
    """`TrainingArguments` with defaults for a small recurrent language model on a CPU."""

    output_dir: str | None = field(default="outputs/language-model", metadata={"help": "Where everything is written."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Blocks per step and device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Blocks per evaluation batch."})
    num_train_epochs: float = field(default=8.0, metadata={"help": "Passes over the training text."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Evaluation keeps the loss, not the logits."})


def load_texts(args: DataArguments, training: bool) -> dict[str, str]:
    """The texts `"train"` (when training) and `"validation"`. Raises `DataError` or `UsageError` if there is none."""
    train_file = args.train_file
    if train_file is None and (training or args.validation_file is None):
        repository = Path(__file__).resolve().parent.parent
        folders = [args.data_dir, os.environ.get("HF_RNN_DATA"), repository.parent / "shared" / "data"]
        paths = [Path(folder) / "tiny-shakespeare" / "input.txt" for folder in folders if folder]
        train_file = next((path for path in paths if path.is_file()), None)
        if train_file is None:
            looked = ", ".join(str(path) for path in paths)
            raise UsageError(f"no text: give a --train_file, or tiny-shakespeare in --data_dir (looked for {looked})")
    texts = {}
    if train_file is not None:
        texts["train"] = read_text(train_file)
    if args.validation_file is not None:
        texts["validation"] = read_text(args.validation_file)
    else:
        if not 0 < args.validation_split < 1:
            raise UsageError(f"--validation_split must lie between 0 and 1, got {args.validation_split}")
        cut = int(len(texts["train"]) * (1 - args.validation_split))
        texts["train"], texts["validation"] = texts["train"][:cut], texts["train"][cut:]
    if not training:
        texts.pop("train", None)
    limits = {"train": args.max_train_characters, "validation": args.max_eval_characters}
    return {split: text[: limits[split]] for split, text in texts.items()}


def make_tokenizer(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: LanguageModelTrainingArguments,
    text: str | None,
    checkpoint: str | None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of the run to resume, the one asked for, the model's, or a new one, saved in the output folder."""
    name = checkpoint or model_args.tokenizer_name or model_args.model_name_or_path
    if name is not None:
        return load_pretrained(AutoTokenizer, name)
    if data_args.tokenization not in ("characters", "subwords"):
        raise UsageError(f"--tokenization must be characters or subwords, got {data_args.tokenization!r}")
    with training_args.main_process_first(local=False, desc="making the tokenizer"):
        if training_args.process_index == 0:
            try:
                if data_args.tokenization == "characters":
                    tokenizer = train_character_tokenizer([text])
                else:
                    lines = io.StringIO(text)  # lines with their ends, which the model has to write as well
                    tokenizer = train_subword_tokenizer(lines, model_args.vocab_size, add_eos=False)
            except ValueError as error:
                raise UsageError(str(error)) from error
            tokenizer.save_pretrained(training_args.output_dir)
    return AutoTokenizer.from_pretrained(training_args.output_dir)


def make_model(args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model to train further, or a new one with the fields of `args`."""
    if args.model_name_or_path is not None:
        return load_pretrained(AutoModelForCausalLM, args.model_name_or_path)
    not_in_config = ("model_name_or_path", "tokenizer_name", "config_overrides")
    fields = {name: value for name, value in vars(args).items() if name not in not_in_config}
    fields |= {"vocab_size": len(tokenizer)}
    fields |= {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    try:
        fields |= json.loads(args.config_overrides or "{}")
        config = RNNConfig(**fields)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    return AutoModelForCausalLM.from_config(config)


def make_blocks(ids: list[int], block_size: int) -> Dataset:
    """
    Cuts a text into blocks of `block_size + 1` tokens, each starting with the last token of the one before, so that
    every token but the first is predicted exactly once. The last block may be shorter.
    """
    blocks = [ids[start : start + block_size + 1] for start in range(0, len(ids) - 1, block_size)]
    if not blocks:
        raise UsageError("the text is too short: at least two tokens are needed")
    return Dataset.from_dict({"input_ids": blocks})


@torch.no_grad()
def score_text(model: PreTrainedModel, ids: list[int], chunk_size: int = 1000) -> float:
    """Mean nats per token of a text, of all tokens but the first, read in one go with the state carried on."""
    model.eval()
    inputs = torch.tensor([ids], device=model.device)  # [1, tokens]
    total, cache = 0.0, None
    for start in tqdm(range(0, len(ids) - 1, chunk_size), desc="scoring"):
        chunk = inputs[:, start : start + chunk_size + 1]
        output = model(chunk[:, :-1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        total += torch.nn.functional.cross_entropy(output.logits[0].float(), chunk[0, 1:], reduction="sum").item()
    return total / (len(ids) - 1)


def loss_metrics(prefix: str, nats_per_token: float, tokens: int, characters: int) -> dict[str, float]:
    """Perplexity per token, and nats and bits per character."""
    nats = nats_per_token * tokens / characters
    return {
        f"{prefix}_loss": nats_per_token,
        f"{prefix}_perplexity": math.exp(min(nats_per_token, 700)),
        f"{prefix}_nats_per_character": nats,
        f"{prefix}_bits_per_character": nats / math.log(2),
    }


def write_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: SamplingArguments, extra: dict[str, Any]
) -> list[str]:
    """Texts that continue the prompt, prompt included."""
    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise UsageError("--prompt must not be empty")
    options = {"max_new_tokens": args.max_new_tokens, "num_return_sequences": args.num_return_sequences}
    if args.do_sample:
        options |= {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    else:
        options |= {"do_sample": False, "num_return_sequences": 1}
    output = model.generate(**inputs, **options | extra)
    return tokenizer.batch_decode(output, skip_special_tokens=True)


def main() -> int | None:
    model_args, data_args, sampling_args, training_args = parse_arguments(
        (ModelArguments, DataArguments, SamplingArguments, LanguageModelTrainingArguments)
    )
    training = training_args.do_train
    if not training and model_args.model_name_or_path is None:
        raise UsageError("--do_train false needs a --model_name_or_path")
    if data_args.block_size < 1:
        raise UsageError(f"--block_size must be at least 1, got {data_args.block_size}")
    try:
        sampling_options = json.loads(sampling_args.generation_options or "{}")
    except json.JSONDecodeError as error:
        raise UsageError(f"--generation_options is not a JSON object: {error}") from error
    set_seed(training_args.seed)

    texts = load_texts(data_args, training) if training or training_args.do_eval else {}
    checkpoint = checkpoint_to_resume(training_args) if training else None
    tokenizer = make_tokenizer(model_args, data_args, training_args, texts.get("train"), checkpoint)
    model = make_model(model_args, tokenizer)
    ids = {split: tokenizer(text)["input_ids"] for split, text in texts.items()}
    say(" · ".join(f"{split} {len(texts[split]):,} characters, {len(ids[split]):,} tokens" for split in ids))
    say(f"{type(model).__name__}, {model.num_parameters():,} parameters, vocabulary of {len(tokenizer)}")

    blocks = {split: make_blocks(ids[split], data_args.block_size) for split in ids}
    stop = StopOnSignal()
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=blocks.get("train"),
        eval_dataset=blocks.get("validation"),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
        callbacks=[stop],
    )
    name = model_args.model_name_or_path
    if training:
        result = trainer.train(resume_from_checkpoint=checkpoint)
        if stop.requested:
            report_stop(trainer)
            return 130
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
        model.config.use_cache = True  # the Trainer turns it off
        trainer.save_model()
        name = training_args.output_dir
    trainer.accelerator.wait_for_everyone()

    if training_args.do_eval:
        metrics = trainer.evaluate()
        tokens, characters = len(ids["validation"]) - 1, len(texts["validation"]) - 1
        metrics |= loss_metrics("eval", metrics["eval_loss"], tokens, characters)
    if training_args.process_index != 0:
        return None
    model = AutoModelForCausalLM.from_pretrained(name).to(training_args.device)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if training_args.do_eval:
        carried = score_text(model, ids["validation"])
        metrics |= loss_metrics("eval_carried", carried, tokens, characters)
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        for prefix, what in (("eval", "every block from an empty state"), ("eval_carried", "state carried through")):
            names = ("perplexity", "nats_per_character", "bits_per_character")
            perplexity, nats, bits = (metrics[f"{prefix}_{name}"] for name in names)
            say(f"Perplexity {perplexity:.3f}, {nats:.4f} nats or {bits:.4f} bits per character ({what})")

    samples = write_samples(model, tokenizer, sampling_args, sampling_options)
    for index, sample in enumerate(samples, start=1):
        say(f"\n--- sample {index} ---\n{sample.strip()}")
    samples_path = Path(training_args.output_dir) / "samples.txt"
    samples_path.write_text("\n\n".join(samples), encoding="utf-8")
    say(f"\nModel, scores and samples: {training_args.output_dir}")
    return None


if __name__ == "__main__":
    run_script(main)
