"""Models of words that are spelled in tokens: against the equations, and the table of known words, its tokenizer."""

import time

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, pipeline

from hf_rnn import RNNConfig, RNNForCausalLM, RNNForMaskedLM, RNNForTokenClassification, RNNModel
from hf_rnn.training import (
    first_continuation_id,
    fold_word,
    frequent_words,
    make_word_tokenizer,
    set_word_table,
    whole_words,
)
from hf_rnn.word_encoder import WordTable, find_words
from matrix import make_mask, make_model, make_tokens
from reference import read_words, split_words, to_numpy


CONTINUATION = 18
ENCODERS = [
    {"word_encoder": "cnn"},
    {"word_encoder": "cnn", "word_encoder_width": 5, "word_encoder_size": 7},
    {"word_encoder": "cnn", "word_encoder_width": 1},
    *({"word_encoder": cell, "word_encoder_size": 6} for cell in ("rnn_tanh", "rnn_relu", "gru", "lstm")),
]


def make_reader(dtype: torch.dtype = torch.float64, **options) -> RNNModel:
    fields = {"first_continuation_id": CONTINUATION, "bidirectional": True, "num_hidden_layers": 2}
    return make_model("RNNModel", dtype, **fields | options)


def tokens_of(row: torch.Tensor, mask: torch.Tensor) -> list[int]:
    return row[mask.bool()].tolist()


def know(model: RNNModel, words: list[tuple[int, ...]]) -> dict[tuple[int, ...], int]:
    """Makes words known to a model by their tokens; returns which embedding each of them has."""
    table = next(module for module in model.modules() if isinstance(module, WordTable))
    keys = []
    for word in words:
        ids = torch.tensor([word])
        found = find_words(ids, CONTINUATION)
        assert found.is_word.sum() == 1
        keys.append(table.word_keys(ids, found)[0, 0].item())
    order = sorted(range(len(words)), key=keys.__getitem__)
    table.keys[: len(words)] = torch.tensor(sorted(keys))
    return {words[index]: row for row, index in enumerate(order, start=1)}


@pytest.mark.parametrize("options", ENCODERS, ids=str)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_words_are_the_equations(options, bidirectional):
    """Every row of a padded batch, one without a token left out, at each of its tokens."""
    model = make_reader(**options, bidirectional=bidirectional, word_vocab_size=6, word_embedding_size=3)
    input_ids, mask = make_tokens(6, 9), make_mask(9)
    rows = [tokens_of(row, tokens) for row, tokens in zip(input_ids, mask)]
    words = sorted({word for row in rows[:3] for word in split_words(row, CONTINUATION)})
    known = know(model, words[::3][:5])
    outputs = model(input_ids, attention_mask=mask).last_hidden_state
    weights = to_numpy(model)
    assert any(len(word) > 2 for row in rows for word in split_words(row, CONTINUATION))
    for row, tokens in enumerate(rows[:-1]):
        expected = read_words(model.config, weights, tokens, known)
        actual = outputs[row, mask[row].bool()].detach().numpy()
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)
        nothing_known = read_words(model.config, weights, tokens, {})
        assert np.allclose(actual, nothing_known) == known.keys().isdisjoint(split_words(tokens, CONTINUATION))
    assert torch.isfinite(outputs).all()


def test_padding_within_a_word():
    """Wherever the padding lies, the outputs at the tokens are the same."""
    model = make_reader(word_encoder="cnn")
    tokens = torch.tensor([[4, 20, 21, 5, 22, 6]])
    expected = model(tokens).last_hidden_state
    spread = torch.full((1, 10), 7)
    places = [1, 2, 4, 5, 8, 9]
    spread[0, places] = tokens[0]
    mask = torch.zeros(1, 10, dtype=torch.long)
    mask[0, places] = 1
    outputs = model(spread, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(outputs[:, places], expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(outputs[:, 3], outputs[:, 2])  # within the word, and
    assert torch.equal(outputs[:, 6:8], outputs[:, 5:6].expand(-1, 2, -1))  # behind it


def test_a_row_that_begins_with_a_continuation():
    """Its first token begins a word all the same."""
    words = find_words(torch.tensor([[20, 21, 4, 22]]), CONTINUATION)
    assert words.starts.tolist() == [[True, False, True, False]]
    assert words.number.tolist() == [[0, 0, 1, 1]]
    assert words.first.tolist() == [[0, 2]]
    assert words.last.tolist() == [[1, 3]]


def test_several_texts_in_one_row():
    """Texts that `position_ids` part know nothing of each other, and no word goes over their edge."""
    for options in ENCODERS[:1] + ENCODERS[-1:]:
        model = make_reader(**options)
        first, second = torch.tensor([[4, 20, 5]]), torch.tensor([[19, 20, 6, 21]])
        expected = torch.cat([model(text).last_hidden_state for text in (first, second)], dim=1)
        positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
        outputs = model(torch.cat([first, second], dim=1), position_ids=positions).last_hidden_state
        torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)


def test_all_outputs_are_those_of_words():
    """Hidden states of every layer and gates, at each token of a word the same, as dictionary and as tuple."""
    model = make_reader(word_encoder="cnn", num_hidden_layers=3)
    tokens = torch.tensor([[4, 20, 21, 5, 22, 6]])
    outputs = model(tokens, output_hidden_states=True, output_gates=True)
    assert [states.shape[-1] for states in outputs.hidden_states] == [model.config.input_size, 12, 12, 12]
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    gates = [values for layer in outputs.gates for values in layer.values()]
    for values in (*outputs.hidden_states, *gates):
        assert values.shape[:2] == (1, 6)
        assert torch.equal(values[:, 0], values[:, 1])
        assert torch.equal(values[:, 3], values[:, 4])
        assert not torch.equal(values[:, 0], values[:, 3])
    as_tuple = model(tokens, output_hidden_states=True, return_dict=False)
    torch.testing.assert_close(as_tuple[0], outputs.last_hidden_state, rtol=0, atol=1e-14)
    assert len(as_tuple[1]) == 4
    chosen = model(tokens, output_hidden_states=[3]).hidden_states
    assert [states is None for states in chosen] == [True, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [ENCODERS[0], ENCODERS[-1]], ids=str)
def test_half_precision(dtype, options):
    """Close to the same model in full precision, with padding everywhere, and no gradient that is not a number."""
    model = make_reader(dtype, **options, word_vocab_size=4, word_embedding_size=3)
    input_ids, mask = make_tokens(6, 9), make_mask(9)
    outputs = model(input_ids, attention_mask=mask).last_hidden_state
    outputs.float().square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    exact = model.double()(input_ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(outputs.double(), exact, rtol=0, atol=0.05)


def test_word_dropout():
    """It makes words unknown that are known, while training, some of them; and nothing else."""
    model = make_reader(word_encoder="cnn", word_vocab_size=3, word_embedding_size=3, word_dropout=0.5)
    know(model, [(4,), (5, 20)])
    table = model.word_encoder.table
    tokens = torch.tensor([[4, 5, 20, 6] * 30])
    words = find_words(tokens, CONTINUATION)
    assert table.word_ids(tokens, words).bool().tolist() == [[True, True, False] * 30]
    whole = table(tokens, words)
    table.train()
    torch.manual_seed(0)
    dropped = (table(tokens, words) != whole).any(-1)[0].view(30, 3)
    assert 0.3 < dropped[:, :2].double().mean() < 0.7
    assert not dropped[:, 2].any()
    assert not torch.equal(dropped[:, 0], dropped[:, 1])


def test_chains_of_labels_over_words():
    """A random field sees one label for each word, and all tokens of a word show it."""
    fields = {"word_encoder": "cnn", "first_continuation_id": CONTINUATION, "use_crf": True, "bidirectional": True}
    model = make_model("RNNForTokenClassification", **fields)
    tokens = torch.tensor([[4, 20, 21, 5, 22, 6]])
    places = torch.tensor([[True, False, False, True, False, True]])
    logits = model(tokens).logits
    paths = model.decode(tokens)
    assert torch.equal(logits[:, 0], logits[:, 2])
    assert torch.equal(logits[:, 3], logits[:, 4])
    emissions = model.classifier(model.model(tokens).last_hidden_state)[places][None]
    torch.testing.assert_close(model.crf(lambda crf: crf.viterbi(emissions))[0][0], logits[places].argmax(-1))
    assert torch.equal(paths.paths[0, 0][places[0]], logits[places].argmax(-1))
    labels = torch.tensor([[1, 2, 2, 3, 0, 0]])
    only_words = labels.masked_fill(~places, -100)
    likelihood = model.crf(lambda crf: crf.log_likelihood(emissions, labels[places][None]))
    # Labels within words are not read, and count with and without the number that Trainer passes.
    for given, number in ((only_words, 3), (labels, 6)):
        torch.testing.assert_close(model(tokens, labels=given).loss, -likelihood.sum() / number)
        loss = model(tokens, labels=given, num_items_in_batch=number).loss
        torch.testing.assert_close(loss, model(tokens, labels=given).loss, rtol=0, atol=1e-14)


def test_answers_are_whole_words():
    """They begin and end with words, and a label within a word is that of its edge; outside of the row it is none."""
    model = make_model(
        "RNNForQuestionAnswering", word_encoder="cnn", first_continuation_id=CONTINUATION, bidirectional=True
    )
    tokens = torch.tensor([[4, 20, 21, 5, 22, 6, 7, 23], [4, 20, 21, 5, 22, 6, 3, 3]])
    mask = torch.tensor([[1] * 8, [1] * 6 + [0] * 2])
    outputs = model(tokens, attention_mask=mask)
    lowest = torch.finfo(torch.float64).min
    assert (outputs.start_logits > lowest).tolist()[0] == [True, False, False, True, False, True, True, False]
    assert (outputs.end_logits > lowest).tolist()[0] == [False, False, True, False, True, True, False, True]
    assert (outputs.end_logits > lowest).tolist()[1] == [False, False, True, False, True, True, False, False]

    def loss(start: list[int], end: list[int]) -> torch.Tensor:
        positions = {"start_positions": torch.tensor(start), "end_positions": torch.tensor(end)}
        return model(tokens, attention_mask=mask, **positions).loss

    assert loss([1, 2], [3, 3]) == loss([0, 0], [4, 4])
    assert loss([1, 2], [3, 3]) < 50
    assert (
        loss([1, 8], [3, 8])
        == model(tokens[:1], start_positions=torch.tensor([1]), end_positions=torch.tensor([3])).loss
    )


def test_what_words_refuse():
    """Embeddings alone, a state, and language models."""
    model = make_reader(word_encoder="cnn", bidirectional=False)
    tokens = torch.tensor([[4, 20]])
    with pytest.raises(ValueError, match="`input_ids` must be given where `word_encoder`"):
        model(inputs_embeds=model.embed_tokens(tokens))
    state = make_model("RNNModel")(tokens, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="`past_key_values` must be None where `word_encoder` is set"):
        model(tokens, cache=state)
    assert model(tokens, use_cache=True).past_key_values is None
    for name in ("RNNForQuestionAnswering", "RNNForSequenceClassification", "RNNForTokenClassification"):
        head = make_model(name, word_encoder="cnn", first_continuation_id=CONTINUATION)
        for inputs, message in (
            ({"inputs_embeds": model.embed_tokens(tokens)}, "`input_ids` must be given where `word_encoder`"),
            ({}, "Give exactly one of `input_ids` and `inputs_embeds`"),
            ({"input_ids": tokens[0]}, r"`input_ids` must have the shape \(batch, seq\), got \(2,\)"),
            ({"input_ids": tokens, "attention_mask": torch.ones(1, 3)}, "`attention_mask` must have the shape"),
        ):
            with pytest.raises(ValueError, match=message):
                head(**inputs)
    for model_class in (RNNForCausalLM, RNNForMaskedLM):
        with pytest.raises(ValueError, match="`word_encoder` must be None for a language model, got 'cnn'"):
            model_class(model.config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"word_encoder": "char"}, "`word_encoder` must be one of"),
        ({"first_continuation_id": None}, "`first_continuation_id` must say"),
        ({"first_continuation_id": -1}, "`first_continuation_id` must say"),
        ({"word_encoder_width": 4}, "`word_encoder_width` must be an odd number, got 4"),
        ({"word_encoder": "lstm", "word_encoder_size": 5}, "`word_encoder_size` must be an even number"),
        ({"word_encoder_size": 0}, "`word_encoder_size` must be an integer of at least 1"),
        ({"word_vocab_size": 1}, "`word_vocab_size` must be 0, or the unknown word"),
        ({"word_vocab_size": -1}, "`word_vocab_size` must be an integer of at least 0"),
        ({"word_embedding_size": 2**31}, "`word_embedding_size` must be an integer of at most"),
        ({"question_attention": "flow"}, "`question_attention` compares tokens and must be None where `word_encoder`"),
        ({"word_dropout": 1.0}, "`word_dropout` must be a probability"),
        ({"word_encoder": None}, "`first_continuation_id` must be None where `word_encoder` is None, got 18"),
        (
            {"word_encoder": None, "first_continuation_id": None, "word_vocab_size": 4},
            "`word_vocab_size` must be 0 where `word_encoder` is None, got 4",
        ),
    ],
)
def test_configurations_of_words(fields, message):
    valid = {"word_encoder": "cnn", "first_continuation_id": 18}
    RNNConfig(**valid)
    with pytest.raises(ValueError, match=message):
        RNNConfig(**valid | fields)


# The table of words and its tokenizer.


TEXT = "Zoë didn't pay Mr. O'Neil $3.50 in the U.S., he said... (see http://a.b/c?d=1) 日本 ##x"


def test_the_tokenizer(tmp_path):
    """Bytes of words, with offsets and words as those of sub-words, back to text, the same after saving."""
    made = make_word_tokenizer()
    made.save_pretrained(tmp_path)
    for tokenizer in (made, AutoTokenizer.from_pretrained(tmp_path)):
        encoded = tokenizer(TEXT, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        assert list(encoded) == ["input_ids", "attention_mask", "offset_mapping"]
        first = first_continuation_id(tokenizer)
        starts = [index for index, token in enumerate(ids) if token < first]
        pieces = [TEXT[encoded["offset_mapping"][index][0] :].split()[0] for index in starts]
        words = tokenizer.decode(ids).split()
        assert len(words) == len(starts)
        assert all(piece.startswith(word) for piece, word in zip(pieces, words))
        assert " ".join(words) == (
            "Zoë did n't pay Mr. O ' Neil $ 3.50 in the U.S. , he said ... ( see http://a.b/c?d=1) 日本 ## x"
        )
        assert tokenizer.unk_token_id not in ids


def test_tokens_are_decoded_as_bytes():
    """Whatever bytes and special tokens follow each other, with a space before each that continues no word."""
    tokenizer = make_word_tokenizer()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): bytes([byte]) for byte in printable}
    byte_of |= {chr(256 + index): bytes([byte]) for index, byte in enumerate(others)}
    for row in torch.randint(0, len(tokenizer), (300, 6), generator=torch.Generator().manual_seed(0)).tolist():
        parts = []
        for token in tokenizer.convert_ids_to_tokens(row):
            space = b"" if token.startswith("##") and len(token) > 2 else b" "
            character = token.removeprefix("##") if space == b"" else token
            parts.append(space + byte_of.get(character, character.encode()))
        assert tokenizer.decode(row) == b"".join(parts).decode(errors="replace").removeprefix(" ")


def test_words_that_a_pipeline_found(tmp_path):
    """In any script they are those of the text, one by one and together."""
    make_word_tokenizer().save_pretrained(tmp_path)
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), make_tagger(id2label={0: "O", 1: "B-x", 2: "I-x"})
    text = "She met Zoë Łuk in Zürich , a 東京 and 本 ##ab 😀"
    words = text.replace("##ab", "## ab").split()
    for label, expected in ((1, words), (2, [" ".join(words)])):
        with torch.no_grad():
            model.classifier.bias.copy_(100.0 * (torch.arange(3) == label))
        for strategy in ("first", "average", "max"):
            tag = pipeline("token-classification", model=model, tokenizer=tokenizer, aggregation_strategy=strategy)
            assert [found["word"] for found in tag(text)] == expected


def test_words_are_split_in_linear_time():
    """Long runs without white space, addresses among them."""
    tokenizer = make_word_tokenizer()
    start = time.perf_counter()
    for run in ("a@", "!@", "!-", "a.", "n'", "1,", "&a", "a@b.c!"):
        tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(run * 1500)
    assert time.perf_counter() - start < 2
    for text, words in (
        ("(a@b.de), a.b@c@d.e:8 @a@b.c", ["(a@b.de", ")", ",", "a.b@c@d.e", ":", "8", "@a@b.c"]),
        ("a@.b a@b.c@d a@b", ["a", "@", ".", "b", "a@b.c", "@", "d", "a", "@", "b"]),
    ):
        assert tokenizer.decode(tokenizer(text)["input_ids"]).split() == words


def test_whole_words():
    """Words of a corpus stay whole; other tokenizers are left alone."""
    tokenizer = make_word_tokenizer()
    words = ["didn't", "U.S.", "a/b"]
    split = tokenizer(words, is_split_into_words=True)
    whole = whole_words(tokenizer)(words, is_split_into_words=True)
    count = [sum(token < first_continuation_id(tokenizer) for token in row["input_ids"]) for row in (split, whole)]
    assert count == [6, 3]
    assert whole.word_ids() == [0] * 6 + [1] * 4 + [2] * 3
    assert tokenizer(words, is_split_into_words=True)["input_ids"] == split["input_ids"]
    with pytest.raises(ValueError, match="`split` must be one of"):
        make_word_tokenizer("letters")


def make_tagger(**options) -> RNNForTokenClassification:
    tokenizer = make_word_tokenizer()
    fields = {
        "vocab_size": len(tokenizer),
        "word_encoder": "cnn",
        "first_continuation_id": first_continuation_id(tokenizer),
        "word_vocab_size": 8,
        "word_embedding_size": 3,
        "hidden_size": 6,
    }
    torch.manual_seed(0)
    return RNNForTokenClassification(RNNConfig(**fields | options)).eval()


def known_words(model, tokenizer, words: list[str]) -> list[bool]:
    ids = whole_words(tokenizer)(words, is_split_into_words=True, return_tensors="pt")["input_ids"]
    table = model.model.word_encoder.table
    return (table.word_ids(ids, find_words(ids, model.config.first_continuation_id)) > 0)[0].tolist()


def test_a_table_of_words(tmp_path):
    """Words are known by their spelling, else by the folded one, with the vectors given, also after loading."""
    tokenizer, made = make_word_tokenizer(), make_tagger()
    words = ["the", "Paris", "in 1", "0000", "zoë"]
    vectors = torch.arange(15.0).view(5, 3)
    vectors[1] = float("nan")
    before = made.model.word_encoder.table.embed_words.weight.clone()
    assert set_word_table(made, tokenizer, words, vectors) == 4  # "in 1" is two words
    made.save_pretrained(tmp_path)
    for model in (made, RNNForTokenClassification.from_pretrained(tmp_path).eval()):
        texts = ["the", "The", "THE", "them", "Paris", "paris", "1984", "198", "zoë", "Zoë", "ZOË"]
        known = [True, True, True, False, True, False, True, False, True, True, False]
        assert known_words(model, tokenizer, texts) == known
        table = model.model.word_encoder.table
        ids = tokenizer("the Paris THE zoë", return_tensors="pt")["input_ids"]
        found = table(ids, find_words(ids, model.config.first_continuation_id))[0]
        assert torch.equal(found[[0, 2, 3]], vectors[[0, 0, 4]])
        assert torch.isfinite(found[1]).all()
    assert torch.equal(made.model.word_encoder.table.embed_words.weight[0], before[0])


def test_a_table_that_is_set_again():
    """Words that stay known keep their embeddings, new ones get others, and no embedding is lost."""
    tokenizer, model = make_word_tokenizer(), make_tagger()
    table = model.model.word_encoder.table

    def embeddings_of(words: list[str]) -> torch.Tensor:
        ids = tokenizer(" ".join(words), return_tensors="pt")["input_ids"]
        return table(ids, find_words(ids, model.config.first_continuation_id))[0]

    made = table.embed_words.weight.clone()
    known = ["eat", "a", "plum", "pear"]
    set_word_table(model, tokenizer, known)
    assert torch.equal(table.embed_words.weight, made)
    expected = embeddings_of(known)
    for new in (["fig"], ["fig", "red", "kiwi"], ["fig", "red", "kiwi", "date"]):
        words = [*new, "plum", "eat", "a"]
        vectors = torch.full((len(words), 3), float("nan"))
        vectors[0] = 7.0
        set_word_table(model, tokenizer, words, vectors)
        assert torch.equal(embeddings_of(["eat", "a", "plum"]), expected[:3])
        assert torch.equal(embeddings_of(["fig"]), torch.full((1, 3), 7.0))
        assert len(embeddings_of(words).unique(dim=0)) == len(words)
        others = embeddings_of(new[1:3])
        assert not (others.unsqueeze(1) == expected).any()
        assert all((made == other).all(1).any() for other in others)
    set_word_table(model, tokenizer, ["a"])
    assert torch.equal(embeddings_of(["a"]), expected[1:2])
    assert torch.equal(embeddings_of(["eat"]), made[:1])


def test_a_long_word_and_a_full_table():
    """Words longer than the powers of the key; the last key of the table; words of every length are told apart."""
    tokenizer = make_word_tokenizer()
    words = ["a" * length for length in range(1, 101)]
    model = make_tagger(word_vocab_size=len(words) + 1)
    assert set_word_table(model, tokenizer, words) == len(words)
    assert all(known_words(model, tokenizer, words))
    assert not any(known_words(model, tokenizer, ["b", "a" * 101, "ab", "ba"]))


def test_what_a_table_refuses():
    tokenizer, model = make_word_tokenizer(), make_tagger()
    with pytest.raises(ValueError, match="`words` must be fewer than `word_vocab_size`, which is 8"):
        set_word_table(model, tokenizer, [str(number) for number in range(8)])
    with pytest.raises(ValueError, match=r"`vectors` must have the shape \(1, 3\), got \(1, 4\)"):
        set_word_table(model, tokenizer, ["a"], torch.zeros(1, 4))
    with pytest.raises(ValueError, match="`word_encoder` and `word_vocab_size` must be set"):
        set_word_table(make_tagger(word_vocab_size=0), tokenizer, ["a"])
    tokenizer.add_tokens(["<extra>"])
    with pytest.raises(ValueError, match="must be the last ones of the tokenizer"):
        first_continuation_id(tokenizer)


@pytest.mark.parametrize("vocab_size", [600, 400])
def test_a_vocabulary_of_another_size(vocab_size, tmp_path):
    """Tokens that stay are folded as before, new ones are spelled as they are; also after loading."""
    made, tokenizer = make_tagger(), make_word_tokenizer()
    set_word_table(made, tokenizer, ["a", "ab"])
    folded = made.model.word_encoder.table.folded.clone()
    made.resize_token_embeddings(vocab_size)
    made.save_pretrained(tmp_path)
    tokens = torch.tensor([[vocab_size - 1, 300, 10]])
    logits = made(tokens).logits
    for model in (made, RNNForTokenClassification.from_pretrained(tmp_path).eval()):
        table = model.model.word_encoder.table
        assert torch.equal(table.folded[:516], folded[:vocab_size])
        assert torch.equal(table.folded[516:], torch.arange(516, max(vocab_size, 516)))
        assert known_words(model, tokenizer, ["A", "AB", "B"]) == [True, True, False]
        assert torch.equal(model(tokens).logits, logits)
        model.resize_token_embeddings(516)
        assert set_word_table(model, tokenizer, ["the"]) == 1
        assert known_words(model, tokenizer, ["The"]) == [True]


def test_frequent_words():
    """Frequent spellings, and folded ones of words that are frequent together."""
    words = ["The"] * 3 + ["the"] * 2 + ["1984", "2001", "Paris", "once"]
    assert frequent_words(words) == ["the", "The", "0000"]
    assert frequent_words(words, max_words=1) == ["the"]
    assert fold_word("Ab1 É") == "ab0 É"
