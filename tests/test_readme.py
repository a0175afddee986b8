"""The code of the README runs as it stands there, from the first block to the last."""

import re
from pathlib import Path

from huggingface_hub import HfApi
from transformers import Trainer

import hf_rnn


README = Path(__file__).parents[1] / "README.md"


def test_python_blocks_run(tmp_path, monkeypatch):
    """All blocks of Python in one go, with the two calls that would reach the Hub recorded instead."""
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    uploaded = {}

    class Repository:
        repo_id = "my-name/my-translator"

    def create_commit(self, repo_id, operations, **kwargs):
        uploaded[repo_id] = {operation.path_in_repo for operation in operations}

    monkeypatch.setattr(HfApi, "create_repo", lambda *args, **kwargs: Repository)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(hf_rnn.RECURRENT_CELLS, "minimal_gated", None)
    losses = []
    evaluate = Trainer.evaluate
    monkeypatch.setattr(Trainer, "evaluate", lambda *args: losses.append(evaluate(*args)["eval_loss"]) or losses[-1])
    namespace = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)

    files = uploaded["my-name/my-translator"]
    assert {"config.json", "model.safetensors", "modeling_rnn_seq2seq.py", "recurrent_cells.py"} <= files
    # What the examples claim to learn, they learn.
    assert losses[0] < 0.4
    assert namespace["output"][0, 1:7].tolist() == namespace["word"][0].flip(0).tolist()


def test_table_names_every_class():
    """The README's table lists each class of the registration table with all of its Auto classes."""
    rows = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    for config_class, model_classes in hf_rnn.REGISTRATION.items():
        assert any(f"`{config_class.model_type}` (`{config_class.__name__}`)" in row for row in rows)
        for model_class, auto_classes in model_classes.items():
            (row,) = [row for row in rows if f"| `{model_class.__name__}` |" in row]
            assert all(f"`{auto_class.__name__}`" in row for auto_class in auto_classes)
