"""What the operators of compiled graphs keep of their forward for their backward."""

import gc
import weakref

import pytest
import torch
from torch.library import opcheck
from torch.utils._pytree import tree_flatten, tree_map

from hf_rnn import RECURRENT_CELLS, without_fast_paths
from hf_rnn.decoder_operator import _Bare
from hf_rnn.opaque_operators import NAMESPACE
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
        torch.testing.assert_close(OPERATORS.recurrent_layer_backward(grad_outputs, carrier, *own), expected)


@CELLS
def test_the_operator_is_what_it_says(cell_type):
    opcheck(OPERATORS.recurrent_layer_forward.default, layer_arguments(cell_type, True))
