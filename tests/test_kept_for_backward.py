"""What the operators of compiled graphs keep of their forward for their backward."""

import gc
import weakref

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.checkpoint import checkpoint

from hf_rnn import RECURRENT_CELLS, opaque_operators, without_fast_paths
from hf_rnn.decoder_operator import _Bare
from hf_rnn.opaque_operators import NAMESPACE
from hf_rnn.recurrent_cells import LSTMCell
from hf_rnn.recurrent_layer import RecurrentLayer
from hf_rnn.recurrent_operator import _Layer, recurrent_layer
from matrix import ON_A_CPU, make_config, make_inputs, make_mask, make_model


OPERATORS = getattr(torch.ops, NAMESPACE)
MODELS = {
    "lstm": ("RNNForCausalLM", {}),
    "gru": ("RNNForCausalLM", {"cell_type": "gru", "recurrent_dropout": 0.3}),
    "two_directions": ("RNNForTokenClassification", {"bidirectional": True, "hidden_dropout": 0.3}),
    "decoder": ("RNNSeq2SeqForConditionalGeneration", {"input_feeding": True, "output_dropout": 0.3}),
}
# On a GPU nothing is kept.
pytestmark = ON_A_CPU


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def runs(monkeypatch):
    """For each time that an operator computes a layer or a decoder, a weak reference to one of its weights."""
    made = []

    def counting(inner):
        def run(module, weights, *arguments):
            made.append(weakref.ref(weights[0]))
            return inner(module, weights, *arguments)

        return run

    for module_class in (_Layer, _Bare):
        monkeypatch.setattr(module_class, "run", counting(module_class.run))
    return made


def compiled_step(name: str, options: dict):
    """A function that computes gradients by a compiled model, which has been called before."""
    model = make_model(name, **options).train()
    # The first run of a graph is watched, and nothing is kept then.
    compiled, inputs = torch.compile(model, fullgraph=True, backend="aot_eager"), make_inputs(name)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.autograd.grad(compiled(**inputs).loss, parameters, allow_unused=True)

    def forward():
        torch.manual_seed(3)
        return compiled(**inputs).loss

    return forward, lambda loss, **options: torch.autograd.grad(loss, parameters, allow_unused=True, **options)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_computed_again(name, runs):
    forward, backward = compiled_step(*MODELS[name])
    results = []
    for times, ruled_out in ((1, []), (2, ["kept_for_backward"])):
        runs.clear()
        with without_fast_paths("tanh_by_sigmoid", *ruled_out):
            loss = forward()
            in_forward = len(runs)
            results.append((loss.detach(), backward(loss)))
        assert in_forward >= 2
        assert len(runs) == times * in_forward
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


@torch._functorch.config.patch(donated_buffer=False)
@pytest.mark.parametrize("name", ["lstm", "decoder"])
def test_a_second_backward_computes_again(name, runs):
    forward, backward = compiled_step(*MODELS[name])
    runs.clear()
    loss = forward()
    gradients = backward(loss, retain_graph=True)
    before = len(runs)
    torch.testing.assert_close(backward(loss), gradients, rtol=1e-12, atol=1e-14)
    assert len(runs) == 2 * before


@pytest.mark.parametrize("name", ["lstm", "decoder"])
def test_what_is_kept_goes_with_the_results(name, runs):
    """It lies nowhere but with the graph, whether there is a backward or not."""
    forward, backward = compiled_step(*MODELS[name])
    for end in (backward, lambda loss: None):
        runs.clear()
        loss = forward()
        gc.collect()
        assert all(reference() is not None for reference in runs)
        end(loss)
        del loss
        gc.collect()
        assert not any(reference() is not None for reference in runs)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("with_checkpoints", [False, True], ids=["without", "with"])
def test_nothing_is_kept_with_checkpoints(name, with_checkpoints, monkeypatch):
    """Within a graph the forwards of all layers would be run before any of their backwards."""
    model_name, options = MODELS[name]
    model = make_model(model_name, **options).train()
    if with_checkpoints:
        model.gradient_checkpointing_enable()
    kept, may_keep = [], opaque_operators._may_keep
    monkeypatch.setattr(opaque_operators, "_may_keep", lambda leaves: kept.append(1) or may_keep(leaves))
    torch.compile(model, fullgraph=True, backend="aot_eager")(**make_inputs(model_name)).loss.backward()
    assert bool(kept) != with_checkpoints


@pytest.mark.parametrize("name", ["lstm", "decoder"])
def test_a_checkpoint_around_a_compiled_model(name, runs):
    """It saves the same in the first run of a graph and when that is computed again: nothing within operators."""
    model_name, options = MODELS[name]
    model = make_model(model_name, **options | {"output_dropout": 0.0}).train()
    compiled, inputs = torch.compile(model, backend="aot_eager"), make_inputs(model_name)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(**inputs).loss, parameters)
    saved, numbers = [], []
    for _ in range(3):
        loss = checkpoint(lambda: compiled(**inputs).loss, use_reentrant=False)
        torch.testing.assert_close(torch.autograd.grad(loss, parameters), expected)
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(1) or tensor, lambda tensor: tensor):
            compiled(**inputs)
        numbers.append(len(saved))
    assert len(set(numbers)) == 1


def test_a_cell_that_computes_without_gradients(monkeypatch):
    """As a reservoir does: what goes in has no gradient, and its weights have none."""

    class Reservoir(LSTMCell):
        def step(self, projected, state, linear=F.linear):
            with torch.no_grad():
                return super().step(projected, state, linear)

    monkeypatch.setitem(RECURRENT_CELLS, "reservoir", Reservoir)
    model = make_model("RNNForCausalLM", cell_type="reservoir").train()
    inputs = make_inputs("RNNForCausalLM")
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        for names in ([], ["kept_for_backward"]):
            model.zero_grad()
            with without_fast_paths("crf_products", *names):
                run(**inputs).loss.backward()
            assert all(
                parameter.grad is None or not parameter.grad.any() for parameter in model.model.layers.parameters()
            )
            assert model.lm_head.weight.grad.any()


def test_the_carrier_is_a_number(monkeypatch):
    """Whoever looks for what is not a number finds nothing there."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        *_, carrier = OPERATORS.recurrent_layer_forward(*layer_arguments("lstm", False))
    finally:
        torch.use_deterministic_algorithms(False)
    assert carrier.isfinite().all()


def plain_arguments(cell_type: str, bidirectional: bool) -> tuple:
    """Of one row without padding in float32, which torch's kernels read, whose outputs are what they keep."""
    inputs, states, weights, _, _, *rest = tree_map(
        lambda value: value.float() if isinstance(value, torch.Tensor) else value,
        layer_arguments(cell_type, bidirectional),
    )
    return inputs[:1], [state[:1] for state in states], weights, [], None, *rest


def layer_arguments(cell_type: str, bidirectional: bool) -> tuple:
    layer = RecurrentLayer(make_config("RNNModel", cell_type=cell_type), 5, 0, bidirectional).double()
    mask = make_mask().bool()
    states = [torch.randn(len(mask), size, dtype=torch.float64) for size in layer.state_sizes]
    weights = [torch.randn_like(weight).detach() for cell in layer.cells for weight in cell.parameters()]
    kept = [torch.randint(0, 2, (len(mask), 6)).double() * 2 for _ in layer.cells]
    return torch.randn(*mask.shape, 5, dtype=torch.float64), states, weights, kept, mask, cell_type, None, None


def copies(arguments: tuple, trained: bool = False) -> tuple:
    def copy(value):
        is_trained = trained and isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.clone().requires_grad_(is_trained) if isinstance(value, torch.Tensor) else value

    return tree_map(copy, arguments)


CELLS = pytest.mark.parametrize("cell_type", RECURRENT_CELLS)
DIRECTIONS = pytest.mark.parametrize("bidirectional", [False, True], ids=["one_direction", "two_directions"])


@CELLS
@DIRECTIONS
def test_gradients_are_those_of_the_operator(cell_type, bidirectional):
    """Of the first order, and of the second one."""
    arguments, results = layer_arguments(cell_type, bidirectional), []
    for operator in (OPERATORS.recurrent_layer_for_training, recurrent_layer):
        own = copies(arguments, trained=True)
        leaves = tree_flatten(own[:3])[0]
        values = operator(*own)
        gradients = torch.autograd.grad(sum(value.sin().sum() for value in values), leaves, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), leaves)
        own = copies(arguments, trained=True)
        leaves = tree_flatten(own[:3])[0]
        first = torch.autograd.grad(sum(value.sin().sum() for value in operator(*own)), leaves)
        results.append([*values, *gradients, *second, *first])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@CELLS
@DIRECTIONS
def test_memory_of_arguments_and_results_may_be_used_again(cell_type, bidirectional):
    """As a compiler does that sees no more use of them in the forward."""
    for make_arguments in (layer_arguments, plain_arguments):
        arguments = make_arguments(cell_type, bidirectional)
        grad_outputs = [torch.randn_like(result) for result in recurrent_layer(*arguments)]
        expected = OPERATORS.recurrent_layer_backward(grad_outputs, None, *arguments)
        own = copies(arguments)
        *results, carrier = OPERATORS.recurrent_layer_forward(*own)
        for tensor in tree_flatten((own, results))[0]:
            if isinstance(tensor, torch.Tensor):
                tensor.numpy().fill(1)  # without a note of it
        gradients = OPERATORS.recurrent_layer_backward(grad_outputs, carrier, *own)
        torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4)


@CELLS
def test_the_operator_is_what_it_says(cell_type):
    opcheck(OPERATORS.recurrent_layer_forward.default, layer_arguments(cell_type, True))
