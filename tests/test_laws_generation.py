"""Law 4: whatever way a text is generated, the cache gives what there is without it, and a row what it gives alone."""

import copy
import functools

import pytest
import torch
from transformers import CompileConfig, StaticCache, set_seed
from transformers.generation.streamers import BaseStreamer

from hf_rnn import RNNConfig
from hf_rnn.recurrent_cache import RecurrentStateLayer, RecurrentStateStaticLayer
from matrix import DECODERS, GENERATIVE, MODEL_CLASSES, PAD, case_id, make_model, make_tokens, options_of


NEW_TOKENS = 6
BATCH, PROMPT_LENGTH = 4, 5


def make_groups():
    """Every option of every generative class, in a few groups that a test loops over: one for each decoder type."""
    groups = {}
    for name in GENERATIVE:
        for options in options_of(name):
            kind = next(
                (d for d in reversed(DECODERS) if d.items() <= ({"decoder_type": "luong"} | options).items()), {}
            )
            key = name if MODEL_CLASSES[name][0] is RNNConfig else f"{name}-{case_id(kind)}"
            groups.setdefault(key, []).append((name, options))
    return groups


GROUPS = make_groups()


LANGUAGE_MODELS = [key for key, ((name, _), *_) in GROUPS.items() if MODEL_CLASSES[name][0] is RNNConfig]
TRANSLATORS = [key for key in GROUPS if key not in LANGUAGE_MODELS]


@pytest.fixture(params=list(GROUPS))
def models(request):
    """The models of a group, whose texts have the length that is asked for."""
    return [make_open_ended(name, **options) for name, options in GROUPS[request.param]]


@pytest.fixture(params=LANGUAGE_MODELS)
def language_models(request):
    """The same, but language models only."""
    return [make_open_ended(name, **options) for name, options in GROUPS[request.param]]


@pytest.fixture(params=TRANSLATORS)
def translators(request):
    """The same, but those with an encoder only."""
    return [make_open_ended(name, **options) for name, options in GROUPS[request.param]]


@functools.cache
def make_cached_model(name, items):
    return make_model(name, **dict(items))


def make_open_ended(name, **options):
    """A model that has no end-of-sequence token, so that texts have the length that is asked for."""
    model = make_cached_model(name, tuple(options.items()))
    model.generation_config.eos_token_id = None
    return model


def is_seq2seq(model):
    return model.config.is_encoder_decoder


def make_mask(*paddings, length=PROMPT_LENGTH):
    """A mask with one row for each set of padded positions."""
    mask = torch.ones(len(paddings), length, dtype=torch.long)
    for row, positions in enumerate(paddings):
        mask[row, list(positions)] = 0
    return mask


LEFT = make_mask((), (0, 1), (0,), (0, 1, 2, 3))
RIGHT = make_mask((), (3, 4), (4,), (1, 2, 3, 4))
MIDDLE = make_mask((), (1, 2), (0, 2, 4), (3,))


def make_prompts(model, mask=LEFT, target_mask=None, seed=0):
    """
    Arguments of `generate`: for a language model a prompt padded by `mask`, for a translator a source padded by `mask`
    and the beginning of a target padded by `target_mask`.
    """
    prompts = {"input_ids": make_tokens(*mask.shape, seed=seed), "attention_mask": mask}
    if is_seq2seq(model) and target_mask is not None:
        prompts["decoder_input_ids"] = make_tokens(*target_mask.shape, seed=seed + 1)
        # What does not begin with the start token would get one in front of it.
        first = target_mask.argmax(dim=1, keepdim=True)
        prompts["decoder_input_ids"].scatter_(1, first, model.config.decoder_start_token_id)
        prompts["decoder_attention_mask"] = target_mask
    return prompts


def take_row(prompts, row):
    """One row of the arguments, without its padding."""
    alone = {}
    for ids, mask in [("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")]:
        if ids in prompts:
            alone[ids] = prompts[ids][row : row + 1, prompts[mask][row].bool()]
            alone[mask] = torch.ones_like(alone[ids])
    return alone


def prompt_length(model, prompts):
    """Number of columns that come before what is generated."""
    if not is_seq2seq(model):
        return prompts["input_ids"].shape[1]
    return prompts["decoder_input_ids"].shape[1] if "decoder_input_ids" in prompts else 1


def generate(model, prompts, seed=0, **options):
    """A whole output of `generate` with the scores of every step."""
    set_seed(seed)
    defaults = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": PAD}
    return model.generate(
        **(defaults | prompts | options), return_dict_in_generate=True, output_scores=True, output_logits=True
    )


def assert_same(actual, expected):
    """The same tokens exactly, and the same scores as near as float32, in which `generate` computes them, allows."""
    assert actual.sequences.tolist() == expected.sequences.tolist()
    assert len(actual.logits) == len(expected.logits)
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.stack(actual.scores), torch.stack(expected.scores), rtol=1e-5, atol=1e-5)
    assert (actual.get("sequences_scores") is None) == (expected.get("sequences_scores") is None)
    if actual.get("sequences_scores") is not None:
        torch.testing.assert_close(actual.sequences_scores, expected.sequences_scores, rtol=1e-6, atol=1e-6)
        assert actual.beam_indices.tolist() == expected.beam_indices.tolist()


def check(model, prompts, **options):
    """Generates with the cache and without, compares, and returns the result."""
    cached = generate(model, prompts, use_cache=True, **options)
    assert_same(cached, generate(model, prompts, use_cache=False, **options))
    return cached


def check_rows(model, prompts, **options):
    """As `check`, and compares every row, with what it returns, to the row generated alone."""
    batch = check(model, prompts, **options)
    num_rows = prompts["attention_mask"].shape[0]
    start = prompt_length(model, prompts)
    sequences = batch.sequences[:, start:].unflatten(0, (num_rows, -1))
    for row in range(num_rows):
        alone_prompts = take_row(prompts, row)
        alone = generate(model, alone_prompts, **options)
        alone_sequences = alone.sequences[:, prompt_length(model, alone_prompts) :]
        assert sequences[row].tolist() == alone_sequences.tolist()
        if batch.get("sequences_scores") is None:
            logits = torch.stack(batch.logits)[:, row]
            torch.testing.assert_close(logits, torch.stack(alone.logits)[:, 0], rtol=1e-6, atol=1e-6)
        else:
            scores = batch.sequences_scores.unflatten(0, (num_rows, -1))[row]
            torch.testing.assert_close(scores, alone.sequences_scores, rtol=1e-6, atol=1e-6)
    return batch


@pytest.mark.parametrize("mask", [LEFT, RIGHT, MIDDLE], ids=["left", "right", "middle"])
def test_greedy(models, mask):
    """A padded batch gives row by row what the rows give alone, wherever the padding of prompt or source lies."""
    different_logits = set()
    for model in models:
        output = check_rows(model, make_prompts(model, mask))
        assert output.sequences.shape == (BATCH, prompt_length(model, make_prompts(model, mask)) + NEW_TOKENS)
        different_logits |= {len(torch.stack(output.logits)[:, row].unique(dim=0)) for row in range(BATCH)}
    assert max(different_logits) > 2, "Every step had the same logits: the models are too dull to show anything."


@pytest.mark.parametrize("target_mask", [LEFT, RIGHT, MIDDLE], ids=["left", "right", "middle"])
def test_beginning_of_a_target(translators, target_mask):
    """A translator goes on from beginnings of the target of different lengths."""
    for model in translators:
        check_rows(model, make_prompts(model, RIGHT, target_mask))


def test_empty_rows(models):
    """A row of nothing but padding generates from the initial state, whatever stands at the padding."""
    mask = torch.cat([LEFT[:2], torch.zeros_like(LEFT[:1])])
    for model in models:
        prompts = make_prompts(model, mask)
        expected = check(model, prompts)
        prompts["input_ids"] = prompts["input_ids"].clone()
        prompts["input_ids"][2] = make_tokens(PROMPT_LENGTH, seed=9)
        actual = check(model, prompts)
        new_tokens = slice(prompt_length(model, prompts), None)
        assert actual.sequences[:, new_tokens].tolist() == expected.sequences[:, new_tokens].tolist()
        torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), rtol=1e-6, atol=1e-6)


def test_sampling(models):
    """With the same seed the same samples, one for each row and several."""
    for model in models:
        prompts = make_prompts(model)
        samples = [check(model, prompts, do_sample=True, seed=seed).sequences for seed in range(2)]
        assert samples[0].tolist() != samples[1].tolist()
        several = check(model, prompts, do_sample=True, top_k=10, temperature=0.7, num_return_sequences=3)
        assert several.sequences.shape[0] == 3 * BATCH


def test_beams(models):
    """Beam search keeps every hypothesis with its own state, in batches as alone."""
    reordered = False
    for model in models:
        prompts = make_prompts(model)
        output = check_rows(model, prompts, num_beams=3, num_return_sequences=2)
        assert output.sequences.shape[0] == 2 * BATCH
        scores = output.sequences_scores.view(BATCH, 2)
        assert (scores[:, 0] >= scores[:, 1]).all()
        # Each row owns three hypotheses; another order than the first means that states changed places.
        own = output.beam_indices % 3
        reordered |= bool((own != own[:, :1])[output.beam_indices >= 0].any())
    assert reordered, "No hypothesis ever changed its place."


def test_beams_find_at_least_what_greedy_finds(models):
    """The scores that beam search reports are the log-probabilities of what it returns."""
    for model in models:
        prompts = make_prompts(model, RIGHT)
        output = generate(model, prompts, num_beams=3, length_penalty=0.0)
        inputs = {"input_ids": output.sequences, "attention_mask": None}
        if is_seq2seq(model):
            inputs = {"decoder_input_ids": output.sequences} | prompts
        else:
            ones = torch.ones(BATCH, NEW_TOKENS, dtype=torch.long)
            inputs["attention_mask"] = torch.cat([prompts["attention_mask"], ones], dim=1)
        with torch.no_grad():
            log_probabilities = model(**inputs).logits[:, -NEW_TOKENS - 1 : -1].log_softmax(-1)
        chosen = log_probabilities.gather(2, output.sequences[:, -NEW_TOKENS:, None]).sum(dim=(1, 2))
        torch.testing.assert_close(output.sequences_scores.double(), chosen, rtol=1e-5, atol=1e-5)


def test_beam_sampling(models):
    """Beams that are sampled."""
    for model in models:
        options = {"num_beams": 3, "do_sample": True, "num_return_sequences": 3}
        output = check(model, make_prompts(model), **options)
        assert output.sequences.shape[0] == 3 * BATCH


def test_rows_end_at_different_steps(models):
    """A row that met its end is filled up with padding, which changes nothing for the others."""
    ended_early = 0
    for model in models:
        prompts = make_prompts(model)
        start = prompt_length(model, prompts)
        free = generate(model, prompts).sequences[:, start:]
        end = free[0, NEW_TOKENS // 2].item()
        expected = free.clone()
        for row in expected:
            found = (row == end).nonzero().flatten().tolist()
            if found:
                row[found[0] + 1 :] = PAD
                ended_early += found[0] < NEW_TOKENS - 1
        actual = check(model, prompts, eos_token_id=end).sequences[:, start:]
        width = actual.shape[1]
        assert actual.tolist() == expected[:, :width].tolist()
        assert (expected[:, width:] == PAD).all()
        check_rows_with_end(model, prompts, end)
    assert ended_early > 0


def check_rows_with_end(model, prompts, end):
    """Beams whose hypotheses end at different steps: the batch against rows alone, which may be shorter."""
    options = {"eos_token_id": end, "num_beams": 3, "num_return_sequences": 2}
    batch = check(model, prompts, **options)
    start = prompt_length(model, prompts)
    for row in range(BATCH):
        alone_prompts = take_row(prompts, row)
        alone = generate(model, alone_prompts, **options)
        for index in range(2):
            together = batch.sequences[2 * row + index, start:].tolist()
            expected = alone.sequences[index, prompt_length(model, alone_prompts) :].tolist()
            assert together[: len(expected)] == expected
            assert set(together[len(expected) :]) <= {PAD}
        scores = batch.sequences_scores[2 * row : 2 * row + 2]
        torch.testing.assert_close(scores, alone.sequences_scores, rtol=1e-6, atol=1e-6)


def test_prompts_of_embeddings(models):
    """Embeddings of a prompt or a source generate what its tokens do."""
    for model in models:
        prompts = make_prompts(model)
        embeddings = model.get_input_embeddings()(prompts["input_ids"]).detach()
        others = {"attention_mask": prompts["attention_mask"], "inputs_embeds": embeddings}
        for options in [{}, {"num_beams": 3, "num_return_sequences": 2}]:
            expected = check(model, prompts, **options)
            actual = generate(model, others, **options)
            if not is_seq2seq(model):
                # Only what is new comes back where the prompt has no tokens.
                expected.sequences = expected.sequences[:, PROMPT_LENGTH:]
            assert_same(actual, expected)


def test_prompts_of_embeddings_beside_their_tokens(language_models):
    """Where the tokens are given too they come back with the text, and the embeddings are what is read."""
    for model in language_models:
        prompts = make_prompts(model)
        other_tokens = make_tokens(*LEFT.shape, seed=5)
        embeddings = model.get_input_embeddings()(other_tokens).detach()
        actual = generate(model, prompts | {"inputs_embeds": embeddings})
        expected = generate(model, prompts | {"input_ids": other_tokens})
        assert actual.sequences[:, :PROMPT_LENGTH].tolist() == prompts["input_ids"].tolist()
        assert actual.sequences[:, PROMPT_LENGTH:].tolist() == expected.sequences[:, PROMPT_LENGTH:].tolist()


class CollectingStreamer(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self):
        self.tokens = []
        self.ended = False

    def put(self, value):
        assert not self.ended
        self.tokens.extend(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_streaming(models):
    """A streamer sees the prompt, then every token as it comes."""
    for model in models:
        prompts = take_row(make_prompts(model), 1)
        expected = generate(model, prompts).sequences[0].tolist()
        for use_cache in [True, False]:
            streamer = CollectingStreamer()
            generate(model, prompts, streamer=streamer, use_cache=use_cache)
            assert streamer.tokens == expected
            assert streamer.ended


@pytest.fixture
def crops(monkeypatch):
    """The numbers of tokens that recurrent states were taken back by."""
    calls = []
    crop = RecurrentStateLayer.crop

    def recorded_crop(self, tokens_to_remove):
        calls.append(-int(tokens_to_remove))
        crop(self, tokens_to_remove)

    monkeypatch.setattr(RecurrentStateLayer, "crop", recorded_crop)
    return calls


def make_assistants(model, options):
    """A smaller model, which is nearly always wrong, and a noisy copy, which is often right."""
    name = type(model).__name__
    smaller = make_open_ended(name, **(options | {"hidden_size": 4, "seed": 1}))
    noisy = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in noisy.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    for assistant in (smaller, noisy):
        assistant.generation_config.num_assistant_tokens = 4
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        assistant.generation_config.assistant_confidence_threshold = 0.0
    return smaller, noisy


@pytest.mark.parametrize("group", GROUPS.values(), ids=list(GROUPS))
def test_assisted(group, crops):
    """Whatever an assistant proposes, the text is that of greedy decoding."""
    for name, options in group:
        model = make_open_ended(name, **options)
        for assistant in make_assistants(model, options):
            prompts = take_row(make_prompts(model), 1)
            expected = generate(model, prompts, max_new_tokens=12)
            assert_same(generate(model, prompts, max_new_tokens=12, assistant_model=assistant), expected)
    assert {0, 1, 2, 4} <= set(crops), f"Proposals were never accepted in part: {sorted(set(crops))}."


def test_prompt_lookup(models, crops):
    """Proposals copied from the text before change nothing."""
    for model in models:
        pattern = [5, 7, 11, 5, 7, 13, 5, 7]
        prompts = take_row(make_prompts(model), 0)
        key = "decoder_input_ids" if is_seq2seq(model) else "input_ids"
        prompts[key] = torch.tensor([[model.config.decoder_start_token_id if is_seq2seq(model) else 0, *pattern]])
        prompts[key.replace("input_ids", "attention_mask")] = torch.ones_like(prompts[key])
        expected = check(model, prompts, max_new_tokens=14)
        actual = generate(model, prompts, max_new_tokens=14, prompt_lookup_num_tokens=3, max_matching_ngram_size=2)
        assert_same(actual, expected)
    assert max(crops) > 0
    assert min(crops) == 0


def full_mask(prompts, key, length):
    """The mask of a prompt, with ones behind it up to `length`."""
    mask = prompts.get(key)
    if mask is None:
        return torch.ones(BATCH, length, dtype=torch.long)
    return torch.cat([mask, mask.new_ones(BATCH, length - mask.shape[1])], dim=1)


def continued(model, prompts, sequences):
    """The arguments of `generate` that go on from `sequences`, which began with `prompts`."""
    ids, mask = "input_ids", "attention_mask"
    if is_seq2seq(model):
        ids, mask = "decoder_input_ids", "decoder_attention_mask"
    return prompts | {ids: sequences, mask: full_mask(prompts, mask, sequences.shape[1])}


@pytest.mark.parametrize("target_mask", [None, LEFT], ids=["begun", "prompted"])
def test_going_on_from_a_kept_cache(models, target_mask):
    """The cache of one call, with all the tokens so far, goes on where the call ended, in many calls as one likes."""
    for model in models:
        prompts = make_prompts(model, LEFT, target_mask)
        expected = check(model, prompts, max_new_tokens=9).sequences
        output = generate(model, prompts, max_new_tokens=3)
        for new_tokens in [1, 5]:
            assert output.sequences.tolist() == expected[:, : output.sequences.shape[1]].tolist()
            cache = output.past_key_values
            assert cache.get_seq_length() == output.sequences.shape[1] - 1
            arguments = continued(model, prompts, output.sequences)
            output = generate(model, arguments, past_key_values=cache, max_new_tokens=new_tokens)
        assert output.sequences.tolist() == expected.tolist()


def test_going_on_with_new_text(models):
    """Between two calls a text may grow: a second question, of different lengths in the rows of a batch."""
    for model in models:
        prompts = make_prompts(model)
        output = generate(model, prompts, max_new_tokens=3)
        longer = torch.cat([output.sequences, make_tokens(BATCH, PROMPT_LENGTH, seed=3)], dim=1)
        arguments = continued(model, prompts, longer)
        mask = "decoder_attention_mask" if is_seq2seq(model) else "attention_mask"
        arguments[mask] = arguments[mask].clone()
        arguments[mask][:, -PROMPT_LENGTH:] = LEFT
        expected = check(model, arguments)
        actual = generate(model, arguments, past_key_values=output.past_key_values)
        assert_same(actual, expected)


@pytest.mark.parametrize("num_new", [1, 4])
def test_going_on_with_new_text_alone(language_models, num_new):
    """Beside a cache it is enough to give the new tokens, if the mask covers the old ones too."""
    for model in language_models:
        prompts = make_prompts(model)
        output = generate(model, prompts, max_new_tokens=3)
        new_tokens = make_tokens(BATCH, num_new, seed=3)
        arguments = continued(model, prompts, torch.cat([output.sequences, new_tokens], dim=1))
        arguments["attention_mask"][:, -num_new:][1, 0] = 0
        expected = check(model, arguments)
        last = output.sequences[:, -1:]
        arguments["input_ids"] = torch.cat([last, new_tokens], dim=1)
        actual = generate(model, arguments, past_key_values=output.past_key_values)
        assert actual.sequences[:, num_new + 1 :].tolist() == expected.sequences[:, -NEW_TOKENS:].tolist()


def test_going_on_from_one_new_token_that_is_padding(language_models):
    """In the first step of a call a single token is read as the mask says."""
    for model in language_models:
        prompts = make_prompts(model)
        with torch.no_grad():
            cache = model(**prompts, use_cache=True).past_key_values
        arguments = continued(model, prompts, torch.cat([prompts["input_ids"], make_tokens(BATCH, 1, seed=4)], dim=1))
        arguments["attention_mask"][1:3, -1] = 0
        expected = check(model, arguments)
        assert_same(generate(model, arguments, past_key_values=cache), expected)


@pytest.mark.parametrize("chunk_size", [1, 2, 3])
def test_chunked_prefill(language_models, chunk_size):
    """A prompt read in pieces."""
    for model in language_models:
        for mask in (LEFT, MIDDLE):
            prompts = make_prompts(model, mask)
            for options in [{}, {"num_beams": 3, "num_return_sequences": 2}]:
                expected = check(model, prompts, **options)
                assert_same(generate(model, prompts, prefill_chunk_size=chunk_size, **options), expected)


def test_static_cache(models):
    """The cache with fixed addresses."""
    for model in models:
        prompts = make_prompts(model)
        for options in [{}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True}]:
            expected = generate(model, prompts, **options)
            actual = generate(model, prompts, cache_implementation="static", **options)
            assert_same(actual, expected)
            cache = actual.past_key_values
            cache = cache.self_attention_cache if is_seq2seq(model) else cache
            assert all(isinstance(layer, RecurrentStateStaticLayer) for layer in cache.layers)


def test_static_cache_goes_on_and_is_used_again(language_models):
    """A static cache made by hand: kept for a second call, and after a reset for another text."""
    for model in language_models:
        cache = StaticCache(config=model.config, max_cache_len=64)
        for seed in range(2):
            prompts = make_prompts(model, seed=seed)
            expected = check(model, prompts, max_new_tokens=8).sequences
            output = generate(model, prompts, past_key_values=cache, max_new_tokens=3)
            arguments = continued(model, prompts, output.sequences)
            output = generate(model, arguments, past_key_values=cache, max_new_tokens=5)
            assert output.sequences.tolist() == expected.tolist()
            cache.reset()


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("use_cache", [True, False])
def test_what_generate_returns_on_request(models, num_beams, use_cache):
    """Hidden states and attentions of every step have one entry per layer and the sizes of what the step read."""
    for model in models:
        config = model.config
        prompts = make_prompts(model)
        options = {"output_attentions": True, "output_hidden_states": True, "num_beams": num_beams}
        output = generate(model, prompts, use_cache=use_cache, **options)
        rows, start = BATCH * num_beams, prompt_length(model, prompts)
        hidden_states = output.decoder_hidden_states if is_seq2seq(model) else output.hidden_states
        num_layers = config.decoder_layers if is_seq2seq(model) else config.num_hidden_layers
        assert len(hidden_states) == NEW_TOKENS
        for step, states in enumerate(hidden_states):
            length = start + step if step == 0 or not use_cache else 1
            assert len(states) == num_layers + 1
            assert states[0].shape == (rows, length, config.embedding_size)
            assert all(state.shape == (rows, length, config.hidden_size) for state in states[1:])
        if not is_seq2seq(model):
            continue
        assert len(output.encoder_hidden_states) == config.encoder_layers + 1
        assert len(output.cross_attentions) == NEW_TOKENS
        mask = prompts["attention_mask"].repeat_interleave(num_beams, dim=0)
        for step, (weights,) in enumerate(output.cross_attentions):
            length = start + step if step == 0 or not use_cache else 1
            assert weights.shape == (rows, config.num_attention_heads, length, PROMPT_LENGTH)
            torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
            assert (weights.masked_select(~mask.bool()[:, None, None]) == 0).all()


def test_encoder_outputs_given(translators):
    """A source that was encoded before."""
    for model in translators:
        prompts = make_prompts(model)
        with torch.no_grad():
            encoded = model.get_encoder()(**prompts)
        others = {"encoder_outputs": encoded, "attention_mask": prompts["attention_mask"]}
        for options in [{}, {"num_beams": 3, "num_return_sequences": 2}]:
            expected = generate(model, prompts, **options)
            assert_same(generate(model, dict(others), **options), expected)


@pytest.mark.parametrize("name", GENERATIVE)
def test_compiled_step_stays_compiled(name):
    """One compilation serves every step of a text with padding and of another of the same shape."""
    model = make_open_ended(name)
    compile_config = CompileConfig(fullgraph=True, dynamic=False, backend="eager")
    compile_config._compile_all_devices = True
    mask = torch.ones(BATCH, PROMPT_LENGTH, dtype=torch.long)
    mask[1, :2] = 0
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for seed in range(2):
        inputs = {"inputs": make_tokens(BATCH, PROMPT_LENGTH, seed=seed), "attention_mask": mask}
        expected = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        options = {"cache_implementation": "static", "compile_config": compile_config}
        compiled = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
        assert compiled.tolist() == expected.tolist()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
