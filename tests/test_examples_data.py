"""Reading of parallel text, the tokenizers, and the errors of the example scripts. Needs no network and no training."""

import csv
import dataclasses
import gzip
import json
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


pytest.importorskip("datasets")
pytest.importorskip("sacrebleu")
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

from transformers import AutoTokenizer, TrainerControl, TrainerState  # noqa: E402

import classify  # noqa: E402
import compare_attention  # noqa: E402
import language_model  # noqa: E402
import prepare_scan  # noqa: E402
import read  # noqa: E402
import tag  # noqa: E402
import training_helpers  # noqa: E402
import transduce  # noqa: E402
import translate  # noqa: E402
from hf_rnn import RNNConfig, RNNSeq2SeqConfig  # noqa: E402
from pair_training import ModelArguments, PairTrainingArguments  # noqa: E402
from subword_tokenizer import (  # noqa: E402
    token_pieces,
    train_character_tokenizer,
    train_subword_tokenizer,
    train_symbol_tokenizer,
)
from text_pairs import DataError, pairs_from_hub, read_pairs, read_text  # noqa: E402
from training_helpers import UsageError, parse_arguments  # noqa: E402


# A line separator and a narrow no-break space must not end a line or vanish.
PAIRS = [("Run!", "Courez\u202f!"), ('He said "no".', "Il a dit « non »."), ("a\u2028b", "c, d")]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def tsv(pairs, header=""):
    return header + "".join(f"{source}\t{target}\n" for source, target in pairs)


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class TestReadPairs:
    def test_tsv(self, tmp_path):
        assert read_pairs(write(tmp_path / "a.tsv", tsv(PAIRS))) == PAIRS

    def test_tsv_with_header_gives_either_direction(self, tmp_path):
        path = write(tmp_path / "a.tsv", tsv(PAIRS, "eng\tfra\n"))
        assert read_pairs(path, "eng", "fra") == PAIRS
        assert read_pairs(path, "fra", "eng") == [(target, source) for source, target in PAIRS]

    def test_windows_line_ends_byte_order_mark_and_missing_last_newline(self, tmp_path):
        content = "\ufeff" + tsv(PAIRS).replace("\n", "\r\n").removesuffix("\r\n")
        assert read_pairs(write(tmp_path / "a.tsv", content)) == PAIRS

    def test_gzip(self, tmp_path):
        assert read_pairs(write(tmp_path / "a.tsv.gz", gzip.compress(tsv(PAIRS).encode()))) == PAIRS

    def test_csv_with_quotes_commas_and_line_ends_in_fields(self, tmp_path):
        pairs = [*PAIRS, ("two\nlines", "b, c")]
        with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("de", "en"), *pairs])
        assert read_pairs(tmp_path / "a.csv", "de", "en") == pairs

    @pytest.mark.parametrize("wrap", [lambda row: row, lambda row: {"id": "1", "translation": row}])
    @pytest.mark.parametrize("columns", [("en", "fr"), (None, None)])
    def test_json_lines_flat_and_nested(self, tmp_path, wrap, columns):
        path = write(tmp_path / "a.jsonl", jsonl(wrap({"en": source, "fr": target}) for source, target in PAIRS))
        assert read_pairs(path, *columns) == PAIRS

    def test_pair_of_plain_files(self, tmp_path):
        source = write(tmp_path / "a.en", "".join(f"{pair[0]} \n" for pair in PAIRS))
        target = write(tmp_path / "a.fr", "".join(f"{pair[1]}\n" for pair in PAIRS))
        assert read_pairs(f"{source},{target}") == PAIRS

    def test_bad_lines_can_be_skipped(self, tmp_path):
        path = write(tmp_path / "a.tsv", "a\tb\nmalformed\n\tempty\nc\td\n")
        assert read_pairs(path, skip_bad_lines=True) == [("a", "b"), ("c", "d")]

    def test_folder_of_files_as_a_hub_data_set(self, tmp_path):
        write(tmp_path / "train.jsonl", jsonl({"translation": {"en": a, "fr": b}} for a, b in PAIRS))
        assert pairs_from_hub(str(tmp_path), None, "train", "fr", "en") == [(b, a) for a, b in PAIRS]
        with pytest.raises(DataError, match="no split 'test'"):
            pairs_from_hub(str(tmp_path), None, "test", None, None)
        with pytest.raises(DataError, match="no field 'de'"):
            pairs_from_hub(str(tmp_path), None, "train", "de", "en")


class TestDataErrors:
    @pytest.mark.parametrize(
        ("name", "content", "line", "problem"),
        [
            ("a.tsv", b"", None, "the file is empty"),
            ("a.tsv", b"a\tb\nc\n", 2, "expected 2 fields, found 1"),
            ("a.tsv", b"a\tb\nc\td\te\n", 2, "expected 2 fields, found 3"),
            ("a.tsv", b"a\n", 1, "expected at least 2 fields, found 1"),
            ("a.tsv", b"a\tb\n\nc\td\n", 2, "empty line"),
            ("a.tsv", b"a\tb\n \td\n", 2, "empty source sentence"),
            ("a.tsv", b"a\tb\nc\t\xe2\x80\x89\n", 2, "empty target sentence"),
            ("a.tsv", b"a\tb\nc\td\xe9\n", 2, "not valid UTF-8: byte 0xe9 at byte 4 of the line"),
            ("a.csv", b'a,b\n"c,d\ne,f\n', 2, "malformed csv record"),
            ("a.csv", b"a,b\nc\n", 2, "expected 2 fields, found 1"),
            ("a.jsonl", b'{"a": "x", "b": "y"}\n{"a": "x"\n', 2, "not a JSON value"),
            ("a.jsonl", b'{"a": "x", "b": "y"}\n{"a": "x"}\n', 2, "no field 'b'|two fields"),
            ("a.jsonl", b'{"a": "x", "b": 3}\n', 1, "field 'b' is not text but int"),
            ("a.json", b'[{"a": "x"}]\n', 1, "expected a JSON object, found list"),
            ("a.tsv.gz", b"not gzip", 1, "damaged gzip file"),
            ("a.tsv.gz", gzip.compress(b"a\tb\n" * 999, mtime=0)[:-20], None, "damaged gzip file"),
            ("a.pdf", b"a\tb\n", None, "unknown kind of file"),
        ],
    )
    def test_one_message_with_file_and_line(self, tmp_path, name, content, line, problem):
        path = write(tmp_path / name, content)
        with pytest.raises(DataError, match=problem) as caught:
            read_pairs(path)
        if line is not None:
            assert str(caught.value).startswith(f"{path}:{line}: ")
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)

    def test_header_without_the_named_column(self, tmp_path):
        path = write(tmp_path / "a.tsv", tsv(PAIRS, "eng\tfra\n"))
        with pytest.raises(DataError, match=r"a\.tsv:1: no column 'deu' in the header"):
            read_pairs(path, "deu", "fra")

    @pytest.mark.parametrize(("shorter", "longer"), [("a.en", "a.fr"), ("a.fr", "a.en")])
    def test_plain_files_of_different_length(self, tmp_path, shorter, longer):
        write(tmp_path / shorter, "1\n2\n")
        write(tmp_path / longer, "1\n2\n3\n4\n")
        with pytest.raises(DataError, match=rf"{shorter}:3: the file ends after 2 lines, but .*{longer} has 4"):
            read_pairs(f"{tmp_path}/a.en,{tmp_path}/a.fr")

    def test_missing_file_and_folder(self, tmp_path):
        with pytest.raises(DataError, match="no such file"):
            read_pairs(tmp_path / "none.tsv")
        with pytest.raises(DataError, match="is a folder"):
            read_text(tmp_path)


class TestShippedData:
    def test_parts_are_fixed_disjoint_and_small(self):
        parts = {name: read_pairs(path, "eng", "fra") for name, path in translate.DEFAULT_FILES.items()}
        assert {name: len(pairs) for name, pairs in parts.items()} == {"train": 80000, "validation": 500, "test": 1000}
        for side in (0, 1):
            sentences = [pair[side] for pairs in parts.values() for pair in pairs]
            assert len(set(sentences)) == len(sentences)
        size = sum(len(gzip.compress(path.read_bytes())) for path in translate.DEFAULT_FILES.values())
        assert size <= 2_000_000

    def test_attribution_is_there(self):
        readme = (EXAMPLES / "data" / "README.md").read_text(encoding="utf-8")
        assert all(text in readme for text in ("CC BY 2.0", "www.manythings.org/anki", "tatoeba.org"))


TEXTS = [
    "Qu'est-ce que c'est\u202f? C’est l'été\u00a0!",
    " two  spaces, a\ttab \n",
    "naïve — 1,234.50 € 😀 中文 e\u0301",
    "don't",
    "x\u2028y",
    "",
]


@pytest.fixture(scope="module")
def subwords():
    return train_subword_tokenizer(TEXTS * 3, 300)


class TestTokenizers:
    def test_subwords_round_trip(self, subwords):
        for text in [*TEXTS, "not seen: Ωmega"]:
            ids = subwords(text)["input_ids"]
            assert ids[-1] == subwords.eos_token_id
            assert subwords.unk_token_id not in ids
            assert subwords.decode(ids, skip_special_tokens=True) == text

    def test_saved_and_loaded(self, subwords, tmp_path):
        subwords.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        encoded = loaded(TEXTS, padding=True)
        assert set(encoded) == {"input_ids", "attention_mask"}
        assert encoded["input_ids"] == subwords(TEXTS, padding=True)["input_ids"]
        assert loaded.batch_decode(encoded["input_ids"], skip_special_tokens=True) == TEXTS
        assert len({loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id}) == 4

    def test_same_text_same_tokenizer(self, subwords):
        assert train_subword_tokenizer(TEXTS * 3, 300).get_vocab() == subwords.get_vocab()

    def test_first_word_is_the_same_token_as_later(self):
        tokenizer = train_subword_tokenizer(["Tom Tom Tom"] * 9, 270)
        first, second = tokenizer("Tom Tom", add_special_tokens=False)["input_ids"]
        assert first == second

    def test_normalization_is_optional(self):
        tokenizer = train_subword_tokenizer(TEXTS, 300, normalization="nfkc")
        assert tokenizer.decode(tokenizer("e\u0301 ﬁ")["input_ids"], skip_special_tokens=True) == "é fi"
        with pytest.raises(ValueError, match="`normalization` must be one of"):
            train_subword_tokenizer(TEXTS, 300, normalization="none")

    def test_vocabulary_too_small_for_the_bytes(self):
        with pytest.raises(ValueError, match="`vocab_size` must be at least 260"):
            train_subword_tokenizer(TEXTS, 100)

    def test_labels_of_tokens(self, subwords):
        labels = token_pieces(subwords, subwords("don't !")["input_ids"])
        assert labels[-1] == "</s>"
        assert all(label.strip() for label in labels)
        assert "".join(label.removeprefix("-") for label in labels[:-1]).replace("␣", "") == "don't!"

    def test_characters(self, tmp_path):
        text = "To be,\n\nor not\r\n  to be\u2028\t"
        train_character_tokenizer([text]).save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer("x")["input_ids"] == [tokenizer.unk_token_id]


class TestSymbols:
    WORDS = ["ab", "b'a", "c"]
    PHONES = ["AH0 B", "B AH0", "S IY1"]

    def test_letters_to_phonemes(self, tmp_path):
        train_symbol_tokenizer(self.WORDS, self.PHONES, "characters", "words").save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        assert tokenizer.convert_ids_to_tokens(tokenizer("b'a")["input_ids"]) == ["b", "'", "a", "</s>"]
        ids = tokenizer("S IY1 B")["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == ["S", "IY1", "B", "</s>"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == "S IY1 B"
        assert tokenizer.unk_token_id in tokenizer("xa")["input_ids"]

    def test_words_to_letters(self):
        tokenizer = train_symbol_tokenizer(self.PHONES, self.WORDS, "words", "characters")
        assert tokenizer.decode(tokenizer("b'a")["input_ids"], skip_special_tokens=True) == "b'a"

    def test_words_to_words(self):
        tokenizer = train_symbol_tokenizer(["walk twice"], ["I_WALK I_WALK"], "words", "words")
        assert len(tokenizer) == 4 + 3
        assert tokenizer.decode(tokenizer("I_WALK walk")["input_ids"], skip_special_tokens=True) == "I_WALK walk"

    def test_characters_to_characters(self):
        tokenizer = train_symbol_tokenizer(["1 + 2"], ["3 "], "characters", "characters")
        assert tokenizer.decode(tokenizer("2 + 1")["input_ids"], skip_special_tokens=True) == "2 + 1"

    def test_what_cannot_be_told_apart(self):
        with pytest.raises(ValueError, match="'ab' is a symbol of one side"):
            train_symbol_tokenizer(["ab"], ["ab c"], "characters", "words")
        with pytest.raises(ValueError, match=r"`target_level` must be one of \['characters', 'words'\], got 'bytes'"):
            train_symbol_tokenizer(["ab"], ["c"], "words", "bytes")

    def test_error_rates(self):
        """Against the nearest of several targets, by hand."""
        results = [["A", "B"], ["A"], []]
        references = [[["B", "B", "B"], ["A", "B"]], [["B", "C", "D"], ["A", "C"]], [["A", "B", "C"]]]
        rates = transduce.error_rates(results, references)
        assert rates == {"sequence_error_rate": 100 * 2 / 3, "symbol_error_rate": 100 * (0 + 1 + 3) / (2 + 2 + 3)}

    def test_ignored_characters(self):
        arguments = transduce.DataArguments(ignore="012")
        rates = transduce.score(["AH1 B", "AH0"], [["AH0 B"], ["AH0", "AH1"]], arguments)
        assert (rates["sequence_error_rate"], rates["ignoring_sequence_error_rate"]) == (50, 0)
        assert rates["symbol_error_rate"] == pytest.approx(100 / 3)
        assert rates["ignoring_symbol_error_rate"] == 0

    def test_characters_left_out(self):
        """Of every target, once each; a symbol of which nothing is left is gone, a target must not be."""
        pairs = [("a", "AH0 1 B"), ("a", "AH1 B"), ("b", "B")]
        arguments = transduce.DataArguments(leave_out="012")
        assert transduce.leave_out(pairs, arguments) == [("a", "AH B"), ("b", "B")]
        arguments = transduce.DataArguments(leave_out="12", target_level="characters")
        assert transduce.leave_out([("a", "1 x2")], arguments) == [("a", " x")]
        with pytest.raises(UsageError, match="--leave_out 1 leaves nothing of '1 1', the target of 'a'"):
            transduce.leave_out([("a", "1 1")], transduce.DataArguments(leave_out="1"))

    def test_all_targets_of_a_source(self):
        assert transduce.group_targets([("a", "x"), ("b", "y"), ("a", "z")]) == {"a": ["x", "z"], "b": ["y"]}

    def test_default_data(self):
        parts = {name: read_pairs(path, "word", "phones") for name, path in transduce.DEFAULT_FILES.items()}
        assert {name: len(pairs) for name, pairs in parts.items()} == {
            "train": 119268,
            "validation": 6721,
            "test": 6548,
        }
        words = [{word for word, _ in pairs} for pairs in parts.values()]
        assert len(set.union(*words)) == sum(map(len, words))


class TestCompareAttention:
    def test_pairs(self):
        """Those that share their decoder or their score with the first, or all."""
        pairs = compare_attention.choose(["luong", "gnmt"], ["general", "dot"], all_pairs=False)
        assert pairs == [("luong", "general"), ("luong", "dot"), ("gnmt", "general")]
        assert len(compare_attention.choose(["luong", "gnmt"], ["general", "dot"], all_pairs=True)) == 4

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--scores", "general,cosine"], "--scores must be among dot, .*got cosine"),
            (["--decoders", "rnn"], "--decoders must be among luong, .*got rnn"),
            (["--attention_score=dot"], "--attention_score is what is compared here"),
        ],
    )
    def test_refusals(self, options, message, capsys):
        status, error = run(compare_attention, *options, capsys=capsys)
        assert status == 2
        assert re.search(message, error)

    def test_what_is_done_is_not_done_again(self, tmp_path, monkeypatch):
        """A run that was cut off after its training is not done; one that fails says where to look."""
        monkeypatch.setattr(compare_attention.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
        results = tmp_path / "all_results.json"
        results.write_text('{"train_loss": 1.0, "test_bleu": 2.0}')
        assert compare_attention.train("luong", "dot", tmp_path, [])["test_bleu"] == 2
        results.write_text('{"train_loss": 1.0}')
        with pytest.raises(SystemExit, match=r"luong with dot failed with status 1, see .*log\.txt"):
            compare_attention.train("luong", "dot", tmp_path, [])


class TestPrepareScan:
    LINES = [f"IN: walk {number} OUT: I_WALK I_{number}\n" for number in range(30)] + ["IN: jump OUT: I_JUMP\n"] * 20

    def prepare(self, folder, *options):
        arguments = ["prepare_scan.py", str(folder), "--output_dir", str(folder / "out"), *options]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", arguments)
            return prepare_scan.main()

    def test_parts(self, tmp_path):
        """Nothing is lost, no command is in two parts, repeated ones stay in training, and the seed decides."""
        write(tmp_path / "tasks_train_simple.txt", "".join(self.LINES))
        write(tmp_path / "tasks_test_simple.txt", "IN: run twice OUT: I_RUN I_RUN\n")
        parts = []
        for options in ([], [], ["--seed", "1"]):
            assert self.prepare(tmp_path, "--dev_share", "0.5", *options) is None
            files = {name: tmp_path / "out" / f"simple.{name}.tsv" for name in ("train", "dev", "test")}
            parts.append({name: read_pairs(path, "command", "actions") for name, path in files.items()})
        train, dev = parts[0]["train"], parts[0]["dev"]
        pairs = [tuple(line.removeprefix("IN: ").strip().split(" OUT: ")) for line in self.LINES]
        assert sorted(train + dev) == sorted(pairs)
        assert 10 <= len(dev) <= 16
        assert not {command for command, _ in train} & {command for command, _ in dev}
        assert train.count(("jump", "I_JUMP")) == 20
        assert parts[0]["test"] == [("run twice", "I_RUN I_RUN")]
        assert parts[1] == parts[0] != parts[2]

    def test_refusals(self, tmp_path, capsys):
        assert self.prepare(tmp_path) == 2
        assert "tasks_train_simple.txt: no such file" in capsys.readouterr().err
        write(tmp_path / "tasks_train_simple.txt", "IN: run OUT: I_RUN\nrun\tI_RUN\n")
        assert self.prepare(tmp_path) == 2
        assert "tasks_train_simple.txt:2: expected a line of the form" in capsys.readouterr().err


def run(module, *arguments, capsys):
    """Exit status and standard error of a script's `main` with these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            training_helpers.run_script(module.main)
    return caught.value.code, capsys.readouterr().err


class TestArguments:
    def test_every_field_of_the_configs_is_an_option(self):
        # use_cache is an option of TrainingArguments, the token ids follow from the tokenizer.
        derived = {"use_cache", "is_encoder_decoder", "pad_token_id", "bos_token_id", "eos_token_id"}
        derived |= {"decoder_start_token_id"}
        # The Trainer has its own; and what needs other data than pairs.
        other = {"label_smoothing", "pointer_generator", "num_copy_ids", "unk_token_id", "guided_alignment_weight"}
        # For a causal model these have one value, or none.
        not_causal = {"bidirectional", "pooling", "classifier_dropout", "use_crf", "crf_constraints", "id2intent"}
        not_causal |= {"pooling_heads", "pooling_attention_size", "question_attention", "sep_token_id"}
        not_causal |= {"crf_ignored_ids"}
        not_causal |= {
            "word_encoder",
            "first_continuation_id",
            "word_encoder_size",
            "word_encoder_width",
            "word_vocab_size",
            "word_embedding_size",
            "word_dropout",
        }
        for config, arguments, left_out in (
            (RNNSeq2SeqConfig, ModelArguments, derived | other | {"vocab_size"}),
            (RNNConfig, language_model.ModelArguments, derived | not_causal),
        ):
            fields = {name for name in config.__annotations__ if not name.startswith("_")} - left_out
            assert fields <= {field.name for field in dataclasses.fields(arguments)}

    def test_json_file_with_options_over_it(self, tmp_path):
        options = {"output_dir": str(tmp_path / "o"), "hidden_size": 32, "learning_rate": 0.01, "train_file": "x.tsv"}
        path = write(tmp_path / "options.json", json.dumps(options))
        types = (ModelArguments, translate.DataArguments, PairTrainingArguments)
        model, data, training = parse_arguments(types, [str(path), "--hidden_size", "64", "--do_train", "false"])
        assert (model.hidden_size, data.train_file, training.learning_rate) == (64, "x.tsv", 0.01)
        assert not training.do_train

        with pytest.raises(UsageError, match="unknown options hiden_size"):
            parse_arguments(types, [str(write(tmp_path / "typo.json", '{"hiden_size": 3}'))])
        with pytest.raises(UsageError, match=r"bad\.json:2: not valid JSON"):
            parse_arguments(types, [str(write(tmp_path / "bad.json", '{"a": 1,\n}'))])

    def test_errors_are_one_line_and_status_2(self, tmp_path, capsys):
        train = write(tmp_path / "train.tsv", tsv(PAIRS))
        bad = write(tmp_path / "bad.tsv", "a\tb\nc\n")
        out = ("--output_dir", tmp_path / "out")
        full = tmp_path / "full"
        full.mkdir()
        write(full / "notes.txt", "mine")
        files = ("--train_file", train, "--validation_file", train)
        small = ("--vocab_size", 300, "--hidden_size", 8)
        cases = [
            (("--train_file", bad, *out), f"{bad}:2: expected 2 fields, found 1"),
            (("--train_file", train, *out), "too few training pairs to hold any out"),
            (("--validation_file", train, *out), "no --train_file"),
            (("--train_file", train, "--dataset_name", "x", *out), "exclude each other"),
            (("--train_file", train, "--source_column", "en", *out), "have to be given together"),
            ((*files, "--output_dir", full), "is not empty"),
            ((*files, *out, "--resume_from_checkpoint", "true"), "no complete checkpoint"),
            ((*files, *out, "--resume_from_checkpoint", full), "is not a complete checkpoint"),
            ((*files, *out, "--vocab_size", 10), "`vocab_size` must be at least 260"),
            ((*files, *out, *small, "--cell_type", "lstn", "--overwrite_output_dir"), "lstn"),
            ((*files, *out, *small, "--overwrite_output_dir", "--generation_config", '{"num_beam": 3}'), "num_beam"),
            ((*files, *out, *small, "--overwrite_output_dir", "--num_beams", 0), "num_beams"),
            ((*files, *out, *small, "--overwrite_output_dir", "--max_new_tokens", 0), "max_new_tokens"),
            ((*files, *out, *small, "--overwrite_output_dir", "--max_source_length", 1), "short enough"),
            (("--do_train", "false", *out), "needs a --model_name_or_path"),
            (("--do_train", "false", "--model_name_or_path", full, "--test_file", train, *out), "cannot load"),
            ((*files, *out, "--eval_strategy", "no"), "save and eval strategy"),
        ]
        for arguments, message in cases:
            status, error = run(translate, *arguments, capsys=capsys)
            assert status == 2, (arguments, error)
            last_line = error.splitlines()[-1]
            assert last_line.startswith("error: "), (arguments, error)
            assert message in last_line, (arguments, error)
        assert (full / "notes.txt").read_text() == "mine"

    def test_language_model_errors(self, tmp_path, capsys, monkeypatch):
        monkeypatch.delenv("HF_RNN_DATA", raising=False)
        bad = write(tmp_path / "bad.txt", b"good\nb\xffad\n")
        short = write(tmp_path / "short.txt", "ab")
        out = ("--output_dir", tmp_path / "out")
        cases = [
            (("--train_file", bad, *out), f"{bad}:2: not valid UTF-8"),
            (("--train_file", tmp_path / "none.txt", *out), "no such file"),
            (("--train_file", short, *out), "too short"),
            (("--train_file", bad, "--block_size", 0, *out), "--block_size"),
            (("--validation_file", short, "--train_file", short, "--tokenization", "words", *out), "--tokenization"),
        ]
        for arguments, message in cases:
            status, error = run(language_model, *arguments, "--overwrite_output_dir", capsys=capsys)
            assert status == 2, (arguments, error)
            assert message in error.splitlines()[-1], (arguments, error)

    def test_language_model_says_where_it_looked(self, tmp_path, monkeypatch):
        monkeypatch.setattr(language_model, "__file__", str(tmp_path / "repository" / "examples" / "x.py"))
        monkeypatch.setenv("HF_RNN_DATA", str(tmp_path / "elsewhere"))
        with pytest.raises(UsageError, match=r"elsewhere.*tiny-shakespeare"):
            language_model.load_texts(language_model.DataArguments(), training=True)
        folder = tmp_path / "elsewhere" / "tiny-shakespeare"
        folder.mkdir(parents=True)
        write(folder / "input.txt", "0123456789")
        texts = language_model.load_texts(language_model.DataArguments(), training=True)
        assert texts == {"train": "012345678", "validation": "9"}


class TestBlocks:
    @pytest.mark.parametrize("length", [2, 5, 8, 9, 10])
    def test_every_token_but_the_first_is_predicted_once(self, length):
        blocks = language_model.make_blocks(list(range(length)), 4)["input_ids"]
        assert [token for block in blocks for token in block[1:]] == list(range(1, length))
        assert all(len(block) <= 5 for block in blocks)


class TestStopping:
    def args(self, tmp_path):
        return SimpleNamespace(world_size=1, output_dir=str(tmp_path), should_save=True)

    def test_a_signal_saves_and_stops_after_the_step(self, tmp_path):
        stop, state, control = training_helpers.StopOnSignal(), TrainerState(epoch=0.5, global_step=7), TrainerControl()
        before = signal.getsignal(signal.SIGINT)
        stop.on_train_begin(self.args(tmp_path), state, control)
        try:
            stop.on_step_end(self.args(tmp_path), state, control)
            assert not control.should_training_stop
            signal.raise_signal(signal.SIGINT)
            stop.on_step_end(self.args(tmp_path), state, control)
        finally:
            stop.on_train_end(self.args(tmp_path), state, control)
        assert stop.requested
        assert control.should_save
        assert control.should_training_stop
        assert signal.getsignal(signal.SIGINT) is before
        # The cut-off epoch is not evaluated, and its checkpoint is marked as an extra one.
        control.should_evaluate = control.should_save = True
        stop.on_epoch_end(self.args(tmp_path), state, control)
        assert not control.should_evaluate
        assert not control.should_save
        (tmp_path / "checkpoint-7").mkdir()
        stop.on_save(self.args(tmp_path), state, control)
        assert (tmp_path / "checkpoint-7" / training_helpers.INTERRUPTED_NAME).exists()

    def test_an_extra_checkpoint_goes_when_the_next_is_saved(self, tmp_path):
        for name in ("checkpoint-5", "checkpoint-7", "checkpoint-9"):
            (tmp_path / name).mkdir()
        (tmp_path / "checkpoint-7" / training_helpers.INTERRUPTED_NAME).touch()
        stop = training_helpers.StopOnSignal()
        stop.on_save(self.args(tmp_path), TrainerState(epoch=1.0, global_step=9), TrainerControl())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", "checkpoint-9"]

    def test_last_checkpoint_is_a_complete_one(self, tmp_path):
        for name, state in (("checkpoint-9", '{"global_step": 9}'), ("checkpoint-10", '{"global_step": 10}')):
            (tmp_path / name).mkdir()
            write(tmp_path / name / "trainer_state.json", state)
        (tmp_path / "checkpoint-11").mkdir()
        (tmp_path / "checkpoint-12").mkdir()
        write(tmp_path / "checkpoint-12" / "trainer_state.json", '{"global_')
        assert Path(training_helpers.last_checkpoint(tmp_path)).name == "checkpoint-10"

    def test_command_to_continue(self, monkeypatch):
        argv = ["examples/translate.py", "--output_dir", "my out", "--resume_from_checkpoint", "x/checkpoint-1"]
        monkeypatch.setattr(sys, "argv", [*argv, "--overwrite_output_dir", "--seed=3"])
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        expected = "python examples/translate.py --output_dir 'my out' --seed=3 --resume_from_checkpoint true"
        assert training_helpers.resume_command() == expected


SCRIPT_ARGUMENTS = [
    classify.ClassificationTrainingArguments,
    language_model.LanguageModelTrainingArguments,
    PairTrainingArguments,
    read.ReaderTrainingArguments,
    tag.TaggingArguments,
    transduce.TransductionTrainingArguments,
]


@pytest.mark.parametrize("arguments_class", SCRIPT_ARGUMENTS)
@pytest.mark.parametrize("bf16", [False, True])
def test_processes_without_a_gpu(arguments_class, bf16, tmp_path, monkeypatch):
    """Several processes share the data only where they know that a CPU is meant, whatever the precision."""
    monkeypatch.setattr(training_helpers.torch.accelerator, "is_available", lambda: False)
    assert arguments_class(str(tmp_path), bf16=bf16).use_cpu


@pytest.mark.parametrize("arguments_class", SCRIPT_ARGUMENTS)
def test_without_training_there_may_be_no_validation_data(arguments_class, tmp_path):
    """An `eval_strategy` would need them, and would also turn `do_eval` on."""
    training = arguments_class(str(tmp_path))
    assert (training.eval_strategy, training.load_best_model_at_end) == ("epoch", True)
    using = arguments_class(str(tmp_path), do_train=False, do_eval=False)
    assert (using.eval_strategy, using.load_best_model_at_end, using.do_eval) == ("no", False, False)
