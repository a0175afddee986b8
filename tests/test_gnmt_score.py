"""GNMT's score in beam search: equation 14 for what is returned, and the search that it leads to."""

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList

from hf_rnn.generation import GNMTScore, align
from matrix import DECODERS, EOS, make_mask, make_model, make_tokens


NAME = "RNNSeq2SeqForConditionalGeneration"
BEAMS = 4


def search(model, processor=None, **options):
    """Beam search over padded sources; one of them is there twice, so that prefixes of different rows are alike."""
    sources, mask = make_tokens(5, 7)[[0, 1, 2, 3, 4, 0]], make_mask()[[0, 1, 2, 3, 4, 1]]
    defaults = {"num_beams": BEAMS, "num_return_sequences": BEAMS, "do_sample": False, "max_new_tokens": 12}
    outputs = model.generate(
        sources,
        attention_mask=mask,
        **(defaults | options),
        output_attentions=True,
        output_scores=True,
        return_dict_in_generate=True,
        logits_processor=LogitsProcessorList([] if processor is None else [processor]),
    )
    return outputs, sources, mask


def expected_scores(model, outputs, sources, mask, alpha: float, beta: float) -> list[float]:
    """Equation 14, from a forward over each returned sequence."""
    scores = []
    for row, sequence in enumerate(outputs.sequences):
        source = row // BEAMS
        forward = model(
            sources[source : source + 1],
            attention_mask=mask[source : source + 1],
            decoder_input_ids=sequence[None, :-1],
            output_attentions=True,
        )
        log_p = forward.logits[0].log_softmax(-1).detach().double().numpy()
        weights = align(forward)[0].detach().double().numpy()
        words = sequence[1:].tolist()
        length = words.index(EOS) + 1 if EOS in words else len(words)
        total = sum(log_p[position, words[position]] for position in range(length))
        score = total / ((5 + length) ** alpha / 6**alpha)
        if EOS in words:
            covered = np.minimum(weights[:length].sum(0), 1)[mask[source].numpy() == 1]
            score += beta * np.log(covered).sum()
        scores.append(score)
    return scores


@pytest.mark.parametrize(
    ("alpha", "beta", "use_cache"), [(1.5, 0.0, True), (0.0, 0.3, True), (0.6, 0.3, True), (0.6, 0.3, False)]
)
def test_scores_are_the_equation(alpha, beta, use_cache):
    """For every returned sequence, in order; the processor is used for one search after the other."""
    lengths = set()
    for options in [*DECODERS[1:3], {"attention_score": "location", "num_attention_heads": 2}]:
        model = make_model(NAME, **options)
        with GNMTScore(BEAMS, alpha, beta, model) as score:
            for new_tokens in (12, 8):
                outputs, *given = search(model, score, use_cache=use_cache, max_new_tokens=new_tokens)
                expected = expected_scores(model, outputs, *given, alpha, beta)
                np.testing.assert_allclose(outputs.sequences_scores, expected, rtol=1e-4, atol=1e-4)
                best = outputs.sequences_scores.view(-1, BEAMS)
                assert (best[:, :-1] >= best[:, 1:]).all()
                lengths |= set((outputs.beam_indices >= 0).sum(-1).tolist())
        decoder = model.get_decoder()
        hooks = [*decoder._forward_pre_hooks.values(), *decoder.cross_attentions._forward_hooks.values()]
        assert not any(getattr(hook, "__self__", None) is score for hook in hooks)
    assert len(lengths) > 3


def test_without_penalties_it_is_the_plain_sum():
    """alpha = 0 is what `generate` calls a length penalty of 0: the same sequences with the same scores."""
    for options in DECODERS:
        model = make_model(NAME, **options)
        expected, *_ = search(model, length_penalty=0.0)
        actual, *_ = search(model, GNMTScore(BEAMS, 0.0))
        assert torch.equal(actual.sequences, expected.sequences)
        torch.testing.assert_close(actual.sequences_scores, expected.sequences_scores, rtol=1e-5, atol=1e-5)


def test_penalties_change_what_is_found():
    """A length penalty makes texts longer, a coverage penalty makes them attend to more of the source."""
    lengths, covered = [], []
    for alpha, beta in [(0.0, 0.0), (2.0, 0.0), (2.0, 3.0)]:
        lengths.append(0)
        covered.append(0.0)
        for options in DECODERS:
            model = make_model(NAME, **options)
            with torch.no_grad():
                model.lm_head.bias[EOS] += 1  # so that there are ends to choose from
            with GNMTScore(BEAMS, alpha, beta, model) as score:
                outputs, _, mask = search(model, score, num_return_sequences=1, max_new_tokens=40)
            lengths[-1] += int((outputs.beam_indices >= 0).sum())
            sums = align(outputs).sum(1)[mask.bool()]
            covered[-1] += float(sums.clamp(min=1e-9, max=1).log().sum())
    assert lengths[0] < lengths[1]
    assert covered[1] < covered[2]


def test_mistakes_are_refused():
    for given, message in [
        ({"num_beams": 1, "length_penalty": 1.0}, "`num_beams` must be at least 2, got 1"),
        ({"num_beams": 2, "length_penalty": -1.0}, "must be at least 0, got -1.0 and 0.0"),
        ({"num_beams": 2, "length_penalty": 1.0, "coverage_penalty": 0.1}, "`model` must be given"),
    ]:
        with pytest.raises(ValueError, match=message):
            GNMTScore(**given)
    with pytest.raises(ValueError, match=r"multiple of `num_beams` \(5\) rows, got 24"):
        search(make_model(NAME), GNMTScore(5, 0.6))
