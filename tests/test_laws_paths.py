"""Law 3: fast path = plain loop = NumPy equations, in outputs, final states and every gradient."""

import contextlib
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from hf_rnn import (
    ATTENTION_SCORES,
    RECURRENT_CELLS,
    loop_only,
    recurrent_kernels,
    recurrent_segments,
    recurrent_stack,
    without_fast_paths,
)
from hf_rnn.recurrent_layer import Padding, RecurrentLayer
from matrix import DECODERS, MODEL_CLASSES, ON_A_CPU, make_config, make_inputs, make_mask, make_model, options_of
from reference import (
    CELL_STEPS,
    NUM_STATES,
    SCORES,
    language_model,
    part,
    project_to_vocabulary,
    run_layer,
    run_stack,
    seq2seq,
    to_numpy,
)


INPUT_SIZE, HIDDEN_SIZE, SEQ = 5, 4, 7
DIRECTIONS = pytest.mark.parametrize("bidirectional", [False, True], ids=["one_direction", "two_directions"])
CELLS = pytest.mark.parametrize("cell_type", RECURRENT_CELLS)


def mask_of(*padded: int) -> torch.Tensor:
    """Six equal rows with padding at the positions `padded`."""
    mask = torch.ones(6, SEQ, dtype=torch.long)
    mask[:, list(padded)] = 0
    return mask


def ragged(*lengths: int) -> torch.Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


MASKS = {
    "none": None,
    "full": mask_of(),
    "right": ragged(7, 3, 5, 1, 7, 2),
    "right and empty": ragged(7, 3, 0, 1, 7, 0),
    "left": ragged(7, 3, 5, 1, 7, 2).flip(1),
    "middle": mask_of(2, 3, 5),
    "both ends": mask_of(0, 6),
    "mixed": make_mask(SEQ),
    "empty": mask_of(*range(SEQ)),
}


def paddings(mask: torch.Tensor | None) -> list[Padding | None]:
    """What a layer is told of a mask: on a CPU with a look at its values, on another device without."""
    looked_at = Padding.from_attention_mask(mask, mask)
    return [looked_at] if mask is None else [looked_at, Padding(mask.bool())]


def make_layer(cell_type: str, bidirectional: bool, dtype: torch.dtype = torch.float64, seed: int = 0):
    """A layer with random weights, inputs, and initial states that take gradients."""
    generator = torch.Generator().manual_seed(seed)
    config = make_config("RNNModel", cell_type=cell_type, hidden_size=HIDDEN_SIZE)
    layer = RecurrentLayer(config, INPUT_SIZE, 0, bidirectional).to(dtype).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.6)
    inputs = torch.randn(6, SEQ, INPUT_SIZE, generator=generator).to(dtype)
    state = tuple(torch.randn(6, size, generator=generator).to(dtype) for size in layer.state_sizes)
    return layer, inputs, state


def run(layer, inputs, state, padding, needs_state=True, needs_history=False):
    """All results of a layer and the gradients of a random projection of them."""
    leaves = dict(layer.named_parameters()) | {"inputs": inputs.clone().requires_grad_()}
    leaves |= {f"initial {index}": states.clone().requires_grad_() for index, states in enumerate(state)}
    given = tuple(leaf for name, leaf in leaves.items() if name.startswith("initial"))
    outputs, final, history = layer(leaves["inputs"], given, padding, needs_state, needs_history)
    results = {"outputs": outputs}
    results |= {f"final {index}": states for index, states in enumerate(final or ())}
    results |= {f"history {index}": states for index, states in enumerate(history or ())}
    objective = sum((result * weights_for(result, name)).sum() for name, result in results.items())
    gradients = torch.autograd.grad(objective, list(leaves.values()), allow_unused=True)
    for (name, leaf), gradient in zip(leaves.items(), gradients):
        results[f"gradient of {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return {name: result.detach() for name, result in results.items()}


def weights_for(result: torch.Tensor, name: str) -> torch.Tensor:
    """Random numbers that depend on nothing but name and shape, the same for every type."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randn(result.shape, generator=generator).to(result.dtype)


def assert_same(actual: dict, expected: dict, where: str = "", rtol: float = 1e-10, atol: float = 1e-11):
    assert actual.keys() == expected.keys(), where
    for name, value in expected.items():
        # Not by `assert_close`, whose message could not say where.
        difference = (actual[name] - value).abs() - rtol * value.abs()
        assert (difference <= atol).all(), f"{where}, {name}: {actual[name]} is not {value}"


@pytest.fixture
def kernel_calls(monkeypatch):
    """A list with one entry for each call of torch's kernel."""
    calls, call = [], recurrent_kernels.call_torch_kernel

    def record(*args, **kwargs):
        calls.append(args)
        return call(*args, **kwargs)

    for module in (recurrent_kernels, recurrent_stack):
        monkeypatch.setattr(module, "call_torch_kernel", record)
    return calls


def test_every_cell_and_score_has_a_reference():
    """A cell or score without its equations in NumPy is not tested."""
    assert CELL_STEPS.keys() == RECURRENT_CELLS.keys()
    assert SCORES.keys() == ATTENTION_SCORES.keys()
    assert {name: len(cell.state_names) for name, cell in RECURRENT_CELLS.items()} == NUM_STATES


@CELLS
def test_one_step_is_the_equations(cell_type):
    """`project_inputs` and `step` on one batch of vectors."""
    layer, inputs, state = make_layer(cell_type, False)
    actual = layer.cell.step(layer.cell.project_inputs(inputs[:, 0]), state)
    expected = CELL_STEPS[cell_type](to_numpy(layer.cell), inputs[:, 0].numpy(), tuple(s.numpy() for s in state))
    assert len(actual) == len(expected) == NUM_STATES[cell_type]
    for states, reference in zip(actual, expected):
        np.testing.assert_allclose(states.detach().numpy(), reference, rtol=1e-12, atol=1e-14)


@CELLS
@DIRECTIONS
def test_fast_path_is_the_loop_is_the_equations(cell_type, bidirectional, kernel_calls):
    """Every kind of mask, with and without final states and history, with given initial states and without."""
    layer, inputs, state = make_layer(cell_type, bidirectional)
    for kind, mask in MASKS.items():
        reference = run_layer(
            cell_type,
            to_numpy(layer),
            inputs.numpy(),
            tuple(s.numpy() for s in state),
            None if mask is None else mask.numpy(),
        )
        outputs, final, passed = reference
        expected = {"outputs": outputs} | {f"final {index}": states for index, states in enumerate(final)}
        expected_history = {f"history {index}": states.swapaxes(0, 1) for index, states in enumerate(passed)}
        for padding in paddings(mask):
            for needs_state, needs_history in [(True, False), (False, False)] + [(True, True)] * (not bidirectional):
                where = f"{kind}, {needs_state=}, {needs_history=}, looked at: {padding and padding.is_right_padded}"
                with loop_only():
                    kernel_calls.clear()
                    loop = run(layer, inputs, state, padding, needs_state, needs_history)
                    assert not kernel_calls
                fast = run(layer, inputs, state, padding, needs_state, needs_history)
                if not needs_history or NUM_STATES[cell_type] == 1:
                    assert kernel_calls, f"{where}: no fast path"
                assert_same(fast, loop, where)
                wanted = expected | (expected_history if needs_history else {})
                assert ("final 0" in loop) == needs_state, where
                for name, value in wanted.items():
                    if needs_state or name == "outputs":
                        message = f"{where}, {name}"
                        np.testing.assert_allclose(loop[name], value, rtol=1e-11, atol=1e-12, err_msg=message)


def test_where_time_is_cut():
    """At the cheapest choice of lengths, found among all of them; nowhere where sorting costs more than it saves."""
    lengths = [9, 3, 0, 7, 3, 1, 9, 4]

    def cost(cuts, call_cost):
        starts = [0, *cuts[:-1]]
        return sum(call_cost + (stop - start) * sum(n > start for n in lengths) for start, stop in zip(starts, cuts))

    choices = [
        [*chosen, 9] for number in range(5) for chosen in itertools.combinations(sorted(set(lengths) - {0, 9}), number)
    ]
    for call_cost in (0, 2, 5, 9, 50):
        best = min(cost(cuts, call_cost) for cuts in choices)
        assert cost(recurrent_segments.choose_cuts(lengths, call_cost), call_cost) == best
        saved = cost([9], call_cost) - best
        assert recurrent_segments.choose_cuts(lengths, call_cost, saved) == [9]
        if saved > 0:
            assert len(recurrent_segments.choose_cuts(lengths, call_cost, saved - 1)) > 1
    assert recurrent_segments.choose_cuts([0, 0], 0) == []


@ON_A_CPU
@CELLS
@DIRECTIONS
@pytest.mark.parametrize("call_cost", [0, 4])
def test_pieces_of_time_are_the_loop(cell_type, bidirectional, call_cost, kernel_calls, monkeypatch):
    """A batch cut at every length, and one where rows end within a piece too; never where nothing is gained by it."""
    monkeypatch.setattr(recurrent_segments, "CALL_COST", call_cost)
    monkeypatch.setattr(recurrent_segments, "CALL_OPERATIONS", 0)
    monkeypatch.setattr(recurrent_segments, "SORTING_OPERATIONS", 0)
    layer, inputs, state = make_layer(cell_type, bidirectional)
    num_lengths = {"right": 5, "right and empty": 3, "left": 5, "mixed": 3, "both ends": 1}
    for kind, number in num_lengths.items():
        num_pieces = number if call_cost == 0 else min(number, 2)
        for padding in (paddings(MASKS[kind])[0], Padding(MASKS[kind].bool())):
            for needs_state in (True, False):
                where = f"{kind}, {needs_state=}, looked at: {padding.is_right_padded}"
                with loop_only():
                    loop = run(layer, inputs, state, padding, needs_state)
                kernel_calls.clear()
                assert_same(run(layer, inputs, state, padding, needs_state), loop, where)
                assert len(kernel_calls) == num_pieces * len(layer.cells), where
                with without_fast_paths("segments"):
                    kernel_calls.clear()
                    assert_same(run(layer, inputs, state, padding, needs_state), loop, where)
                    assert len(kernel_calls) == len(layer.cells), where


@CELLS
@DIRECTIONS
def test_initial_states_are_zero_where_not_given(cell_type, bidirectional):
    layer, inputs, _ = make_layer(cell_type, bidirectional)
    for kind in ("none", "right and empty", "mixed"):
        mask = MASKS[kind]
        array_mask = None if mask is None else mask.numpy()
        outputs, final, _ = run_layer(cell_type, to_numpy(layer), inputs.numpy(), None, array_mask)
        for enabled in (True, False):
            with loop_only(enabled):
                actual, actual_final, _ = layer(inputs, None, paddings(mask)[0])
            np.testing.assert_allclose(actual.detach(), outputs, rtol=1e-11, atol=1e-12)
            for states, reference in zip(actual_final, final, strict=True):
                np.testing.assert_allclose(states.detach(), reference, rtol=1e-11, atol=1e-12)


@CELLS
@DIRECTIONS
def test_gradients_are_those_of_the_equations(cell_type, bidirectional):
    """Autograd against central differences of the NumPy reference, along a random direction in every tensor."""
    layer, inputs, state = make_layer(cell_type, bidirectional, seed=1)
    arrays = to_numpy(layer) | {"inputs": inputs.numpy()}
    arrays |= {f"initial {index}": states.numpy() for index, states in enumerate(state)}
    for kind in ("none", "right and empty", "mixed"):
        mask = MASKS[kind]

        def objective(arrays, mask=mask):
            initial = tuple(arrays[f"initial {index}"] for index in range(len(state)))
            array_mask = None if mask is None else mask.numpy()
            outputs, final, _ = run_layer(cell_type, arrays, arrays["inputs"], initial, array_mask)
            results = {"outputs": outputs} | {f"final {index}": states for index, states in enumerate(final)}
            return sum(
                (result * weights_for(torch.tensor(result), key).numpy()).sum() for key, result in results.items()
            )

        with loop_only():
            loop = run(layer, inputs, state, paddings(mask)[0])
        for name, array in arrays.items():
            direction = np.random.default_rng(0).normal(size=array.shape)
            up, down = (objective(arrays | {name: array + sign * 1e-5 * direction}) for sign in (1, -1))
            derivative = (loop[f"gradient of {name}"].numpy() * direction).sum()
            np.testing.assert_allclose(derivative, (up - down) / 2e-5, rtol=1e-7, atol=1e-7, err_msg=f"{kind}, {name}")


@CELLS
@DIRECTIONS
@pytest.mark.parametrize("enabled", [True, False], ids=["loop", "fast"])
def test_gradcheck(cell_type, bidirectional, enabled):
    """Torch's own check of every gradient of the loop, and of the fast path."""
    layer, inputs, state = make_layer(cell_type, bidirectional, seed=2)
    names, parameters = zip(*layer.named_parameters())
    padding = Padding(MASKS["mixed"].bool())

    def function(inputs, *tensors):
        initial, values = tensors[: len(state)], tensors[len(state) :]
        arguments = (inputs, initial, padding)
        outputs, final, _ = torch.func.functional_call(layer, dict(zip(names, values)), arguments)
        return outputs, *final

    leaves = [tensor.detach().clone().requires_grad_() for tensor in (inputs, *state, *parameters)]
    with loop_only(enabled):
        # cuDNN adds in another order each time.
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True, nondet_tol=1e-12)


# float32 loses about seven digits per operation to rounding, some tens of operations deep here.
@CELLS
@DIRECTIONS
def test_paths_agree_in_float32(cell_type, bidirectional):
    layer, inputs, state = make_layer(cell_type, bidirectional, torch.float32)
    atol = 1e-4 if inputs.device.type == "cpu" else 3e-4  # the hyperbolic tangent of cuDNN is less exact
    for kind, mask in MASKS.items():
        for padding in paddings(mask):
            with loop_only():
                loop = run(layer, inputs, state, padding)
            assert_same(run(layer, inputs, state, padding), loop, kind, rtol=1e-5, atol=atol)


@CELLS
@DIRECTIONS
def test_paths_agree_in_bfloat16(cell_type, bidirectional):
    """Both paths stay near float64 on the same (rounded) weights: 8 bits of mantissa, some tens of operations."""
    layer, inputs, state = make_layer(cell_type, bidirectional, torch.bfloat16)
    exact = make_layer(cell_type, bidirectional)[0]
    exact.load_state_dict(layer.state_dict())
    for kind, mask in MASKS.items():
        for padding in paddings(mask):
            with loop_only():
                expected = run(exact, inputs.double(), tuple(s.double() for s in state), padding)
                loop = run(layer, inputs, state, padding)
            fast = run(layer, inputs, state, padding)
            for name, value in expected.items():
                scale = value.abs().max().clamp(min=1)
                for path, results in (("loop", loop), ("fast", fast)):
                    assert results[name].dtype == torch.bfloat16
                    error = ((results[name].double() - value).abs().max() / scale).item()
                    assert error < (0.08 if name.startswith("gradient") else 0.03), f"{kind}, {name}, {path}"


# Whole models.


def padded_inputs(name: str) -> dict:
    """Inputs with every kind of padding, labels only at tokens, and in both sequences of a seq2seq model."""
    inputs = make_inputs(name)
    mask = make_mask()
    if name == "RNNForMultipleChoice":
        mask = mask[torch.arange(18).view(6, 3) % 6]
    inputs["attention_mask"] = mask
    if "decoder_input_ids" in inputs:
        inputs["decoder_attention_mask"] = make_mask(5).roll(1, 0)
    if "start_positions" in inputs:
        first = mask.argmax(1)
        first[mask.sum(1) == 0] = mask.shape[1]  # ignored by the loss
        inputs |= {"start_positions": first, "end_positions": first}
    elif "labels" in inputs and inputs["labels"].dim() == 2:
        inputs["labels"] = inputs["labels"].masked_fill(inputs.get("decoder_attention_mask", mask) == 0, -100)
    return inputs


def results_of(model, inputs: dict) -> dict:
    """The outputs and the loss of a model, and the gradients of a random projection of its outputs."""
    outputs = model(**inputs)
    results = {key: value for key, value in outputs.items() if isinstance(value, torch.Tensor)}
    # The loss is left out: the stock ones are computed in float32.
    objective = sum(
        (value.clamp(min=-1e3) * weights_for(value, key)).sum() for key, value in results.items() if key != "loss"
    )
    gradients = torch.autograd.grad(objective, list(model.parameters()), allow_unused=True)
    for (name, parameter), gradient in zip(model.named_parameters(), gradients):
        results[f"gradient of {name}"] = torch.zeros_like(parameter) if gradient is None else gradient
    return {name: result.detach() for name, result in results.items()}


def check_model(name: str, options: dict, taken: list, *ruled_out: list[str]) -> None:
    """That a model gives what its loop gives, without the named fast paths; `taken` records another one."""
    model = make_model(name, **options)
    inputs = padded_inputs(name)
    with loop_only():
        expected = results_of(model, inputs)
    assert not taken
    for names in ruled_out:
        with without_fast_paths(*names):
            actual = results_of(model, inputs)
        assert_same(actual, expected, f"{name}, {options}, without {names}", rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_models_on_the_fast_path_and_on_the_loop(name, kernel_calls):
    """Outputs, loss and gradients of every class with every option, with padding and without."""
    for options in options_of(name):
        model = make_model(name, **options)
        for inputs in (padded_inputs(name), make_inputs(name)):
            with loop_only():
                kernel_calls.clear()
                loop = results_of(model, inputs)
                assert not kernel_calls
            fast = results_of(model, inputs)
            assert kernel_calls, options
            torch.testing.assert_close(fast.pop("loss", None), loop.pop("loss", None), rtol=1e-6, atol=0)
            assert_same(fast, loop, str(options))


@ON_A_CPU
@pytest.mark.parametrize("decoder", DECODERS, ids=str)
@pytest.mark.parametrize("cell_type", ["gru", "lstm"])
def test_rows_that_have_ended_are_not_decoded(decoder, cell_type, monkeypatch):
    """A decoder that runs step by step, cut at every length: outputs, also at padding, and gradients of the loop."""
    monkeypatch.setattr(recurrent_segments, "LOOP_CUT_COST", 0)
    name = "RNNSeq2SeqForConditionalGeneration"
    model = make_model(name, cell_type=cell_type, **decoder)
    inputs = make_inputs(name) | {"attention_mask": make_mask(), "use_cache": False}
    lengths = torch.tensor([5, 2, 0, 3, 5, 1])
    inputs["decoder_attention_mask"] = (torch.arange(5) < lengths[:, None]).long()
    attended = []
    attend = model.model.decoder.attention.register_forward_hook(lambda _, args, __: attended.append(len(args[0])))
    fast = results_of(model, inputs)
    if model.model.decoder.runs_step_by_step:
        assert attended == [5, 4, 3, 2, 2]
    attend.remove()
    with loop_only():
        loop = results_of(model, inputs)
    # The stock loss is computed in float32.
    torch.testing.assert_close(fast.pop("loss", None), loop.pop("loss", None), rtol=1e-6, atol=0)
    assert_same(fast, loop, str(decoder))


@pytest.mark.parametrize("decoder", DECODERS, ids=str)
def test_attention_at_padding(decoder, monkeypatch):
    """Of a target position without a token it is that of the token before it, on every path, with its gradient."""
    monkeypatch.setattr(recurrent_segments, "LOOP_CUT_COST", 0)
    name = "RNNSeq2SeqForConditionalGeneration"
    model = make_model(name, **decoder)
    inputs = make_inputs(name) | {"attention_mask": make_mask(), "use_cache": False, "output_attentions": True}
    masks = [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [1, 0, 0, 1, 1], [1, 1, 0, 1, 0]]
    inputs["decoder_attention_mask"] = torch.tensor(masks)
    found = []
    for context in (loop_only(), without_fast_paths("segments"), contextlib.nullcontext()):
        with context:
            weights = model(**inputs).cross_attentions[0]
        for row, mask in enumerate(masks):
            for position in range(1, 5):
                if not mask[position]:
                    torch.testing.assert_close(weights[row, :, position], weights[row, :, position - 1])
        factors = torch.linspace(-1, 1, weights.numel(), dtype=weights.dtype).to(weights.device).view(weights.shape)
        gradients = torch.autograd.grad((weights * factors).sum(), list(model.parameters()), allow_unused=True)
        found.append([weights.detach(), *(gradient for gradient in gradients if gradient is not None)])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-10)


@ON_A_CPU
@pytest.mark.parametrize("decoder", DECODERS, ids=str)
def test_nothing_is_decoded_behind_the_last_label(decoder):
    """In training, where the inputs are made of labels; those in between that are ignored end nothing."""
    name = "RNNSeq2SeqForConditionalGeneration"
    model = make_model(name, **decoder).train()
    inputs = make_inputs(name)
    del inputs["decoder_input_ids"]
    for row, length in enumerate([5, 2, 0, 3, 5, 1]):
        inputs["labels"][row, length:] = -100
    inputs["labels"][0, 2] = -100
    seen = []
    inner = model.model.forward

    def forward(**arguments):
        seen.append(arguments["decoder_attention_mask"])
        return inner(**arguments)

    def gradients(**more):
        loss = model(**inputs, **more).loss
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)]

    model.model.forward = forward
    actual = gradients()
    expected = gradients(decoder_attention_mask=torch.ones_like(inputs["labels"]))
    assert seen[0].sum(1).tolist() == [5, 2, 0, 3, 5, 1]
    for pair in zip(actual, expected, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-9)
    model.eval()
    with torch.no_grad():
        model(**inputs)
    assert seen[-1] is None


@pytest.mark.parametrize("name", ["RNNForCausalLM", "RNNForMaskedLM"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_language_models_are_the_equations(name, tied):
    mask = make_mask()
    for options in options_of(name):
        model = make_model(name, tie_word_embeddings=tied, num_hidden_layers=3, **options)
        input_ids = make_inputs(name)["input_ids"]
        expected = language_model(model.config, to_numpy(model), input_ids.numpy(), mask.numpy())
        for enabled in (True, False):
            with loop_only(enabled):
                logits = model(input_ids, attention_mask=mask).logits.detach()
            np.testing.assert_allclose(logits, expected, rtol=1e-10, atol=1e-11, err_msg=str(options))


def test_hidden_states_are_the_equations():
    """The embeddings and the output of each layer, residual connections included."""
    for options in options_of("RNNModel"):
        if "word_encoder" in options:  # see the tests of words
            continue
        model = make_model("RNNModel", num_hidden_layers=3, **options)
        input_ids, mask = make_inputs("RNNModel")["input_ids"], make_mask()
        weights = to_numpy(model)
        embeddings = weights["embed_tokens.weight"][input_ids.numpy()]
        expected, _ = run_stack(model.config, weights, embeddings, mask.numpy())
        outputs = model(input_ids, attention_mask=mask, output_hidden_states=True)
        for actual, reference in zip(outputs.hidden_states, [embeddings, *expected], strict=True):
            np.testing.assert_allclose(actual.detach(), reference, rtol=1e-10, atol=1e-11, err_msg=str(options))


@pytest.mark.parametrize("name", ["RNNSeq2SeqModel", "RNNSeq2SeqForConditionalGeneration"])
def test_encoder_decoders_are_the_equations(name):
    """Encoder, bridge, attention and every type of decoder, with padding in the source and in the target."""
    for options in options_of(name):
        model = make_model(name, **options)
        inputs = {key: value for key, value in padded_inputs(name).items() if key != "labels"}
        arrays = {key: value.numpy() for key, value in inputs.items()}
        weights = to_numpy(getattr(model, "model", model))
        encoded, vectors, alphas = seq2seq(
            model.config,
            weights,
            arrays["input_ids"],
            arrays["attention_mask"],
            arrays["decoder_input_ids"],
            arrays["decoder_attention_mask"],
        )
        if name == "RNNSeq2SeqForConditionalGeneration":
            vectors = project_to_vocabulary(to_numpy(model), vectors)
        tokens = arrays["decoder_attention_mask"].astype(bool)
        for enabled in (True, False):
            with loop_only(enabled):
                outputs = model(**inputs, output_attentions=True)
            compared = {
                "encoder": (outputs.encoder_last_hidden_state, encoded),
                "decoder": (outputs.get("logits", outputs.get("last_hidden_state"))[tokens], vectors[tokens]),
                "attention": (outputs.cross_attentions[0].transpose(1, 2)[tokens], alphas.swapaxes(1, 2)[tokens]),
            }
            for key, (actual, expected) in compared.items():
                np.testing.assert_allclose(
                    actual.detach(), expected, rtol=1e-10, atol=1e-11, err_msg=f"{options}, {key}, loop: {enabled}"
                )


def reference_logits(model, inputs: dict) -> np.ndarray:
    """The logits of a language model or an encoder-decoder in NumPy."""
    arrays, weights = {key: value.numpy() for key, value in inputs.items()}, to_numpy(model)
    if not model.config.is_encoder_decoder:
        return language_model(model.config, weights, arrays["input_ids"], arrays["attention_mask"])
    keys = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
    _, vectors, _ = seq2seq(model.config, part(weights, "model"), *(arrays[key] for key in keys))
    return project_to_vocabulary(weights, vectors)


@pytest.mark.parametrize("name", ["RNNForCausalLM", "RNNForMaskedLM", "RNNSeq2SeqForConditionalGeneration"])
def test_gradients_of_models_are_those_of_the_equations(name):
    """Nothing is cut off on the way back: central differences of the NumPy model, all parameters moved at once."""
    for options in options_of(name):
        # A seed with which no unit that is rectified changes sides within the step.
        model = make_model(name, seed=1, **options)
        inputs = {key: value for key, value in padded_inputs(name).items() if key != "labels"}
        tokens = inputs.get("decoder_attention_mask", inputs["attention_mask"]).bool()
        logits = model(**inputs).logits
        projections = weights_for(logits, "logits") * tokens.unsqueeze(-1)
        parameters = list(model.parameters())
        gradients = torch.autograd.grad((logits * projections).sum(), parameters, allow_unused=True)
        generator = torch.Generator().manual_seed(5)
        moves = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        derivative = sum((g * move).sum().item() for g, move in zip(gradients, moves) if g is not None)
        values = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                for parameter, move in zip(parameters, moves):
                    parameter.add_(step * move)
            values.append((reference_logits(model, inputs) * projections.numpy()).sum())
        np.testing.assert_allclose(
            derivative, (values[0] - values[1]) / 2e-5, rtol=1e-6, atol=1e-6, err_msg=str(options)
        )


# Torch's own modules, whose weights move in by renaming.

TORCH_MODULES = {
    "rnn_tanh": lambda *args, **kwargs: nn.RNN(*args, nonlinearity="tanh", **kwargs),
    "rnn_relu": lambda *args, **kwargs: nn.RNN(*args, nonlinearity="relu", **kwargs),
    "gru": nn.GRU,
    "lstm": nn.LSTM,
}


def our_name(name: str) -> str:
    """`weight_ih_l0_reverse` to `layers.0.cell_reverse.weight_ih`."""
    parameter, layer = name.removesuffix("_reverse").split("_l")
    return f"layers.{layer}.cell{'_reverse' if name.endswith('_reverse') else ''}.{parameter}"


@pytest.mark.parametrize("cell_type", TORCH_MODULES)
@DIRECTIONS
@pytest.mark.parametrize("padded", [False, True], ids=["full", "packed"])
def test_layers_are_torch_modules(cell_type, bidirectional, padded):
    """Outputs, final states and gradients of three layers, on full and on packed ragged batches."""
    torch.manual_seed(0)
    module = TORCH_MODULES[cell_type](5, 6, num_layers=3, batch_first=True, bidirectional=bidirectional).double()
    model = make_model("RNNModel", cell_type=cell_type, bidirectional=bidirectional, num_hidden_layers=3)
    missing, unexpected = model.load_state_dict(
        {our_name(name): value for name, value in module.state_dict().items()}, strict=False
    )
    assert missing == ["embed_tokens.weight"]
    assert not unexpected
    mask = MASKS["right"] if padded else mask_of()
    inputs = torch.randn(6, SEQ, 5, dtype=torch.float64)
    theirs = inputs.clone().requires_grad_()
    if padded:
        packed, final = module(pack_padded_sequence(theirs, mask.sum(1).cpu(), batch_first=True, enforce_sorted=False))
        outputs, _ = pad_packed_sequence(packed, batch_first=True, total_length=SEQ)
    else:
        outputs, final = module(theirs)
    final = final if isinstance(final, tuple) else (final,)  # each [layers * directions, batch, hidden]
    projections = weights_for(outputs, "outputs")
    (outputs * projections).sum().add(sum(states.square().sum() for states in final)).backward()
    for enabled in (False, True):
        model.zero_grad()
        ours = inputs.clone().requires_grad_()
        hidden, padding, states = ours, Padding.from_attention_mask(mask, mask), []
        with loop_only(enabled):
            for layer in model.layers:
                hidden, state, _ = layer(hidden, None, padding)
                states.extend(state)
            last_hidden_state = model(inputs_embeds=inputs, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(last_hidden_state, hidden, rtol=0, atol=1e-12)
        tokens = mask.bool()
        torch.testing.assert_close(hidden[tokens], outputs[tokens], rtol=1e-11, atol=1e-12)
        for index, expected in enumerate(final):
            torch.testing.assert_close(torch.stack(states[index :: len(final)]), expected, rtol=1e-11, atol=1e-12)
        squares = sum(state.square().sum() for state in states)
        (hidden * projections * tokens.unsqueeze(-1)).sum().add(squares).backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-11)
        parameters = dict(model.named_parameters())
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(parameters[our_name(name)].grad, parameter.grad, rtol=1e-10, atol=1e-11)


def test_loop_only_ends_with_its_block(kernel_calls):
    """Also where the block is left by an error, and `loop_only(False)` within it allows the kernel again."""
    layer, inputs, state = make_layer("lstm", False)
    with loop_only():
        layer(inputs, state)
        assert not kernel_calls
        with loop_only(False):
            layer(inputs, state)
        assert len(kernel_calls) == 1
        layer(inputs, state)
        assert len(kernel_calls) == 1
    with pytest.raises(RuntimeError), loop_only():
        layer(inputs[..., :-1], state)
    layer(inputs, state)
    assert len(kernel_calls) == 2
