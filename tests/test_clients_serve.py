"""`transformers serve` and `transformers chat`, which `python -m hf_rnn` starts with this library's models in reach."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from transformers.utils.import_utils import is_serve_available

from clients import CHAT_TEMPLATE, make_client_model, make_tokenizer, save_checkpoint


pytestmark = pytest.mark.skipif(not is_serve_available(), reason="needs the extra `clients` (transformers[serving])")

CHAT = [{"role": "user", "content": "who sat on the mat ?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a server, and the folder of the model that it serves."""
    tokenizer = make_tokenizer(special_tokens=False, chat_template=CHAT_TEMPLATE)
    folder = save_checkpoint(tmp_path_factory.mktemp("served"), "RNNForCausalLM", tokenizer, eos_token_id=None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hf_rnn", "serve", folder, "--device", "cpu", "--host", "127.0.0.1"]
    log = tmp_path_factory.mktemp("log") / "server.txt"
    with log.open("w") as output:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=output, stderr=subprocess.STDOUT)
        try:
            address = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 300  # importing takes its time on a busy machine
            while process.poll() is None and time.monotonic() < deadline:
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=1).close()
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(0.1)
            assert process.poll() is None, log.read_text()
            yield address, folder
        finally:
            process.terminate()
            process.wait(timeout=20)


def ask(address: str, path: str, **body) -> str:
    body = json.dumps(body).encode()
    request = urllib.request.Request(f"{address}{path}", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


def expected_words(number: int) -> list[str]:
    tokenizer = make_tokenizer(special_tokens=False, chat_template=CHAT_TEMPLATE)
    model = make_client_model("RNNForCausalLM", tokenizer, eos_token_id=None)
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=number, do_sample=False)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).split()


def test_chat_completions(server):
    address, folder = server
    answer = json.loads(
        ask(address, "/v1/chat/completions", model=folder, messages=CHAT, max_tokens=5, temperature=0.0)
    )
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["choices"][0]["message"]["content"].split() == expected_words(5)
    assert answer["usage"]["completion_tokens"] == 5


def test_streamed_chat_completions(server):
    address, folder = server
    stream = ask(
        address, "/v1/chat/completions", model=folder, messages=CHAT, max_tokens=5, temperature=0.0, stream=True
    )
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    pieces = [event["choices"][0]["delta"].get("content") or "" for event in events]
    assert sum(map(bool, pieces)) > 1
    assert "".join(pieces).split() == expected_words(5)
    assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_completions(server):
    address, folder = server
    tokenizer = make_tokenizer(special_tokens=False)
    model = make_client_model("RNNForCausalLM", tokenizer, eos_token_id=None)
    prompt = tokenizer("the cat", return_tensors="pt")
    expected = tokenizer.decode(model.generate(**prompt, max_new_tokens=4)[0, 2:], skip_special_tokens=True)
    answer = json.loads(ask(address, "/v1/completions", model=folder, prompt="the cat", max_tokens=4, temperature=0.0))
    assert answer["choices"][0]["text"].split() == expected.split()


def test_responses(server):
    address, folder = server
    text = ask(address, "/v1/responses", model=folder, input=CHAT, max_output_tokens=4, temperature=0.0, stream=False)
    answer = json.loads(text)
    assert answer["status"] == "completed"
    assert answer["output"][0]["content"][0]["text"].split() == expected_words(4)


def test_chat_command(server, tmp_path):
    address, folder = server
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}  # it asks the server
    finished = subprocess.run(
        [sys.executable, "-m", "hf_rnn", "chat", folder, address, "max_new_tokens=4", "do_sample=False"],
        input="who sat on the mat ?\nn\n!exit\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
        env=environment,
    )
    assert finished.returncode == 0, finished.stderr
    # The limit of tokens makes it ask whether to go on: no.
    assert " ".join(expected_words(4)) in " ".join(finished.stdout.split())
