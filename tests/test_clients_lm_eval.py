"""The language model evaluation harness on local tasks, through its own kind of model, `hf`."""

import json
import math

import pytest
import torch

from clients import CHAT_TEMPLATE, SENTENCES, make_client_model, make_tokenizer, save_checkpoint


lm_eval = pytest.importorskip("lm_eval", reason="needs the extra `clients`")
lm_eval_tasks = pytest.importorskip("lm_eval.tasks", reason="needs the extra `clients`")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {output_type}
doc_to_text: "{text}"
doc_to_target: "{target}"
metric_list: [{{metric: {metric}, aggregation: {aggregation}, higher_is_better: true}}]
"""
EXAMPLES = [(" ".join(sentence.split()[:-1]), sentence.split()[-1]) for sentence in SENTENCES[:5]]


@pytest.fixture
def tasks(tmp_path):
    data = tmp_path / "data.json"
    data.write_text(
        "\n".join(json.dumps({"prompt": p, "answer": a, "choices": [a, "dog"], "gold": 0}) for p, a in EXAMPLES)
    )
    prompt = "{{prompt}}"
    common = {"data": data, "text": prompt, "target": "{{answer}}", "aggregation": "mean"}
    choice = TASK.format(**common | {"target": "gold"}, name="choice", output_type="multiple_choice", metric="acc")
    generation = TASK.format(**common, name="generation", output_type="generate_until", metric="exact_match")
    rolling = TASK.format(
        **common | {"text": "", "target": prompt, "aggregation": "weighted_perplexity"},
        name="rolling", output_type="loglikelihood_rolling", metric="word_perplexity",
    )  # fmt: skip
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "choice.yaml").write_text(choice + 'doc_to_choice: "{{choices}}"\n')
    (folder / "generation.yaml").write_text(generation + 'generation_kwargs: {until: ["dog"], max_gen_toks: 5}\n')
    (folder / "rolling.yaml").write_text(rolling)
    return lm_eval_tasks.TaskManager(include_path=str(folder), include_defaults=False)


def answers(result, task: str) -> list:
    """The raw answers to a task's requests, in the order of its examples."""
    return [sample["resps"] for sample in sorted(result["samples"][task], key=lambda sample: sample["doc_id"])]


def log_likelihood(model, prompt: list[int], continuation: list[int]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + continuation])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None]).sum().item()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_local_tasks(tmp_path, tasks, batch_size):
    tokenizer = make_tokenizer(special_tokens=False, chat_template=CHAT_TEMPLATE)
    folder = save_checkpoint(tmp_path / "model", "RNNForCausalLM", tokenizer)
    result = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": folder, "dtype": "float32"},
        tasks=["choice", "generation", "rolling"],
        task_manager=tasks,
        device="cpu",
        batch_size=batch_size,
        bootstrap_iters=0,
    )
    model = make_client_model("RNNForCausalLM", tokenizer)
    right = 0
    for (prompt, answer), choices in zip(EXAMPLES, answers(result, "choice")):
        ids = tokenizer(prompt)["input_ids"]
        scores = [log_likelihood(model, ids, tokenizer(word)["input_ids"]) for word in (answer, "dog")]
        assert [choice[0][0] for choice in choices] == pytest.approx(scores, abs=1e-4)
        right += scores[0] >= scores[1]
    assert result["results"]["choice"]["acc,none"] == pytest.approx(right / len(EXAMPLES))

    for (prompt, _), [[text]] in zip(EXAMPLES, answers(result, "generation")):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        new = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert text.strip() == tokenizer.decode(new, skip_special_tokens=True).split("dog")[0].strip()

    total = sum(log_likelihood(model, [tokenizer.bos_token_id], tokenizer(p)["input_ids"]) for p, _ in EXAMPLES)
    words = sum(len(prompt.split()) for prompt, _ in EXAMPLES)
    assert result["results"]["rolling"]["word_perplexity,none"] == pytest.approx(math.exp(-total / words), rel=1e-4)


@pytest.mark.slow
def test_command_line_with_the_checkpoints_code(tmp_path, tasks):
    """`lm_eval` imports nothing of this library; with `trust_remote_code` the checkpoint's own code is used."""
    import subprocess
    import sys

    tokenizer = make_tokenizer(special_tokens=False)
    folder = save_checkpoint(tmp_path / "model", "RNNForCausalLM", tokenizer)
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", "choice", "--device", "cpu",
        "--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "results.json"),
        "--model_args", f"pretrained={folder},dtype=float32,trust_remote_code=True",
    ]  # fmt: skip
    finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    [results] = tmp_path.rglob("results*.json")
    assert "acc,none" in json.loads(results.read_text())["results"]["choice"]
