"""Cuts the data set that ships with the translation example out of the full Tatoeba English-French pairs.

    python examples/prepare_data.py FOLDER

FOLDER holds `train.tsv.gz`, `dev.tsv` and `test.tsv` with the columns `eng` and `fra`. Each part is cut from the part
of the same name, so the parts stay as disjoint as they were. The same input and seed give the same bytes.
"""

import argparse
import gzip
import hashlib
import random
from pathlib import Path

from text_pairs import read_pairs


PARTS = {"train": "train.tsv.gz", "dev": "dev.tsv", "test": "test.tsv"}


def choose_pairs(pairs: list[tuple[str, str]], count: int, max_words: int, rng: random.Random) -> list[tuple[str, str]]:
    """
    Returns up to `count` random pairs, sorted (which compresses best), with 2 to `max_words` words on each side (French
    up to two more) and no English or French sentence used twice: of several translations one is taken at random.
    """
    pairs = sorted(set(pairs))
    rng.shuffle(pairs)
    chosen, seen = [], set()
    for english, french in pairs:
        fits = 2 <= len(english.split()) <= max_words and 2 <= len(french.split()) <= max_words + 2
        if fits and english not in seen and french not in seen:
            seen.update((english, french))
            chosen.append((english, french))
    return sorted(chosen[:count])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="Folder of the full data set.")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--train_pairs", type=int, default=80000)
    parser.add_argument("--dev_pairs", type=int, default=500)
    parser.add_argument("--test_pairs", type=int, default=1000)
    parser.add_argument("--max_words", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    args.output_dir.mkdir(parents=True, exist_ok=True)
    for part, source_name in PARTS.items():
        rng = random.Random(f"{args.seed}-{part}")
        pairs = read_pairs(args.source / source_name, source_column="eng", target_column="fra")
        pairs = choose_pairs(pairs, getattr(args, f"{part}_pairs"), args.max_words, rng)
        text = "eng\tfra\n" + "".join(f"{english}\t{french}\n" for english, french in pairs)
        content = text.encode("utf-8")
        suffix = ".tsv"
        if part == "train":
            content, suffix = gzip.compress(content, compresslevel=9, mtime=0), ".tsv.gz"
        path = args.output_dir / f"tatoeba-eng-fra.{part}{suffix}"
        path.write_bytes(content)
        print(f"{path.name}\t{len(pairs)} pairs\t{len(content)} bytes\t{hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
