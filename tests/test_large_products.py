"""Large products by oneDNN: the same numbers and gradients, where they are taken, and in which cases not."""

import copy

import pytest
import torch
from torch import nn
from torch.library import opcheck
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor

from hf_rnn import large_products, loop_only, without_fast_paths
from hf_rnn.large_products import large_linear, weight_gradient
from hf_rnn.linear_modules import apply_linear
from hf_rnn.linear_operator import large_linear_operator, linear_in_graph
from hf_rnn.recurrent_cells import GRUCell
from hf_rnn.recurrent_kernels import run_loop
from hf_rnn.weight_layouts import has_onednn
from matrix import ON_A_CPU, cases, make_inputs, make_model
from test_laws_paths import check_model


@pytest.fixture
def taken(monkeypatch):
    """
    Every product in every type is taken for a large one, and the shapes of those that oneDNN would be asked for: what
    is tested is what the library makes of them. What oneDNN makes of them is tested where it has them.
    """
    shapes = []

    def multiply(inputs, weight, bias=None):
        # A weight with gaps takes oneDNN a thousand times as long.
        assert weight.is_contiguous() or weight.t().is_contiguous()
        shapes.append((tuple(inputs.shape), tuple(weight.shape)))
        return F.linear(inputs, weight, bias)

    def takes_onednn(inputs, weight):
        return large_products.may_take("large_products") and type(weight) in (torch.Tensor, nn.Parameter)

    monkeypatch.setattr(large_products, "by_onednn", multiply)
    monkeypatch.setattr(large_products, "takes_onednn", takes_onednn)
    monkeypatch.setattr("hf_rnn.vocabulary_loss.takes_onednn", takes_onednn)
    return shapes


def make_arguments(*shape, dtype=torch.float64):
    return (
        torch.randn(*shape, 4, dtype=dtype, requires_grad=True),
        torch.randn(5, 4, dtype=dtype, requires_grad=True),
        torch.randn(5, dtype=dtype, requires_grad=True),
    )


@pytest.mark.parametrize("shape", [(3,), (2, 3), (0, 3)], ids=str)
def test_gradients(taken, shape):
    """Of the first and the second order, with and without a bias, and of each argument alone."""
    inputs, weight, bias = make_arguments(*shape)
    assert torch.equal(large_linear(inputs, weight, bias), F.linear(inputs, weight, bias))
    for arguments in ((inputs, weight, bias), (inputs, weight)):
        assert torch.autograd.gradcheck(large_linear, arguments)
        assert torch.autograd.gradgradcheck(large_linear, arguments)
        for index in range(len(arguments)):
            leaves = [leaf.detach().requires_grad_(index == number) for number, leaf in enumerate(arguments)]
            assert torch.autograd.gradcheck(large_linear, leaves)
    assert taken


@pytest.mark.parametrize("width", [3, 8])
def test_gradient_of_a_weight(taken, width):
    """The same whichever of the two is the wider one and whichever is copied; with gradients of its own."""
    gradients, inputs = (torch.randn(6, size, dtype=torch.float64, requires_grad=True) for size in (width, 4))
    torch.testing.assert_close(weight_gradient(gradients, inputs), gradients.t() @ inputs)
    assert taken == [((width, 6), (4, 6))] if width == 3 else [((4, 6), (8, 6))]
    assert torch.autograd.gradcheck(weight_gradient, (gradients, inputs))


class ProjectingCell(GRUCell):
    """A cell with a projection of its own, by a function, by its named arguments, and by a module."""

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__(input_size, hidden_size)
        self.layer = nn.Linear(input_size, 3 * hidden_size)

    def project_inputs(self, inputs):
        named = F.linear(input=inputs, weight=self.weight_ih)
        return F.linear(inputs, self.weight_ih, bias=self.bias_ih) + self.layer(inputs) + named


def test_products_of_cells_that_project_inputs_themselves(taken):
    """They are taken as well, without a word of it in the cell, and the gradients stay."""
    cell = ProjectingCell(4, 5).double()
    for parameter in cell.parameters():
        nn.init.normal_(parameter)
    inputs, state = torch.randn(2, 3, 4, dtype=torch.float64), (torch.zeros(2, 5, dtype=torch.float64),)

    def results():
        outputs, _, _ = run_loop(cell, inputs, state, None)
        return [outputs, *torch.autograd.grad(outputs.sum(), list(cell.parameters()))]

    actual = results()
    assert taken[:2] == [((2, 3, 4), (15, 4))] * 2
    taken.clear()
    with loop_only():
        expected = results()
    assert not taken
    for pair in zip(actual, expected, strict=True):
        torch.testing.assert_close(*pair)


def test_nothing_is_kept_without_gradients(taken):
    inputs, weight, bias = make_arguments(3)
    with torch.no_grad():
        assert large_linear(inputs, weight, bias).grad_fn is None
    assert large_linear(*(leaf.detach() for leaf in (inputs, weight, bias))).grad_fn is None
    assert len(taken) == 2


@pytest.mark.parametrize(("name", "options"), cases(), ids=str)
def test_models(taken, name, options):
    """Outputs, loss and every gradient of a model in training mode, without torch's kernels and with them."""
    others = ([], ["torch_kernel"], ["chunked_loss"])
    check_model(name, options, taken, *(["packed_linear", *names] for names in others))
    assert taken or name != "RNNForCausalLM"


def test_a_vocabulary_in_parts(taken, monkeypatch):
    """The gradient of the projection is made for a few words at a time and covers all of them."""
    from hf_rnn.vocabulary_loss import linear_cross_entropy

    monkeypatch.setattr("hf_rnn.vocabulary_loss.WORDS_AT_ONCE", 2)
    monkeypatch.setattr("hf_rnn.vocabulary_loss.chunk_length", lambda num_rows, weight, dtype: 3)
    arguments, labels = make_arguments(7), torch.arange(7) % 5
    actual = torch.autograd.grad(linear_cross_entropy(*arguments, labels), arguments)
    assert ((2, 3), (4, 3)) in taken
    expected = torch.autograd.grad(F.cross_entropy(F.linear(*arguments), labels), arguments)
    for pair in zip(actual, expected):
        torch.testing.assert_close(*pair)


def test_which_products_are_taken(monkeypatch):
    """Large ones in float32 where oneDNN is faster, which no other program has its hands on."""
    monkeypatch.setattr(large_products, "onednn_pays", lambda num_threads: True)
    inputs, weight = torch.zeros(4, 32, 128), nn.Parameter(torch.zeros(128, 128))
    takes = large_products.takes_onednn
    assert takes(inputs, weight)
    assert takes(weight.t(), inputs.flatten(0, 1).t())
    assert not takes(inputs[:3], weight)
    assert not takes(torch.zeros(31, 2048), torch.zeros(2048, 2048))
    assert not takes(torch.zeros(2048, 31), torch.zeros(2048, 31))
    assert not takes(inputs.double(), weight.double())
    assert not takes(inputs.bfloat16(), weight.bfloat16())
    assert not takes(torch.zeros(4, 32, 128, device="meta"), weight)
    with without_fast_paths("large_products"):
        assert not takes(inputs, weight)
    with torch.autocast("cpu"):
        assert not takes(inputs, weight)
    seen = []
    torch.func.vmap(lambda row: seen.append(takes(row, weight.detach())) or row)(inputs[None].expand(2, -1, -1, -1))
    assert seen == [False]


def test_onednn(monkeypatch):
    """What it computes, from arguments that do not lie in one piece too."""
    if not has_onednn(torch.float32):
        pytest.skip("Torch has no operators of oneDNN here.")
    monkeypatch.setattr(large_products, "onednn_pays", lambda num_threads: True)
    inputs, weight, bias = torch.randn(300, 4, 70)[::2], torch.randn(90, 140)[:, ::2], torch.randn(90)
    leaves = [leaf.detach().requires_grad_() for leaf in (inputs, weight, bias)]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    assert large_products.takes_onednn(*leaves[:2])
    outputs, expected = large_linear(*leaves), F.linear(*wide)
    gradient = torch.randn(4, 150, 90).transpose(0, 1)
    for actual, exact in zip(
        [outputs, *torch.autograd.grad(outputs, leaves, gradient)],
        [expected, *torch.autograd.grad(expected, wide, gradient.double())],
    ):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-4, atol=1e-4)


def test_modules_with_something_around_them_are_called(taken):
    """An adapter or a hook has its say."""
    module, inputs = nn.Linear(4, 5, dtype=torch.float64), torch.ones(3, 4, dtype=torch.float64)
    plain = apply_linear(module, inputs)
    assert len(taken) == 1
    module.register_forward_hook(lambda module, arguments, output: output + 1)
    torch.testing.assert_close(apply_linear(module, inputs), plain + 1)

    class Adapted(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs) + 2

    adapted = Adapted(4, 5, dtype=torch.float64)
    adapted.load_state_dict(module.state_dict())
    torch.testing.assert_close(apply_linear(adapted, inputs), plain + 2)
    assert len(taken) == 1

    seen, watched = [], nn.Linear(4, 5, dtype=torch.float64)
    watched.register_full_backward_hook(lambda *arguments: seen.append(arguments))
    apply_linear(watched, inputs.requires_grad_()).sum().backward()
    assert len(seen) == 1
    assert len(taken) == 1


# In graphs.


def products_in_graph(model, inputs, backend: str = "aot_eager") -> list[str]:
    """The operators of the graph of a forward."""
    targets = []

    def look(graph, example_inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend(backend)(graph, example_inputs)

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=look)
    actual, expected = compiled(**inputs), model(**inputs)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-5)
    if actual.loss is not None and actual.loss.requires_grad:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = [torch.autograd.grad(outputs.loss, parameters) for outputs in (actual, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    return [target for target in targets if "large_linear" in target]


@ON_A_CPU
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("takes", [False, True], ids=["torch", "oneDNN"])
def test_graphs_that_are_trained(monkeypatch, takes, backend):
    """One operator for the head and each map of the attention, with the gradients of all."""
    monkeypatch.setattr(large_products, "takes_onednn", lambda inputs, weight: takes and has_onednn(torch.float32))
    model = make_model("RNNForCausalLM", dtype=torch.float32).train()
    assert len(products_in_graph(model, make_inputs("RNNForCausalLM"), backend)) == 1
    name = "RNNSeq2SeqForConditionalGeneration"
    model = make_model(name, dtype=torch.float32, attention_score="additive").train()
    assert len(products_in_graph(model, make_inputs(name), backend)) >= 3


@ON_A_CPU
def test_graphs_in_which_products_are_those_of_torch():
    """What is not trained, other types, autocast, and modules with something around them."""
    inputs = make_inputs("RNNForCausalLM")
    model = make_model("RNNForCausalLM", dtype=torch.float32, tie_word_embeddings=False).train()
    with torch.no_grad():
        assert not products_in_graph(model, inputs)
    assert not products_in_graph(make_model("RNNForCausalLM").train(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        torch._dynamo.reset()
        targets = []
        torch.compile(model, backend=lambda graph, _: targets.append(str(graph.graph)) or graph)(**inputs)
        assert "large_linear" not in "".join(targets)
    wrapped = copy.deepcopy(model)
    wrapped.lm_head.weight = nn.Parameter(TwoTensor(model.lm_head.weight.detach(), model.lm_head.weight.detach()))
    torch._dynamo.reset()
    targets.clear()
    torch.compile(wrapped, backend=lambda graph, _: targets.append(str(graph.graph)) or graph)(**inputs)
    assert "large_linear" not in "".join(targets)
    watched = copy.deepcopy(model)
    watched.lm_head.register_forward_hook(lambda module, args, output: output + 1)
    assert not products_in_graph(watched, inputs)
    assert products_in_graph(model, inputs)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (0, 3)], ids=str)
def test_gradients_of_the_operator(shape):
    """Of the first and the second order, of each argument alone."""
    inputs, weight, bias = make_arguments(*shape)
    assert torch.equal(linear_in_graph(inputs, weight, bias), F.linear(inputs, weight, bias))
    for arguments in ((inputs, weight, bias), (inputs, weight)):
        assert torch.autograd.gradcheck(linear_in_graph, arguments)
        assert torch.autograd.gradgradcheck(linear_in_graph, arguments)
        opcheck(large_linear_operator, (*arguments, None)[:3])
        for index in range(len(arguments)):
            leaves = [leaf.detach().requires_grad_(index == number) for number, leaf in enumerate(arguments)]
            assert torch.autograd.gradcheck(linear_in_graph, leaves)
