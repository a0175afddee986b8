"""Classification in chunks with the state carried: what the whole text gives, and what is refused."""

import pytest
import torch

from hf_rnn import RECURRENT_CELLS, RNNConfig, RNNForSequenceClassification, classify_in_chunks, loop_only
from hf_rnn.configuration_rnn import POOLING_TYPES
from matrix import make_mask, make_model, make_tokens


NAME = "RNNForSequenceClassification"
KINDS = [{"pooling": pooling} for pooling in POOLING_TYPES]
KINDS.append({"pooling": "attention", "pooling_heads": 2, "pooling_attention_size": 5})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_chunks_give_what_the_whole_text_gives(kind):
    """Chunks of every size, padding of every kind, all cells, with residual connections, on the fast paths and not."""
    tokens, mask = make_tokens(6, 11), make_mask(11)
    mask[3, 2:9] = 0  # a whole chunk of padding between tokens
    for cell_type in RECURRENT_CELLS:
        for residual in (False, True):
            model = make_model(NAME, cell_type=cell_type, residual=residual, num_hidden_layers=3, **kind)
            for given in (None, mask):
                with torch.no_grad(), loop_only():
                    expected = model(tokens, given).logits
                for chunk_size in (1, 2, 3, 10, 11, 100):
                    actual = classify_in_chunks(model, tokens, given, chunk_size=chunk_size).logits
                    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
                with loop_only():
                    actual = classify_in_chunks(model, tokens, given, chunk_size=4).logits
                torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.05)], ids=["float32", "bfloat16"]
)
def test_long_texts_in_other_precisions(kind, dtype, tolerance):
    """5,000 tokens, in pieces of all lengths that somebody else cut."""
    torch.manual_seed(0)
    model = RNNForSequenceClassification(RNNConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, **kind))
    model = model.to(dtype).eval()
    tokens = torch.randint(0, 50, (2, 5000), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, 3210:] = 0
    with torch.no_grad():
        expected = model(tokens, mask).logits
    pieces = [slice(0, 1), slice(1, 700), slice(700, 2500), slice(2500, 5000)]
    actual = classify_in_chunks(
        model, (tokens[:, piece] for piece in pieces), (mask[:, piece] for piece in pieces), chunk_size=300
    ).logits
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_weights_of_a_long_text():
    """The attentions of the whole text, and none where they are not asked for."""
    tokens, mask = make_tokens(6, 9), make_mask(9)
    for heads in (1, 3):
        model = make_model(NAME, pooling="attention", pooling_heads=heads)
        expected = model(tokens, mask, output_attentions=True)
        actual = classify_in_chunks(model, tokens, mask, chunk_size=2, output_attentions=True)
        assert actual.attentions[0].shape == (6, heads, 1, 9)
        torch.testing.assert_close(actual.attentions[0], expected.attentions[0], rtol=0, atol=1e-12)
        assert classify_in_chunks(model, tokens, mask).attentions is None
    with pytest.raises(ValueError, match="`output_attentions` needs `pooling='attention'`, got 'max'"):
        classify_in_chunks(make_model(NAME, pooling="max"), tokens, output_attentions=True)


def test_the_state_does_not_grow():
    """What is kept between chunks is as large after the last as after the first, and no graph hangs on it."""
    model = make_model(NAME, pooling="attention")
    sizes = []
    read = type(model.pooling).read

    def record(hidden_states, mask, state, scores):
        state = read(model.pooling, hidden_states, mask, state, scores)
        sizes.append([None if part is None else part.numel() for part in state])
        assert not any(part is not None and part.requires_grad for part in state)
        return state

    model.pooling.read = record
    pieces = (make_tokens(2, 3, seed=seed) for seed in range(40))
    classify_in_chunks(model, pieces)
    assert len(sizes) == 40
    assert all(size == sizes[0] for size in sizes)


@pytest.mark.parametrize("pooling", POOLING_TYPES)
def test_nothing_to_read(pooling):
    """No token at all, or an empty piece before, between and behind others."""
    model, tokens = make_model(NAME, pooling=pooling), make_tokens(3, 4)
    empty = tokens[:, :0]
    torch.testing.assert_close(classify_in_chunks(model, empty).logits, model(empty).logits, rtol=0, atol=1e-12)
    pieces = [empty, tokens[:, :2], empty, tokens[:, 2:], empty]
    torch.testing.assert_close(classify_in_chunks(model, pieces).logits, model(tokens).logits, rtol=0, atol=1e-12)


def test_refusals():
    model, tokens, mask = make_model(NAME), make_tokens(2, 6), torch.ones(2, 6)
    for call, message in (
        (lambda: classify_in_chunks(make_model(NAME, bidirectional=True), tokens), "`bidirectional` must be False"),
        (lambda: classify_in_chunks(make_model("RNNForCausalLM"), tokens), "sequence classifier .* got RNNForCausalLM"),
        (lambda: classify_in_chunks(make_model("RNNForMultipleChoice"), tokens), "got RNNForMultipleChoice"),
        (lambda: classify_in_chunks(model, tokens, chunk_size=0), "`chunk_size` must be .* got 0"),
        (lambda: classify_in_chunks(model, tokens, chunk_size=2.5), "`chunk_size` must be .* got 2.5"),
        (lambda: classify_in_chunks(model, []), "at least one piece"),
        (lambda: classify_in_chunks(model, [tokens, tokens[:1]]), "as many rows, got 2 and 1"),
        (lambda: classify_in_chunks(model, tokens[0]), r"shape \(batch, seq\), got \(6,\)"),
        (lambda: classify_in_chunks(model, tokens, mask[:, 1:]), r"shape of `input_ids` \(2, 6\), got \(2, 5\)"),
        (lambda: classify_in_chunks(model, [tokens], mask), "an iterable where it is not"),
        (lambda: classify_in_chunks(model, tokens, [mask]), "must be a tensor where"),
        (lambda: classify_in_chunks(model, [tokens] * 2, [mask]), "as many pieces .* got fewer"),
        (lambda: classify_in_chunks(model, [tokens], [mask] * 2), "as many pieces .* got more"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (NAME, {"word_encoder": "cnn", "first_continuation_id": 18}, "`word_encoder` must be None to read in chunks"),
        ("RNNForTokenClassification", {"id2intent": {0: "a", 1: "b"}}, "`model` must be a sequence classifier"),
    ],
)
def test_models_that_do_not_read_in_chunks(name, options, message):
    with pytest.raises(ValueError, match=message):
        classify_in_chunks(make_model(name, **options), make_tokens(1, 4))
