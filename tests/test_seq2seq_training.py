"""What the configuration of an encoder-decoder adds to its loss while training, against NumPy."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoConfig, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from clients import make_tokenizer
from hf_rnn.training import AlignmentCollator, ScheduledSampling, read_alignment
from matrix import DECODERS, MODEL_CLASSES, ON_A_CPU, make_config, make_inputs, make_mask, make_model


NAME = "RNNSeq2SeqForConditionalGeneration"


def make_batch() -> dict:
    """Sources and targets with padding, labels only at tokens of the target."""
    inputs = make_inputs(NAME)
    target_mask = make_mask(5)[[0, 1, 2, 3, 4, 0]]
    labels = inputs["labels"].masked_fill(target_mask == 0, -100)
    return inputs | {"attention_mask": make_mask(), "decoder_attention_mask": target_mask, "labels": labels}


def alignments_for(batch: dict) -> torch.Tensor:
    """Some positions belong to one source word, some to several with weights of their own, some to none."""
    alignments = torch.rand(6, 5, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    alignments *= (alignments > 0.6) * batch["attention_mask"].unsqueeze(1)
    return alignments


def expected_losses(outputs, batch: dict, alignments: np.ndarray) -> dict[str, float]:
    """Sums over the labels, position by position."""
    weights = outputs.cross_attentions[0].detach().numpy()
    logits = outputs.logits.detach().numpy()
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    sums = {"plain": 0.0, "uniform": 0.0, "coverage": 0.0, "alignment": 0.0}
    for row in range(6):
        covered = np.zeros(weights.shape[1::2])
        for position in range(5):
            if not batch["decoder_attention_mask"][row, position]:
                continue
            now, label = weights[row, :, position], batch["labels"][row, position]
            sums["plain"] -= log_p[row, position, label]
            sums["uniform"] -= log_p[row, position].mean()
            sums["coverage"] += np.minimum(now, covered).sum() / len(now)
            covered += now
            share = alignments[row, position]
            if share.sum() > 0:
                used = share > 0
                sums["alignment"] -= (share[used] / share.sum() * np.log(now.mean(0)[used])).sum()
    return sums


@pytest.mark.parametrize("number", [None, 40, torch.tensor(40)], ids=["mean", "number", "tensor"])
def test_losses_are_the_equations(number):
    """Smoothing, coverage and alignments, each alone and together; a number of labels of several batches divides."""
    batch = make_batch()
    alignments = alignments_for(batch)
    assert (alignments.sum(-1) == 0).any()
    divisor = int((batch["labels"] != -100).sum()) if number is None else 40
    weights = {"label_smoothing": 0.2, "coverage_loss_weight": 0.7, "guided_alignment_weight": 0.3}
    for decoder in DECODERS:
        model = make_model(NAME, num_attention_heads=2, **decoder)
        sums = expected_losses(model(**batch, output_attentions=True), batch, alignments.numpy())
        terms = {
            "label_smoothing": 0.2 * (sums["uniform"] - sums["plain"]),
            "coverage_loss_weight": 0.7 * sums["coverage"],
            "guided_alignment_weight": 0.3 * sums["alignment"],
        }
        for fields in (*([field] for field in weights), list(weights)):
            for field, value in weights.items():
                setattr(model.config, field, value if field in fields else 0.0)
            expected = (sums["plain"] + sum(terms[field] for field in fields)) / divisor
            given = batch | ({"alignments": alignments} if "guided_alignment_weight" in fields else {})
            loss = model.train()(**given, num_items_in_batch=number).loss
            np.testing.assert_allclose(loss.item(), expected, rtol=2e-6, err_msg=f"{decoder}, {fields}")
            # Whoever evaluates wants figures that can be compared.
            loss = model.eval()(**given, num_items_in_batch=number).loss
            np.testing.assert_allclose(loss.item(), sums["plain"] / divisor, rtol=2e-6)


def test_attentions_are_returned_only_on_request():
    batch = make_batch()
    model = make_model(NAME, coverage_loss_weight=1.0).train()
    assert model(**batch).cross_attentions is None
    assert len(model(**batch, output_attentions=True).cross_attentions) == 1


def test_alignments_of_another_shape_are_refused():
    batch = make_batch()
    model = make_model(NAME).train()
    with pytest.raises(ValueError, match=r"`alignments` must have the shape \(6, 5, 7\), got \(6, 7, 5\)"):
        model(**batch, alignments=alignments_for(batch).transpose(1, 2))


@pytest.mark.parametrize("field", ["coverage_loss_weight", "guided_alignment_weight"])
def test_attention_learns_from_its_losses(field):
    """Gradients of the added loss reach the score, and steps against them make it smaller."""
    batch = make_batch()
    alignments = torch.zeros(6, 5, 7)
    alignments[:, :, 1] = 1
    given = batch | {"alignments": alignments, "attention_mask": torch.ones(6, 7)}
    model = make_model(NAME, attention_score="additive").train()

    def added(value):
        model.config.guided_alignment_weight = 0.0
        setattr(model.config, field, value)
        return model(**given).loss

    losses = []
    optimizer = torch.optim.Adam(model.model.decoder.attention.parameters(), lr=0.05)
    for _ in range(30):
        loss = added(1.0) - added(0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


# Scheduled sampling.


def inputs_read(model, batch: dict) -> torch.Tensor:
    """The tokens that the decoder reads in a step of training."""
    seen = []

    def see(module, args, kwargs):
        seen.append(kwargs["input_ids"])

    hook = model.get_decoder().register_forward_pre_hook(see, with_kwargs=True)
    model(**batch).loss.backward()
    hook.remove()
    return seen[-1]


@pytest.mark.parametrize("decoder", DECODERS, ids=lambda options: "-".join(map(str, options.values())))
def test_a_decoder_reads_what_it_predicts(decoder):
    """With a rate of one every token but the first is the best one after those that were read; the loss is theirs."""
    batch = make_batch()
    mask = batch["decoder_attention_mask"].bool()
    model = make_model(NAME, scheduled_sampling=1.0, **decoder).train()
    read = inputs_read(model, batch)
    right = batch["decoder_input_ids"]
    outputs = model.eval()(**(batch | {"decoder_input_ids": read}))
    replaced = torch.zeros_like(mask)
    replaced[:, 1:] = mask[:, 1:] & mask[:, :-1]
    predicted = outputs.logits.argmax(-1).roll(1, dims=1)
    assert torch.equal(read[replaced], predicted[replaced])
    assert torch.equal(read[~replaced], right[~replaced])
    assert (read[replaced] != right[replaced]).any()
    torch.testing.assert_close(model.train()(**batch).loss, outputs.loss)
    model.eval()
    assert torch.equal(inputs_read(model, batch), right)


def test_a_share_of_the_words_is_the_models_own():
    model = make_model(NAME, scheduled_sampling=0.3).train()
    batch = {key: value.repeat(300, 1) for key, value in make_batch().items()}
    replaced = batch["decoder_attention_mask"].bool()
    replaced = replaced[:, 1:] & replaced[:, :-1]
    torch.manual_seed(0)
    read = inputs_read(model, batch)[:, 1:]
    changed = (read != batch["decoder_input_ids"][:, 1:])[replaced].double().mean()
    # Now and then the model predicts the right word.
    assert 0.2 < changed < 0.33


@pytest.mark.parametrize("schedule", ["linear", "exponential", "inverse_sigmoid"])
def test_schedules(schedule):
    """They start at the right words, never go back, pass the point that was asked for and stay below the highest."""
    rates = [ScheduledSampling(100, schedule).rate_at(step) for step in range(2000)]
    assert rates[0] < 0.05
    assert rates == sorted(rates)
    assert rates[-1] == 1 if schedule == "linear" else rates[-1] > 0.99
    assert math.isclose(rates[100], 1.0 if schedule == "linear" else 0.5, rel_tol=1e-6)
    assert max(ScheduledSampling(100, schedule, final_rate=0.25).rate_at(step) for step in range(2000)) == 0.25
    assert ScheduledSampling(1, schedule).rate_at(10**9) == 1.0


def test_mistakes_in_a_schedule():
    for given, message in [
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"steps": 5, "schedule": "cosine"}, "`schedule` must be one of .*linear.*got 'cosine'"),
        ({"steps": 5, "final_rate": 2}, r"`final_rate` must be in \[0, 1\], got 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            ScheduledSampling(**given)


@ON_A_CPU
def test_the_schedule_is_saved_and_resumed(tmp_path):
    """The same weights with an interruption as without, and the rate of the last step in the saved configuration."""
    batch = make_batch()
    rows = [{key: value[row] for key, value in batch.items()} for row in range(5)]
    results = []
    for name, stops in (("whole", [8]), ("resumed", [5, 8])):
        for index, stop in enumerate(stops):
            torch.manual_seed(0)
            model = MODEL_CLASSES[NAME][1](make_config(NAME))
            arguments = TrainingArguments(
                tmp_path / name,
                max_steps=8,
                per_device_train_batch_size=2,
                save_steps=5,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                learning_rate=0.01,
                lr_scheduler_type="constant",
            )
            arguments.max_steps = stop
            schedule = ScheduledSampling(8, "linear")
            trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[schedule])
            trainer.train(resume_from_checkpoint=index > 0)
            assert model.config.scheduled_sampling == (stop - 1) / 8
        results.append(dict(model.named_parameters()))
        assert AutoConfig.from_pretrained(tmp_path / name / "checkpoint-5").scheduled_sampling == 0.5
    for key, parameter in results[0].items():
        assert torch.equal(parameter, results[1][key]), key


# Alignments in batches.


def aligned_examples() -> list[dict]:
    """Sources and targets of their own lengths, of which one word belongs to another; of the last nobody knows."""
    return [
        {"input_ids": [5, 6, 7], "labels": [8, 9], "alignments": [(0, 1), (2, 0), (1, 0)]},
        {"input_ids": [5, 6, 7, 4, 9], "labels": [8, 9, 7, 2], "alignments": "4-3 0-0"},
        {"input_ids": [6], "labels": [4, 2]},
    ]


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_alignments_in_batches(padding_side):
    tokenizer = make_tokenizer(padding_side=padding_side)
    collator = AlignmentCollator(DataCollatorForSeq2Seq(tokenizer))
    examples = aligned_examples()
    batch = collator(examples)
    expected = {(1, 0, 0): 5, (1, 3, 4): 9} | {(0, 1, 0): 5, (0, 0, 2): 7, (0, 0, 1): 6}
    starts = [(2, 2), (0, 0)] if padding_side == "left" else [(0, 0), (0, 0)]
    assert batch["alignments"].shape == (3, 4, 5)
    assert batch["alignments"].sum() == len(expected)
    for (row, target, source), token in expected.items():
        place = target + starts[row][0], source + starts[row][1]
        assert batch["alignments"][(row, *place)] == 1
        assert batch["input_ids"][row, place[1]] == token
        assert batch["labels"][row, place[0]] == examples[row]["labels"][target]
    assert "alignments" in examples[0]  # nobody took them away


@ON_A_CPU
def test_training_with_alignments(tmp_path):
    """Attention learns to look where it is told to, by the stock Trainer."""
    examples = [{"input_ids": [5, 6, 7, 4], "labels": [8, 9, 7, 2], "alignments": "3-0 2-1 1-2 0-3"}] * 8
    model = make_model(NAME, torch.float32)
    collator = AlignmentCollator(DataCollatorForSeq2Seq(make_tokenizer(), model=model))
    arguments = TrainingArguments(
        tmp_path, max_steps=60, learning_rate=0.02, report_to="none", use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(model, arguments, train_dataset=examples, data_collator=collator)
    trainer.train()
    batch = {name: value for name, value in collator(examples[:1]).items() if name != "alignments"}
    weights = model.eval()(**batch, output_attentions=True).cross_attentions[0][0, 0]
    assert weights.argmax(-1).tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize("pair", [(3, 0), (0, 2), (-1, 0)])
def test_alignments_outside_of_their_example(pair):
    examples = [aligned_examples()[0] | {"alignments": [pair]}, aligned_examples()[1]]
    with pytest.raises(ValueError, match=r"below the 3 source and 2 target tokens.*got \(" + str(pair[0])):
        AlignmentCollator(DataCollatorForSeq2Seq(make_tokenizer()))(examples)


def test_lines_of_alignments():
    assert read_alignment("0-0 12-3\n") == [(0, 0), (12, 3)]
    assert read_alignment("") == []
    for wrong in ("0-0 1", "1-a", "-1-2"):
        with pytest.raises(ValueError, match="pairs such as '0-1', got"):
            read_alignment(wrong)
