"""Writes word vectors out of the input embeddings of a pretrained model, as a text file like those of GloVe.

    python examples/vectors_from_model.py MODEL_FOLDER vectors.txt --texts train.tsv,more.tsv.gz

A word of several tokens gets the mean of their embeddings. The words are those of the texts, as the tokenizer of words
of `classify.py` splits them, in lower case, and with `--own_words` those that are tokens of the model. Vectors are
moved to a mean of zero and stretched to a standard deviation, as those of transformers are small and share a direction.
"""

import argparse
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer

from subword_tokenizer import train_word_tokenizer
from text_pairs import read_lines
from training_helpers import UsageError, load_pretrained, run_script, say


def words_of_files(paths: str) -> list[str]:
    """All words of files, in the order of how often they occur."""
    lines = (line for path in paths.split(",") for _, line in read_lines(path))
    tokenizer = train_word_tokenizer(lines, vocab_size=2**31 - 1)
    special = set(tokenizer.all_special_tokens)
    return [word for word, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]) if word not in special]


def words_of_tokenizer(tokenizer) -> list[str]:
    """The tokens that are whole words, in the order of their ids."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_tokens)
    words = [token for token in tokens if token not in special and token.isalnum()]
    encoded = tokenizer(words, add_special_tokens=False)["input_ids"]
    return [word for word, ids in zip(words, encoded, strict=True) if len(ids) == 1]


@torch.no_grad()
def vectors_of_words(model, tokenizer, words: list[str], standard_deviation: float) -> tuple[list[str], torch.Tensor]:
    """The words that the tokenizer knows all parts of, and their vectors `(words, size)`."""
    embeddings = model.get_input_embeddings().weight.float()
    embeddings = embeddings - embeddings.mean(0)
    embeddings = embeddings * (standard_deviation / embeddings.std())
    known, vectors = [], []
    for word, ids in zip(words, tokenizer(words, add_special_tokens=False)["input_ids"], strict=True):
        if ids and tokenizer.unk_token_id not in ids:
            known.append(word)
            vectors.append(embeddings[ids].mean(0))
    return known, torch.stack(vectors) if vectors else embeddings[:0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Folder or name of the model.")
    parser.add_argument("output", type=Path, help="The file to write.")
    parser.add_argument("--texts", required=True, help="Files whose words get vectors, joined by commas.")
    parser.add_argument("--own_words", action="store_true", help="Also the words that are tokens of the model.")
    parser.add_argument("--standard_deviation", type=float, default=0.3)
    args = parser.parse_args()
    if not args.standard_deviation > 0:
        raise UsageError(f"--standard_deviation must be above 0, got {args.standard_deviation}")
    model, tokenizer = load_pretrained(AutoModel, args.model), load_pretrained(AutoTokenizer, args.model)
    words = words_of_files(args.texts)
    if args.own_words:
        words = list(dict.fromkeys([*words, *words_of_tokenizer(tokenizer)]))
    known, vectors = vectors_of_words(model, tokenizer, words, args.standard_deviation)
    with open(args.output, "w", encoding="utf-8") as file:
        for word, vector in zip(tqdm(known, desc="writing", unit=" words"), vectors.tolist(), strict=True):
            file.write(f"{word} {' '.join(f'{number:.4f}' for number in vector)}\n")
    say(f"{len(known)} of {len(words)} words have a vector of {vectors.shape[1]} numbers: {args.output}")


if __name__ == "__main__":
    run_script(main)
