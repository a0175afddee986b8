"""What the configuration of an encoder-decoder adds to its loss while training, against NumPy."""

import numpy as np
import pytest
import torch

from matrix import DECODERS, make_inputs, make_mask, make_model


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
