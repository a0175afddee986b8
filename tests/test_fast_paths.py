"""Fast paths on CPUs: packed weights in single steps and loops, functions of sequences; when copies are made anew."""

import contextlib
import copy
import functools
import gc
import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

import hf_rnn
from hf_rnn import (
    FAST_PATHS,
    RECURRENT_CELLS,
    attention,
    fast_paths,
    kept_for_texts,
    loop_only,
    modeling_rnn_seq2seq,
    packed_linear,
    recurrent_kernels,
    recurrent_segments,
    sequence_functions,
    weight_layouts,
    without_fast_paths,
)
from hf_rnn import step_linear as step_linear_module
from hf_rnn.recurrent_cache import cache_of
from hf_rnn.recurrent_cells import LSTMCell
from hf_rnn.recurrent_kernels import call_torch_kernel, run_loop
from hf_rnn.step_linear import StepLinear
from hf_rnn.weight_layouts import ONEDNN, PLAIN, TRANSPOSED
from matrix import DECODERS, GENERATIVE, MODEL_CLASSES, case_id, cases, make_inputs, make_mask, make_model, make_tokens
from test_laws_paths import check_model, padded_inputs, results_of


CELLS = pytest.mark.parametrize("cell_type", RECURRENT_CELLS)


@pytest.fixture
def packed(monkeypatch):
    """
    Packed weights on every machine and in every type, as plain ones, and a record of what was packed: what is tested is
    what the library makes of them. What the layouts are is tested in another file.
    """
    calls = []

    def pack(weight, layout):
        calls.append(tuple(weight.shape))
        return weight.detach().clone()

    for module in (weight_layouts, packed_linear, step_linear_module, sequence_functions):
        for name, stand_in in {
            "pack": pack,
            "multiply": F.linear,
            "can_pack": lambda inputs, weight: inputs.numel() > 0,
            "is_large": lambda inputs, weight: True,
            "layout_for": lambda inputs, weight: TRANSPOSED if inputs.numel() > 0 else PLAIN,
        }.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand_in)
    monkeypatch.setattr(packed_linear, "_copies", {})
    return calls


def test_names():
    """Every fast path can be ruled out by its name, and by nothing else."""
    assert all(fast_paths.may_take(name) for name in FAST_PATHS)
    for name in FAST_PATHS:
        with without_fast_paths(name):
            assert [other for other in FAST_PATHS if not fast_paths.may_take(other)] == [name]
            with without_fast_paths():
                assert not any(fast_paths.may_take(name) for name in FAST_PATHS)
            with loop_only(False):
                assert all(fast_paths.may_take(name) for name in FAST_PATHS)
    with loop_only():
        assert not any(fast_paths.may_take(name) for name in FAST_PATHS)
    with pytest.raises(ValueError, match=r"packed_linear.*got \['onednn'\]"), without_fast_paths("onednn"):
        pass


def test_names_in_the_environment(monkeypatch):
    monkeypatch.setenv("HF_RNN_WITHOUT", "sequence_functions, step_linear")
    assert fast_paths._from_environment() == {"sequence_functions", "step_linear"}
    monkeypatch.setenv("HF_RNN_WITHOUT", "")
    assert fast_paths._from_environment() == frozenset()
    monkeypatch.setenv("HF_RNN_WITHOUT", "gru")
    with pytest.raises(ValueError, match="sequence_functions"):
        fast_paths._from_environment()
    monkeypatch.setenv("HF_RNN_LOOP_ONLY", "1")
    assert fast_paths._from_environment() == set(FAST_PATHS)


# Copies of weights in single steps.


def linear_of(weight: nn.Parameter) -> torch.Tensor:
    with torch.no_grad():
        return packed_linear.packed_linear(torch.ones(1, weight.shape[1], dtype=weight.dtype), weight)


def make_weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(300, 7, dtype=torch.float64))


def test_a_weight_whose_layout_is_the_fastest_needs_no_copy(packed, monkeypatch):
    layouts = {300: PLAIN, 301: TRANSPOSED}
    monkeypatch.setattr(packed_linear, "layout_for", lambda inputs, weight: layouts[len(weight)])
    for weight in (make_weight(), nn.Parameter(torch.ones(301, 7))):
        for _ in range(3):
            torch.testing.assert_close(linear_of(weight), weight.detach().sum(1)[None])
    assert packed == [(301, 7)]


def test_copies_in_several_layouts(packed, monkeypatch):
    """For one row and for many another one may be the fastest."""
    layout = [TRANSPOSED]
    monkeypatch.setattr(packed_linear, "layout_for", lambda inputs, weight: layout[0])
    weight = make_weight()
    for name in (TRANSPOSED, ONEDNN, TRANSPOSED, ONEDNN):
        layout[0] = name
        for _ in range(2):
            torch.testing.assert_close(linear_of(weight), weight.detach().sum(1)[None])
    assert packed == [(300, 7)] * 2


def test_a_copy_is_made_at_the_second_use_and_kept(packed):
    weight = make_weight()
    for _ in range(4):
        torch.testing.assert_close(linear_of(weight), weight.detach().sum(1)[None])
    assert packed == [(300, 7)]


def step_of_an_optimizer(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()


def fused_step(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.1, fused=True).step()


def load(weight):
    with torch.no_grad():
        weight.copy_(torch.randn_like(weight))


def other_data(weight):
    weight.data = torch.randn_like(weight)


def merge_in_place(weight):
    """As PEFT merges LoRA: neither the address nor the version of the weight changes."""
    version, pointer = weight._version, weight.data_ptr()
    weight.data += torch.outer(torch.randn(300, dtype=weight.dtype), torch.randn(7, dtype=weight.dtype))
    assert (weight._version, weight.data_ptr()) == (version, pointer)


def swap(weight):
    """As modules load and move with `torch.__future__.set_swap_module_params_on_conversion(True)`."""
    torch.utils.swap_tensors(weight, make_weight())


@pytest.mark.parametrize("change", [step_of_an_optimizer, fused_step, load, other_data, merge_in_place, swap])
def test_a_copy_is_made_anew_when_the_weight_has_changed(packed, change):
    weight = make_weight()
    for _ in range(2):
        for _ in range(3):
            torch.testing.assert_close(linear_of(weight), weight.detach().sum(1)[None])
        change(weight)
    torch.testing.assert_close(linear_of(weight), weight.detach().sum(1)[None])
    assert len(packed) == 2


def test_swapped_weights(packed, monkeypatch):
    """A model whose weights have copies loads and moves where torch swaps parameters for others."""
    monkeypatch.setattr(torch.__future__, "get_swap_module_params_on_conversion", lambda: True)
    model, other, token = make_model("RNNForCausalLM"), make_model("RNNForCausalLM", seed=1), torch.ones(1, 1).long()
    with torch.no_grad():
        for _ in range(3):
            model(token)
        assert packed
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(model(token).logits, other(token).logits)
        for _ in range(3):
            model(token)
        model.lm_head.to(torch.float32)
        assert model.lm_head.weight.dtype == torch.float32


def test_one_number_changed_behind_the_back_is_seen_with_the_next_text(packed):
    weight = make_weight()
    for _ in range(3):
        linear_of(weight)
    weight.data[123, 4] += 1
    packed_linear.begin_text()
    torch.testing.assert_close(linear_of(weight), weight.detach().sum(1)[None])


def test_copies_of_some_columns(packed):
    """Beside one of all, and made anew with it."""
    weight, inputs = make_weight(), torch.randn(2, 7, dtype=torch.float64)
    for sizes in ([(300, 7), (300, 3)], [(300, 7), (300, 3)]):
        with torch.no_grad():
            weight.mul_(2)
            for _ in range(4):
                whole = packed_linear.packed_linear(inputs, weight)
                part = packed_linear.packed_linear(inputs[:, 4:], weight, first_column=4)
                torch.testing.assert_close(whole, inputs @ weight.t())
                torch.testing.assert_close(part, inputs[:, 4:] @ weight[:, 4:].t())
        assert sorted(packed) == sorted(sizes)
        packed.clear()


def test_copies_go_with_their_weights(packed):
    weight, module = make_weight(), nn.Linear(7, 300, dtype=torch.float64)
    for _ in range(3):
        linear_of(weight)
        linear_of(module.weight)
    assert len(packed_linear._copies) == 2
    del weight
    gc.collect()
    assert len(packed_linear._copies) == 1
    packed_linear.forget_copies(module)
    assert not packed_linear._copies


@pytest.mark.parametrize(
    "move", [lambda model: model.float(), lambda model: model.to(model.device)], ids=["float", "to"]
)
def test_moving_a_model_drops_its_copies(packed, move):
    model = make_model("RNNForCausalLM")
    with torch.no_grad():
        for _ in range(3):
            model(torch.ones(1, 1, dtype=torch.long))
    assert packed_linear._copies
    move(model)
    assert not packed_linear._copies


@pytest.mark.parametrize(("name", "options"), cases(*GENERATIVE), ids=str)
def test_steps_with_packed_weights(packed, name, options):
    """Token by token, with copies and without, the weights being changed in the middle."""
    model = make_model(name, **options)
    inputs = make_inputs(name, batch=2, with_labels=False)
    tokens = inputs.pop("decoder_input_ids", inputs["input_ids"])

    def run():
        outputs, given = [], {}
        key = "input_ids"
        if model.config.is_encoder_decoder:
            given, key = {"encoder_outputs": model.get_encoder()(inputs["input_ids"])}, "decoder_input_ids"
        past = None
        for position in range(tokens.shape[1]):
            result = model(**{key: tokens[:, position : position + 1]}, **given, past_key_values=past, use_cache=True)
            past = result.past_key_values
            outputs.append(result.logits)
            if position == 3:
                for parameter in model.parameters():
                    parameter.data *= 1.1
        for parameter in model.parameters():
            parameter.data /= 1.1
        return torch.cat(outputs, dim=1)

    with torch.no_grad():
        with without_fast_paths("packed_linear"):
            expected = run()
            assert not packed
        torch.testing.assert_close(run(), expected, rtol=1e-9, atol=1e-9)
        assert packed


# Loops that are trained.


@pytest.mark.parametrize(("name", "options"), cases(), ids=str)
def test_loops_with_packed_weights(packed, name, options):
    """Outputs, loss and every gradient of a model whose loops multiply with packed weights."""
    check_model(name, options, packed, ["torch_kernel", "chunked_loss"])
    assert packed


def test_gradients_of_step_linear(packed):
    """Numerically, and where only the inputs, the weight or the bias take gradients."""
    weight, bias, inputs = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in [(4, 4), (4,), (2, 4)]
    )

    def loop(inputs, weight, bias):
        linear = StepLinear()
        for _ in range(3):
            inputs = torch.tanh(linear(inputs, weight, bias))
        return inputs

    checks = torch.autograd.gradcheck, torch.autograd.gradgradcheck
    assert all(check(loop, (inputs, weight, bias)) for check in checks)
    for index in range(3):
        leaves = [leaf.detach().requires_grad_(index == number) for number, leaf in enumerate((inputs, weight, bias))]
        assert all(check(loop, leaves) for check in checks)


def test_what_second_derivatives_leave_behind(packed):
    """Nothing is kept of a backward that did not ask for the weight, and a weight that has changed is refused."""
    weight = nn.Parameter(torch.randn(3, 3))
    inputs = torch.randn(2, 3, requires_grad=True)
    outputs = StepLinear()(inputs, weight)
    (gradient,) = torch.autograd.grad(outputs.square().sum(), inputs, create_graph=True)
    graph = weakref.ref(outputs.grad_fn)
    del outputs, gradient
    assert graph() is None
    outputs = StepLinear()(inputs, weight).square().sum()
    with torch.no_grad():
        weight.mul_(2)
    for create_graph in (False, True):
        with pytest.raises(RuntimeError, match="modified in place"):
            torch.autograd.grad(outputs, inputs, create_graph=create_graph, retain_graph=True)


def test_one_product_for_the_gradient_of_a_weight(packed, monkeypatch):
    """The path is taken: a weight is packed once for each direction, and its gradient is one product."""
    model = make_model("RNNForCausalLM", cell_type="lstm", num_hidden_layers=1).train()
    collected = []
    backward = step_linear_module._Collect.backward
    monkeypatch.setattr(
        step_linear_module._Collect, "backward", staticmethod(lambda *args: collected.append(1) or backward(*args))
    )
    with without_fast_paths("torch_kernel"):
        model(**make_inputs("RNNForCausalLM")).loss.backward()
    assert packed == [(24, 6), (6, 24)]
    assert collected == [1]


def test_two_backwards_of_one_graph(packed):
    weight, inputs = (torch.randn(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    linear = StepLinear()
    outputs = linear(linear(inputs, weight), weight).sum()
    first = torch.autograd.grad(outputs, [weight, inputs], retain_graph=True)
    second = torch.autograd.grad(outputs, [weight, inputs])
    for pair in zip(first, second):
        torch.testing.assert_close(*pair)


# GRUs and plain RNNs as one function.

FUNCTIONS = pytest.mark.parametrize("kernel", ["gru", "rnn_tanh", "rnn_relu"])


@FUNCTIONS
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch", [1, 4])
def test_sequence_functions(packed, monkeypatch, kernel, bidirectional, batch):
    """Outputs, final states and gradients are those of the loop over the cell."""
    monkeypatch.setattr("hf_rnn.recurrent_kernels.takes_function", lambda *arguments: True)
    cells = [RECURRENT_CELLS[kernel](5, 6).double() for _ in range(1 + bidirectional)]
    for cell in cells:
        for parameter in cell.parameters():
            nn.init.normal_(parameter)
    inputs = torch.randn(batch, 7, 5, dtype=torch.float64, requires_grad=True)
    state = tuple(torch.randn(batch, 6, dtype=torch.float64, requires_grad=True) for _ in cells)
    leaves = [inputs, *state, *(parameter for cell in cells for parameter in cell.parameters())]

    def results(outputs, final):
        objective = sum((result * result.detach().cos()).sum() for result in (outputs, *final))
        return [outputs, *final, *torch.autograd.grad(objective, leaves)]

    actual = results(*call_torch_kernel(cells, inputs, state))
    assert packed
    loops = [run_loop(cell, inputs, state[index : index + 1], None, index == 1)[:2] for index, cell in enumerate(cells)]
    expected = results(torch.cat([outputs for outputs, _ in loops], -1), [final[0] for _, final in loops])
    for pair in zip(actual, expected, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-11)


@FUNCTIONS
def test_derivatives_of_sequence_functions(packed, kernel):
    """Of the first and the second order, of each argument alone and of all, with packed weights and plain ones."""
    gates = 3 * len(RECURRENT_CELLS[kernel].gate_names)
    shapes = [(4, 2, 5), (2, 3), (gates, 5), (gates, 3), (gates,), (gates,)]
    run = functools.partial(sequence_functions.run_function, kernel)
    for index in [*range(len(shapes)), None]:
        leaves = [
            torch.randn(shape).double().requires_grad_(index in (number, None)) for number, shape in enumerate(shapes)
        ]
        for reverse in (False, True):
            assert torch.autograd.gradcheck(run, (*leaves, reverse))
            if index is None:
                assert torch.autograd.gradgradcheck(run, (*leaves, reverse))
    assert packed


@FUNCTIONS
def test_sequence_functions_of_small_products(monkeypatch, kernel):
    """Where no product is worth another layout, nothing is packed; a backward under autocast is that without."""
    monkeypatch.setattr(weight_layouts, "pack", None)
    cell = RECURRENT_CELLS[kernel](5, 6)
    for parameter in cell.parameters():
        nn.init.normal_(parameter, std=0.3)
    inputs, state = torch.randn(2, 7, 5), (torch.randn(2, 6),)
    assert sequence_functions.takes_function(kernel, inputs.transpose(0, 1), state[0], list(cell.parameters()))
    gradients = []
    for run in (call_torch_kernel, lambda cells, *arguments: run_loop(*cells, *arguments, None)):
        outputs, _, *_ = run([cell], inputs, state)
        with torch.autocast("cpu", enabled=run is call_torch_kernel):
            gradients.append([outputs, *torch.autograd.grad(outputs.sin().sum(), list(cell.parameters()))])
    for pair in zip(*gradients, strict=True):
        torch.testing.assert_close(*pair)


def test_which_sequences_run_as_a_function(monkeypatch):
    """Those in float32 with a graph, and without one where another layout of a weight pays; nothing else."""
    monkeypatch.setattr(weight_layouts, "fastest", lambda functions: list(functions)[-1])
    monkeypatch.setattr(weight_layouts, "_layouts", {})
    inputs, hidden = torch.zeros(5, 64, 8), torch.zeros(64, 128)
    weights = [torch.zeros(384, 8), torch.zeros(384, 128), torch.zeros(384), torch.zeros(384)]

    def takes(kernel="gru", rows=64, steps=5, dtype=torch.float32):
        arguments = (tensor.to(dtype) for tensor in weights)
        return sequence_functions.takes_function(
            kernel, inputs[:steps, :rows].to(dtype), hidden[:rows].to(dtype), list(arguments)
        )

    assert takes()
    assert takes("rnn_tanh")
    assert takes("rnn_relu")
    assert not takes("lstm")
    assert not takes(steps=2)
    assert not takes(dtype=torch.float64)
    assert not takes(rows=2)
    weights[0].requires_grad_()
    assert takes(rows=2)
    assert not takes(rows=2, dtype=torch.float64)
    with torch.no_grad():
        assert not takes(rows=2)
    for context in (without_fast_paths("sequence_functions"), torch.autocast("cpu")):
        with context:
            assert not takes()
    seen = []
    torch.func.vmap(lambda row: seen.append(takes()) or row)(inputs)
    assert seen == [False]


# Derivatives of the second order.


@pytest.fixture
def everything_taken(packed, monkeypatch):
    """In tiny models too: functions of sequences, pieces of time wherever a row ends, attention in parts; `packed`."""
    monkeypatch.setattr(recurrent_kernels, "takes_function", lambda kernel, *arguments: kernel != "lstm")
    monkeypatch.setattr(attention, "MOST_TANH_KEPT", 0)
    for name in ("CALL_COST", "CALL_OPERATIONS", "SORTING_OPERATIONS"):
        monkeypatch.setattr(recurrent_segments, name, 0)
    return packed


def check_close_for_size(actual: Sequence[torch.Tensor | None], expected: Sequence[torch.Tensor | None]) -> None:
    """Where a tensor holds millions, those of its numbers that are zero are so but for the rounding of millions."""
    for number, wanted in zip(actual, expected, strict=True):
        largest = 0.0 if wanted is None else wanted.detach().abs().max().item()
        torch.testing.assert_close(number, wanted, rtol=1e-8, atol=1e-12 * max(1, largest))


@pytest.mark.parametrize(("name", "options"), cases(), ids=str)
def test_second_derivatives(everything_taken, name, options):
    """The gradients of all weights with a graph, and those of a penalty on them."""
    model, inputs = make_model(name, **options), padded_inputs(name)
    weights = list(model.parameters())

    def results():
        outputs = model(**inputs)
        target = sum(value.square().sum() for value in outputs.values() if isinstance(value, torch.Tensor))
        first = torch.autograd.grad(target, weights, create_graph=True, allow_unused=True)
        penalty = sum(gradient.square().sum() for gradient in first if gradient is not None)
        return first, torch.autograd.grad(penalty, weights, allow_unused=True)

    with loop_only():
        expected = results()
    assert not everything_taken
    for ruled_out in ([], ["torch_kernel"]):
        with without_fast_paths(*ruled_out) if ruled_out else contextlib.nullcontext():
            for actual, gradients in zip(results(), expected, strict=True):
                check_close_for_size(actual, gradients)
    assert everything_taken


@CELLS
@pytest.mark.parametrize("ruled_out", [[], ["torch_kernel"]], ids=["sequences", "loops"])
def test_gradients_with_a_graph_of_a_text_in_two_parts(everything_taken, cell_type, ruled_out):
    """What the second part begins with was computed by the same weights, which count once for each part."""
    model = make_model("RNNModel", cell_type=cell_type)
    weights = list(model.layers.parameters())
    first, second = make_tokens(3, 4), make_tokens(3, 5, seed=1)

    def results(create_graph: bool):
        state = cache_of(model(first, use_cache=True))
        outputs = model(second, past_key_values=state).last_hidden_state
        gradients = torch.autograd.grad(outputs.square().sum(), weights, create_graph=create_graph)
        if not create_graph:
            return gradients
        penalty = sum(gradient.square().sum() for gradient in gradients)
        return [*gradients, *torch.autograd.grad(penalty, weights)]

    with loop_only():
        expected = results(create_graph=True)
    with without_fast_paths(*ruled_out) if ruled_out else contextlib.nullcontext():
        actual = results(create_graph=True)
        plain = results(create_graph=False)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(tuple(actual[: len(plain)]), plain, rtol=1e-8, atol=1e-12)


# All of them in the type in which they are used.


@pytest.mark.parametrize("decoder", DECODERS, ids=str)
@pytest.mark.parametrize("cell_type", ["gru", "lstm"])
def test_float32(everything_is_packed, decoder, cell_type):
    """A translator of a width at which every path is taken, against the loop in float64."""
    options = decoder | {"cell_type": cell_type, "hidden_size": 128, "embedding_size": 32}
    name = "RNNSeq2SeqForConditionalGeneration"
    inputs = make_inputs(name) | {"attention_mask": make_mask()}
    model = make_model(name, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    with loop_only():
        expected = results_of(model, inputs)
    actual = results_of(model.float(), inputs)
    for key, value in expected.items():
        scale = value.abs().max() + 1e-6
        assert (actual[key].double() - value).abs().max() / scale < 2e-4, key


def test_generated_tokens_are_the_same(everything_is_packed):
    """With packed weights in float32 nothing else is generated."""
    for name in GENERATIVE:
        model = make_model(name, dtype=torch.float32, hidden_size=128)
        inputs = {"input_ids": make_inputs(name, with_labels=False)["input_ids"]}
        for num_beams in (1, 3):
            tokens = model.generate(**inputs, num_beams=num_beams, max_new_tokens=20, do_sample=False)
            with loop_only():
                expected = model.generate(**inputs, num_beams=num_beams, max_new_tokens=20, do_sample=False)
            assert torch.equal(tokens, expected)


def test_a_new_cell_is_fast_through_step_linear(packed, monkeypatch):
    """A cell that somebody adds needs no code of its own for it."""

    class Slow(LSTMCell):
        def step(self, projected, state, linear=F.linear):
            return super().step(projected, state, linear)

    monkeypatch.setitem(RECURRENT_CELLS, "slow", Slow)
    model = make_model("RNNForCausalLM", cell_type="slow", num_hidden_layers=1)
    model(**make_inputs("RNNForCausalLM")).loss.backward()
    assert packed == [(24, 6), (6, 24)]


def test_public_names():
    assert {"FAST_PATHS", "loop_only", "without_fast_paths"} <= set(hf_rnn.__all__)
    assert MODEL_CLASSES


# Keys of attention.


@pytest.mark.parametrize("decoder", DECODERS, ids=str)
def test_keys_are_projected_once_for_each_source(decoder, monkeypatch):
    """In decoding; anew for other features, features that were written to, and changed weights; not while training."""
    name = "RNNSeq2SeqForConditionalGeneration"
    model = make_model(name, attention_score="additive", **decoder)
    score = model.model.decoder.attention.score
    calls = []
    project = score.project_keys
    monkeypatch.setattr(score, "project_keys", lambda keys: calls.append(1) or project(keys))
    inputs = make_inputs(name, batch=2, with_labels=False)["input_ids"]
    step = {"decoder_input_ids": torch.tensor([[1], [1]])}

    def logits(encoder_outputs, cache=None):
        with torch.no_grad():
            return model(encoder_outputs=encoder_outputs, **step, past_key_values=cache).logits

    def calls_of(*arguments):
        calls.clear()
        logits(*arguments)
        return len(calls)

    with torch.no_grad():
        outputs = model.get_encoder()(inputs)
        cache = cache_of(model(encoder_outputs=outputs, **step, use_cache=True))
        assert len(calls) == 1
        assert calls_of(outputs, cache) == 0
        assert calls_of(outputs, copy.deepcopy(cache)) == 1  # another text
        assert calls_of(outputs, cache) == 0
        outputs.last_hidden_state.mul_(2)
        assert calls_of(outputs, cache) == 1
        for parameter in score.parameters():
            parameter.mul_(0.5)
        assert calls_of(outputs, cache) == 1
        with torch.autocast("cpu"):
            assert calls_of(outputs, cache) == 1
        assert calls_of(outputs, cache) == 1
        with loop_only():
            assert calls_of(outputs, cache) == 1
        assert calls_of(outputs, cache) == 0
        for parameter in score.parameters():
            parameter.data.mul_(3)  # which nobody sees within a text
        expected = logits(BaseModelOutputWithPooling(**{name: part.clone() for name, part in outputs.items()}))
        assert torch.equal(logits(outputs), expected)
        calls.clear()
        model.generate(inputs, max_new_tokens=9, min_new_tokens=9, num_beams=3)
        assert len(calls) == 1
    calls.clear()
    model(encoder_outputs=outputs, **step, past_key_values=cache).logits.sum().backward()
    assert len(calls) == 1
    del cache
    gc.collect()
    assert not kept_for_texts._texts


@pytest.mark.parametrize("decoder", [{}, {"input_feeding": True}], ids=str)
def test_values_are_mapped_once_for_each_source(decoder, monkeypatch):
    """In decoding, where one map without anything around it is all that reads the context."""
    name = "RNNSeq2SeqForConditionalGeneration"
    inputs = {"input_ids": make_inputs(name, batch=6, with_labels=False)["input_ids"], "attention_mask": make_mask()}
    step = {"decoder_input_ids": torch.tensor([[1], [2], [1], [3], [4], [1]]), "attention_mask": make_mask()}
    seen = []
    forward = attention.Attention.forward

    def see(self, queries, memory, *state):
        seen.append(memory.are_values_mapped)
        return forward(self, queries, memory, *state)

    monkeypatch.setattr(attention.Attention, "forward", see)

    def check(model, is_mapped, outputs=None, cache=None):
        with torch.no_grad():
            outputs = outputs or model.get_encoder()(**inputs)
            copied = copy.deepcopy(cache)
            actual = model(encoder_outputs=outputs, **step, past_key_values=cache, use_cache=True)
            assert seen.pop() is is_mapped
            with without_fast_paths("mapped_values"):
                expected = model(encoder_outputs=outputs, **step, past_key_values=copied, use_cache=True).logits
            torch.testing.assert_close(actual.logits, expected, rtol=1e-9, atol=1e-10)
            assert seen.pop() is False
        return outputs, cache_of(actual)

    model = make_model(name, **decoder)
    combine = model.model.decoder.combine
    outputs, cache = check(model, True)
    products = []
    large_linear = modeling_rnn_seq2seq.large_linear
    monkeypatch.setattr(
        modeling_rnn_seq2seq, "large_linear", lambda *tensors: products.append(1) or large_linear(*tensors)
    )
    check(model, True, outputs, cache)
    assert not products
    with torch.no_grad():
        combine.weight.mul_(-0.5)
    check(model, True, outputs, cache)
    outputs.last_hidden_state.mul_(2)
    check(model, True, outputs, cache)
    assert len(products) == 2
    handle = combine.register_forward_hook(lambda module, arguments, output: output + 1)
    check(model, False, outputs, cache)
    handle.remove()
    check(model, True, outputs, cache)
    model(encoder_outputs=outputs, **step).logits.sum().backward()
    assert seen.pop() is False
    with torch.no_grad():
        model(encoder_outputs=outputs, **step | {"decoder_input_ids": torch.ones(6, 2, dtype=torch.long)})
    assert not any(seen)
    for options in (
        {"num_attention_heads": 2},
        {"use_coverage": True},
        {"attention_score": "location"},
        {"encoder_bidirectional": False, "hidden_size": 6},
    ):
        check(make_model(name, **decoder, **options), "hidden_size" in options)
    del cache
    gc.collect()
    assert not kept_for_texts._texts


@pytest.mark.parametrize("other", [{"decoder_type": "bahdanau"}, {"decoder_type": "gnmt"}], ids=case_id)
def test_values_that_more_than_one_map_reads(other):
    decoder = make_model("RNNSeq2SeqForConditionalGeneration", **other).model.decoder
    features = torch.ones(2, 3, 12, dtype=torch.float64)
    with torch.no_grad():
        memory = decoder.prepare_memory(features, None, DynamicCache(config=decoder.config))
    assert not memory.are_values_mapped
    assert memory.values.shape == (2, 1, 3, 12)


@pytest.mark.parametrize("name", GENERATIVE)
def test_inference_mode(name):
    """Models made and used there: their tensors do not count their versions."""
    inputs = {"input_ids": make_inputs(name, with_labels=False)["input_ids"]}
    model = make_model(name, dtype=torch.float32, hidden_size=128)
    expected = model.generate(**inputs, max_new_tokens=9, do_sample=False)
    with torch.inference_mode():
        assert torch.equal(model.generate(**inputs, max_new_tokens=9, do_sample=False), expected)
        model = make_model(name, dtype=torch.float32, hidden_size=128)
        assert torch.equal(model.generate(**inputs, max_new_tokens=9, do_sample=False), expected)
    assert torch.equal(model.generate(**inputs, max_new_tokens=9, do_sample=False), expected)
