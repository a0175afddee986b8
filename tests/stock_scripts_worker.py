"""
What the example scripts of transformers' repository do with a saved checkpoint, on local data, from `AutoConfig` to a
trained model that is saved and loaded again. Arguments: the folder of the checkpoints and texts, and `with` or
`without` the library.
"""

import math
import os
import sys
from pathlib import Path


ROOT, WAY = Path(sys.argv[1]), sys.argv[2]
if WAY == "without":
    sys.modules["hf_rnn"] = None  # an import fails as that of a missing package does
else:
    import hf_rnn  # noqa: F401, registers the models

import torch  # noqa: E402
from datasets import load_dataset  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForMultipleChoice,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    default_data_collator,
)


TEXTS = load_dataset("json", data_files=str(ROOT / "rows.jsonl"), cache_dir=os.environ["HF_HOME"])["train"]
REMOTE = {"trust_remote_code": True}


def checkpoint(name: str, auto_class, **config_options):
    """Configuration, tokenizer and model as each of the scripts loads them."""
    folder = ROOT / name
    config = AutoConfig.from_pretrained(folder, cache_dir=None, revision="main", token=None, **config_options, **REMOTE)
    tokenizer = AutoTokenizer.from_pretrained(folder, cache_dir=None, use_fast=True, revision="main", **REMOTE)
    model = auto_class.from_pretrained(folder, config=config, cache_dir=None, revision="main", token=None, **REMOTE)
    origin = "transformers_modules." if WAY == "without" else "hf_rnn."
    assert type(model).__module__.startswith(origin), type(model)
    # New words make the embeddings larger, nothing makes them smaller.
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    assert model.get_input_embeddings().weight.shape[0] >= len(tokenizer)
    return config, tokenizer, model


def train(task, model, tokenizer, rows, collator, auto_class, trainer_class=Trainer, **options):
    """Two steps, an evaluation, and the saved model loaded once more."""
    arguments_class = Seq2SeqTrainingArguments if trainer_class is Seq2SeqTrainer else TrainingArguments
    arguments = arguments_class(
        str(ROOT / WAY / task),
        max_steps=2,
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        data_collator=collator,
    )
    assert math.isfinite(trainer.train().training_loss)
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    trainer.save_model()
    loaded = auto_class.from_pretrained(arguments.output_dir, **REMOTE)
    for key, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], weight), key
    print(task)


def block_size_with_trainer(config, tokenizer) -> int:
    """`run_clm.py` where `--block_size` is not given."""
    limit = config.max_position_embeddings if hasattr(config, "max_position_embeddings") else 1024
    block_size = tokenizer.model_max_length
    if block_size > limit:
        block_size = min(1024, limit) if limit > 0 else 1024
    return block_size


def block_size_without_trainer(config, tokenizer) -> int:
    """`run_clm_no_trainer.py` where `--block_size` is not given."""
    block_size = tokenizer.model_max_length
    if block_size > config.max_position_embeddings:
        block_size = min(1024, config.max_position_embeddings)
    return block_size


def language_model():
    config, tokenizer, model = checkpoint("RNNForCausalLM", AutoModelForCausalLM)
    for block_size in (block_size_with_trainer, block_size_without_trainer):
        assert block_size(config, tokenizer) == 1024
        tokenizer.model_max_length, unlimited = 8, tokenizer.model_max_length
        assert block_size(config, tokenizer) == 8
        tokenizer.model_max_length = unlimited

    def group(rows, size=8):
        ids = [token for row in rows["input_ids"] for token in row]
        blocks = [ids[i : i + size] for i in range(0, len(ids) // size * size, size)]
        return {"input_ids": blocks, "labels": blocks}

    rows = TEXTS.map(lambda row: {"input_ids": tokenizer(row["text"])["input_ids"]}, remove_columns=TEXTS.column_names)
    rows = rows.map(group, batched=True)
    train("clm", model, tokenizer, rows, default_data_collator, AutoModelForCausalLM)


def masked_language_model():
    _, tokenizer, model = checkpoint("RNNForMaskedLM", AutoModelForMaskedLM)
    rows = TEXTS.map(
        lambda row: tokenizer(row["text"], return_special_tokens_mask=True), remove_columns=TEXTS.column_names
    )
    collator = DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm_probability=0.5)
    train("mlm", model, tokenizer, rows, collator, AutoModelForMaskedLM)


def classifier():
    labels = sorted(TEXTS.unique("kind"))
    config, tokenizer, model = checkpoint(
        "RNNForMaskedLM",
        AutoModelForSequenceClassification,
        num_labels=len(labels),
        finetuning_task="text-classification",
    )
    assert (config.num_labels, config.problem_type) == (len(labels), None)
    model.config.label2id = {label: index for index, label in enumerate(labels)}
    model.config.id2label = {index: label for label, index in model.config.label2id.items()}
    config.problem_type = "single_label_classification"
    max_length = min(128, tokenizer.model_max_length)

    def prepare(row):
        encoded = tokenizer(row["text"], row["text"], padding="max_length", max_length=max_length, truncation=True)
        return {**encoded, "label": model.config.label2id[row["kind"]]}

    rows = TEXTS.map(prepare, remove_columns=TEXTS.column_names)
    train("glue", model, tokenizer, rows, default_data_collator, AutoModelForSequenceClassification)
    loaded = AutoConfig.from_pretrained(ROOT / WAY / "glue", **REMOTE)
    assert loaded.label2id == {label: index for index, label in enumerate(labels)}
    rows = TEXTS.map(
        lambda row: {**tokenizer(row["text"]), "label": labels.index(row["kind"])}, remove_columns=TEXTS.column_names
    )
    train(
        "glue-dynamic", model, tokenizer, rows, DataCollatorWithPadding(tokenizer), AutoModelForSequenceClassification
    )


def tagger():
    _, tokenizer, model = checkpoint(
        "RNNForMaskedLM", AutoModelForTokenClassification, num_labels=2, finetuning_task="ner"
    )
    assert model.config.label2id == {"LABEL_0": 0, "LABEL_1": 1}
    model.config.label2id = {"O": 0, "B": 1}
    model.config.id2label = {0: "O", 1: "B"}

    def prepare(row):
        encoded = tokenizer(row["text"].split(), truncation=True, is_split_into_words=True)
        words = encoded.word_ids()
        return {**encoded, "labels": [-100 if word is None else word % 2 for word in words]}

    rows = TEXTS.map(prepare, remove_columns=TEXTS.column_names)
    train("ner", model, tokenizer, rows, DataCollatorForTokenClassification(tokenizer), AutoModelForTokenClassification)


def reader():
    _, tokenizer, model = checkpoint("RNNForMaskedLM", AutoModelForQuestionAnswering)

    def prepare(row):
        encoded = tokenizer(
            "the cat",
            row["text"],
            truncation="only_second",
            max_length=16,
            padding="max_length",
            return_offsets_mapping=True,
        )
        encoded.pop("offset_mapping")
        return {**encoded, "start_positions": 4, "end_positions": 5}

    rows = TEXTS.map(prepare, remove_columns=TEXTS.column_names)
    train("qa", model, tokenizer, rows, default_data_collator, AutoModelForQuestionAnswering)


def chooser():
    _, tokenizer, model = checkpoint("RNNForMaskedLM", AutoModelForMultipleChoice)

    def prepare(row):
        encoded = tokenizer([row["text"]] * 4, [*row["text"].split(), "a", "a", "a"][:4], truncation=True)
        return {**encoded, "label": 1}

    rows = TEXTS.map(prepare, remove_columns=TEXTS.column_names)
    train("swag", model, tokenizer, rows, DataCollatorForMultipleChoice(tokenizer), AutoModelForMultipleChoice)


def translator():
    config, tokenizer, model = checkpoint("RNNSeq2SeqForConditionalGeneration", AutoModelForSeq2SeqLM)
    assert model.config.decoder_start_token_id is not None
    assert config.max_position_embeddings >= 1024  # `run_summarization.py` would resize the positions otherwise
    bos = tokenizer.convert_tokens_to_ids("mat")
    model.generation_config.forced_bos_token_id = bos

    def prepare(row):
        encoded = tokenizer(row["text"], max_length=16, truncation=True)
        return {**encoded, "labels": tokenizer(text_target=row["text"], max_length=16, truncation=True)["input_ids"]}

    rows = TEXTS.map(prepare, remove_columns=TEXTS.column_names)
    collator = DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=-100)
    batch = collator([{key: rows[0][key] for key in ("input_ids", "attention_mask", "labels")}])
    assert batch["decoder_input_ids"][0, 0] == model.config.decoder_start_token_id
    train(
        "translation", model, tokenizer, rows, collator, AutoModelForSeq2SeqLM, Seq2SeqTrainer,
        predict_with_generate=True, generation_max_length=6, generation_num_beams=2,
    )  # fmt: skip
    generated = model.generate(**tokenizer(["the cat"], return_tensors="pt"), max_new_tokens=4, num_beams=2)
    assert generated[0, 1] == bos
    loaded = AutoModelForSeq2SeqLM.from_pretrained(ROOT / WAY / "translation", **REMOTE)
    assert loaded.generation_config.forced_bos_token_id == bos


for task in (language_model, masked_language_model, classifier, tagger, reader, chooser, translator):
    task()
