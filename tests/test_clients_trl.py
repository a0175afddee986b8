"""TRL: supervised fine-tuning of an LSTM language model."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from clients import CHAT_TEMPLATE, SENTENCES, make_tokenizer, save_checkpoint
from hf_rnn import lora_target_parameters


trl = pytest.importorskip("trl", reason="needs the extra `clients`")

ANSWER = "the cat sat on the mat"
DATA = {
    "text": Dataset.from_dict({"text": SENTENCES}),
    "messages": Dataset.from_list(
        [{"messages": [{"role": "user", "content": s}, {"role": "assistant", "content": ANSWER}]} for s in SENTENCES]
    ),
    "prompt and completion": Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": s}], "completion": [{"role": "assistant", "content": ANSWER}]}
            for s in SENTENCES
        ]
    ),
}


def make_trainer(folder, data: str, peft_config=None, **options):
    tokenizer = make_tokenizer(special_tokens=False, chat_template=CHAT_TEMPLATE)
    checkpoint = save_checkpoint(folder / "start", "RNNForCausalLM", tokenizer)
    options = {"max_steps": 40, "learning_rate": 3e-2, "per_device_train_batch_size": 6} | options
    arguments = trl.SFTConfig(
        output_dir=str(folder / "run"), use_cpu=True, bf16=False, report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True, gradient_checkpointing=False, **options,
    )  # fmt: skip
    return trl.SFTTrainer(
        model=checkpoint,
        args=arguments,
        train_dataset=DATA[data],
        eval_dataset=DATA[data],
        processing_class=tokenizer,
        peft_config=peft_config,
    )


@pytest.mark.parametrize("data", DATA)
def test_sft(tmp_path, data):
    trainer = make_trainer(tmp_path, data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.7 * before
    trainer.save_model(str(tmp_path / "end"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "end")
    for key, weight in loaded.state_dict().items():
        torch.testing.assert_close(weight, trainer.model.state_dict()[key])


def test_sft_on_chats_teaches_the_answer(tmp_path):
    """Only the completion is trained, and the stock pipeline gives it back through the chat template."""
    trainer = make_trainer(tmp_path, "prompt and completion", max_steps=80)
    batch = next(iter(trainer.get_train_dataloader()))
    tokenizer = trainer.processing_class
    for labels in batch["labels"]:
        assert tokenizer.decode(labels[labels != -100], skip_special_tokens=True).strip() == ANSWER
    trainer.train()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": SENTENCES[0]}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = trainer.model.eval().generate(**prompt, max_new_tokens=6, do_sample=False)
    assert tokenizer.decode(output[0, prompt["input_ids"].shape[1] :]) == ANSWER


def test_gradient_checkpointing_gives_the_same(tmp_path):
    """TRL turns it on by default."""
    losses = []
    for enabled in (False, True):
        trainer = make_trainer(tmp_path / str(enabled), "messages", max_steps=3)
        trainer.args.gradient_checkpointing = enabled
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_sft_with_lora(tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra `clients`")
    plain = make_trainer(tmp_path / "plain", "text").model
    config = peft.LoraConfig(r=4, target_parameters=lora_target_parameters(plain), task_type="CAUSAL_LM")
    trainer = make_trainer(tmp_path, "text", config)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * before
    merged = trainer.model.merge_and_unload()
    changed = {key for key, weight in merged.state_dict().items() if not torch.equal(weight, plain.state_dict()[key])}
    assert changed == {f"model.{name}" for name in lora_target_parameters(plain)}
