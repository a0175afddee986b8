"""Trains one small translator for each kind of decoder and each score with `translate.py`, and compares them.

    python examples/compare_attention.py                                 # on the data beside this script
    python examples/compare_attention.py --decoders luong,gnmt --scores general,additive
    python examples/compare_attention.py --train_file train.de,train.en --validation_file val.de,val.en

Every decoder is trained with the first of the scores, and the first decoder with every score; `--all true` trains every
pair. Options that are not named here go to `translate.py`, the same for each. A run that is complete in `--output_dir`
is not repeated, so that an interrupted comparison goes on where it was.

Speed is counted in processor time, so that other programs on the machine matter little: run it with OMP_NUM_THREADS=1.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from hf_rnn import ATTENTION_SCORES
from training_helpers import say


# What is said of a run to `translate.py`, by the name of its row.
DECODERS = {
    "luong": ["--decoder_type", "luong"],
    "luong+input_feeding": ["--decoder_type", "luong", "--input_feeding", "true"],
    "bahdanau": ["--decoder_type", "bahdanau"],
    "gnmt": ["--decoder_type", "gnmt"],
}
SCRIPT = Path(__file__).parent / "translate.py"
# The same size for all, two layers of the decoder because `gnmt` has no fewer; scored once, at the end.
SAME = ["--decoder_layers", "2", "--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
COLUMNS = (
    ("decoder", None),
    ("score", None),
    ("parameters", "{:,}"),
    ("validation loss", "{:.3f}"),
    ("validation BLEU", "{:.2f}"),
    ("test BLEU, greedy", "{:.2f}"),
    ("test BLEU, beams", "{:.2f}"),
    ("tokens/s of training", "{:,.0f}"),
    ("peak MiB", "{:,.0f}"),
)


def choose(decoders: list[str], scores: list[str], all_pairs: bool) -> list[tuple[str, str]]:
    """The pairs of decoder and score to train: all, or those that share their decoder or score with the first pair."""
    pairs = [(decoder, score) for decoder in decoders for score in scores]
    return [pair for pair in pairs if all_pairs or decoders[0] == pair[0] or scores[0] == pair[1]]


def train(decoder: str, score: str, folder: Path, options: list[str]) -> dict[str, float]:
    """Runs `translate.py` unless all its scores are there already, and returns them, on the main process alone."""
    results = folder / "all_results.json"
    is_main = int(os.environ.get("RANK", 0)) == 0
    # Those of the training are written before the others.
    if not results.exists() or "test_bleu" not in json.loads(results.read_text(encoding="utf-8")):
        results.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(SCRIPT), "--output_dir", str(folder), "--overwrite_output_dir", "true"]
        command += [*DECODERS[decoder], "--attention_score", score, *SAME, *options]
        with open(folder / "log.txt" if is_main else os.devnull, "w", encoding="utf-8") as log:
            status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        if status != 0:
            sys.exit(f"error: {decoder} with {score} failed with status {status}, see {folder / 'log.txt'}")
    return json.loads(results.read_text(encoding="utf-8")) if is_main else {}


def row_of(decoder: str, score: str, results: dict[str, float]) -> list[str]:
    """The cells of a line of the table; `-` for what was not measured."""
    values = (
        results.get("parameters"),
        results.get("eval_loss"),
        results.get("eval_bleu"),
        results.get("test_bleu_greedy", results.get("test_bleu")),
        results.get("test_bleu") if "test_bleu_greedy" in results else None,
        results["train_tokens"] / results["train_processor_seconds"],
        results.get("peak_mebibytes"),
    )
    cells = ["-" if value is None else form.format(value) for value, (_, form) in zip(values, COLUMNS[2:], strict=True)]
    return [decoder, score, *cells]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--decoders", default=",".join(DECODERS), help=f"Among {', '.join(DECODERS)}.")
    scores = ["general", *(score for score in ATTENTION_SCORES if score != "general")]
    parser.add_argument("--scores", default=",".join(scores), help=f"Among {', '.join(ATTENTION_SCORES)}.")
    parser.add_argument("--all", default="false", choices=["true", "false"], help="Every decoder with every score.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/attention"))
    args, options = parser.parse_known_args()
    decoders, scores = args.decoders.split(","), args.scores.split(",")
    for option, names, known in (("decoders", decoders, DECODERS), ("scores", scores, ATTENTION_SCORES)):
        unknown = [name for name in names if name not in known]
        if unknown:
            parser.error(f"--{option} must be among {', '.join(known)}, got {', '.join(unknown)}")
    given = {option.partition("=")[0].removeprefix("--") for option in options if option.startswith("--")}
    varied = sorted(given & {"decoder_type", "input_feeding", "attention_score"})
    if varied:
        parser.error(f"--{varied[0]} is what is compared here: use --decoders and --scores")

    lines = [[name for name, _ in COLUMNS], ["---", "---", *["---:"] * (len(COLUMNS) - 2)]]
    for line in lines:
        say(f"| {' | '.join(line)} |")
    for decoder, score in choose(decoders, scores, args.all == "true"):
        results = train(decoder, score, args.output_dir / f"{decoder}-{score}", options)
        if results:
            lines.append(row_of(decoder, score, results))
            say(f"| {' | '.join(lines[-1])} |")
    if len(lines) > 2:
        table = args.output_dir / "table.md"
        table.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
