"""The example scripts from beginning to end, on little data: what they write, and that a stop loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import hf_rnn  # noqa: F401, registers the models


REPOSITORY = Path(__file__).parents[1]
TINY_TRANSLATOR = {
    "max_train_samples": 256,
    "max_eval_samples": 16,
    "max_predict_samples": 16,
    "vocab_size": 400,
    "hidden_size": 16,
    "per_device_train_batch_size": 32,
    "num_train_epochs": 2,
    "logging_steps": 2,
}
TEXT = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n" * 60


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")


def command(script: str, output_dir: Path, options: dict, launcher: tuple[str, ...] = ()) -> list[str]:
    words = [sys.executable, *launcher, str(REPOSITORY / "examples" / script), "--output_dir", str(output_dir)]
    return words + [word for name, value in options.items() for word in (f"--{name}", str(value))]


def environment() -> dict:
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}


def run(script: str, output_dir: Path, status: int = 0, launcher: tuple[str, ...] = (), **options) -> str:
    done = subprocess.run(
        command(script, output_dir, options, launcher), capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_translate(tmp_path):
    """Trains, scores, saves, loads, translates and draws; a second run into the same folder is refused."""
    output = run("translate.py", tmp_path / "out", decoder_type="gnmt", decoder_layers=2, **TINY_TRANSLATOR)
    assert "sacreBLEU, 5 beams" in output
    assert "translation " in output
    assert "eval_bleu" in output
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert 0 <= results["test_bleu"] <= 100
    assert results["test_samples"] == 16
    assert (tmp_path / "out" / "attention.png").stat().st_size > 5000
    assert len((tmp_path / "out" / "test_translations.jsonl").read_text().splitlines()) == 16
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (model.config.decoder_type, model.config.hidden_size, model.config.use_cache) == ("gnmt", 16, True)
    assert model.generation_config.num_beams == 5
    output = model.generate(**tokenizer(["Bonjour !"], return_tensors="pt"))
    assert output.shape[0] == 1
    refused = run("translate.py", tmp_path / "out", status=2, **TINY_TRANSLATOR)
    assert refused.count("error:") == 1
    assert "--resume_from_checkpoint" in refused


def test_transduce(tmp_path):
    """Letters to phonemes: trains, judges each word once against all its pronunciations, saves, and judges again."""
    options = {name: value for name, value in TINY_TRANSLATOR.items() if name != "vocab_size"}
    output = run("transduce.py", tmp_path / "out", ignore="012", max_target_length=12, **options)
    assert "(wrong, " in output or "(right)" in output
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "out" / "test_results.jsonl").read_text().splitlines()]
    assert results["test_samples"] == len(rows) == len({row["source"] for row in rows})
    wrong = sum(row["result"] not in row["targets"] for row in rows)
    assert results["test_sequence_error_rate"] == pytest.approx(100 * wrong / len(rows), abs=1e-4)
    assert "test_greedy_ignoring_symbol_error_rate" in results
    # Validation, whose batches come in another order, gives the same rates.
    written = "".join(f"{row['source']}\t{target}\n" for row in rows for target in row["targets"])
    (tmp_path / "test.tsv").write_text(written)
    files = {"validation_file": tmp_path / "test.tsv", "test_file": tmp_path / "test.tsv"}
    options = {"do_train": "false", "model_name_or_path": tmp_path / "out", "num_beams": 1, "max_new_tokens": 12}
    run("transduce.py", tmp_path / "again", **files, **options)
    again = json.loads((tmp_path / "again" / "all_results.json").read_text())
    assert again["test_symbol_error_rate"] == results["test_greedy_symbol_error_rate"]
    assert again["eval_symbol_error_rate"] == pytest.approx(again["test_symbol_error_rate"], abs=1e-4)


def test_compare_attention(tmp_path):
    """Each row says what a run of `translate.py` has measured; what is done is not done again."""
    options = {"decoders": "luong,luong+input_feeding", "scores": "dot", "num_beams": 2, **TINY_TRANSLATOR}
    options |= {"max_train_samples": 64, "num_train_epochs": 1, "max_new_tokens": 8}
    output = run("compare_attention.py", tmp_path / "out", **options)
    assert output == (tmp_path / "out" / "table.md").read_text()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in output.splitlines()]
    assert [row[:2] for row in rows] == [["luong", "dot"], ["luong+input_feeding", "dot"]]
    for row in rows:
        assert len(row) == len(head)
        results = json.loads((tmp_path / "out" / "-".join(row[:2]) / "all_results.json").read_text())
        assert float(row[head.index("validation loss")]) == pytest.approx(results["eval_loss"], abs=1e-3)
        assert int(row[head.index("tokens/s of training")].replace(",", "")) > 0
        assert int(row[head.index("peak MiB")].replace(",", "")) > 100
    config = json.loads((tmp_path / "out" / "luong+input_feeding-dot" / "config.json").read_text())
    assert (config["decoder_type"], config["input_feeding"], config["attention_score"]) == ("luong", True, "dot")
    done = tmp_path / "out" / "luong-dot" / "all_results.json"
    done.write_text(json.dumps(json.loads(done.read_text()) | {"eval_loss": 123.0}))
    assert "| 123.000 |" in run("compare_attention.py", tmp_path / "out", **options)


def test_language_model(tmp_path):
    """Trains on a file by characters, reports perplexity, saves, loads and writes a sample."""
    (tmp_path / "text.txt").write_text(TEXT)
    options = {"hidden_size": 16, "num_train_epochs": 1, "block_size": 32, "max_new_tokens": 20}
    output = run("language_model.py", tmp_path / "out", train_file=tmp_path / "text.txt", **options)
    assert "perplexity" in output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer(["To be"], return_tensors="pt")
    assert tokenizer.decode(prompt["input_ids"][0]) == "To be"
    assert model.generate(**prompt, max_new_tokens=5).shape == (1, 10)


@pytest.mark.slow
def test_stop_and_resume(tmp_path):
    """A Ctrl-C saves a checkpoint; the resumed run ends with the weights of a run that was never stopped."""
    options = TINY_TRANSLATOR | {"max_train_samples": 1024, "num_train_epochs": 3, "do_predict": "false"}
    run("translate.py", tmp_path / "whole", **options)
    process = subprocess.Popen(
        command("translate.py", tmp_path / "stopped", options),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(),
    )
    deadline = time.monotonic() + 300
    while not list((tmp_path / "stopped").glob("checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 130, output
    assert "--resume_from_checkpoint true" in output
    run("translate.py", tmp_path / "stopped", resume_from_checkpoint="true", **options)
    whole, stopped = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert whole.keys() == stopped.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(stopped[name], weight, rtol=0, atol=0, msg=name)


def steps_of(output_dir: Path) -> int:
    return json.loads((output_dir / "trainer_state.json").read_text())["global_step"]


# A script, options, how many rows of a training there are, and the Auto class that loads what was trained.
SMALL = {name: value for name, value in TINY_TRANSLATOR.items() if name != "vocab_size"}
LAUNCHED = {
    "translate.py": (TINY_TRANSLATOR, 256, "AutoModelForSeq2SeqLM"),
    "transduce.py": (SMALL | {"max_new_tokens": 8}, 256, "AutoModelForSeq2SeqLM"),
    "language_model.py": (
        {"hidden_size": 16, "num_train_epochs": 2, "block_size": 32, "max_new_tokens": 20}
        | {"per_device_train_batch_size": 8},
        -(-(int(len(TEXT) * 0.9) - 1) // 32),
        "AutoModelForCausalLM",
    ),
    "classify.py": (SMALL, 256, "AutoModelForSequenceClassification"),
    "tag.py": (
        {name: value for name, value in SMALL.items() if name != "max_predict_samples"},
        256,
        "AutoModelForTokenClassification",
    ),
    # One window for each question.
    "read.py": (TINY_TRANSLATOR | {"max_seq_length": 5000}, 256, "AutoModelForQuestionAnswering"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "processes"), [(TORCHRUN, 2), (ACCELERATE, 1)], ids=["torchrun", "accelerate"])
@pytest.mark.parametrize("script", LAUNCHED)
def test_launchers(script, launcher, processes, tmp_path):
    """Under a launcher the processes share the data, and the first alone prints and writes."""
    options, rows, auto_class = LAUNCHED[script]
    options = dict(options)
    if script == "language_model.py":
        options["train_file"] = tmp_path / "text.txt"
        options["train_file"].write_text(TEXT)
    output = run(script, tmp_path / "out", launcher=launcher, **options)
    assert steps_of(tmp_path / "out") == 2 * -(-rows // (options["per_device_train_batch_size"] * processes))
    assert output.count("Model, scores and ") == output.count(" parameters, ") == 1
    getattr(transformers, auto_class).from_pretrained(tmp_path / "out")
    if script == "translate.py":
        assert output.count("sacreBLEU, 5 beams") == 1
        assert len((tmp_path / "out" / "test_translations.jsonl").read_text().splitlines()) == 16
        assert json.loads((tmp_path / "out" / "all_results.json").read_text())["test_samples"] == 16


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_comparison_under_a_launcher(launcher, tmp_path):
    """Each of the processes takes part in every run, and one of them reports."""
    options = TINY_TRANSLATOR | {"num_train_epochs": 1, "num_beams": 2, "max_new_tokens": 8}
    output = run(
        "compare_attention.py", tmp_path / "out", launcher=launcher, decoders="luong", scores="dot,general", **options
    )
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in output
    assert output.count("| luong | general |") == 1
    assert steps_of(tmp_path / "out" / "luong-general") == (4 if launcher is TORCHRUN else 8)
