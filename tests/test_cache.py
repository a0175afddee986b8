"""The recurrent state as a cache: its size, its rows, rolling back, resetting, copies, the twin at fixed addresses."""

import copy
import pickle
import warnings
from dataclasses import fields

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, GPT2Config, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from hf_rnn import RECURRENT_CELLS, RNNConfig
from hf_rnn.recurrent_cache import RecurrentStateLayer, RecurrentStateStaticLayer
from matrix import (
    DECODERS,
    GENERATIVE,
    MODEL_CLASSES,
    case_id,
    cases,
    make_config,
    make_inputs,
    make_mask,
    make_model,
    make_tokens,
)


LAYERS = [RecurrentStateLayer, RecurrentStateStaticLayer]
ROWS, SIZE, REST = 3, 4, 5

# One case for each way in which a class keeps its state: every cell, and every decoder type.
CASES = [(name, options) for name in GENERATIVE for options in ({"cell_type": cell} for cell in RECURRENT_CELLS)]
CASES += [(name, options) for name in GENERATIVE if MODEL_CLASSES[name][0] is not RNNConfig for options in DECODERS[1:]]
CASES += [(name, options | {"cell_type": "gru"}) for name, options in CASES if options in DECODERS[1:]]
# The attention with a state of its own.
ATTENDING = [
    {"decoder_type": "gnmt", "attention_score": "location", "num_attention_heads": 2, "use_coverage": True},
    {"input_feeding": True, "attention_score": "location", "cell_type": "gru"},
]
CASES += [(name, options) for name in GENERATIVE if MODEL_CLASSES[name][0] is not RNNConfig for options in ATTENDING]
over_cases = pytest.mark.parametrize(("name", "options"), CASES, ids=case_id)


def make_states(*shape, seed=0):
    """Random keys and values."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, size, generator=generator) for size in (SIZE, REST))


def make_filled(layer_class, num_tokens=2):
    """A layer after a first text."""
    layer = layer_class(max_cache_len=8)
    layer.update(*make_states(ROWS), num_tokens=num_tokens)
    return layer


def make_cache(model, static=False):
    """An empty cache as `generate` makes it."""
    config = model.config.get_text_config(decoder=True)
    make = (lambda: StaticCache(config=config, max_cache_len=16)) if static else (lambda: DynamicCache(config=config))
    return EncoderDecoderCache(make(), make()) if model.config.is_encoder_decoder else make()


def recurrent_layers(cache):
    """The layers that hold states."""
    return (cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache).layers


@torch.no_grad()
def read(model, tokens, cache, mask=None, rows=None):
    """Logits for tokens, read on from the state in `cache`; of a source whose rows are `rows`, if there is one."""
    if not model.config.is_encoder_decoder:
        return model(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True).logits
    sources, source_mask = make_tokens(6, 7, seed=9), make_mask()
    if rows is None:
        rows = torch.arange(tokens.shape[0])
    return model(
        input_ids=sources[rows],
        attention_mask=source_mask[rows],
        decoder_input_ids=tokens,
        decoder_attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
    ).logits


def assert_equal_states(actual, expected):
    """The same tensors, and the same counters, in every layer."""
    assert len(recurrent_layers(actual)) == len(recurrent_layers(expected)) > 0
    for layer, other in zip(recurrent_layers(actual), recurrent_layers(expected)):
        torch.testing.assert_close(layer.keys, other.keys, rtol=0, atol=1e-12)
        torch.testing.assert_close(layer.values, other.values, rtol=0, atol=1e-12)
        assert int(layer.get_seq_length()) == int(other.get_seq_length())


@pytest.mark.parametrize("name", GENERATIVE)
def test_transformers_builds_the_layers(name):
    """`DynamicCache`, `StaticCache` and the model itself make one layer per recurrent layer of the decoder."""
    sizes = (
        {"num_hidden_layers": 3} if MODEL_CLASSES[name][0] is RNNConfig else {"encoder_layers": 1, "decoder_layers": 3}
    )
    model = make_model(name, **sizes)
    dynamic = make_cache(model)
    read(model, make_tokens(2, 3), dynamic)
    own = model(make_tokens(2, 3), use_cache=True).past_key_values
    for cache in (dynamic, own, DynamicCache(config=model.config)):
        assert [type(layer) for layer in recurrent_layers(cache)] == [RecurrentStateLayer] * 3
    assert [type(layer) for layer in recurrent_layers(make_cache(model, True))] == [RecurrentStateStaticLayer] * 3
    assert isinstance(own, EncoderDecoderCache) == model.config.is_encoder_decoder


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@over_cases
def test_fixed_size(name, options, static):
    """However long the text: one hidden state in keys, all other states in values; then what the attention keeps."""
    model = make_model(name, **options)
    config, rows = model.config, 2
    num_states = len(RECURRENT_CELLS[config.cell_type].state_names)
    cache = make_cache(model, static)
    for length in (1, 3, 60):
        read(model, make_tokens(rows, length), cache)
        layers = recurrent_layers(cache)
        if getattr(config, "attention_has_state", False):
            attended, layers = layers[-1], layers[:-1]
            heads = config.num_attention_heads
            assert attended.keys.shape == (rows, heads, 7)
            others = 7 * config.use_coverage + config.encoder_output_size // heads
            assert attended.values.shape == (rows, heads, others)
        assert len(layers) == getattr(config, "decoder_layers", config.num_hidden_layers)
        for index, layer in enumerate(layers):
            steps = getattr(config, "input_feeding", False) or getattr(config, "decoder_type", None) == "bahdanau"
            fed = index == 0 and steps  # the attentional vector of the step before
            assert layer.keys.shape == (rows, config.hidden_size)
            assert layer.values.shape == (rows, config.hidden_size * (num_states - 1 + fed))
            assert layer.keys.dtype == layer.values.dtype == torch.float64
    assert cache.get_seq_length() == 64


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@over_cases
def test_counts_and_goes_on(name, options, static):
    """A text in pieces, padding included, ends in the state and gives the logits of the whole text."""
    model = make_model(name, **options)
    tokens, mask = make_tokens(6, 7), make_mask()
    whole = make_cache(model)
    expected = read(model, tokens, whole, mask)
    cache = make_cache(model, static)
    start, pieces = 0, []
    for length in (2, 1, 4):
        assert int(cache.get_seq_length()) == start
        pieces.append(read(model, tokens[:, start : start + length], cache, mask[:, : start + length]))
        start += length
    is_token = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, dim=1)[is_token], expected[is_token], rtol=0, atol=1e-12)
    assert_equal_states(cache, whole)


@pytest.mark.parametrize("layer_class", LAYERS)
def test_lengths(layer_class):
    """What a layer says of itself."""
    layer = layer_class(max_cache_len=8)
    assert layer.get_seq_length() == 0
    assert layer.get_mask_sizes(4) == (4, 0)
    layer = make_filled(layer_class)
    layer.update(*make_states(ROWS, seed=1), num_tokens=3)
    assert int(layer.get_seq_length()) == 5
    length, offset = layer.get_mask_sizes(4)
    assert (int(length), offset) == (9, 0)
    assert layer.get_max_length() == -1
    assert layer.is_compileable
    assert layer.is_croppable
    assert not layer.is_sliding
    assert not layer.supports_early_init


@pytest.mark.parametrize("layer_class", LAYERS)
def test_batch_size(layer_class):
    """There is none before the first text, which transformers writes as -1."""
    cache = DynamicCache(config=make_config("RNNForCausalLM"))
    cache.layers = [layer_class(max_cache_len=8) for _ in cache.layers]
    assert not hasattr(cache.layers[0], "batch_size")
    assert cache.batch_size == -1
    for layer in cache.layers:
        layer.update(*make_states(ROWS))
    assert cache.batch_size == ROWS
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 2 * ROWS


@pytest.mark.parametrize("layer_class", LAYERS)
def test_rows(layer_class):
    """Rows reordered, repeated and selected, by position or by mask, with the recorded states too."""
    changes = {
        "reorder_cache": (torch.tensor([2, 0, 0]), [2, 0, 0]),
        "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2]),
        "batch_select_indices": (torch.tensor([2, 1]), [2, 1]),
    }
    masked = {"batch_select_indices": (torch.tensor([True, False, True]), [0, 2])}
    for method, (argument, rows) in [*changes.items(), *masked.items()]:
        layer = make_filled(layer_class)
        layer.activate_past_recording()
        first = make_states(ROWS)
        steps = make_states(2, ROWS, seed=1)
        layer.update(*(states[-1] for states in steps), num_tokens=2, history=steps, initial=first)
        getattr(layer, method)(argument)
        assert torch.equal(layer.keys, steps[0][-1][rows])
        assert torch.equal(layer.values, steps[1][-1][rows])
        assert int(layer.get_seq_length()) == 4
        layer.crop(-1)
        assert torch.equal(layer.keys, steps[0][0][rows])
        assert torch.equal(layer.values, steps[1][0][rows])


@pytest.mark.parametrize("layer_class", LAYERS)
def test_rows_of_an_empty_layer(layer_class):
    """Before the first text there is nothing to reorder, and nothing happens."""
    layer = layer_class(max_cache_len=8)
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.batch_repeat_interleave(3)
    layer.batch_select_indices(torch.tensor([0]))
    layer.offload()
    layer.prefetch()
    layer.crop(0)
    layer.reset()
    assert layer.get_seq_length() == 0
    assert not layer.is_initialized


@over_cases
def test_rows_of_a_model(name, options):
    """A state whose rows were moved goes on as if the text had stood in these rows from the start."""
    model = make_model(name, **options)
    tokens, mask, more = make_tokens(6, 7), make_mask(), make_tokens(12, 2, seed=1)
    changes = [
        ("reorder_cache", torch.tensor([5, 3, 3, 0, 1, 2]), [5, 3, 3, 0, 1, 2]),
        ("batch_repeat_interleave", 2, [row for row in range(6) for _ in range(2)]),
        ("batch_select_indices", torch.tensor([4, 1]), [4, 1]),
    ]
    for method, argument, rows in changes:
        cache, expected = make_cache(model), make_cache(model)
        read(model, tokens, cache, mask)
        getattr(cache, method)(argument)
        read(model, tokens[rows], expected, mask[rows], rows)
        assert_equal_states(cache, expected)
        actual_logits = read(model, more[: len(rows)], cache, None, rows)
        expected_logits = read(model, more[: len(rows)], expected, None, rows)
        torch.testing.assert_close(actual_logits, expected_logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@over_cases
def test_rolling_back(name, options, static):
    """After any number of calls a state taken back by n tokens is one that never saw them."""
    model = make_model(name, **options)
    tokens, mask = make_tokens(6, 7), make_mask()
    lengths = [2, 1, 4]
    for first_recorded in range(len(lengths) + 1):
        recorded = sum(lengths[first_recorded:])
        for removed in range(recorded + 1):
            cache, expected = make_cache(model, static), make_cache(model)
            start = 0
            for call, length in enumerate(lengths):
                if call == first_recorded:
                    cache.activate_past_recording()
                read(model, tokens[:, start : start + length], cache, mask[:, : start + length])
                start += length
            crop(cache, -removed)
            kept = start - removed
            if kept:
                read(model, tokens[:, :kept], expected, mask[:, :kept])
            else:
                # Back at the beginning: the state is the one that a text starts from.
                assert cache.get_seq_length() == 0
                cache_logits = read(model, tokens[:, :3], cache, mask[:, :3])
                torch.testing.assert_close(
                    cache_logits, read(model, tokens[:, :3], expected, mask[:, :3]), rtol=0, atol=1e-12
                )
            assert_equal_states(cache, expected)


def crop(cache, tokens):
    """Of every layer, because a pair of static caches refuses it."""
    for layer in recurrent_layers(cache):
        layer.crop(tokens)


@over_cases
def test_rolling_back_again_and_again(name, options):
    """Recording goes on after a roll-back, which is what assisted decoding does."""
    model = make_model(name, **options)
    tokens, wrong = make_tokens(6, 7), make_tokens(6, 7, seed=8)
    cache, expected = make_cache(model), make_cache(model)
    read(model, tokens[:, :2], cache)
    cache.activate_past_recording()
    read(model, tokens, expected)
    for position in range(2, 6):
        # One right token, then three proposals that are refused.
        proposal = torch.cat([tokens[:, position : position + 1], wrong[:, :3]], dim=1)
        read(model, proposal, cache)
        cache.crop(-3)
    read(model, tokens[:, 6:], cache)
    assert_equal_states(cache, expected)


@pytest.mark.parametrize("layer_class", LAYERS)
def test_crop_refuses(layer_class):
    """What cannot be taken back is an error, and changes nothing."""
    layer = make_filled(layer_class)
    with pytest.raises(ValueError, match="zero or negative, got 2"):
        layer.crop(2)
    with pytest.raises(RuntimeError, match=r"by 1 tokens: 0 were recorded.*activate_past_recording"):
        layer.crop(-1)
    layer.activate_past_recording()
    steps = make_states(2, ROWS, seed=1)
    for removed in (-3, 1):
        layer.update(*(states[-1] for states in steps), num_tokens=2, history=steps, initial=make_states(ROWS))
        length = int(layer.get_seq_length())
        with pytest.raises((RuntimeError, ValueError)):
            layer.crop(removed)
        assert int(layer.get_seq_length()) == length
        assert torch.equal(layer.keys, steps[0][-1])
        # Nothing to take back, but what was recorded is forgotten.
        layer.crop(0)
        with pytest.raises(RuntimeError):
            layer.crop(-1)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@over_cases
def test_reset(name, options, static):
    """A cache that was reset is as good as a new one, for another number of rows too."""
    model = make_model(name, **options)
    cache = make_cache(model, static)
    cache.activate_past_recording()
    read(model, make_tokens(6, 5), cache)
    for rows in (6, 2) if not static else (6,):
        cache.reset()
        assert cache.get_seq_length() == 0
        expected = make_cache(model)
        tokens = make_tokens(rows, 3, seed=1)
        expected_logits = read(model, tokens, expected)
        torch.testing.assert_close(read(model, tokens, cache), expected_logits, rtol=0, atol=1e-12)
        assert_equal_states(cache, expected)
        # What was recorded before is gone with the rest.
        with pytest.raises(RuntimeError):
            crop(cache, -4)


@over_cases
def test_static_addresses(name, options):
    """The twin for compiled decoding writes in place: whatever happens to the text, addresses stay."""
    model = make_model(name, **options)
    cache = make_cache(model, static=True)
    read(model, make_tokens(6, 5), cache)

    def addresses():
        return [
            tensor.data_ptr()
            for layer in recurrent_layers(cache)
            for tensor in (layer.keys, layer.values, layer.cumulative_length)
        ]

    expected = addresses()
    read(model, make_tokens(6, 1), cache)
    assert addresses() == expected
    cache.reorder_cache(torch.tensor([3, 3, 1, 0, 5, 4]))
    assert addresses() == expected
    cache.activate_past_recording()
    read(model, make_tokens(6, 4), cache)
    crop(cache, -2)
    assert addresses() == expected
    cache.reset()
    assert addresses() == expected
    read(model, make_tokens(6, 3), cache)
    assert addresses() == expected


def test_static_layer_owns_its_tensors():
    """Writing in place reaches neither what was given nor what another layer was given."""
    keys, values = make_states(ROWS)
    layers = [RecurrentStateStaticLayer(max_cache_len=8) for _ in range(2)]
    for layer in layers:
        layer.update(keys, values)
    layers[0].update(*make_states(ROWS, seed=1))
    assert torch.equal(layers[1].keys, keys)
    assert torch.equal(keys, make_states(ROWS)[0])


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("name", GENERATIVE)
def test_copies(name, static, make_copy):
    """A copy goes on by itself, recording included."""
    for options in ({}, *DECODERS[1:]) if MODEL_CLASSES[name][0] is not RNNConfig else ({}, {"cell_type": "gru"}):
        model = make_model(name, **options)
        cache, expected = make_cache(model, static), make_cache(model)
        read(model, make_tokens(6, 2), cache)
        cache.activate_past_recording()
        read(model, make_tokens(6, 2, seed=1), cache)
        copied = make_copy(cache)
        assert type(copied) is type(cache)
        assert_equal_states(copied, cache)
        read(model, make_tokens(6, 3, seed=2), cache)
        crop(copied, -2)
        read(model, make_tokens(6, 2), expected)
        assert_equal_states(copied, expected)
        crop(cache, -5)
        assert_equal_states(cache, expected)


@over_cases
def test_caches_made_without_a_configuration(name, options):
    """`DynamicCache()` does not know its layers beforehand."""
    model = make_model(name, **options)
    tokens = make_tokens(6, 5)
    expected = make_cache(model)
    expected_logits = read(model, tokens, expected)
    caches = [DynamicCache()]
    if model.config.is_encoder_decoder:
        caches.append(EncoderDecoderCache(DynamicCache(), DynamicCache()))
        # A single cache is the one of the decoder.
        caches.append(DynamicCache(config=model.config.get_text_config(decoder=True)))
    for cache in caches:
        first = read(model, tokens[:, :2], cache)
        logits = torch.cat([first, read(model, tokens[:, 2:], cache)], dim=1)
        torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-12)
        assert_equal_states(cache, expected)


@pytest.mark.parametrize("name", GENERATIVE)
def test_other_caches_are_refused(name):
    """Keys and values of attention are no states."""
    model = make_model(name)
    attention = DynamicCache(config=GPT2Config(n_layer=2))
    static_attention = StaticCache(config=GPT2Config(n_layer=2), max_cache_len=4)
    caches = [attention, static_attention]
    if model.config.is_encoder_decoder:
        caches.append(EncoderDecoderCache(attention, make_cache(model).cross_attention_cache))
    for cache in caches:
        with pytest.raises(TypeError, match=r"recurrent states.*Static|recurrent states.*Dynamic") as error:
            read(model, make_tokens(2, 3), cache)
        assert "DynamicCache(config=model.config)" in str(error.value)


@torch.no_grad()
@pytest.mark.parametrize("name", GENERATIVE)
def test_cache_has_two_names(name):
    """`cache`, as transformers calls it since 5.24, is `past_key_values`; the output class has it by both names."""
    model = make_model(name)
    first, then = make_inputs(name, with_labels=False), make_inputs(name, with_labels=False, seed=5)
    wanted = model(**then, past_key_values=model(**first, use_cache=True).past_key_values)[0]
    state = model(**first, use_cache=True).past_key_values
    assert torch.equal(model(**then, cache=state)[0], wanted)
    assert not torch.equal(model(**then)[0], wanted)
    with pytest.raises(ValueError, match="`past_key_values` or `cache`, not both"):
        model(**then, past_key_values=state, cache=state)


@torch.no_grad()
@pytest.mark.parametrize("name", GENERATIVE)
def test_the_older_name_is_warned_of_as_in_transformers(name):
    """Once where it is given, by transformers that has another name for it; never by what the library does itself."""
    model, inputs = make_model(name), make_inputs(name, with_labels=False)
    state = model(**inputs, use_cache=True)[1]
    warned = []
    for keyword in ("past_key_values", "cache"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(**inputs, **{keyword: state})
        warned.append(sum(f"`{keyword}` is deprecated" in str(warning.message) for warning in caught))
        assert not [warning for warning in caught if issubclass(warning.category, FutureWarning)] or warned[-1]
    has_new_name = "cache" in {field.name for field in fields(BaseModelOutputWithPast)}
    assert warned == [int(has_new_name), 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=3)


@pytest.mark.parametrize("name", GENERATIVE)
def test_whose_cache_is_filled(name):
    """A cache that is given is filled and returned; with `use_cache=False` it is read and left as it is."""
    model = make_model(name)
    tokens, more = make_tokens(6, 4), make_tokens(6, 2, seed=1)
    key = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    source = {"input_ids": make_tokens(6, 7, seed=9)} if model.config.is_encoder_decoder else {}
    cache = make_cache(model)
    output = model(**(source | {key: tokens}), past_key_values=cache)
    assert output.past_key_values is cache
    before = copy.deepcopy([(layer.keys.detach(), layer.values.detach()) for layer in recurrent_layers(cache)])
    output = model(**(source | {key: more}), past_key_values=cache, use_cache=False)
    assert output.past_key_values is None
    assert cache.get_seq_length() == 4
    for layer, (keys, values) in zip(recurrent_layers(cache), before):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    whole = model(**(source | {key: torch.cat([tokens, more], dim=1)}))
    torch.testing.assert_close(output.logits, whole.logits[:, 4:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer_class", LAYERS)
def test_offloading(layer_class):
    """Where the state is on the CPU already there is nothing to move."""
    layer = make_filled(layer_class)
    keys, values, address = layer.keys.clone(), layer.values.clone(), layer.keys.data_ptr()
    layer.offload()
    layer.prefetch()
    assert torch.equal(layer.keys, keys)
    assert torch.equal(layer.values, values)
    assert layer.keys.data_ptr() == address


def test_cases_cover_the_matrix():
    """Every cell and decoder type of the matrix has a case here."""
    for field in ("cell_type", "decoder_type", "input_feeding"):
        for name in GENERATIVE:
            present = {options.get(field) for case, options in CASES if case == name}
            assert {options.get(field) for _, options in cases(name)} - {None, "luong"} <= present
