"""Turns the files of SCAN (https://github.com/brendenlake/SCAN) into pairs for `transduce.py`.

    python examples/prepare_scan.py FOLDER --split simple --output_dir scan

FOLDER holds `tasks_train_SPLIT.txt` and `tasks_test_SPLIT.txt` with lines `IN: commands OUT: actions`. SCAN has no
development set: a random share of the training commands becomes one. A command that occurs several times in the
training file, as the lone primitive of the `addprim` splits does, stays there. The same input and seed give the same
bytes.
"""

import argparse
import random
import re
import sys
from pathlib import Path

from text_pairs import DataError, read_lines


LINE = re.compile(r"IN: (\S.*?) OUT: (\S.*?)\s*")


def read_commands(path: Path) -> list[tuple[str, str]]:
    """Pairs of commands and actions. Raises `DataError` with file and line for a line of another form."""
    pairs = []
    for number, line in read_lines(path):
        match = LINE.fullmatch(line)
        if match is None:
            raise DataError(path, number, "expected a line of the form `IN: commands OUT: actions`")
        pairs.append(match.groups())
    return pairs


def hold_out(pairs: list[tuple[str, str]], share: float, seed: int) -> tuple[list, list]:
    """The pairs without, and only those of a random `share` of the commands, taken from those that occur once."""
    counts: dict[str, int] = {}
    for command, _ in pairs:
        counts[command] = counts.get(command, 0) + 1
    chosen = set(random.Random(seed).sample(list(counts), round(share * len(counts))))
    chosen = {command for command in chosen if counts[command] == 1}
    return [pair for pair in pairs if pair[0] not in chosen], [pair for pair in pairs if pair[0] in chosen]


def main() -> int | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="Folder of the files of SCAN.")
    parser.add_argument("--split", default="simple", help="simple, length, addprim_jump, addprim_turn_left or another.")
    parser.add_argument("--output_dir", type=Path, default=Path("scan"))
    parser.add_argument("--dev_share", type=float, default=0.1, help="Share of the training commands held out.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not 0 <= args.dev_share < 1:
        parser.error(f"--dev_share must be in [0, 1), got {args.dev_share}")

    try:
        parts = {name: read_commands(args.source / f"tasks_{name}_{args.split}.txt") for name in ("train", "test")}
    except DataError as error:
        print("error:", error, file=sys.stderr)
        return 2
    parts["train"], parts["dev"] = hold_out(parts["train"], args.dev_share, args.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, pairs in parts.items():
        path = args.output_dir / f"{args.split}.{name}.tsv"
        lines = ["command\tactions\n", *(f"{command}\t{actions}\n" for command, actions in pairs)]
        path.write_text("".join(lines), encoding="utf-8", newline="\n")
        print(f"{path}\t{len(pairs)} pairs")
    return None


if __name__ == "__main__":
    sys.exit(main())
