"""Reading of pretrained word vectors, and how they get into a model. Files are made here."""

import gzip

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_rnn.training import WordVectors, place_word_vectors, read_word_vectors, words_of_tokens
from matrix import make_model
from word_tokenizer import make_tokenizer


GLOVE = "the 0.1 0.2 0.3\nCat 1 -2 3e-1\ncat -1 2 .5\n. . . 4 5 6\n3.14 7 8 9\nto a@b.c 1 2 3\n"
VECTORS = {
    "the": [0.1, 0.2, 0.3],
    "Cat": [1, -2, 0.3],
    "cat": [-1, 2, 0.5],
    ". . .": [4, 5, 6],
    "3.14": [7, 8, 9],
    "to a@b.c": [1, 2, 3],
}


def write(path, content: str | bytes):
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content, mtime=0) if path.name.endswith(".gz") else content)
    return path


def assert_read(vectors: WordVectors, expected: dict[str, list[float] | None]):
    assert vectors.words == list(expected)
    assert vectors.found.tolist() == [vector is not None for vector in expected.values()]
    assert vectors.num_found == sum(vectors.found.tolist())
    rows = [[0.0] * vectors.dimension if vector is None else vector for vector in expected.values()]
    assert torch.equal(vectors.vectors, torch.tensor(rows, dtype=torch.float32))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("glove.txt", GLOVE),
        ("word2vec.txt", "6 3\n" + GLOVE),
        ("fasttext.vec", "6 3\n" + GLOVE.replace("\n", " \n")),
        ("glove.txt.gz", GLOVE),
        ("fasttext.vec.gz", "6 3\n" + GLOVE.replace("\n", " \n")),
        ("windows.txt", "\ufeff" + GLOVE.replace("\n", "\r\n")),
        ("no_last_line_end.txt", GLOVE.removesuffix("\n")),
    ],
)
def test_formats(tmp_path, name, content):
    """With and without a first line, compressed, with words of several parts and words that are numbers."""
    assert_read(read_word_vectors(write(tmp_path / name, content)), VECTORS)


def test_words_that_are_wanted(tmp_path):
    """Each once and in their order; what the file lacks has zeros, or the vector of the word in lower case."""
    path = write(tmp_path / "glove.txt", GLOVE)
    words = ["dog", "Cat", "THE", "CAT", "dog", ". . ."]
    expected = {"dog": None, "Cat": VECTORS["Cat"], "THE": VECTORS["the"], "CAT": VECTORS["cat"]}
    assert_read(read_word_vectors(path, iter(words)), expected | {". . .": VECTORS[". . ."]})
    expected |= {"THE": None, "CAT": None, ". . .": VECTORS[". . ."]}
    assert_read(read_word_vectors(path, words, lowercase_fallback=False), expected)


def test_white_space_within_words(tmp_path):
    """Only spaces part fields: a no-break space, which fastText has in words, does not; nor does U+2028 end a line."""
    path = write(tmp_path / "a.vec", "2 2\n10\u00a0000 1 2\na\u2028b 3 4\n")
    assert_read(read_word_vectors(path), {"10\u00a0000": [1, 2], "a\u2028b": [3, 4]})


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        ("", None, "no vectors in this file"),
        ("5 3\n", None, "no vectors in this file"),
        ("a 1 2\nb 1\n", 2, "expected a word and 2 numbers, found 2 fields"),
        ("a 1 2\nb 1 2 3\n", 2, "expected 2 numbers, found 3"),
        ("a 1 2\nb c 1 2 3\n", 2, "expected 2 numbers, found 3"),
        ("a 1 2\n\nb 1 2\n", 2, "expected a word and 2 numbers, found 1 fields"),
        ("a b\n", 1, "expected a word and some numbers, found 2 fields"),
        ("a 1 2\nb 1 x\n", 2, "number 2 is not a finite number in float32 but 'x'"),
        ("a 1 2\nb nan 2\n", 2, "number 1 is not a finite number in float32 but 'nan'"),
        ("a 1 2\nb 1 -inf\n", 2, "number 2 is not a finite number in float32 but '-inf'"),
        ("a 1 2\nb 1 1e40\n", 2, "number 2 is not a finite number in float32 but '1e40'"),
        ("1 0\na\n", 2, "expected a word and some numbers, found 1 fields"),
        ("1 0\na 1\n", 2, "expected a word and some numbers, found 2 fields"),
        ("a 1 2\nb 1 1_0\n", 2, "number 2 is not a finite number in float32 but '1_0'"),
        ("a 1 2\nb 3 4\na 1 2\n", 3, "'a' has a vector in line 1 already"),
        ("2 2\na 1 2\nb 3\n", 3, "expected a word and 2 numbers"),
        ("3 2\na 1 2\nb 3 4\n", None, "the first line says 3 words, but 2 lines follow"),
        ("1 2\na 1 2\nb 3 4\n", None, "the first line says 1 words, but 2 lines follow"),
        (b"a 1 2\nb\xe9 1 2\n", 2, "not valid UTF-8: byte 0xe9 at byte 2 of the line"),
    ],
)
def test_files_that_are_broken(tmp_path, content, line, problem):
    """One error with the file, the line and what is wrong."""
    path = write(tmp_path / "a.txt", content)
    with pytest.raises(ValueError, match=f"^{path}{'' if line is None else f':{line}'}: ") as caught:
        read_word_vectors(path)
    assert problem in str(caught.value)


def test_damaged_gzip(tmp_path):
    whole = gzip.compress(GLOVE.encode() * 300, mtime=0)
    for name, content in (("short.gz", whole[:-30]), ("none.gz", b"no gzip at all")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}:\d+: damaged gzip file"):
            read_word_vectors(tmp_path / name, ["nothing"])
    with pytest.raises(FileNotFoundError):
        read_word_vectors(tmp_path / "absent.txt")


def test_words_that_come_again(tmp_path):
    """Only words that are wanted count; the first vector may be kept."""
    path = write(tmp_path / "a.txt", "a 1 2\nb 3 4\na 5 6\n")
    assert_read(read_word_vectors(path, ["b"]), {"b": [3, 4]})
    assert_read(read_word_vectors(path, on_duplicate="first"), {"a": [1, 2], "b": [3, 4]})


def test_arguments_that_make_no_sense(tmp_path):
    path = write(tmp_path / "a.txt", "a 1 2\n")
    header = write(tmp_path / "b.txt", "1 2\na 1 2\n")
    for call, message in (
        (lambda: read_word_vectors(path, on_duplicate="last"), r"`on_duplicate` must be one of .* got 'last'"),
        (lambda: read_word_vectors(path, dimension=0), "`dimension` must be at least 1, got 0"),
        (lambda: read_word_vectors(path, []), "`words` must hold at least one word"),
        (lambda: read_word_vectors(path, dimension=3), "a.txt:1: expected a word and 3 numbers, found 3 fields"),
        (lambda: read_word_vectors(header, dimension=3), "b.txt:1: expected vectors of 3 numbers, the header says 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_progress(tmp_path, capsys):
    """A bar that ends at the size of the file, or none."""
    path = write(tmp_path / "a.txt.gz", GLOVE)
    read_word_vectors(path)
    shown = capsys.readouterr().err
    assert "reading a.txt.gz: 100%" in shown
    read_word_vectors(path, show_progress=False)
    assert capsys.readouterr().err == ""


def test_into_a_model():
    """The embeddings of known words are replaced, all others stay, special tokens too."""
    model, tokenizer = make_model("RNNForSequenceClassification"), make_tokenizer()
    words = words_of_tokens(tokenizer)
    assert set(words.values()) == set(tokenizer.get_vocab()) - {"<unk>", "<s>", "</s>", "<pad>", "<mask>"}
    before = model.get_input_embeddings().weight.detach().clone()
    rows = torch.arange(20.0).view(4, 5)
    vectors = WordVectors(["cat", "dog", "<unk>", "mat"], rows, torch.tensor([True, True, True, False]))
    assert place_word_vectors(model, tokenizer, vectors) == 1
    after = model.get_input_embeddings().weight
    assert after.requires_grad
    cat = tokenizer.convert_tokens_to_ids("cat")
    assert torch.equal(after[cat], rows[0].double())
    others = torch.arange(len(before)) != cat
    assert torch.equal(after[others], before[others])
    wide = WordVectors(["cat"], torch.ones(1, 7), torch.tensor([True]))
    with pytest.raises(ValueError, match="got 5 and 7: make the model with `embedding_size=7`"):
        place_word_vectors(model, tokenizer, wide)
    small = make_model("RNNForSequenceClassification", vocab_size=cat)
    with pytest.raises(ValueError, match=f"beyond the {cat} embeddings"):
        place_word_vectors(small, tokenizer, vectors)


def test_words_of_subwords():
    """Tokens that begin a word stand for it, in any script; those that continue one stand for none."""
    texts = ["das Mädchen liest", "das Märchen", "日本 日本"] * 9
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"]))
    words = set(words_of_tokens(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")).values())
    assert {"das", "Mädchen", "日本"} <= words
    assert "dchen" not in words
    assert "<unk>" not in words
    pieces = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    pieces = PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="[UNK]")
    assert words_of_tokens(pieces) == {1: "play"}
