"""Streams of `datasets`, and tokenizers that return `token_type_ids`, which these models take and do not use."""

import inspect

import pytest
import torch
from datasets import IterableDataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from clients import SENTENCES, make_client_model, make_tokenizer
from matrix import MODEL_CLASSES, case_id, make_inputs, make_model


def sentences(epochs: int = 1000):
    for _ in range(epochs):
        yield from ({"text": sentence, "label": index % 3} for index, sentence in enumerate(SENTENCES))


def train(folder, model, stream, collator, **options):
    arguments = TrainingArguments(
        str(folder), max_steps=20, learning_rate=2e-2, report_to="none", use_cpu=True, save_strategy="no",
        logging_steps=5, disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=stream, data_collator=collator)
    trainer.train()
    assert trainer.state.global_step == 20
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    return losses


@pytest.mark.parametrize("remove_unused_columns", [False, True])
def test_streamed_language_model(tmp_path, remove_unused_columns):
    tokenizer = make_tokenizer(special_tokens=False)
    stream = IterableDataset.from_generator(sentences).map(
        lambda row: tokenizer(row["text"]), remove_columns=["text", "label"]
    )
    assert "token_type_ids" in next(iter(stream))
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    model = make_client_model("RNNForCausalLM", tokenizer)
    train(tmp_path, model, stream.shuffle(seed=0, buffer_size=8), collator, remove_unused_columns=remove_unused_columns)


def test_streamed_classifier(tmp_path):
    tokenizer = make_tokenizer()
    stream = IterableDataset.from_generator(sentences).map(
        lambda rows: tokenizer(rows["text"]), batched=True, batch_size=4, remove_columns=["text"]
    )
    model = make_client_model("RNNForSequenceClassification", tokenizer, num_labels=3, bidirectional=True)
    train(tmp_path, model, stream, DataCollatorWithPadding(tokenizer), remove_unused_columns=False)


def test_streamed_translator(tmp_path):
    tokenizer = make_tokenizer()
    stream = IterableDataset.from_generator(sentences).map(
        lambda row: tokenizer(row["text"], text_target=row["text"]), remove_columns=["text", "label"]
    )
    model = make_client_model("RNNSeq2SeqForConditionalGeneration", tokenizer)
    collator = DataCollatorForSeq2Seq(tokenizer, model)
    train(tmp_path, model, stream, collator, remove_unused_columns=False, gradient_accumulation_steps=2)


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_token_type_ids_change_nothing(name):
    """In a forward, with labels too."""
    model, inputs = make_model(name), make_inputs(name)
    expected = model(**inputs)
    result = model(token_type_ids=torch.ones_like(inputs["input_ids"]), **inputs)
    assert result.keys() == expected.keys()
    for key in ("loss", "logits", "start_logits", "last_hidden_state"):
        assert (key in result) == (key in expected)
        if key in result:
            torch.testing.assert_close(result[key], expected[key], rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}], ids=case_id)
@pytest.mark.parametrize("name", ["RNNForCausalLM", "RNNSeq2SeqForConditionalGeneration"])
def test_token_type_ids_in_generate(name, options):
    tokenizer = make_tokenizer(special_tokens=False, padding_side="left")
    model = make_client_model(name, tokenizer, eos_token_id=None)
    inputs = tokenizer(
        SENTENCES[:1] if "prompt_lookup_num_tokens" in options else SENTENCES, padding=True, return_tensors="pt"
    )
    assert "token_type_ids" in inputs
    options = {"max_new_tokens": 6, **options}
    output = model.generate(**inputs, **options)
    del inputs["token_type_ids"]
    assert torch.equal(output, model.generate(**inputs, **options))


def test_a_wrong_argument_is_still_refused():
    model = make_client_model("RNNForCausalLM", make_tokenizer())
    assert "token_type_ids" not in inspect.signature(model.forward).parameters
    with pytest.raises(ValueError, match="not_an_argument"):
        model.generate(torch.tensor([[5, 6]]), not_an_argument=1)
