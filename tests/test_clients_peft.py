"""PEFT: LoRA on the weights of recurrences."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments

from clients import SENTENCES, LowRankCell, make_client_model, make_tokenizer, save_checkpoint
from hf_rnn import (
    RECURRENT_CELLS,
    lora_target_modules,
    lora_target_parameters,
)
from hf_rnn.export import export_model, package
from hf_rnn.export.graphs import make_graphs
from matrix import MODEL_CLASSES, case_id, make_inputs, make_model


peft = pytest.importorskip("peft", reason="needs the extra `clients`")


@pytest.fixture(params=[*RECURRENT_CELLS, "low_rank"])
def cell_type(request, monkeypatch):
    monkeypatch.setitem(RECURRENT_CELLS, "low_rank", LowRankCell)
    return request.param


def with_adapter(model, **options):
    """The model with random adapters everywhere in its recurrence."""
    torch.manual_seed(1)
    options = {"target_modules": lora_target_modules(model), "r": 2, "init_lora_weights": False} | options
    return peft.get_peft_model(model, peft.LoraConfig(target_parameters=lora_target_parameters(model), **options))


def logits_of(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs)[0]


CASES = [
    ("RNNForCausalLM", {}),
    ("RNNModel", {"bidirectional": True}),
    ("RNNForTokenClassification", {"bidirectional": True, "residual": True}),
    ("RNNSeq2SeqForConditionalGeneration", {"decoder_type": "luong"}),
    ("RNNSeq2SeqForConditionalGeneration", {"decoder_type": "bahdanau", "attention_score": "additive"}),
    ("RNNSeq2SeqForConditionalGeneration", {"decoder_type": "gnmt"}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=case_id)
def test_adapters_work_and_merge(name, options, cell_type):
    model = make_model(name, cell_type=cell_type, **options)
    inputs = make_inputs(name, with_labels=False)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, -2:] = 0
    base = logits_of(model, inputs)
    adapted = with_adapter(model)
    with_adapters = logits_of(adapted, inputs)
    assert (with_adapters - base).abs().max() > 1e-2
    with adapted.disable_adapter():
        torch.testing.assert_close(logits_of(adapted, inputs), base, rtol=0, atol=1e-12)

    # Every adapter is in use and nothing else is trained.
    adapted.train()
    adapted(**inputs)[0].sum().backward()
    for key, weight in adapted.named_parameters():
        assert weight.requires_grad == ("lora_" in key)
        assert not weight.requires_grad or weight.grad.abs().sum() > 0, key
    adapted.zero_grad()

    merged = adapted.merge_and_unload()
    assert type(merged) is MODEL_CLASSES[name][1]
    assert merged.state_dict().keys() == make_model(name, cell_type=cell_type, **options).state_dict().keys()
    torch.testing.assert_close(logits_of(merged, inputs), with_adapters, rtol=0, atol=1e-10)


def test_generation_with_an_adapter():
    tokenizer = make_tokenizer(special_tokens=False)
    adapted = with_adapter(make_client_model("RNNForCausalLM", tokenizer, eos_token_id=None), task_type="CAUSAL_LM")
    inputs = tokenizer(SENTENCES, return_tensors="pt", padding=True, padding_side="left")
    options = {"max_new_tokens": 6, "num_beams": 2}
    with_cache = adapted.generate(**inputs, **options)
    assert torch.equal(with_cache, adapted.generate(**inputs, use_cache=False, **options))
    with adapted.disable_adapter():
        assert not torch.equal(with_cache, adapted.generate(**inputs, **options))
    assert torch.equal(with_cache, adapted.merge_and_unload().generate(**inputs, **options))


def test_train_save_load_merge(tmp_path):
    """With the stock Trainer, names from the configuration, and a loaded base model."""
    tokenizer = make_tokenizer(special_tokens=False)
    folder = save_checkpoint(tmp_path / "base", "RNNForCausalLM", tokenizer, initializer_range=0.1)
    base = AutoModelForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(
        r=4, lora_alpha=16, target_parameters=lora_target_parameters(base.config), task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config)
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    arguments = TrainingArguments(
        str(tmp_path / "run"), num_train_epochs=30, learning_rate=3e-2, report_to="none", disable_tqdm=True,
        use_cpu=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    data = [tokenizer(sentence) for sentence in SENTENCES]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data, data_collator=collator)
    loss_before = trainer.evaluate()["eval_loss"]
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    assert loss < 0.8 * loss_before
    for key, weight in model.state_dict().items():
        assert torch.equal(weight, before[key]) == ("lora_" not in key), key

    trainer.save_model(str(tmp_path / "adapter"))
    saved = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in saved
    assert "model.safetensors" not in saved
    inputs = tokenizer(SENTENCES, return_tensors="pt", padding=True)
    expected = logits_of(model, inputs)
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits_of(loaded, inputs), expected, rtol=0, atol=1e-6)
    # Transformers too finds the base model by itself.
    automatic = AutoModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits_of(automatic, inputs), expected, rtol=0, atol=1e-6)

    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged, inputs), expected, rtol=0, atol=1e-5)


def test_classifier_keeps_its_new_head(tmp_path):
    model = with_adapter(make_model("RNNForSequenceClassification", pooling="attention"), task_type="SEQ_CLS")
    trained = {key for key, weight in model.named_parameters() if weight.requires_grad and "lora_" not in key}
    assert {key.split(".modules_to_save")[0] for key in trained} >= {"base_model.model.classifier"}
    inputs = make_inputs("RNNForSequenceClassification", with_labels=False)
    expected = logits_of(model, inputs)
    model.save_pretrained(tmp_path)
    base = make_model("RNNForSequenceClassification", pooling="attention", seed=0)
    torch.testing.assert_close(logits_of(peft.PeftModel.from_pretrained(base, tmp_path), inputs), expected)


def test_two_adapters():
    inputs = make_inputs("RNNForCausalLM", with_labels=False)
    model = with_adapter(make_model("RNNForCausalLM"))
    first = logits_of(model, inputs)
    targets = lora_target_parameters(model.get_base_model().config)
    model.add_adapter("second", peft.LoraConfig(r=1, target_parameters=targets, init_lora_weights=False))
    model.set_adapter("second")
    assert not torch.allclose(logits_of(model, inputs), first)
    model.set_adapter("default")
    torch.testing.assert_close(logits_of(model, inputs), first)


@pytest.mark.parametrize(("name", "options"), [CASES[0], CASES[2], CASES[4]], ids=case_id)
def test_adapters_that_are_in_a_model_are_exported_with_it(name, options, tmp_path):
    adapted = with_adapter(make_model(name, dtype=torch.float32, **options))
    with pytest.raises(ValueError, match=r"got PeftModel\. Merge its adapters"):
        export_model(adapted, tmp_path / "refused", format="torch")
    model = adapted.get_base_model()
    report = export_model(model, tmp_path / "out", format="torch")
    assert max(report["differences"].values()) < 1e-5
    kind, graphs, states = make_graphs(model)
    merged_kind, merged_graphs, merged_states = make_graphs(adapted.merge_and_unload())
    assert (kind, states) == (merged_kind, merged_states)
    for graph_name, graph in graphs.items():
        inputs = package._random_inputs(graph, 2, 5, torch.Generator().manual_seed(0))
        expected = merged_graphs[graph_name](inputs)
        for output, result in graph(inputs).items():
            torch.testing.assert_close(result, expected[output], atol=1e-5, rtol=1e-5)


def test_dropout_is_refused_by_peft():
    """What PEFT cannot do with parameters, it says."""
    with pytest.raises(ValueError, match="lora_dropout"):
        with_adapter(make_model("RNNForCausalLM"), lora_dropout=0.1)
    with pytest.raises(ValueError, match="use_dora"):
        with_adapter(make_model("RNNForCausalLM"), use_dora=True)
