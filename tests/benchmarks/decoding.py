"""Decoding with language models: single steps, `generate()`, what long texts cost, and narrow types."""

import copy
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from hf_rnn.recurrent_cache import cache_of, cache_output
from hf_rnn.weight_layouts import in_fastest_layout, multiply

from .harness import (
    Measurement,
    Settings,
    Skipped,
    benchmark,
    check_equal,
    interleave,
    matrix_products,
    measure,
    summarize,
)
from .language_model import make_language_model, step_shapes
from .plain import PlainLanguageModel


@torch.no_grad()
def decode(model: Callable, batch: int, num_tokens: int, device: str) -> torch.Tensor:
    """Greedy tokens `[batch, num_tokens]` by single steps of a function from tokens and state to logits and state."""
    token, state, tokens = torch.arange(3, 3 + batch, device=device).unsqueeze(1), None, []
    for _ in range(num_tokens):
        logits, state = model(token, state)
        token = logits[:, -1:].argmax(-1)
        tokens.append(token)
    return torch.cat(tokens, dim=1)


def with_cache(model) -> Callable:
    """A model as a function of tokens and state."""

    def run(token, state):
        outputs = model(input_ids=token, cache=state, use_cache=True)
        return outputs.logits, cache_of(outputs)

    return run


def make_decoder(settings: Settings, batch: int, **options):
    """A language model whose greedy tokens do not depend on rounding, with at least as many tokens as rows."""
    model = make_language_model(settings, **({"vocab_size": batch + 20} if settings.quick else {}), **options).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    return model


@benchmark("step-1", "decode step, batch 1, identical tokens / nn.LSTM, T = 1", {"cpu": 0.40, "cuda": None}, batch=1)
@benchmark("step-32", "decode step, batch 32, identical tokens / nn.LSTM, T = 1", {"cpu": 0.50, "cuda": None}, batch=32)
@benchmark(
    "step-160", "decode step, batch 160, identical tokens / nn.LSTM, T = 1", {"cpu": 0.60, "cuda": None}, batch=160
)
def decode_step(settings: Settings, batch: int) -> Measurement:
    """Vocabulary 10,000, hidden 512, two layers; the whole forward of the model with its state in a `Cache`."""
    model = make_decoder(settings, batch)
    plain, ours = PlainLanguageModel(model).eval(), with_cache(model)
    num_tokens = settings.size(16, 3)
    # By default cuDNN keeps ten bits of a number, which gives other tokens.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert torch.equal(decode(ours, batch, 64, settings.device), decode(plain, batch, 64, settings.device)), (
            "the tokens differ"
        )
        return measure(
            settings,
            lambda: decode(plain, batch, num_tokens, settings.device),
            lambda: decode(ours, batch, num_tokens, settings.device),
            matrix_products(step_shapes(model.config, batch), settings, times=num_tokens),
        )


@benchmark("step-1-bf16", "decode step, batch 1, in bfloat16 / nn.LSTM in float32, T = 1", {"cpu": 0.15, "cuda": None})
def decode_step_bf16(settings: Settings) -> Measurement:
    """Opt-in, by the type of the model. The logits of the first step are within what the type allows."""
    model = make_decoder(settings, 1)
    plain = PlainLanguageModel(model).eval()
    narrow = with_cache(copy.deepcopy(model).to(torch.bfloat16))
    token = torch.full((1, 1), 3, device=settings.device)
    with torch.no_grad():
        check_equal("logits", narrow(token, None)[0], plain(token)[0], 0.05)
    num_tokens = settings.size(16, 3)
    shapes = step_shapes(model.config, 1)
    return measure(
        settings,
        lambda: decode(plain, 1, num_tokens, settings.device),
        lambda: decode(narrow, 1, num_tokens, settings.device),
        matrix_products(shapes, settings, dtype=torch.bfloat16, times=num_tokens),
    )


@benchmark("step-1-int8", "decode step, batch 1, exported with 8-bit weights / nn.LSTM, T = 1", {"cpu": 0.10})
def decode_step_int8(settings: Settings) -> Measurement:
    """ONNX Runtime alone, in NumPy. How much quality is lost is a matter of trained models, see their cards."""
    try:
        from hf_rnn.export import export_model, load
    except ImportError:
        raise Skipped("there is no hf_rnn.export") from None
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise Skipped(f"{package} is not installed")
    model = make_decoder(settings, 1)
    plain = PlainLanguageModel(model).eval()
    with tempfile.TemporaryDirectory() as folder:
        export_model(model, Path(folder) / "int8", int8=True)
        exported = load(Path(folder) / "int8", threads=settings.threads)
    token = torch.full((1, 1), 3)
    with torch.no_grad():
        expected = plain(token)[0]
    check_equal("logits", torch.from_numpy(exported(token.numpy())[0]), expected, 0.1)
    num_tokens = settings.size(16, 3)

    def ours():
        token, state = torch.full((1, 1), 3).numpy(), None
        for _ in range(num_tokens):
            logits, state = exported(token, state=state)
            token = logits[:, -1:].argmax(-1)

    return measure(
        settings,
        lambda: decode(plain, 1, num_tokens, settings.device),
        ours,
        matrix_products(step_shapes(model.config, 1), settings, times=num_tokens),
    )


def make_gpt2(settings: Settings, num_positions: int) -> GPT2LMHeadModel:
    """A GPT-2 of 9.4 M parameters."""
    config = GPT2Config(
        vocab_size=settings.size(10_000, 50),
        n_embd=settings.size(256, 16),
        n_layer=settings.size(8, 2),
        n_head=settings.size(4, 2),
        n_positions=num_positions,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config).to(settings.device).eval()


@benchmark("generate-64", "generate(), 64 new tokens / GPT-2 of equal size", {"cpu": 0.60, "cuda": None}, new_tokens=64)
@benchmark(
    "generate-2048", "generate(), 2,048 new tokens / GPT-2 of equal size", {"cpu": 0.40, "cuda": None}, new_tokens=2048
)
@benchmark(
    "generate-32x512",
    "generate(), batch 32, 512 new tokens / GPT-2 of equal size",
    {"cpu": 0.25, "cuda": None},
    new_tokens=512,
    batch=32,
)
def generate(settings: Settings, new_tokens: int, batch: int = 1) -> Measurement:
    """Greedy, from a prompt of 8 tokens, both with their caches."""
    num_tokens, batch = settings.size((new_tokens, batch), (5, min(batch, 2)))
    model = make_language_model(settings).eval()
    other = make_gpt2(settings, settings.size(2112, 32))
    prompt = torch.randint(3, model.config.vocab_size, (batch, 8), device=settings.device)

    def run(model):
        outputs = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=num_tokens
        )
        assert outputs.shape == (batch, 8 + num_tokens)

    floor = matrix_products(step_shapes(model.config, batch), settings, times=num_tokens)
    rounds = None if new_tokens == 64 else 3
    result = measure(settings, lambda: run(other), lambda: run(model), floor, rounds)
    parameters = [sum(parameter.numel() for parameter in of.parameters()) / 1e6 for of in (model, other)]
    return result._replace(note=f"{result.note}; {parameters[0]:.1f} and {parameters[1]:.1f} M parameters")


@torch.no_grad()
def read(model, length: int, device: str) -> tuple[torch.Tensor, DynamicCache]:
    """A text of some length, and the state after all of its tokens but the last."""
    text = torch.randint(3, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    return text, cache_of(model(input_ids=text[:, :-1], use_cache=True))


def state_bytes(cache) -> int:
    """What the state takes."""
    return sum(
        tensor.numel() * tensor.element_size()
        for layer in cache.layers
        for tensor in vars(layer).values()
        if isinstance(tensor, torch.Tensor)
    )


@benchmark("time-per-token", "time per token in generate() after 4,096 tokens / after 512", {"cpu": 1.05, "cuda": 1.05})
def time_per_token(settings: Settings) -> Measurement:
    """Whether a long text makes the next tokens slower."""
    model = make_language_model(settings).eval()
    num_tokens = settings.size(64, 3)
    texts = [read(model, length, settings.device) for length in settings.size((512, 4096), (5, 40))]

    def go_on(text, cache):
        mask = torch.ones_like(text)
        state = cache_output(copy.deepcopy(cache))  # it is filled
        model.generate(text, attention_mask=mask, do_sample=False, max_new_tokens=num_tokens, **state)

    return measure(settings, *(lambda text=text: go_on(*text) for text in texts))


@benchmark("state-bytes", "bytes of the state after 4,096 tokens / after 512", {"cpu": 1.0, "cuda": 1.0})
def bytes_of_state(settings: Settings) -> Measurement:
    """The state of a text has one size."""
    model = make_language_model(settings).eval()
    short, long = (
        state_bytes(read(model, length, settings.device)[1]) for length in settings.size((512, 4096), (5, 40))
    )
    return Measurement(long / short, note=f"{long} and {short} bytes")


@benchmark("library", "a step of batch 1 without the time of cells and projections", {"cpu": 100, "cuda": None}, "us")
def library_overhead(settings: Settings) -> Measurement:
    """What a forward takes beyond embedding, the equations of the cells, and products as they are made there."""
    # Small, so that the difference is not lost in what the products take.
    model = make_language_model(settings, vocab_size=200, hidden_size=64).eval()
    token = torch.full((1, 1), 3, device=settings.device)
    cells = [layer.cell for layer in model.model.layers]
    weights = [*(weight for cell in cells for weight in (cell.weight_ih, cell.weight_hh)), model.lm_head.weight]
    packed = {id(weight): in_fastest_layout(weight[:1], weight) for weight in weights}

    def linear(inputs, weight, bias):
        return multiply(inputs, packed[id(weight)], bias)

    @torch.no_grad()
    def whole(state):
        return model(input_ids=token, cache=state, use_cache=True)

    @torch.no_grad()
    def bare(states):
        hidden, new_states = F.embedding(token[:, 0], model.model.embed_tokens.weight), []
        for cell, state in zip(cells, states):
            state = cell.step(linear(hidden, cell.weight_ih, cell.bias_ih), state, linear)
            hidden = state[0]
            new_states.append(state)
        return linear(hidden, model.lm_head.weight, model.lm_head.bias), new_states

    with torch.no_grad():
        cache = cache_of(model(input_ids=token, use_cache=True))
    states = [cell.initial_state(token.float()) for cell in cells]
    _, states = bare(states)
    check_equal("logits", whole(cache).logits[:, 0], bare(states)[0])
    times = interleave({"whole": lambda: whole(cache), "bare": lambda: bare(states)}, settings)
    return summarize([1e6 * (time - bare) for time, bare in zip(times["whole"], times["bare"])], floor=0.0)
