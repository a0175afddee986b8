"""The tutorial's scripts: what they write after a little training, and, slowly, that their pass marks are met."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


TUTORIAL = Path(__file__).parents[1] / "examples" / "tutorial"
# Each with its pictures, and how many pass marks a run with two training steps reports as missed and as met.
SCRIPTS = {
    "addition.py": (["addition.png"], 4, 0),
    "copying.py": (["copying.png", "copying_attention.png"], 1, 0),
    "last_step.py": (["last_step.png"], 2, 1),
    "translation_steps.py": (["translation_steps.png"], 1, 3),
}


def run(script: str, folder: Path, *options: str) -> subprocess.CompletedProcess:
    pytest.importorskip("matplotlib")
    environment = os.environ | {"PYTHONPATH": str(TUTORIAL.parents[1]), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, str(TUTORIAL / script), "--output_dir", str(folder), *options]
    return subprocess.run(words, capture_output=True, text=True, env=environment, cwd=folder, check=False)


@pytest.mark.parametrize("script", SCRIPTS)
def test_little_training(script, tmp_path):
    """Two steps: the script runs to its end, draws, and says with its status that it has not learned its task."""
    pictures, missed, passed = SCRIPTS[script]
    done = run(script, tmp_path, "--steps", "2")
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("MISSED: ") for line in lines) == missed, done.stdout
    assert sum(line.startswith("passed: ") for line in lines) == passed, done.stdout
    for picture in pictures:
        assert (tmp_path / picture).stat().st_size > 5000


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("script", SCRIPTS)
def test_pass_marks(script, seed, tmp_path):
    """Three seeds meet every mark."""
    done = run(script, tmp_path, "--seed", str(seed))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed: " in done.stdout
