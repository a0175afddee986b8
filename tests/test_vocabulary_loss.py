"""
The loss of language models in training: in chunks it is what plain cross-entropy is, with every gradient, and the
logits beside it are there for whoever reads them, but only then.
"""

import contextlib
import copy
import gc
import pickle
import weakref
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from accelerate.utils.operations import ConvertOutputsToFp32
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainingArguments

from hf_rnn import RNNConfig, RNNForCausalLM, deferred_logits, vocabulary_loss, without_fast_paths
from hf_rnn.deferred_logits import DeferredLogits, _Product, vocabulary_logits
from hf_rnn.vocabulary_loss import chunk_length, linear_cross_entropy, pays
from matrix import ON_A_CPU, VOCAB_SIZE, case_id, make_inputs, make_mask, make_model


HEADS = ["RNNForCausalLM", "RNNForMaskedLM", "RNNSeq2SeqForConditionalGeneration"]
OVER_HEADS = pytest.mark.parametrize("name", HEADS)
TIES = [
    {"tie_word_embeddings": False},
    {"tie_word_embeddings": True},  # with a projection to the size of the embeddings
    {"tie_word_embeddings": True, "embedding_size": 6},
]
ROWS, SIZE = 11, 5


def chunked_loss(enabled: bool):
    """Within this context the loss comes in chunks, or from all logits."""
    return contextlib.nullcontext() if enabled else without_fast_paths("chunked_loss")


@pytest.fixture(params=[1, 2, 5, 11, 1000], ids=lambda length: f"chunks of {length}")
def chunks(request, monkeypatch):
    """Chunks of any length, among them one row and more than there are."""
    monkeypatch.setattr(vocabulary_loss, "chunk_length", lambda num_rows, weight, dtype: request.param)


@pytest.fixture(params=[True, False], ids=["cpu", "elsewhere"])
def place(request, monkeypatch):
    """As on a CPU, or as elsewhere, where rows without a label are computed in vain, and some rows at a time."""
    monkeypatch.setattr(vocabulary_loss, "is_on_cpu", lambda tensor: request.param)
    monkeypatch.setattr(vocabulary_loss, "LOGITS_AT_ONCE_ELSEWHERE", 2 * VOCAB_SIZE)


@pytest.fixture
def never_computed(monkeypatch):
    """Fails where the values of deferred logits are computed."""

    def compute(self):
        raise AssertionError("The logits were computed.")

    monkeypatch.setattr(_Product, "compute", compute)


def make_arguments(dtype=torch.float64, bias=True, ignored=4, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    shapes = [(ROWS, SIZE), (VOCAB_SIZE, SIZE)] + ([(VOCAB_SIZE,)] if bias else [])
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) * scale for shape in shapes]
    labels = torch.randint(0, VOCAB_SIZE, (ROWS,), generator=generator)
    labels[torch.randperm(ROWS, generator=generator)[:ignored]] = -100
    tensors = [tensor.to(dtype).requires_grad_() for tensor in tensors] + ([] if bias else [None])
    return *tensors, labels


def plain_cross_entropy(hidden_states, weight, bias, labels, **options):
    """The definition."""
    return F.cross_entropy(F.linear(hidden_states, weight, bias), labels, **options)


def with_gradients(function, arguments, **options):
    """A loss and the gradients of three times it."""
    loss = function(*arguments, **options)
    tensors = [tensor for tensor in arguments[:3] if tensor is not None]
    return loss.detach(), torch.autograd.grad(3 * loss, tensors)


# The function.


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("ignored", [0, 4, ROWS - 1])
@pytest.mark.usefixtures("chunks", "place")
def test_equals_plain_cross_entropy(reduction, bias, ignored):
    arguments = make_arguments(bias=bias, ignored=ignored)
    actual = with_gradients(linear_cross_entropy, arguments, reduction=reduction)
    expected = with_gradients(plain_cross_entropy, arguments, reduction=reduction)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("chunks", "place")
def test_passes_gradcheck():
    *tensors, labels = make_arguments()
    assert torch.autograd.gradcheck(lambda *inputs: linear_cross_entropy(*inputs, labels), tensors)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.usefixtures("place")
def test_nothing_to_predict(reduction):
    """As plain cross-entropy: a mean over nothing is nan, a sum zero, and the gradients are zeros."""
    arguments = make_arguments(ignored=ROWS)
    loss, gradients = with_gradients(linear_cross_entropy, arguments, reduction=reduction)
    expected, expected_gradients = with_gradients(plain_cross_entropy, arguments, reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    torch.testing.assert_close(gradients, expected_gradients)
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.usefixtures("place")
def test_other_index_to_ignore():
    *tensors, labels = make_arguments(ignored=0)
    ignored = int(labels[0])
    actual = with_gradients(linear_cross_entropy, (*tensors, labels), ignore_index=ignored)
    expected = with_gradients(plain_cross_entropy, (*tensors, labels), ignore_index=ignored)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("chunks", "place")
def test_as_exact_as_plain_cross_entropy(dtype):
    """Against float64 on the same numbers: not twice as far off as the stock loss, which is in float32 at least."""
    arguments = make_arguments(dtype)

    def stock(hidden_states, weight, bias, labels):
        return F.cross_entropy(F.linear(hidden_states, weight, bias).float(), labels)

    wide = [tensor.detach().double().requires_grad_() for tensor in arguments[:3]]
    exact_loss, exact = with_gradients(plain_cross_entropy, (*wide, arguments[3]))
    (loss, actual), (stock_loss, expected) = (
        with_gradients(function, arguments) for function in (linear_cross_entropy, stock)
    )
    assert loss.dtype == torch.float32
    allowance = 10 * torch.finfo(torch.float32).eps
    assert (loss - exact_loss).abs() <= 2 * (stock_loss - exact_loss).abs() + allowance
    for tensor, stock_tensor, exact_tensor in zip(actual, expected, exact):
        assert tensor.dtype == dtype
        error, stock_error = ((value - exact_tensor).norm() for value in (tensor, stock_tensor))
        assert error <= 2 * stock_error + allowance * exact_tensor.norm()


def test_far_logits():
    """No overflow, and no loss that rounding makes infinite."""
    arguments = make_arguments(torch.float32, scale=100.0)
    actual = with_gradients(linear_cross_entropy, arguments)
    torch.testing.assert_close(actual, with_gradients(plain_cross_entropy, arguments), rtol=1e-5, atol=1e-5)
    assert actual[0] > 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("place")
def test_what_is_nearly_certain(dtype):
    """The probability of a label is one but for a thousandth, which is less than a narrow type shows beside one."""
    hidden_states = torch.eye(4, dtype=dtype).mul(8).requires_grad_()
    weight, labels = torch.eye(4, dtype=dtype).requires_grad_(), torch.arange(4)
    loss, gradients = with_gradients(linear_cross_entropy, (hidden_states, weight, None, labels))
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden_states, weight)]
    exact_loss, exact = with_gradients(plain_cross_entropy, (*wide, None, labels))
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-3, atol=0)
    for actual, expected in zip(gradients, exact):
        assert (actual - expected).norm() <= max(torch.finfo(dtype).eps, 1e-3) * expected.norm()


@pytest.mark.usefixtures("place")
def test_many_rows_in_float16():
    """A sum over rows, which is divided by their number later, is finite all the same."""
    rows, vocab_size = 140_000, 40
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.rand(rows, 2, generator=generator).half().requires_grad_()
    weight, bias = (torch.zeros(shape, dtype=torch.float16).requires_grad_() for shape in ((vocab_size, 2), vocab_size))
    labels = torch.randint(0, vocab_size, (rows,), generator=generator).where(torch.arange(rows) % 5 < 2, 0)
    _, actual = with_gradients(linear_cross_entropy, (hidden_states, weight, bias, labels))
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden_states, weight, bias)]
    _, expected = with_gradients(plain_cross_entropy, (*wide, labels))
    torch.testing.assert_close([gradient.double() for gradient in actual[1:]], list(expected[1:]), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("place")
def test_gradients_in_narrow_types_are_scaled_exactly(dtype):
    """By the number of labels, not by what a narrow type makes of it, which would be the same error in all of them."""
    for ignored in range(ROWS):
        hidden_states, weight, bias, labels = make_arguments(dtype, ignored=ignored)
        (mean,), (total,) = (
            torch.autograd.grad(
                linear_cross_entropy(hidden_states, weight, bias, labels, reduction=reduction), hidden_states
            )
            for reduction in ("mean", "sum")
        )
        expected = (total.double() / (ROWS - ignored)).to(dtype)
        # From float32 to the narrow type, which may round twice, here and there.
        assert (mean != expected).double().mean() < 0.02


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.usefixtures("chunks", "place")
def test_what_lies_where_nothing_is_to_predict(bias, number):
    """Numbers that are none do not get into anything but themselves."""
    arguments = make_arguments(bias=bias)
    expected = with_gradients(linear_cross_entropy, arguments)
    with torch.no_grad():
        arguments[0][arguments[-1] == -100] = number
    torch.testing.assert_close(with_gradients(linear_cross_entropy, arguments), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_computes_only_what_needs_a_gradient(frozen, monkeypatch):
    arguments = make_arguments()
    expected = with_gradients(plain_cross_entropy, arguments)
    results, compute = [], vocabulary_loss._sum_and_gradients

    def record(*inputs):
        results.append(compute(*inputs))
        return results[-1]

    monkeypatch.setattr(vocabulary_loss, "_sum_and_gradients", record)
    for index in frozen:
        arguments[index].requires_grad_(False)
    loss = linear_cross_entropy(*arguments)
    torch.testing.assert_close(loss.detach(), expected[0])
    assert [gradient is None for gradient in results[0][1]] == [index in frozen for index in range(3)]
    assert loss.requires_grad == (len(frozen) < 3)
    if loss.requires_grad:
        (3 * loss).backward()
    for index, tensor in enumerate(arguments[:3]):
        if index in frozen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, expected[1][index])


def test_without_a_graph_there_are_no_gradients(monkeypatch):
    results, compute = [], vocabulary_loss._sum_and_gradients
    monkeypatch.setattr(
        vocabulary_loss, "_sum_and_gradients", lambda *inputs: results.append(compute(*inputs)) or results[-1]
    )
    with torch.no_grad():
        loss = linear_cross_entropy(*make_arguments())
    assert not loss.requires_grad
    assert results[0][1] == (None, None, None)


def test_backward_twice():
    """A graph that is retained gives its gradients again, whatever became of the first ones."""
    arguments = make_arguments()
    loss = linear_cross_entropy(*arguments)
    loss.backward(retain_graph=True)
    first = [tensor.grad.clone() for tensor in arguments[:3]]
    loss.backward()
    for tensor, gradient in zip(arguments, first):
        torch.testing.assert_close(tensor.grad, 2 * gradient)


def test_gradients_lie_where_they_were_saved():
    """Unless somebody may see them there, or ask for them again: a copy is as large as the weight."""
    arguments = make_arguments(ignored=0)  # no row is left out, to which a gradient would go back
    expected = with_gradients(linear_cross_entropy, arguments)[1]

    def gradients(watched=False, **options):
        """Whether they lie there, their values being right."""
        seen = []
        watching = torch.autograd.graph.saved_tensors_hooks(lambda tensor: seen.append(tensor) or tensor, lambda x: x)
        with watching if watched else contextlib.nullcontext():
            loss = linear_cross_entropy(*arguments)
        saved = seen if watched else list(loss.grad_fn.saved_tensors)
        before = [tensor.clone() for tensor in saved]
        if "is_grads_batched" in options:
            three = torch.full((2,), 3.0, dtype=loss.dtype)
            results = [both[1] for both in torch.autograd.grad(loss, arguments[:3], three, **options)]
        else:
            results = torch.autograd.grad(3 * loss, arguments[:3], **options)
        torch.testing.assert_close(tuple(results), expected)
        lie_there = [result.data_ptr() == tensor.data_ptr() for result, tensor in zip(results, saved)]
        assert all(lie_there) or all(map(torch.equal, saved, before))
        return lie_there

    assert gradients() == [True] * 3
    assert gradients(retain_graph=True) == gradients(watched=True) == gradients(is_grads_batched=True) == [False] * 3


def test_refusals():
    hidden_states, weight, bias, labels = make_arguments()
    with pytest.raises(ValueError, match="`reduction` must be 'mean' or 'sum', got 'none'"):
        linear_cross_entropy(hidden_states, weight, bias, labels, reduction="none")
    for wrong in (VOCAB_SIZE, -1) if labels.device.type == "cpu" else ():
        with pytest.raises(IndexError, match=f"`labels` must be -100 or from 0 to 28, got {wrong}"):
            linear_cross_entropy(hidden_states, weight, bias, torch.full_like(labels, wrong))
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(linear_cross_entropy(hidden_states, weight, bias, labels), weight, create_graph=True)


@pytest.mark.parametrize(
    ("device", "smallest", "most"),
    [("cpu", "MIN_CHUNK_SIZE", None), ("meta", "MIN_CHUNK_SIZE_ELSEWHERE", vocabulary_loss.MOST_CHUNKS_ELSEWHERE)],
)
def test_lengths_of_chunks(device, smallest, most):
    """
    Chunks together hold every row, are about equal, and no larger than the weight or a few megabytes; on a GPU larger
    where there were too many.
    """
    for vocab_size, size in [(29, 5), (8_000, 512), (32_000, 512), (250_000, 16), (10_000_000, 1)]:
        weight = torch.empty(vocab_size, size, device=device)
        for num_rows in (1, 7, 1599, 1600, 100_000):
            length = chunk_length(num_rows, weight, torch.float32)
            number = -(-num_rows // length)
            assert 1 <= length <= num_rows
            largest = max(weight.numel(), getattr(vocabulary_loss, smallest), vocab_size)
            if most is None or num_rows * vocab_size <= most * largest:
                assert length * vocab_size <= largest
            else:
                assert length == -(-num_rows // max(most, -(-num_rows // (vocabulary_loss.MOST_LOGITS // vocab_size))))
            assert number * length - num_rows < number


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_no_chunk_is_longer_than(device):
    """Numbers of 32 bits count its logits; in float16 a number is left of a sum over its rows."""
    most = vocabulary_loss.MOST_LOGITS
    for vocab_size, size in [(29, 5), (32_000, 512), (250_000, 4096), (10_000_000, 1)]:
        weight = torch.empty(vocab_size, size, device="meta").expand(vocab_size, size)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vocabulary_loss, "is_on_cpu", lambda tensor: device == "cpu")
            for num_rows in (1, 100_000, 3_000_000):
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    length = chunk_length(num_rows, weight, dtype)
                    assert length >= 1
                    assert length * vocab_size <= most
                    assert dtype != torch.float16 or length < 2**16


# In the models.


@pytest.fixture(autouse=True)
def in_chunks_anywhere(monkeypatch):
    """Tiny models are to be tested elsewhere than on a CPU, too."""
    monkeypatch.setattr(deferred_logits, "pays", lambda num_rows, weight, dtype: True)


def test_where_it_does_not_pay(monkeypatch):
    """Elsewhere than on a CPU what fits into one chunk goes through the functions of torch, in wide types."""
    monkeypatch.setattr(vocabulary_loss, "MIN_CHUNK_SIZE_ELSEWHERE", 98 * 7)
    for device, rows, expected in [("cpu", 1, True), ("cpu", 99, True), ("meta", 99, True), ("meta", 3, False)]:
        weight = torch.empty(7, 5, device=device)
        assert pays(rows, weight, torch.float32) is pays(rows, weight, torch.float64) is expected
        assert pays(rows, weight, torch.bfloat16)
    model, inputs = make_training("RNNForCausalLM")
    for answer, kind in ((True, DeferredLogits), (False, torch.Tensor)):
        asked = Mock(return_value=answer)
        monkeypatch.setattr(deferred_logits, "pays", asked)
        outputs = model(**inputs)
        assert type(outputs.logits) is kind
        outputs.loss.backward()
        asked.assert_called_once_with(outputs.logits[..., 0].numel(), model.lm_head.weight, model.dtype)


def make_training(name, dtype=torch.float64, ignored=True, **options):
    """A model in training mode, and inputs with padding and without some labels."""
    model, inputs = make_model(name, dtype, **options).train(), make_inputs(name)
    inputs["attention_mask"] = make_mask()
    if ignored:
        inputs["labels"][0, :3] = inputs["labels"][2:4, -2:] = inputs["labels"][5] = -100
    return model, inputs


def gradients_of(model, inputs, plain, autocast=False, repeat=1, **options):
    """The loss, the outputs and the gradients of a forward and backward."""
    model.zero_grad()
    for _ in range(repeat):
        with chunked_loss(not plain), torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            outputs = model(**inputs, **options)
        assert (type(outputs.logits) is DeferredLogits) != plain
        outputs.loss.backward()
    return outputs, {key: parameter.grad for key, parameter in model.named_parameters()}


def assert_same_gradients(actual, expected, tolerance):
    """Relative to the largest number in each of them."""
    assert actual.keys() == expected.keys()
    for key, gradient in expected.items():
        if gradient is None:
            assert actual[key] is None, key
        else:
            assert actual[key].dtype == gradient.dtype
            assert (actual[key] - gradient).abs().max() <= tolerance * gradient.abs().max(), key


@OVER_HEADS
@pytest.mark.parametrize("options", TIES, ids=case_id)
@pytest.mark.parametrize("num_items", [None, 9, torch.tensor(9)], ids=["mean", "int", "tensor"])
def test_models_train_as_with_plain_cross_entropy(name, options, num_items):
    """The stock losses are in float32, whatever the type of a model."""
    for dtype, tolerance in [(torch.float64, 1e-6), (torch.float32, 1e-5)]:
        model, inputs = make_training(name, dtype, **options)
        expected, expected_gradients = gradients_of(model, inputs, True, num_items_in_batch=num_items)
        outputs, gradients = gradients_of(model, inputs, False, num_items_in_batch=num_items)
        torch.testing.assert_close(outputs.loss, expected.loss)
        assert_same_gradients(gradients, expected_gradients, tolerance)
        torch.testing.assert_close(outputs.logits, expected.logits)


@OVER_HEADS
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("num_items", [None, 9], ids=["mean", "sum"])
def test_models_train_in_half_precision(name, autocast, num_items):
    """Not twice as far from float32 as with plain cross-entropy."""
    model, inputs = make_training(name, torch.float32)
    if not autocast:  # numbers that both types have
        model = model.bfloat16().float()
    _, exact = gradients_of(model, inputs, True, num_items_in_batch=num_items)
    exact = {key: gradient.clone() for key, gradient in exact.items()}
    if not autocast:
        model = model.bfloat16()
    expected, expected_gradients = gradients_of(model, inputs, True, autocast, num_items_in_batch=num_items)
    expected_gradients = {key: gradient.clone() for key, gradient in expected_gradients.items()}
    outputs, gradients = gradients_of(model, inputs, False, autocast, num_items_in_batch=num_items)
    assert outputs.loss.dtype == expected.loss.dtype == torch.float32
    assert outputs.logits.dtype == expected.logits.dtype == torch.bfloat16
    assert torch.equal(outputs.logits, expected.logits)
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=1e-3, atol=1e-3)
    assert all(gradient.dtype == expected_gradients[key].dtype for key, gradient in gradients.items())
    error, plain_error = (
        sum((value - exact[key]).float().square().sum() for key, value in values.items()).sqrt()
        for values in (gradients, expected_gradients)
    )
    assert error <= 2 * plain_error


@OVER_HEADS
def test_nothing_to_predict_in_a_batch(name):
    """The stock loss: nan for a mean, zero for a sum; no gradient either way, where no batch of a step has any too."""
    model, inputs = make_training(name)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    for num_items in (None, 9, torch.tensor(0)):
        expected, expected_gradients = gradients_of(model, inputs, True, num_items_in_batch=num_items)
        outputs, gradients = gradients_of(model, inputs, False, num_items_in_batch=num_items)
        torch.testing.assert_close(outputs.loss, expected.loss, equal_nan=True)
        assert_same_gradients(gradients, expected_gradients, 0)


@OVER_HEADS
def test_accumulation_and_gradient_checkpointing(name):
    model, inputs = make_training(name)
    _, expected = gradients_of(model, inputs, True, repeat=3, num_items_in_batch=7)
    expected = {key: gradient.clone() for key, gradient in expected.items()}
    _, gradients = gradients_of(model, inputs, False, repeat=3, num_items_in_batch=7)
    assert_same_gradients(gradients, expected, 1e-6)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    _, gradients = gradients_of(model, inputs, False, repeat=3, num_items_in_batch=7)
    assert_same_gradients(gradients, expected, 1e-6)


@OVER_HEADS
def test_a_forward_within_a_checkpoint(name):
    """The whole model, run once more in the backward."""
    model, inputs = make_training(name)
    _, expected = gradients_of(model, inputs, True)
    expected = {key: gradient.clone() for key, gradient in expected.items()}
    model.zero_grad()
    torch.utils.checkpoint.checkpoint(lambda: model(**inputs).loss, use_reentrant=False).backward()
    assert_same_gradients({key: parameter.grad for key, parameter in model.named_parameters()}, expected, 1e-6)


@OVER_HEADS
def test_frozen_parts(name):
    for part in ("lm_head", "model"):
        model, inputs = make_training(name)
        getattr(model, part).requires_grad_(False)
        _, expected = gradients_of(model, inputs, True)
        _, gradients = gradients_of(model, inputs, False)
        assert any(gradient is not None for gradient in gradients.values())
        assert_same_gradients(gradients, expected, 1e-6)


@OVER_HEADS
def test_where_logits_are_not_deferred(name):
    """Outside of training; on request; and where more than a product happens in the projection."""
    model, inputs = make_training(name)
    without_labels = {key: value for key, value in inputs.items() if key != "labels"}
    without_labels.setdefault("decoder_input_ids", None)
    if "decoder_input_ids" not in inputs:
        without_labels.pop("decoder_input_ids")
    assert type(model(**inputs).logits) is DeferredLogits
    assert type(model(**without_labels).logits) is torch.Tensor
    assert type(model.eval()(**inputs).logits) is torch.Tensor
    model.train()
    with torch.no_grad():
        assert type(model(**inputs).logits) is torch.Tensor
    with chunked_loss(False):
        assert type(model(**inputs).logits) is torch.Tensor
    handle = model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    with chunked_loss(False):
        expected = model(**inputs)
    outputs = model(**inputs)
    assert torch.equal(outputs.logits, expected.logits)
    assert torch.equal(outputs.loss, expected.loss)
    assert type(outputs.logits) is torch.Tensor
    handle.remove()

    class Adapted(nn.Linear):
        def forward(self, inputs):
            return 2 * super().forward(inputs)

    adapted = Adapted(model.lm_head.in_features, model.lm_head.out_features).double()
    model.lm_head = adapted
    assert type(model(**inputs).logits) is torch.Tensor
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    assert type(model(**inputs).logits) is torch.Tensor


def test_where_logits_are_not_deferred_by_their_tensors():
    """Frozen throughout, on the meta device, under `torch.func`, compiled: what a projection alone returns."""
    linear, hidden_states = nn.Linear(3, 7), torch.randn(2, 3)
    assert type(vocabulary_logits(linear, hidden_states, for_loss=True)) is DeferredLogits
    assert type(vocabulary_logits(linear, hidden_states, for_loss=False)) is torch.Tensor
    frozen = nn.Linear(3, 7).requires_grad_(False)
    assert type(vocabulary_logits(frozen, hidden_states, for_loss=True)) is torch.Tensor
    assert type(vocabulary_logits(linear.to("meta"), hidden_states.to("meta"), for_loss=True)) is torch.Tensor
    linear = nn.Linear(3, 7)

    def loss(weights, hidden_states):
        copied = copy.copy(linear)
        copied._parameters = dict(weights)
        return vocabulary_logits(copied, hidden_states, for_loss=True).square().sum()

    weights = {key: value.detach() for key, value in linear.named_parameters()}
    expected = torch.func.grad(lambda h: linear(h).square().sum())(hidden_states)
    torch.testing.assert_close(torch.func.grad(loss, argnums=1)(weights, hidden_states), expected)
    compiled = torch.compile(lambda h: vocabulary_logits(linear, h, for_loss=True), backend="eager", fullgraph=True)
    actual = compiled(hidden_states)
    assert type(actual) is torch.Tensor
    torch.testing.assert_close(actual, linear(hidden_states))


@OVER_HEADS
def test_a_loss_function_of_ones_own(name):
    """With cross-entropy or without, in place of the stock one."""

    def smoothed(logits, labels, vocab_size, shift_labels=None, **kwargs):
        target = labels if shift_labels is None else shift_labels
        return F.cross_entropy(logits.view(-1, vocab_size), target.view(-1), label_smoothing=0.1)

    def summed(logits, labels, vocab_size, shift_labels=None, **kwargs):
        target = labels if shift_labels is None else shift_labels
        loss_function = nn.CrossEntropyLoss(reduction="sum")
        return loss_function(logits.flatten(0, 1), target.flatten()) + logits.square().mean()

    for loss_function in (smoothed, summed):
        model, inputs = make_training(name)
        model.loss_function = loss_function
        expected, expected_gradients = gradients_of(model, inputs, True)
        outputs, gradients = gradients_of(model, inputs, False)
        torch.testing.assert_close(outputs.loss, expected.loss, rtol=1e-10, atol=1e-10)
        assert_same_gradients(gradients, expected_gradients, 1e-10)


@pytest.mark.parametrize("keep", [0, 3, torch.tensor([0, 2, 4])], ids=["all", "last", "some"])
def test_logits_to_keep(keep):
    model, inputs = make_training("RNNSeq2SeqForConditionalGeneration")
    if not isinstance(keep, int) or keep:
        kept = inputs["labels"][:, -3:] if isinstance(keep, int) else inputs["labels"][:, keep]
        inputs["labels"] = kept.contiguous()
    expected, expected_gradients = gradients_of(model, inputs, True, logits_to_keep=keep)
    outputs, gradients = gradients_of(model, inputs, False, logits_to_keep=keep)
    assert outputs.logits.shape == expected.logits.shape
    torch.testing.assert_close(outputs.loss, expected.loss)
    assert_same_gradients(gradients, expected_gradients, 1e-6)


class MadeTensors(TorchDispatchMode):
    """
    Follows the tensors that are made within it: how many elements the largest one has, and the most bytes that they had
    at a time.
    """

    def __init__(self):
        super().__init__()
        self.largest = self.bytes = self.most_bytes = 0
        self.storages = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # What went in was there before, or is known.
        given = {tensor.untyped_storage()._cdata for tensor in tensors_in((args, kwargs))}
        results = function(*args, **(kwargs or {}))
        for tensor in tensors_in(results):
            self.largest = max(self.largest, tensor.numel())
            if tensor.untyped_storage()._cdata not in self.storages | given:
                self.add(tensor.untyped_storage())
        return results

    def add(self, storage):
        number, size = storage._cdata, storage.nbytes()
        self.storages.add(number)
        self.bytes += size
        self.most_bytes = max(self.most_bytes, self.bytes)

        def remove():
            self.storages.remove(number)
            self.bytes -= size

        weakref.finalize(storage, remove)


def tensors_in(values) -> list[torch.Tensor]:
    """Those that have numbers."""
    leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    return [leaf for leaf in leaves if leaf.device.type != "meta"]


@pytest.mark.parametrize(
    ("elsewhere", "dtype"),
    [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16), (True, torch.float16)],
    ids=str,
)
def test_memory_of_the_loss(elsewhere, dtype, monkeypatch):
    """
    That of the gradients, of a chunk of logits, and of the logits of some rows beside them; the gradients of a weight
    are not there twice.
    """
    rows, vocab_size, size, chunk = 160, 4000, 50, 40
    monkeypatch.setattr(vocabulary_loss, "is_on_cpu", lambda tensor: not elsewhere)
    monkeypatch.setattr(vocabulary_loss, "LOGITS_AT_ONCE_ELSEWHERE", vocab_size)
    monkeypatch.setattr(vocabulary_loss, "chunk_length", lambda num_rows, weight, dtype: chunk)
    hidden_states, weight = (torch.randn(number, size, dtype=dtype).requires_grad_() for number in (rows, vocab_size))
    labels = torch.randint(vocab_size, (rows,))
    with MadeTensors() as made:
        torch.autograd.grad(linear_cross_entropy(hidden_states, weight, None, labels), [hidden_states, weight])
    gradients, logits = dtype.itemsize * hidden_states.numel() + 4 * weight.numel(), dtype.itemsize * chunk * vocab_size
    # In narrow types what a chunk adds to the gradient of the weight is beside it.
    narrow = dtype.itemsize * weight.numel() if dtype.itemsize < 4 else 0
    assert gradients + logits <= made.most_bytes <= gradients + narrow + 1.2 * logits


@OVER_HEADS
def test_no_tensor_of_all_logits(name, monkeypatch):
    """Nothing larger than the weight, or a chunk, is made in a step of training."""
    for constant in ("MIN_CHUNK_SIZE", "MIN_CHUNK_SIZE_ELSEWHERE"):
        monkeypatch.setattr(vocabulary_loss, constant, 1)
    model, inputs = make_training(name, vocab_size=999, ignored=False)
    logits = inputs["labels"].numel() * 999
    for plain in (True, False):
        with MadeTensors() as made:
            gradients_of(model, inputs, plain)
        assert (made.largest >= logits) == plain
        if not plain:
            assert made.largest == model.lm_head.weight.numel() < logits


# Logits that wait.


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs):
        ctx.save_for_backward(inputs)
        return inputs * inputs

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class PassOn(torch.autograd.Function):
    """As wrappers for data parallelism do."""

    @staticmethod
    def forward(ctx, inputs):
        return inputs.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 7 * gradient


def set_item(logits, labels):
    logits[..., 0] = -1.0
    return 2 * logits


def divide_in_place(logits, labels):
    logits /= 0.7
    return logits


def set_in_view(logits, labels):
    view = logits.view(-1, VOCAB_SIZE)
    view[:, 1] = 0
    return logits + view.view(logits.shape)


def change_a_copy(logits, labels):
    changed = logits.clone().mul_(2)
    return changed + logits


def token_accuracy(logits, labels):
    return (logits[..., :-1, :].argmax(-1) == labels[..., 1:]).float().mean()


USES = {
    "argmax": lambda logits, labels: logits.argmax(-1),
    "token_accuracy": token_accuracy,
    "entropy": lambda logits, labels: -(logits.softmax(-1) * F.log_softmax(logits, -1)).sum(-1),
    "slice": lambda logits, labels: logits[..., :-1, :].contiguous(),
    "shifted_loss": lambda logits, labels: F.cross_entropy(
        logits[..., :-1, :].reshape(-1, VOCAB_SIZE), labels[..., 1:].reshape(-1)
    ),
    "loss": lambda logits, labels: F.cross_entropy(logits.view(-1, VOCAB_SIZE), labels.view(-1)),
    "loss_per_token": lambda logits, labels: F.cross_entropy(logits.transpose(1, 2), labels, reduction="none"),
    "weighted_loss": lambda logits, labels: F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), weight=torch.ones(VOCAB_SIZE, dtype=logits.dtype)
    ),
    "gather": lambda logits, labels: logits.gather(-1, labels.clamp(0).unsqueeze(-1)),
    "float": lambda logits, labels: logits.float().exp(),
    "double": lambda logits, labels: logits.double(),
    "to": lambda logits, labels: logits.to("cpu", torch.float32)[0],
    "type": lambda logits, labels: logits.type(torch.float32),
    "cat": lambda logits, labels: torch.cat([logits, logits], dim=1),
    "compare": lambda logits, labels: logits > 0,
    "mask": lambda logits, labels: logits[logits > 0],
    "where": lambda logits, labels: torch.where(logits > 0, logits, -logits),
    "reflected": lambda logits, labels: 1 - logits,
    "einsum": lambda logits, labels: torch.einsum("btv,btv->bt", logits, logits),
    "matmul": lambda logits, labels: logits @ logits.mT,
    "iterate": lambda logits, labels: sum(logits),
    "topk": lambda logits, labels: logits.topk(3).values,
    "detach": lambda logits, labels: logits.detach() * 2,
    "like": lambda logits, labels: torch.ones_like(logits),
    "vmap": lambda logits, labels: torch.vmap(torch.sin)(logits),
    "checkpoint": lambda logits, labels: torch.utils.checkpoint.checkpoint(torch.sin, logits, use_reentrant=False),
    "function": lambda logits, labels: Square.apply(logits),
    "pass_on": lambda logits, labels: 3 * PassOn.apply(logits),
    "loss_passed_on": lambda logits, labels: F.cross_entropy(
        PassOn.apply(logits).view(-1, VOCAB_SIZE), labels.view(-1)
    ),
    "set_item": set_item,
    "divide_in_place": divide_in_place,
    "set_in_view": set_in_view,
    "change_a_copy": change_a_copy,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_logits_are_as_good_as_computed_ones(use, dtype):
    """Values, types and gradients, together with the loss of the model, through whatever one does with them."""
    results = []
    for plain in (True, False):
        model, inputs = make_training("RNNForCausalLM", dtype)
        with chunked_loss(not plain):
            outputs = model(**inputs)
        result = USES[use](outputs.logits, inputs["labels"])
        objective = outputs.loss
        if result.requires_grad:
            factors = torch.randn(result.shape, generator=torch.Generator().manual_seed(1), dtype=result.dtype)
            objective = objective + (factors.to(result.device) * result).sum()
        objective.backward()
        results.append((result, {key: parameter.grad for key, parameter in model.named_parameters()}))
    (expected, expected_gradients), (actual, gradients) = results
    assert actual.dtype == expected.dtype
    assert actual.requires_grad == expected.requires_grad
    torch.testing.assert_close(actual + 0, expected + 0)
    assert_same_gradients(gradients, expected_gradients, 1e-6 if dtype == torch.float64 else 1e-4)


def make_outputs(**options):
    model, inputs = make_training("RNNForCausalLM", torch.float32, **options)
    return model, inputs, model(**inputs)


@pytest.mark.usefixtures("never_computed")
def test_logits_wait():
    """What looks at them from outside does not compute them."""
    model, inputs, outputs = make_outputs()
    logits = outputs.logits
    assert logits.shape == (6, 7, VOCAB_SIZE)
    assert (logits.dtype, logits.device, logits.ndim, logits.dim()) == (torch.float32, model.device, 3, 3)
    assert (logits.size(-1), logits.numel()) == (VOCAB_SIZE, 6 * 7 * VOCAB_SIZE)
    assert logits.requires_grad
    assert logits.grad_fn is not None
    assert isinstance(logits, torch.Tensor)
    assert outputs[1] is outputs.to_tuple()[1] is logits
    assert copy.copy(outputs).logits is logits
    assert model(**inputs, return_dict=False)[1].waits
    assert logits.float() is logits.to(torch.float32) is logits
    assert logits._base is None
    assert torch.is_floating_point(logits)
    assert not torch.is_complex(logits)
    assert torch.numel(logits) == logits.numel()
    assert logits.to(torch.float64).dtype == torch.float64
    assert logits.view(-1, VOCAB_SIZE).shape == (42, VOCAB_SIZE)
    torch.autograd.backward(outputs.loss)


@pytest.mark.parametrize("read", [False, True], ids=["waiting", "read"])
@pytest.mark.parametrize("through_view", [False, True])
def test_hooks_of_logits(read, through_view):
    """They see the gradient of the values and change it."""
    found = []
    for plain in (True, False):
        model, inputs = make_training("RNNForCausalLM")
        with chunked_loss(not plain):
            logits, seen = model(**inputs).logits, []
        if read:
            logits.sum()
        logits.register_hook(lambda gradient, seen=seen: seen.append(gradient.shape) or 2 * gradient)
        assert plain or logits.waits == (not read)
        result = logits
        if through_view:
            result = logits.view(-1, VOCAB_SIZE)
            result.register_hook(lambda gradient, seen=seen: seen.append(gradient.shape) or 5 * gradient)
        result.square().sum().backward()
        found.append((seen, model.lm_head.weight.grad))
    assert len(found[0][0]) == 1 + through_view
    torch.testing.assert_close(*found)


def test_a_hook_does_not_compute_logits(never_computed):
    """Sharded data parallelism hangs one on every output."""
    _, _, outputs = make_outputs()
    outputs.logits.register_hook(lambda gradient: pytest.fail("there is no gradient"))
    outputs.loss.backward()


def test_nothing_waits_in_a_graph(monkeypatch):
    """What is recorded by somebody as a CUDA graph is played without this module, which would not compute anew."""
    monkeypatch.setattr(deferred_logits, "is_capturing", lambda device_type: True)
    assert type(make_outputs()[2].logits) is torch.Tensor


def test_logits_stay_the_same_tensor():
    """They are computed once, also through what shares their memory, and only as often as asked for."""
    _, _, outputs = make_outputs()
    logits, view = outputs.logits, outputs.logits.view(-1, VOCAB_SIZE)
    detached = logits.detach()
    logits.clamp_(max=0)
    assert detached.max() == view.max() == logits.max() == 0
    assert detached.data_ptr() == view.data_ptr() == logits.data_ptr()


def test_logits_leave_torch():
    """Through NumPy, lists, text, and files, as an ordinary tensor."""
    _, _, outputs = make_outputs()
    with chunked_loss(False):
        expected = make_outputs()[2].logits.detach()
    assert (outputs.logits.detach().cpu().numpy() == expected.numpy()).all()
    assert make_outputs()[2].logits.tolist() == expected.tolist()
    assert repr(make_outputs()[2].logits.detach()) == repr(expected)
    loaded = pickle.loads(pickle.dumps(make_outputs()[2].logits))
    assert type(loaded) is torch.Tensor
    assert torch.equal(loaded, expected)


def test_logits_in_mixed_precision():
    """What Accelerate makes of outputs waits too, and so do the logits of its float32."""
    model, inputs = make_training("RNNForCausalLM", torch.bfloat16)
    outputs = ConvertOutputsToFp32(model.forward)(**inputs)
    with chunked_loss(False):
        expected = ConvertOutputsToFp32(model.forward)(**inputs)
    assert outputs.logits.waits
    assert outputs.logits.dtype == torch.float32
    assert torch.equal(outputs.logits, expected.logits)
    outputs.logits.sum().backward()
    assert model.lm_head.weight.grad.any()


def test_logits_do_not_outlive_their_outputs():
    _, _, outputs = make_outputs()
    outputs.logits.float().view(-1, VOCAB_SIZE)
    references = [weakref.ref(outputs.logits), weakref.ref(outputs.logits.product)]
    outputs.logits.argmax(-1)
    outputs.loss.backward()
    gc.disable()
    try:
        del outputs
        assert [reference() for reference in references] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_logits_of_weights_that_have_changed(fused):
    """They cannot be had any more, unless somebody asked for them before; wrong ones must not be given."""
    model, _, outputs = make_outputs()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    outputs.loss.backward()
    expected = outputs.logits.detach().clone()
    optimizer.step()
    assert torch.equal(outputs.logits, expected)
    model, _, outputs = make_outputs()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    outputs.loss.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="weights have changed since the forward"):
        outputs.logits.argmax(-1)


class ReadsLogits(Trainer):
    """Reports the accuracy of its training, as trainers for language models do."""

    accuracies = ()

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        with torch.no_grad():
            self.accuracies += (token_accuracy(outputs.logits, inputs["labels"]).item(),)
        return (loss, outputs) if return_outputs else loss


def train(trainer_class, folder, **options):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB_SIZE, (16, 9), generator=generator)
    torch.manual_seed(0)
    model = RNNForCausalLM(RNNConfig(vocab_size=VOCAB_SIZE, hidden_size=16, num_hidden_layers=1))
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        max_steps=4,
        learning_rate=0.01,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        **options,
    )
    trainer = trainer_class(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in tokens])
    trainer.train()
    return trainer


@ON_A_CPU
@pytest.mark.usefixtures("never_computed")
@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}], ids=case_id)
def test_trainer_does_not_compute_logits(options, tmp_path):
    train(Trainer, tmp_path, **options)


@ON_A_CPU
def test_trainers_that_read_logits(tmp_path):
    """They see what they would see without the chunks."""
    trainer = train(ReadsLogits, tmp_path)
    with chunked_loss(False):
        expected = train(ReadsLogits, tmp_path)
    assert len(trainer.accuracies) == 4
    assert trainer.accuracies == pytest.approx(expected.accuracies)
    for key, weight in expected.model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[key], weight, rtol=1e-4, atol=1e-5)


@ON_A_CPU
def test_label_smoothing(tmp_path):
    """Computed by the trainer from the logits."""
    trainer = train(Trainer, tmp_path, label_smoothing_factor=0.1)
    with chunked_loss(False):
        expected = train(Trainer, tmp_path, label_smoothing_factor=0.1)
    for key, weight in expected.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[key], weight)


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("find_unused", [False, True], ids=["all used", "find unused"])
@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel(find_unused, monkeypatch):
    """It looks into the outputs; it may not compute them, and gradients through them must come through."""
    model, inputs = make_training("RNNForCausalLM")
    with chunked_loss(False):
        outputs = model(**inputs)
    (outputs.loss + outputs.logits.square().mean()).backward()
    expected = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    _, expected_of_loss = gradients_of(model, inputs, True)
    expected_of_loss = {key: gradient.clone() for key, gradient in expected_of_loss.items()}
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=find_unused)
    for own_loss in (True, False):
        model.zero_grad()
        outputs = parallel(**inputs)
        assert isinstance(outputs.logits, DeferredLogits)
        assert outputs.logits.product.result is None
        (outputs.loss + outputs.logits.square().mean() if own_loss else outputs.loss).backward()
        gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
        assert_same_gradients(gradients, expected if own_loss else expected_of_loss, 1e-6)
