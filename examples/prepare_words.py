"""Makes a list of words without pronunciations, for `--unlabelled_file` of `transduce.py`, out of lists of words.

    python examples/prepare_words.py dist.all.last american-english-large --output_file words.txt

Of each line the first word counts, in small letters; what has other signs than the 26 letters is left out. So are words
that the split of the CMU dictionary (see `data/README.md`) would put into its development or test part, or keep back,
whether they are in the dictionary or not: nothing that a model is judged by can be among them.
"""

import argparse
import hashlib
import re
import sys
from pathlib import Path

from text_pairs import DataError, read_lines


TRAINING = range(20, 902)


def is_for_training(word: str) -> bool:
    """Whether the split of the CMU dictionary puts a word into the training part."""
    return int(hashlib.sha256(word.encode("utf-8")).hexdigest()[:15], 16) % 1000 in TRAINING


def read_words(path: Path) -> set[str]:
    """The words of a list that can be used."""
    words = {line.split()[0].lower() for _, line in read_lines(path) if line.strip()}
    return {word for word in words if re.fullmatch("[a-z]+", word) and is_for_training(word)}


def main() -> int | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lists", nargs="+", type=Path, help="Files with a word at the start of each line, UTF-8.")
    parser.add_argument("--output_file", type=Path, default=Path("words.txt"))
    args = parser.parse_args()
    try:
        words = set().union(*map(read_words, args.lists))
    except DataError as error:
        print("error:", error, file=sys.stderr)
        return 2
    args.output_file.write_text("".join(f"{word}\n" for word in sorted(words)), encoding="utf-8", newline="\n")
    print(f"{args.output_file}\t{len(words)} words")
    return None


if __name__ == "__main__":
    sys.exit(main())
