"""The stock `Trainer`, `Seq2SeqTrainer` and `Accelerator`: what their options do to a recurrent model."""

import itertools
import math
import time

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from transformers import (
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    default_data_collator,
)

from matrix import DECODERS, PAD, case_id, make_model, make_tokens
from test_laws_distributed import (
    CASES,
    assert_same_weights,
    main_options,
    make_arguments,
    make_examples,
    make_tokenizer,
)


SEQ2SEQ = "RNNSeq2SeqForConditionalGeneration"
TASKS = [
    "RNNForCausalLM",
    "RNNForMaskedLM",
    "RNNForSequenceClassification",
    "RNNForTokenClassification",
    "RNNForQuestionAnswering",
    "RNNForMultipleChoice",
    SEQ2SEQ,
]
over_tasks = pytest.mark.parametrize("name", TASKS)


def make_trainer(name, folder, batch_size=4, model_options=None, dtype=torch.float64, trainer=None, **options):
    """A trainer of a tiny model on ragged examples; `options` are those of `TrainingArguments`."""
    model_options = main_options(name) | (model_options or {})
    model = make_model(name, dtype, **model_options)
    arguments = make_arguments(folder, batch_size, **options)
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=make_examples(name, model_options),
        eval_dataset=make_examples(name, model_options, number=6),
        **(trainer or {}),
    )


def train(name, folder, **options):
    """The weights after a training."""
    trainer = make_trainer(name, folder, **options)
    trainer.train()
    return trainer.model.state_dict()


class Recorder(TrainerCallback):
    """What a run writes to its log."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(logs)


# Gradient checkpointing, precision, compilation.


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not-reentrant", "reentrant"])
@pytest.mark.parametrize("case", [*TASKS, *(case for case in CASES if case.startswith(f"{SEQ2SEQ}-"))])
def test_gradient_checkpointing(case, use_reentrant, tmp_path):
    """A step with checkpoints is the step without, gradients through states included."""
    name, model_options = CASES[case]
    options = {"model_options": model_options, "optim": "sgd", "learning_rate": 1.0, "max_steps": 1}
    expected = train(name, tmp_path, **options)
    actual = train(
        name,
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
        **options,
    )
    assert_same_weights(actual, expected)


@over_tasks
def test_bf16(name, tmp_path):
    """Mixed precision: parameters stay in float32, and the loss is nearly that of float32."""
    losses = {}
    for bf16 in (False, True):
        trainer = make_trainer(name, tmp_path, dtype=torch.float32, bf16=bf16, max_steps=3, learning_rate=0.01)
        losses[bf16] = trainer.train().training_loss
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=0.02)


@pytest.mark.slow
@over_tasks
def test_torch_compile(name, tmp_path):
    """A compiled training goes through the same losses, and soon."""
    losses = {}
    for compiled in (False, True):
        recorder = Recorder()
        started = time.monotonic()
        make_trainer(
            name,
            tmp_path,
            dtype=torch.float32,
            torch_compile=compiled,
            max_steps=4,
            learning_rate=0.01,
            logging_strategy="steps",
            logging_steps=1,
            trainer={"callbacks": [recorder]},
        ).train()
        losses[compiled] = [entry["loss"] for entry in recorder.logs if "loss" in entry]
    assert time.monotonic() - started < 180
    assert len(losses[True]) == 4
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


# The loss.


def smoothed(logits, labels, epsilon):
    """Cross-entropy with smoothed labels over what has a label."""
    return F.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), ignore_index=-100, label_smoothing=epsilon
    ).item()


@pytest.mark.parametrize("name", [name for name in TASKS if name != "RNNForQuestionAnswering"])
def test_label_smoothing(name, tmp_path):
    """What has no label does not count, and a language model is asked for the next token."""
    trainer = make_trainer(name, tmp_path, label_smoothing_factor=0.2, per_device_eval_batch_size=6)
    batch = default_data_collator(trainer.eval_dataset)
    labels = batch["labels"]
    if labels.dim() > 1:
        assert (labels == -100).any()
    logits = trainer.model(**batch).logits.detach()
    if name == "RNNForCausalLM":
        logits, labels = logits[:, :-1], labels[:, 1:]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(smoothed(logits, labels, 0.2), rel=1e-5)


@pytest.mark.parametrize("name", ["RNNForCausalLM", "RNNForTokenClassification", SEQ2SEQ])
def test_accumulated_steps_with_label_smoothing(name, tmp_path):
    """Rows with unequal numbers of labels: one step of 8 is one of 4 accumulated steps of 2."""
    options = {"optim": "sgd", "learning_rate": 1.0, "max_steps": 1, "label_smoothing_factor": 0.2}
    whole = train(name, tmp_path, batch_size=8, **options)
    pieces = train(name, tmp_path, batch_size=2, gradient_accumulation_steps=4, **options)
    # Transformers smooths in float32.
    assert_same_weights(pieces, whole, 1e-6)


@over_tasks
def test_clipped_gradients(name, tmp_path):
    """With plain gradient descent and learning rate 1, a step is as long as `max_grad_norm`."""
    before = make_model(name, **main_options(name)).state_dict()
    recorder = Recorder()
    trainer = make_trainer(
        name,
        tmp_path,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_steps=1,
        max_grad_norm=0.01,
        logging_strategy="steps",
        logging_steps=1,
        trainer={"callbacks": [recorder]},
    )
    trainer.train()
    assert recorder.logs[0]["grad_norm"] > 0.01
    after = dict(trainer.model.named_parameters())
    length = math.sqrt(sum(((after[key] - before[key]) ** 2).sum().item() for key in after))
    assert length == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "sgd", "adafactor"])
@over_tasks
def test_optimizers(name, optim, tmp_path):
    """A few epochs of each lower the loss."""
    trainer = make_trainer(name, tmp_path, dtype=torch.float32, optim=optim, learning_rate=0.01, num_train_epochs=4)
    trainer.eval_dataset = trainer.train_dataset
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


def embeddings_seen(model):
    """Records what comes out of `embedded`, where embeddings enter the layers; source first, then target."""
    seen = []
    for module_name, module in model.named_modules():
        if module_name.endswith("embedded"):
            module.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    return seen


@over_tasks
def test_neftune(name, tmp_path):
    """Noise on the embeddings of source and target while training, of the size asked for, and at no other time."""
    alpha = 3.0
    trainer = make_trainer(name, tmp_path, batch_size=8, neftune_noise_alpha=alpha, max_steps=1, learning_rate=0.0)
    trainer.args.dataloader_drop_last = True
    model = trainer.model
    batch = default_data_collator(trainer.train_dataset)
    seen = embeddings_seen(model)
    model(**batch)
    clean = list(seen)
    assert len(clean) == (2 if name == SEQ2SEQ else 1)
    seen.clear()
    trainer._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    for noisy, expected in zip(seen, clean, strict=True):
        bound = alpha / math.sqrt(noisy.shape[1] * noisy.shape[2])
        noise = (noisy - expected).abs()
        assert 0.9 * bound < noise.max() <= bound * (1 + 1e-6)
        assert noise.mean() == pytest.approx(bound / 2, rel=0.15)
    seen.clear()
    model.train()(**batch)
    for again, expected in zip(seen, clean, strict=True):
        assert torch.equal(again, expected)


# Batches.


def ragged(name, number=24):
    """Texts of their own lengths, as lists, which a collator pads."""
    generator = torch.Generator().manual_seed(5)
    examples = []
    for row in range(number):
        # Of one token nothing can be predicted, and the mean of a batch of such texts is nan.
        length, target_length = torch.randint(2, 12, (2,), generator=generator).tolist()
        ids = make_tokens(length, seed=row).tolist()
        examples.append({"input_ids": ids, "labels": ids if name != SEQ2SEQ else ids[::-1][:target_length] + [2]})
    return examples


def collator_for(model):
    """Pads inputs and labels."""
    return DataCollatorForSeq2Seq(make_tokenizer(), model=model)


@pytest.mark.parametrize("name", ["RNNForCausalLM", "RNNForMaskedLM", SEQ2SEQ])
def test_grouping_by_length(name, tmp_path):
    """Batches of similar lengths, all examples once; the loss falls."""
    lengths = []

    class Recording(DataCollatorForSeq2Seq):
        def __call__(self, features, return_tensors=None):
            lengths.append([len(feature["input_ids"]) for feature in features])
            return super().__call__(features, return_tensors)

    trainer = make_trainer(
        name,
        tmp_path,
        train_sampling_strategy="group_by_length",
        num_train_epochs=1,
        learning_rate=0.01,
        dtype=torch.float32,
    )
    trainer.train_dataset = trainer.eval_dataset = ragged(name, 200)
    trainer.data_collator = collator_for(trainer.model)
    before = trainer.evaluate()["eval_loss"]
    trainer.data_collator = Recording(make_tokenizer(), model=trainer.model)
    trainer.train()
    assert sorted(itertools.chain(*lengths)) == sorted(len(example["input_ids"]) for example in trainer.train_dataset)
    assert sum(max(group) - min(group) for group in lengths) / len(lengths) < 3
    trainer.data_collator = collator_for(trainer.model)
    assert trainer.evaluate()["eval_loss"] < before


def test_finding_a_batch_size(tmp_path):
    """`auto_find_batch_size` makes batches smaller until they fit, here into an imagined memory of 4 rows."""
    trainer = make_trainer(
        "RNNForCausalLM", tmp_path, batch_size=8, auto_find_batch_size=True, max_steps=2, dtype=torch.float32
    )
    forward, tried = trainer.model.forward, []

    def forward_in_little_memory(input_ids, **inputs):
        tried.append(len(input_ids))
        if len(input_ids) > 4:
            raise RuntimeError("CUDA out of memory. An imagined one.")
        return forward(input_ids, **inputs)

    trainer.model.forward = forward_in_little_memory
    trainer.train()
    assert trainer.state.global_step == 2
    assert tried[0] == 8
    assert max(tried[-2:]) <= 4


# Evaluation.


@over_tasks
def test_predictions(name, tmp_path):
    """Predictions are the logits alone, neither the state nor hidden states, whatever the configuration caches."""
    trainer = make_trainer(
        name, tmp_path, per_device_eval_batch_size=4, eval_accumulation_steps=1, use_cache=True, dtype=torch.float32
    )
    assert trainer.model.config.use_cache
    result = trainer.predict(trainer.eval_dataset)
    batch = default_data_collator(trainer.eval_dataset)
    outputs = trainer.model(**batch)
    predictions = result.predictions if isinstance(result.predictions, tuple) else (result.predictions,)
    kept = [key for key in outputs if key.endswith("logits")]
    assert len(predictions) == len(kept)
    for prediction, key in zip(predictions, kept):
        torch.testing.assert_close(torch.from_numpy(prediction), outputs[key].detach(), rtol=1e-4, atol=1e-5)
    assert result.metrics["test_loss"] > 0


@pytest.mark.parametrize("concatenated", [True, False])
@pytest.mark.parametrize("name", ["RNNForCausalLM", SEQ2SEQ])
def test_metrics_with_inputs_and_losses(name, concatenated, tmp_path):
    """`include_for_metrics` and `eval_do_concat_batches`, with texts of different lengths in each batch."""
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"rows": sum(map(len, prediction.inputs)) if not concatenated else len(prediction.inputs)}

    trainer = make_trainer(
        name,
        tmp_path,
        per_device_eval_batch_size=4,
        eval_do_concat_batches=concatenated,
        include_for_metrics=["inputs", "loss"],
        trainer={"compute_metrics": compute_metrics},
    )
    trainer.eval_dataset = ragged(name, 10)
    trainer.data_collator = collator_for(trainer.model)
    assert trainer.evaluate()["eval_rows"] == 10
    (prediction,) = seen
    if concatenated:
        assert prediction.predictions.shape[:2] == prediction.label_ids.shape
    else:
        assert [len(batch) for batch in prediction.predictions] == [4, 4, 2]
        widths = [batch.shape[1] for batch in prediction.predictions]
        assert len(set(widths)) > 1
        assert widths == [batch.shape[1] for batch in prediction.label_ids]
    assert len(prediction.losses) >= 3


@pytest.mark.parametrize("options", DECODERS, ids=case_id)
def test_generated_predictions(options, tmp_path):
    """`predict_with_generate` with beams gives what `generate` gives, batch by batch, padded to one width."""
    model = make_model(SEQ2SEQ, torch.float32, **options)
    examples = ragged(SEQ2SEQ, 10)
    arguments = make_arguments(
        tmp_path, 4, Seq2SeqTrainingArguments, predict_with_generate=True, per_device_eval_batch_size=4
    )
    trainer = Seq2SeqTrainer(model=model, args=arguments, data_collator=collator_for(model))
    generation = {"num_beams": 3, "max_new_tokens": 7, "length_penalty": 0.5}
    predictions = torch.from_numpy(trainer.predict(examples, **generation).predictions)
    for start in range(0, 10, 4):
        batch = trainer.data_collator(examples[start : start + 4])
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        expected = model.generate(**inputs, **generation)
        assert torch.equal(predictions[start : start + 4, : expected.shape[1]], expected)
        assert (predictions[start : start + 4, expected.shape[1] :] == PAD).all()


# The end of a training.


@over_tasks
def test_early_stopping_and_the_best_model(name, tmp_path):
    """A training that gets worse is stopped, and the weights of its best checkpoint come back."""
    trainer = make_trainer(
        name,
        tmp_path,
        dtype=torch.float32,
        lr_scheduler_type="constant",
        max_steps=20,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        trainer={"callbacks": [EarlyStoppingCallback(early_stopping_patience=2)]},
    )
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.3, maximize=True)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.global_step == len(losses) < 20
    assert min(losses) == losses[-3] == trainer.state.best_metric
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{len(losses) - 2}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
    best = type(trainer.model).from_pretrained(trainer.state.best_model_checkpoint)
    assert_same_weights(trainer.model.state_dict(), best.state_dict(), 0)


# Accelerate without a trainer.


@over_tasks
def test_accelerator(name, tmp_path):
    """A plain loop: prepare, accumulate, clip, save and load the state; it goes on as if nothing had happened."""
    examples = make_examples(name, main_options(name))

    def make_loop(seed=0):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = make_model(name, seed=seed, **main_options(name)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        loader = torch.utils.data.DataLoader(examples, batch_size=2, collate_fn=default_data_collator)
        return accelerator, *accelerator.prepare(model, optimizer, loader)

    def run_epoch(accelerator, model, optimizer, loader):
        steps = 0
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                    steps += 1
                optimizer.step()
                optimizer.zero_grad()
        assert steps == 2

    first = make_loop()
    run_epoch(*first)
    first[0].save_state(tmp_path / "state")
    run_epoch(*first)
    second = make_loop(seed=1)
    second[0].load_state(tmp_path / "state")
    run_epoch(*second)
    expected = first[0].unwrap_model(first[1])
    actual = second[0].unwrap_model(second[1])
    assert type(actual) is type(expected) is type(make_model(name))
    assert_same_weights(actual.state_dict(), expected.state_dict(), 0)
    # By hand, without Accelerate.
    model = make_model(name, **main_options(name)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        for start in range(0, 8, 4):
            for offset in (0, 2):
                batch = default_data_collator(examples[start + offset : start + offset + 2])
                (model(**batch).loss / 2).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    assert_same_weights(expected.state_dict(), model.state_dict())
