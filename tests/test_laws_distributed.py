"""
Laws 7 and 8: a batch in one piece, in accumulated pieces or on several processes is the same step; and a training that
was interrupted ends where it would have ended.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    DataCollatorForSeq2Seq,
    GenerationConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_rnn import RNNSeq2SeqConfig
from matrix import (
    DECODERS,
    GENERATIVE,
    MODEL_CLASSES,
    PAD,
    RECURRENT_CELLS,
    VOCAB_SIZE,
    case_id,
    make_config,
    make_inputs,
    make_model,
    options_of,
)


BATCH = 8
over_classes = pytest.mark.parametrize("name", MODEL_CLASSES)


def main_options(name):
    """Two directions where there can be two."""
    return {"bidirectional": True} if name not in GENERATIVE and MODEL_CLASSES[name][0] is not RNNSeq2SeqConfig else {}


# What the trainers are run with: every class, and for the classes with several kinds of labels each kind.
CASES = {name: (name, main_options(name)) for name in MODEL_CLASSES}
for problem_type, num_labels in [("regression", 1), ("regression", 4), ("multi_label_classification", 4)]:
    CASES[f"RNNForSequenceClassification-{problem_type}-{num_labels}"] = (
        "RNNForSequenceClassification",
        {"problem_type": problem_type, "num_labels": num_labels},
    )
for index, options in enumerate(options_of("RNNForTokenClassification")):
    if {"use_crf", "id2intent"} & options.keys():
        CASES[f"RNNForTokenClassification-{index}"] = ("RNNForTokenClassification", options)
CASES["RNNForCausalLM-tied"] = ("RNNForCausalLM", {"tie_word_embeddings": True})
for decoder in DECODERS:
    CASES[f"RNNSeq2SeqForConditionalGeneration-{case_id(decoder)}"] = ("RNNSeq2SeqForConditionalGeneration", decoder)
COPYING = {"pointer_generator": True, "num_copy_ids": 5, "unk_token_id": 4}
CASES["RNNSeq2SeqForConditionalGeneration-copying"] = ("RNNSeq2SeqForConditionalGeneration", COPYING)


def make_examples(name, options, number=BATCH):
    """Examples whose texts, padded, have quite different numbers of tokens and labels."""
    inputs = make_inputs(name, batch=number, options=options)
    generator = torch.Generator().manual_seed(1)
    if options.get("problem_type") == "regression":
        shape = (number,) if options["num_labels"] == 1 else (number, options["num_labels"])
        inputs["labels"] = torch.randn(shape, generator=generator, dtype=torch.float64)
    elif options.get("problem_type") == "multi_label_classification":
        inputs["labels"] = torch.randint(0, 2, (number, options["num_labels"]), generator=generator).double()
    if options.get("pointer_generator"):
        for key in ("input_ids", "labels"):
            # Words that the vocabulary lacks.
            inputs[key][:, ::2] = VOCAB_SIZE + inputs[key][:, ::2] % options["num_copy_ids"]
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for row in range(number):
        # The first half of the examples is short.
        short = 4 if row < number // 2 else row % 2
        inputs["attention_mask"][row, ..., inputs["input_ids"].shape[-1] - short :] = 0
        if "labels" in inputs and inputs["labels"].dim() == 2 and not inputs["labels"].is_floating_point():
            length = inputs["labels"].shape[1]
            inputs["labels"][row, length - short :] = -100
    if "labels" not in inputs and "start_positions" not in inputs:
        # A model without a head is trained towards numbers, see `token_mean_of_squares`.
        inputs["labels"] = inputs["attention_mask"].masked_fill(inputs["attention_mask"] == 0, -100)
    return [{key: value[row] for key, value in inputs.items()} for row in range(number)]


def token_mean_of_squares(outputs, labels, num_items_in_batch=None):
    """A loss for models without a head: the mean square of their outputs over everything with a label."""
    losses = outputs[0].square().sum(-1)
    seen = labels[:, : losses.shape[1]] != -100
    return (losses * seen).sum() / num_items_in_batch


def loss_without_head(name):
    """Keyword arguments of a trainer for a class that computes no loss."""
    has_loss = {"labels", "start_positions"} & make_inputs(name).keys()
    return {} if has_loss else {"compute_loss_func": token_mean_of_squares}


def make_arguments(folder, batch_size, arguments_class=TrainingArguments, **options):
    """Arguments of a quiet trainer on CPU."""
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch_size,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "seed": 3,
        # A class without a head takes no labels, but the loss that it is given does.
        "remove_unused_columns": False,
    }
    return arguments_class(**(defaults | options))


def train_one_step(name, options, folder, batch_size, accumulation_steps=1, model=None):
    """One step of plain gradient descent with learning rate 1, so that weights show the gradient."""
    model = make_model(name, **options) if model is None else model
    arguments = make_arguments(
        folder,
        batch_size,
        gradient_accumulation_steps=accumulation_steps,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        max_steps=1,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=make_examples(name, options), **loss_without_head(name)
    )
    trainer.train()
    return model


def assert_same_weights(actual, expected, tolerance=1e-12):
    """Of two state dicts."""
    assert actual.keys() == expected.keys()
    for key, weight in expected.items():
        difference = (actual[key] - weight).abs().max().item()
        assert difference <= tolerance, f"{key} differs by {difference}."


def assert_moved(state, name, options):
    """Training changed every weight that has a part in the loss, far more than rounding could."""
    before = make_model(name, **options).state_dict()
    moved = sum((state[key] - before[key]).abs().max() > 1e-6 for key in before)
    assert moved > 0.7 * len(before), f"Only {moved} of {len(before)} weights moved."


def backward_over(model, batches, num_items):
    """The sum of losses over batches, whose gradients are left at the weights."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=num_items).loss
        loss.backward()
        total += loss.item()
    return total


def gradients(model, batches, num_items):
    """The sum of losses over batches, and its gradients."""
    total = backward_over(model, batches, num_items)
    return total, {key: parameter.grad.clone() for key, parameter in model.named_parameters()}


# Transformers counts no items where there is no `labels`.
WITH_LABELS = [key for key, (name, _) in CASES.items() if "labels" in make_inputs(name)]


@pytest.mark.parametrize("case", WITH_LABELS)
def test_loss_and_gradients_in_pieces(case):
    """Two halves with unequal numbers of labels add up to the whole, where each knows the number of all labels."""
    name, options = CASES[case]
    several = [options] if case != name else [main_options(name) | other for other in options_of(name)]
    for other in several:
        model = make_model(name, **other)
        examples = make_examples(name, other)
        whole = default_data_collator(examples)
        halves = [default_data_collator(examples[: BATCH // 2]), default_data_collator(examples[BATCH // 2 :])]
        # A causal language model predicts nothing at the first position.
        first = 1 if name == "RNNForCausalLM" else 0
        num_items = (whole["labels"][..., first:] != -100).sum()
        if whole["labels"].dim() > 1 and not whole["labels"].is_floating_point():
            counts = [(half["labels"] != -100).sum() for half in halves]
            assert counts[0] * 2 < counts[1]
        loss, expected = gradients(model, [whole], num_items)
        for number in (num_items, num_items.item()):
            loss_in_pieces, actual = gradients(model, halves, number)
            # The losses of transformers add up in float32.
            assert abs(loss_in_pieces - loss) < 1e-6 * max(1, abs(loss))
            assert_same_weights(actual, expected, 1e-7)
        # Without a number the loss is the mean over the batch itself.
        alone = model(**whole).loss.item()
        assert abs(alone - loss) < 1e-6 * max(1, abs(loss))


@pytest.mark.parametrize("case", CASES)
def test_accumulated_steps(case, tmp_path):
    """The stock Trainer: one step of 2B is one of two accumulated steps of B."""
    name, options = CASES[case]
    whole = train_one_step(name, options, tmp_path, BATCH).state_dict()
    assert_moved(whole, name, options)
    for steps in (2, 4):
        pieces = train_one_step(name, options, tmp_path, BATCH // steps, accumulation_steps=steps).state_dict()
        assert_same_weights(pieces, whole)


def run_torchrun(script, folder, *arguments):
    """Runs a script of this folder on two processes, with `folder` and `arguments` as its arguments."""
    tests = Path(__file__).parent
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tests), *filter(None, sys.path)])
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        + [str(tests / script), str(folder), *arguments],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-4000:]


def check_two_processes(cases, folder):
    """Trains on two processes, half of the batch on each, whole and in two steps, and compares with one process."""
    run_torchrun("ddp_worker.py", folder, *cases)
    for case in cases:
        name, options = CASES[case]
        whole = train_one_step(name, options, folder, BATCH).state_dict()
        for steps in (1, 2):
            assert_same_weights(torch.load(folder / f"{case}-{steps}.pt"), whole)


def test_two_processes(tmp_path):
    """Two processes with half of the batch each take the step of one process with the whole."""
    check_two_processes(["RNNForCausalLM"], tmp_path)


@pytest.mark.slow
def test_two_processes_of_every_class(tmp_path):
    """The same for every class and every kind of labels."""
    check_two_processes(list(CASES), tmp_path)


def check_sharded(cases, folder):
    """Trains on two processes with sharded parameters, and compares with one process that has all of them."""
    run_torchrun("fsdp_worker.py", folder, *cases)
    for case in cases:
        name, options = CASES[case]
        whole = train_one_step(name, options, folder, BATCH).state_dict()
        for way, steps in itertools.product(("torch", "transformers"), (1, 2)):
            # Every process adds up its losses in float32.
            assert_same_weights(torch.load(folder / f"{case}-{way}-{steps}.pt"), whole, 1e-6)


def test_sharded_parameters(tmp_path):
    """FSDP2, by torch alone and by transformers: laws 7 and 8, tied embeddings, and generation on both processes."""
    check_sharded(["RNNForCausalLM-tied"], tmp_path)


@pytest.mark.slow
def test_sharded_parameters_of_every_class(tmp_path):
    """The same for every class and every kind of labels."""
    check_sharded(list(CASES), tmp_path)


def dropouts_of(name):
    """Dropout in every place that the configuration of a class knows."""
    config = make_config(name)
    return {field: 0.2 for field in vars(config) if field.endswith("_dropout")}


class StopAfter(TrainerCallback):
    """Ends a training early, as an interruption would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


def train_with_dropout(name, options, folder, stop_after=None, resume_from=None, seed=0):
    """Four steps of AdamW with a falling learning rate over shuffled data, with a checkpoint after the second."""
    arguments = make_arguments(
        folder,
        batch_size=3,
        learning_rate=0.01,
        lr_scheduler_type="linear",
        warmup_steps=1,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
    )
    # The weights that a training starts from must not matter to one that goes on from a checkpoint.
    model = make_model(name, seed=seed, **options, **dropouts_of(name))
    set_seed(11 + seed)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=make_examples(name, options, number=10),
        callbacks=[StopAfter(stop_after)] if stop_after else None,
        **loss_without_head(name),
    )
    trainer.train(resume_from_checkpoint=resume_from)
    return model.state_dict()


def check_resuming(name, options, folder):
    """Four steps at once against two, a new trainer and two more."""
    whole = train_with_dropout(name, options, folder / "whole")
    train_with_dropout(name, options, folder / "parts", stop_after=2)
    checkpoint = folder / "parts" / "checkpoint-2"
    assert not (folder / "parts" / "checkpoint-4").exists()
    resumed = train_with_dropout(name, options, folder / "parts", resume_from=str(checkpoint), seed=1)
    assert_same_weights(resumed, whole)
    assert_moved(whole, name, options)


@over_classes
def test_resuming(name, tmp_path):
    """Train, save, load, resume: with dropout everywhere the same weights as without the interruption."""
    check_resuming(name, main_options(name), tmp_path)


@pytest.mark.parametrize(("cell_type", "decoder"), [*itertools.zip_longest(RECURRENT_CELLS, DECODERS, fillvalue={})])
def test_resuming_with_every_cell_and_decoder(cell_type, decoder, tmp_path):
    """The same for every cell, and for every type of decoder."""
    options = ({"cell_type": cell_type} if cell_type else {}) | decoder
    check_resuming("RNNSeq2SeqForConditionalGeneration", options, tmp_path)


def train_translator(options, folder, stop_after=None, resume_from=None, seed=0):
    """As above, with the trainer for translators, which translates after every step."""
    name = "RNNSeq2SeqForConditionalGeneration"
    model = make_model(name, torch.float32, seed=seed, **options, **dropouts_of(name))
    arguments = make_arguments(
        folder,
        3,
        Seq2SeqTrainingArguments,
        learning_rate=0.01,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        predict_with_generate=True,
        generation_config=GenerationConfig(
            max_new_tokens=6, num_beams=2, decoder_start_token_id=1, eos_token_id=2, pad_token_id=PAD
        ),
    )
    examples = []
    for example in make_examples(name, options, number=10):
        length = int(example["attention_mask"].sum())
        labels = example["labels"][example["labels"] != -100]
        # Texts of their own lengths, which the collator pads.
        examples.append({"input_ids": example["input_ids"][:length].tolist(), "labels": labels.tolist()})
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction.predictions)
        return {"length": float((prediction.predictions != PAD).sum())}

    set_seed(11 + seed)
    trainer = Seq2SeqTrainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        eval_dataset=examples[:5],
        data_collator=DataCollatorForSeq2Seq(make_tokenizer(), model=model),
        compute_metrics=compute_metrics,
        callbacks=[StopAfter(stop_after)] if stop_after else None,
    )
    trainer.train(resume_from_checkpoint=resume_from)
    return trainer, seen


def make_tokenizer():
    """As little of a tokenizer as a collator asks for."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{index}": index for index in range(29)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="w0")),
        pad_token=f"w{PAD}",
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.mark.parametrize("options", DECODERS, ids=case_id)
def test_resuming_with_generated_predictions(options, tmp_path):
    """The trainer that translates as it goes."""
    trainer, seen = train_translator(options, tmp_path / "whole")
    whole = trainer.model.state_dict()
    train_translator(options, tmp_path / "parts", stop_after=2)
    resumed, _ = train_translator(
        options, tmp_path / "parts", resume_from=str(tmp_path / "parts" / "checkpoint-2"), seed=1
    )
    assert_same_weights(resumed.model.state_dict(), whole, 1e-6)
    assert len(seen) == 4
    assert all(len(predictions) == 5 for predictions in seen)
    # What the trainer got is what `generate` gives.
    model, collator = trainer.model.eval(), trainer.data_collator
    batch = collator([trainer.eval_dataset[index] for index in range(5)])
    batch.pop("labels")
    batch.pop("decoder_input_ids", None)
    random_state = torch.get_rng_state()
    sequences = model.generate(**batch, generation_config=trainer.args.generation_config)
    assert torch.equal(torch.get_rng_state(), random_state)
    predictions = torch.from_numpy(seen[-1])
    width = sequences.shape[1]
    assert predictions[:, :width].tolist() == sequences.tolist()
    assert (predictions[:, width:] == PAD).all()
