"""Beams and samples that attend to one copy of their source give what they give with a copy for each."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from hf_rnn import without_fast_paths
from hf_rnn.attention import ATTENTION_SCORES, Attention
from hf_rnn.linear_modules import apply_transposed
from hf_rnn.shared_sources import SharedEncoderOutput
from matrix import case_id, cases, make_inputs, make_mask, make_model


NAME = "RNNSeq2SeqForConditionalGeneration"
CASES = pytest.mark.parametrize("options", [options for _, options in cases(NAME)], ids=case_id)
PATHS = ["shared_sources", "keys_for_plain_queries", "mapped_values"]


def make_sources():
    return {"input_ids": make_inputs(NAME, batch=6, with_labels=False)["input_ids"], "attention_mask": make_mask()}


@pytest.fixture
def sources_seen(monkeypatch):
    """The number of sources that are attended to, at each call."""
    seen = []
    forward = Attention.forward

    def count(self, queries, memory, *state):
        seen.append((queries.shape[0], memory.keys.shape[0]))
        return forward(self, queries, memory, *state)

    monkeypatch.setattr(Attention, "forward", count)
    return seen


def assert_same(actual, expected):
    assert torch.equal(actual.sequences, expected.sequences)
    for name in ("scores", "cross_attentions", "decoder_hidden_states", "encoder_hidden_states"):
        for pair in zip(actual[name], expected[name], strict=True):
            torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-10)


BEGUN = {
    "decoder_input_ids": torch.tensor([[1, 4, 5], [1, 0, 5], [0, 1, 3], [1, 4, 5], [1, 3, 3], [1, 5, 4]]),
    "decoder_attention_mask": torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]]),
}
EVERYTHING = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_attentions": True,
    "output_hidden_states": True,
}


@CASES
@pytest.mark.parametrize("begun", [False, True], ids=["", "begun"])
def test_beams(sources_seen, options, begun):
    """Every number that `generate` returns, from the first token and from several."""
    model = make_model(NAME, **options)
    settings = {"num_beams": 3, "max_new_tokens": 5, **EVERYTHING, **(BEGUN if begun else {})}
    actual = model.generate(**make_sources(), **settings)
    assert set(sources_seen) == {(18, 18 if model.config.attention_has_state else 6)}
    sources_seen.clear()
    with without_fast_paths(*PATHS):
        expected = model.generate(**make_sources(), **settings)
    assert set(sources_seen) == {(18, 18)}
    assert_same(actual, expected)


@CASES
@pytest.mark.parametrize("begun", [False, True], ids=["", "begun"])
def test_what_rows_have_in_common_is_computed_once(sources_seen, options, begun):
    """All that comes before their first own tokens; for the whole model where nothing watches its parts."""
    settings = {"num_beams": 3, "max_new_tokens": 4, **(BEGUN if begun else {})}
    model = make_model(NAME, **options)
    encoder_outputs = copy.deepcopy(model).get_encoder()(**make_sources())  # which leaves no hooks on the model
    results = []
    for paths in ([], PATHS):
        sources_seen.clear()
        model = copy.deepcopy(model)
        with without_fast_paths(*paths) if paths else contextlib.nullcontext():
            outputs = BaseModelOutputWithPooling(**encoder_outputs)
            mask = make_sources()["attention_mask"]
            results.append(model.generate(encoder_outputs=outputs, attention_mask=mask, **settings, **EVERYTHING))
        rows = list(dict.fromkeys(sources_seen))
        shares = not (paths or model.config.attention_has_state)
        assert rows == ([(6, 6), (18, 6)] if shares else [(18, 18)])
    for pair in zip(*(result.decoder_hidden_states for result in results), strict=True):
        assert [part.shape for part in pair[0]] == [part.shape for part in pair[1]]
    results = [{**result, "encoder_hidden_states": ()} for result in results]
    assert_same(*(ModelOutput(**result) for result in results))


def test_what_rows_do_not_have_in_common(sources_seen):
    """Other tokens, masks or gradients, states that are there already, and those who watch: every row by itself."""
    model = make_model(NAME)
    states = model.get_encoder()(**make_sources())
    model = copy.deepcopy(model)

    def rows_seen(tokens, grad=False, begun=False, **arguments):
        sources_seen.clear()
        cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
        mask = make_mask().repeat_interleave(2, 0)
        shared = SharedEncoderOutput(**states, rows_per_source=2)
        inputs = {"encoder_outputs": shared, "attention_mask": mask, "past_key_values": cache, **arguments}
        expected = {
            "encoder_outputs": BaseModelOutputWithPooling(
                **{name: part.repeat_interleave(2, 0) for name, part in states.items()}
            )
        }
        with torch.set_grad_enabled(grad):
            for _ in range(1 + begun):
                logits = model(decoder_input_ids=tokens, **inputs).logits
            seen = sources_seen[-1]
            if not begun:
                expected = model(decoder_input_ids=tokens, **(inputs | expected | {"past_key_values": None})).logits
                torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-10)
        return seen

    alike = torch.tensor([[1, 2], [3, 4], [1, 2], [3, 4], [1, 2], [3, 4]]).repeat_interleave(2, 0)
    assert rows_seen(alike) == (6, 6)
    assert rows_seen(alike, decoder_attention_mask=torch.ones_like(alike)) == (6, 6)
    other = alike.clone()
    other[5, 1] = 1
    assert rows_seen(other) == (12, 6)
    mask = torch.ones_like(alike)
    mask[5, 1] = 0
    assert rows_seen(alike, decoder_attention_mask=mask) == (12, 6)
    assert rows_seen(alike, grad=True) == (12, 6)
    assert rows_seen(alike, begun=True) == (12, 6)
    assert rows_seen(alike, past_key_values=None) == (12, 6)
    assert rows_seen(alike, past_key_values=StaticCache(config=model.config, max_cache_len=9)) == (12, 6)
    assert rows_seen(alike, labels=alike) == (12, 6)
    with pytest.raises(ValueError, match="`rows_per_source` must divide the 11 rows"):
        rows_seen(alike[:11])
    handle = model.lm_head.register_forward_hook(lambda *arguments: None)
    assert rows_seen(alike) == (12, 6)
    handle.remove()
    assert rows_seen(alike) == (6, 6)


@pytest.mark.parametrize("decoder", [{}, {"input_feeding": True}], ids=["layers", "steps"])
def test_samples(sources_seen, decoder):
    """Samples of one source, with and without a cache."""
    model = make_model(NAME, **decoder)
    for use_cache in (True, False):
        settings = {"do_sample": True, "num_return_sequences": 4, "max_new_tokens": 5, "use_cache": use_cache}
        results = []
        for paths in (PATHS, PATHS[:1], ["packed_linear"]):
            torch.manual_seed(0)
            with without_fast_paths(*paths):
                results.append(model.generate(**make_sources(), **settings))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
    assert (24, 6) in sources_seen


@pytest.mark.parametrize("decoder", [{}, {"input_feeding": True}, {"decoder_type": "bahdanau"}], ids=case_id)
@pytest.mark.parametrize("score", [name for name in ATTENTION_SCORES if name != "location"])
def test_decoder(decoder, score):
    """Outputs and gradients of several rows for each source, of several positions."""
    model = make_model(NAME, **decoder, attention_score=score).model
    encoder_outputs = model.encoder(**make_sources())
    tokens = torch.randint(1, 7, (12, 4), generator=torch.Generator().manual_seed(0))

    def results(rows, mask, hidden_states, final_states):
        outputs = model.decoder(
            input_ids=tokens,
            encoder_hidden_states=hidden_states,
            encoder_final_states=final_states,
            encoder_attention_mask=mask,
            rows_per_source=rows,
            use_cache=False,
            output_attentions=True,
        )
        (weights,) = outputs.cross_attentions
        total = outputs.last_hidden_state.sin().sum() + weights.square().sum()
        total.backward(retain_graph=True)
        gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad()
        return [outputs.last_hidden_state, weights, *gradients]

    states = (encoder_outputs.last_hidden_state, encoder_outputs.pooler_output)
    actual = results(2, make_mask(), *states)
    expected = results(1, make_mask().repeat_interleave(2, 0), *(part.repeat_interleave(2, 0) for part in states))
    for pair in zip(actual, expected, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-10)


def test_what_is_refused():
    model = make_model(NAME)
    outputs = model.get_encoder()(**make_sources())
    arguments = {
        "encoder_hidden_states": outputs.last_hidden_state,
        "encoder_final_states": outputs.pooler_output,
        "input_ids": torch.ones(12, 1, dtype=torch.long),
    }
    with pytest.raises(ValueError, match=r"`encoder_hidden_states` must have the shape \(12, source"):
        model.model.decoder(**arguments)
    with pytest.raises(ValueError, match=r"`encoder_hidden_states` must have the shape \(4, source"):
        model.model.decoder(**arguments, rows_per_source=3)
    with pytest.raises(ValueError, match=r"`rows_per_source` must divide the 12 rows"):
        model.model.decoder(**arguments, rows_per_source=5)
    covered = make_model(NAME, use_coverage=True).model.decoder
    with pytest.raises(ValueError, match=r"`rows_per_source`.*be 1 where"):
        covered(**arguments, rows_per_source=2)


def test_map_of_queries_with_something_around_it():
    """An adapter or a hook on it has its say at each step."""
    inputs, linear = torch.randn(2, 3, 5), nn.Linear(4, 5, bias=False)
    torch.testing.assert_close(apply_transposed(linear, inputs), inputs @ linear.weight)
    assert apply_transposed(nn.Linear(4, 5), inputs) is None
    with without_fast_paths("keys_for_plain_queries"):
        assert apply_transposed(linear, inputs) is None
    linear.register_forward_hook(lambda module, arguments, output: 2 * output)
    assert apply_transposed(linear, inputs) is None

    model = make_model(NAME)
    query = model.model.decoder.attention.score.query
    calls = []
    handle = query.register_forward_hook(lambda *arguments: calls.append(1))
    model.generate(**make_sources(), max_new_tokens=4, min_new_tokens=4)
    assert len(calls) == 4
    handle.remove()
    assert model.generate(**make_sources(), max_new_tokens=4, min_new_tokens=4).shape == (6, 5)
    assert len(calls) == 4
    # What was kept for a source does not outlive a change of the weights.
    outputs, step = model.get_encoder()(**make_sources()), torch.ones(6, 1, dtype=torch.long)
    with torch.no_grad():
        first = model(encoder_outputs=outputs, decoder_input_ids=step).logits
        query.weight.mul_(-3)
        second = model(encoder_outputs=outputs, decoder_input_ids=step).logits
        with without_fast_paths():
            outputs = BaseModelOutputWithPooling(**{name: value.clone() for name, value in outputs.items()})
            expected = model(encoder_outputs=outputs, decoder_input_ids=step).logits
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, expected, rtol=1e-9, atol=1e-10)
