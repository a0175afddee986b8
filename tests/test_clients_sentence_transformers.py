"""Sentence-transformers: sentence embeddings from an `RNNModel`; setfit and captum, which build on such models."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from clients import SENTENCES, make_client_model, make_tokenizer, save_checkpoint


PAIRS = Dataset.from_dict({"anchor": SENTENCES[:3], "positive": SENTENCES[3:]})


@pytest.fixture
def sentence_transformers():
    return pytest.importorskip("sentence_transformers", reason="needs the extra `clients`")


def make_encoder(folder, mode: str = "mean", padding_side: str = "right", **options):
    """The dimension is given: of a model with two directions sentence-transformers would guess half of it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    name = save_checkpoint(
        folder, "RNNModel", make_tokenizer(padding_side=padding_side, model_max_length=64), **options
    )
    transformer = Transformer(name)
    pooling = Pooling(transformer.model.config.output_size, pooling_mode=mode)
    return SentenceTransformer(modules=[transformer, pooling], device="cpu")


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("mode", ["mean", "max", "lasttoken"])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"cell_type": "gru"}], ids=str)
def test_padding_changes_no_embedding(sentence_transformers, tmp_path, options, mode, padding_side):
    encoder = make_encoder(tmp_path, mode, padding_side, **options)
    alone = np.stack([encoder.encode(sentence) for sentence in SENTENCES])
    assert alone.shape == (len(SENTENCES), encoder.get_embedding_dimension())
    assert np.abs(alone - encoder.encode(SENTENCES, batch_size=4)).max() < 1e-6
    assert np.abs(alone - encoder.encode(SENTENCES[::-1], batch_size=6)[::-1]).max() < 1e-6
    assert np.abs(alone[0] - alone[1]).max() > 1e-2


def test_folder_of_a_model(sentence_transformers, tmp_path):
    """A saved `RNNModel` with one direction needs no description of its modules."""
    encoder = sentence_transformers.SentenceTransformer(save_checkpoint(tmp_path, "RNNModel"), device="cpu")
    assert encoder.encode(SENTENCES).shape == (len(SENTENCES), encoder.get_embedding_dimension())


@pytest.mark.parametrize("bidirectional", [False, True])
def test_train_save_load(sentence_transformers, tmp_path, bidirectional):
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    encoder = make_encoder(tmp_path / "start", bidirectional=bidirectional)
    loss = MultipleNegativesRankingLoss(encoder)
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path / "run"), max_steps=30, learning_rate=1e-2, report_to="none", use_cpu=True, save_strategy="no",
        logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(encoder, arguments, train_dataset=PAIRS, eval_dataset=PAIRS, loss=loss)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.5 * before
    encoder.save_pretrained(str(tmp_path / "end"))
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "end"), device="cpu")
    np.testing.assert_allclose(loaded.encode(SENTENCES), encoder.encode(SENTENCES), atol=1e-6)
    similarity = loaded.similarity(loaded.encode(PAIRS["anchor"]), loaded.encode(PAIRS["positive"]))
    assert similarity.argmax(1).tolist() == [0, 1, 2]


def test_setfit(tmp_path):
    setfit = pytest.importorskip("setfit", reason="needs the extra `clients`")
    data = Dataset.from_dict({"text": SENTENCES, "label": [0, 1, 0, 1, 0, 1]})
    model = setfit.SetFitModel(model_body=make_encoder(tmp_path / "start", bidirectional=True), labels=["no", "yes"])
    model.model_head = setfit.SetFitHead(model.model_body.get_embedding_dimension(), 2)
    arguments = setfit.TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=10, batch_size=6, num_epochs=(1, 60), body_learning_rate=1e-2,
        head_learning_rate=1e-1, report_to="none", save_strategy="no", logging_strategy="no", show_progress_bar=False,
    )  # fmt: skip
    start = model.model_body[0].model.embed_tokens.weight.clone()
    trainer = setfit.Trainer(model, arguments, train_dataset=data)
    trainer.train()
    assert not torch.equal(model.model_body[0].model.embed_tokens.weight, start)
    assert list(model.predict(SENTENCES)) == ["no", "yes"] * 3


def test_captum():
    """Integrated gradients on the embeddings sum up to the change of the score, and padding has no part in it."""
    attributions = pytest.importorskip("captum.attr", reason="needs the extra `clients`")
    tokenizer = make_tokenizer()
    model = make_client_model("RNNForSequenceClassification", tokenizer, bidirectional=True, pooling="attention")
    inputs = tokenizer(SENTENCES, return_tensors="pt", padding=True)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]

    def score(input_ids, attention_mask):
        return model(input_ids=input_ids, attention_mask=attention_mask).logits

    method = attributions.LayerIntegratedGradients(score, model.model.embed_tokens)
    baseline = torch.full_like(ids, tokenizer.mask_token_id)
    shares = method.attribute(ids, baseline, additional_forward_args=(mask,), target=1, n_steps=300)
    assert shares.shape == (*ids.shape, model.config.embedding_size)
    change = (score(ids, mask) - score(baseline, mask))[:, 1]
    torch.testing.assert_close(shares.sum((1, 2)), change.detach(), rtol=0.02, atol=0.02)
    assert (shares[mask == 0] == 0).all()
