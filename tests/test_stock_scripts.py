"""The steps of transformers' example scripts, with a checkpoint that was saved with its code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clients import SENTENCES, make_tokenizer, save_checkpoint


TASKS = ["clm", "mlm", "glue", "glue-dynamic", "ner", "qa", "swag", "translation"]


@pytest.mark.parametrize("way", ["with", "without"])
def test_steps_of_the_scripts(way, tmp_path):
    """Load, resize, name the labels, train, evaluate, save and load, whether or not the library is installed."""
    tokenizer = make_tokenizer(model_input_names=["input_ids", "attention_mask"])
    save_checkpoint(tmp_path / "RNNForCausalLM", "RNNForCausalLM", tokenizer, vocab_size=len(tokenizer) - 3)
    save_checkpoint(tmp_path / "RNNForMaskedLM", "RNNForMaskedLM", tokenizer, bidirectional=True)
    name = "RNNSeq2SeqForConditionalGeneration"
    save_checkpoint(tmp_path / name, name, tokenizer, decoder_start_token_id=tokenizer.bos_token_id)
    rows = [{"text": sentence, "kind": "ab"[index % 2]} for index, sentence in enumerate(SENTENCES)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]) if way == "with" else "",
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    process = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("stock_scripts_worker.py")), str(tmp_path), way],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    assert [line for line in process.stdout.split() if line in TASKS] == TASKS
