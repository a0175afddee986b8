"""The attention of generated words: by every search what a forward over the returned words attends to."""

import pytest
import torch
from transformers import set_seed

import hf_rnn
from matrix import BOS, DECODERS, EOS, PAD, make_mask, make_model, make_tokens


NAME = "RNNSeq2SeqForConditionalGeneration"
SEARCHES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
    "beam_sampling": {"num_beams": 3, "do_sample": True},
}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no_cache"])
def test_weights_belong_to_the_returned_words(search, use_cache):
    """With a prompt for the target and without; rows that end early included."""
    sources, mask = make_tokens(5, 7), make_mask()[:5]
    prompts = torch.cat([torch.full((5, 1), BOS), make_tokens(5, 2, seed=4).clamp(min=5)], dim=1)
    has_moved = has_ended = False
    for decoder in [*DECODERS, {"attention_score": "location", "use_coverage": True}]:
        model = make_model(NAME, num_attention_heads=2, **decoder)
        for given in ({}, {"decoder_input_ids": prompts}):
            set_seed(0)
            outputs = model.generate(
                sources,
                attention_mask=mask,
                **given,
                **SEARCHES[search],
                max_new_tokens=9,
                use_cache=use_cache,
                output_attentions=True,
                return_dict_in_generate=True,
            )
            weights = hf_rnn.align(outputs)
            sequences = outputs.sequences
            repeats = len(sequences) // 5
            forward = model(
                sources.repeat_interleave(repeats, 0),
                attention_mask=mask.repeat_interleave(repeats, 0),
                decoder_input_ids=sequences[:, :-1],
                output_attentions=True,
            )
            expected = hf_rnn.align(forward)
            assert weights.shape == expected.shape == (*sequences[:, 1:].shape, 7)
            for row, tokens in enumerate(sequences[:, 1:]):
                prompt = given["decoder_input_ids"].shape[1] - 1 if given else 0
                ends = (tokens[prompt:] == EOS).nonzero()
                length = prompt + int(ends[0]) + 1 if len(ends) else len(tokens)
                has_ended |= length < len(tokens)
                torch.testing.assert_close(weights[row, :length], expected[row, :length], rtol=1e-9, atol=1e-12)
                if "beam_indices" in outputs:
                    assert (weights[row, length:] == 0).all()
            if "beam_indices" in outputs:
                used = outputs.beam_indices
                has_moved |= bool((used != used[:, :1])[used >= 0].any())
    assert has_moved or "beam" not in search
    assert has_ended


def test_a_forward_averages_its_heads():
    model = make_model(NAME, num_attention_heads=3)
    inputs = {"input_ids": make_tokens(2, 7), "decoder_input_ids": make_tokens(2, 4)}
    outputs = model(**inputs, output_attentions=True)
    assert torch.equal(hf_rnn.align(outputs), outputs.cross_attentions[0].mean(1))
    with pytest.raises(ValueError, match="`outputs` must hold `cross_attentions`"):
        hf_rnn.align(model(**inputs))


class Vocabulary:
    """As much of a tokenizer as is asked for: token n is the word "tn"."""

    unk_token_id = 7
    all_special_ids = [PAD, BOS, EOS, 7]

    def convert_ids_to_tokens(self, token_id):
        return f"t{token_id}"


def make_outputs(sequences, weights):
    attentions = tuple((torch.tensor(step)[:, None, None],) for step in weights)
    return hf_rnn.generation.alignment.ModelOutput(
        sequences=torch.tensor(sequences), cross_attentions=attentions, beam_indices=None
    )


def test_unknown_words_are_replaced():
    """By the source word with most weight, or its translation; never by padding; special tokens are left out."""
    weights = [[[0.1, 0.6, 0.3], [0.2, 0.3, 0.5]], [[0.2, 0.1, 0.7], [0.5, 0.3, 0.2]]]
    outputs = make_outputs([[BOS, 7, 7, EOS], [BOS, 7, 9, EOS]], [*weights, weights[0]])
    words = [["the", "cat", "sat"], ["a", "dog", None]]
    assert hf_rnn.replace_unknowns(outputs, words, Vocabulary()) == [["cat", "sat"], ["dog", "t9"]]
    lexicon = {"cat": "Katze"}
    assert hf_rnn.replace_unknowns(outputs, words, Vocabulary(), lexicon) == [["Katze", "sat"], ["dog", "t9"]]
    # Two sequences of one source.
    assert hf_rnn.replace_unknowns(outputs, words[:1], Vocabulary()) == [["cat", "sat"], ["sat", "t9"]]
    assert hf_rnn.replace_unknowns(outputs, [[None] * 3] * 2, Vocabulary()) == [["t7", "t7"], ["t7", "t9"]]
    with pytest.raises(ValueError, match=r"`source_words` must have 3 positions in each row, got \[2, 3\]"):
        hf_rnn.replace_unknowns(outputs, [["a", "b"], ["a", "b", "c"]], Vocabulary())
    with pytest.raises(ValueError, match="`source_words` must have a row for each source of 2 rows, got 3"):
        hf_rnn.replace_unknowns(outputs, [["a"] * 3] * 3, Vocabulary())
