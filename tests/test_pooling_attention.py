"""Pooling and attention against NumPy: padding gets exactly nothing, in every precision."""

import numpy as np
import pytest
import torch

from hf_rnn import ATTENTION_SCORES, RECURRENT_CELLS
from hf_rnn.attention import TANH_AT_ONCE, Attention, LocalScore
from hf_rnn.configuration_rnn import POOLING_TYPES
from hf_rnn.pooling import SequencePooling
from hf_rnn.recurrent_layer import Padding, RecurrentLayer
from matrix import make_config, make_mask
from reference import POOLINGS, SCORES, attend, part, pool, pooling_weights, to_numpy


SEQ = 7
FLOATS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
PRECISIONS = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
DIRECTIONS = pytest.mark.parametrize("bidirectional", [False, True], ids=["one_direction", "two_directions"])
# Widths of queries and keys and the number of heads; equal widths need no map before a dot product.
SIZES = [(6, 6, 1), (6, 12, 1), (6, 6, 3), (6, 12, 2), (6, 12, 6)]


def randomize(module, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# Pooling.


def test_every_pooling_has_a_reference():
    assert POOLINGS.keys() == set(POOLING_TYPES)


@pytest.mark.parametrize("pooling", POOLING_TYPES)
@DIRECTIONS
def test_pooling_is_the_equations(pooling, bidirectional):
    """On the outputs of a layer of each kind, with every kind of padding and without a mask."""
    for cell_type in RECURRENT_CELLS:
        layer = randomize(RecurrentLayer(make_config("RNNModel", cell_type=cell_type), 5, 0, bidirectional).double())
        module = randomize(SequencePooling(pooling, layer.output_size, bidirectional).double())
        for mask in (None, make_mask(SEQ), make_mask(SEQ)[:1]):
            batch = 6 if mask is None else len(mask)
            outputs, _, _ = layer(random(batch, SEQ, 5), padding=Padding.from_attention_mask(mask, mask))
            array_mask = np.ones((batch, SEQ)) if mask is None else mask.numpy()
            expected = pool(pooling, to_numpy(module), outputs.detach().numpy(), array_mask, bidirectional)
            actual = module(outputs, mask)[0].detach().numpy()
            assert actual.shape == expected.shape == (batch, module.output_size)
            np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-12, err_msg=cell_type)


@pytest.mark.parametrize("pooling", POOLING_TYPES)
@PRECISIONS
def test_pooling_in_every_precision(pooling, dtype):
    """Near the equations in NumPy, finite for rows without a token, and in the type of the outputs."""
    module = randomize(SequencePooling(pooling, 8, False)).to(dtype)
    mask = make_mask(SEQ)
    outputs = random(6, SEQ, 8, dtype=dtype)
    # What layers do: the last output stands at the end, and nothing where there is none.
    outputs[:, -1] = (outputs * (mask.cumsum(1) * mask == mask.sum(1, keepdim=True)).unsqueeze(-1)).sum(1)
    outputs[5, -1] = 0
    pooled, _ = module(outputs, mask)
    assert pooled.dtype == dtype
    expected = pool(pooling, to_numpy(module), outputs.double().numpy(), mask.numpy(), False)
    tolerance = FLOATS[dtype]
    np.testing.assert_allclose(pooled.detach().double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("pooling", [name for name in POOLING_TYPES if name not in ("last", "concat")])
@PRECISIONS
def test_padding_does_not_enter_a_pool(pooling, dtype):
    """Large numbers at the padding: neither results nor gradients change, and the padding gets no gradient."""
    module = randomize(SequencePooling(pooling, 8, False)).to(dtype)
    mask = make_mask(SEQ)
    padding = (mask == 0).unsqueeze(-1)
    outputs = random(6, SEQ, 8, dtype=dtype)
    found = []
    for filled in (outputs, outputs.masked_fill(padding, 1e4), outputs.masked_fill(padding, -1e4)):
        filled.requires_grad_()
        pooled, _ = module(filled, mask)
        (gradient,) = torch.autograd.grad((pooled * random(6, 8, seed=1, dtype=dtype)).sum(), filled)
        assert (gradient.masked_select(padding) == 0).all()
        assert torch.isfinite(gradient).all()
        found.append((pooled, gradient))
    for pooled, gradient in found[1:]:
        assert torch.equal(pooled, found[0][0])
        assert torch.equal(gradient, found[0][1])


# How pooling attends: heads and the width of its tanh layer.
ATTENDING = [(1, None), (3, None), (1, 5), (2, 4)]


@pytest.mark.parametrize(("heads", "score_size"), ATTENDING)
@PRECISIONS
def test_pooling_attends_as_the_equations(heads, score_size, dtype):
    """Weights and vectors of every head: nothing at padding, rows that sum to one, zeros where there is no token."""
    tolerance = FLOATS[dtype]
    module = randomize(SequencePooling("attention", 8, False, heads, score_size)).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.3)
    outputs = random(6, SEQ, 8, dtype=dtype)
    for mask in (None, make_mask(SEQ)):
        pooled, weights = module(outputs, mask)
        assert pooled.dtype == weights.dtype == dtype
        assert pooled.shape == (6, heads * 8) == (6, module.output_size)
        assert weights.shape == (6, heads, 1, SEQ)
        array_mask = np.ones((6, SEQ)) if mask is None else mask.numpy()
        values, reference = outputs.double().numpy(), to_numpy(module)
        expected = pool("attention", reference, values, array_mask, False)
        np.testing.assert_allclose(pooled.detach().double(), expected, rtol=tolerance, atol=2 * tolerance)
        for row, tokens in enumerate(array_mask.astype(bool)):
            assert (weights[row, :, 0, ~torch.from_numpy(tokens)] == 0).all()
            if tokens.any():
                actual = weights[row, :, 0, torch.from_numpy(tokens)].detach().double()
                expected = pooling_weights(reference, values[row, tokens])
                np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)
                np.testing.assert_allclose(actual.sum(-1), 1, rtol=0, atol=2 * tolerance)


@pytest.mark.parametrize("pooling", POOLING_TYPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_pooling_piece_by_piece(pooling, dtype):
    """Whatever the pieces, empty ones and those of nothing but padding included: what the whole sequence gives."""
    for heads, score_size in ATTENDING if pooling == "attention" else [(1, None)]:
        module = randomize(SequencePooling(pooling, 8, False, heads, score_size)).to(dtype)
        mask = make_mask(SEQ)
        # The scores are far apart, so that early ones are forgotten and late ones are lost.
        outputs = random(6, SEQ, 8, dtype=dtype) * 20
        for given in (None, mask):
            expected = module(outputs, given)[0]
            for ends in ([7], [1, 2, 3, 4, 5, 6, 7], [2, 2, 4, 7], [0, 3, 7]):
                state = None
                for start, end in zip([0, *ends], ends):
                    piece = None if given is None else given[:, start:end]
                    state = module.read(outputs[:, start:end], piece, state)
                torch.testing.assert_close(module.pooled(state), expected, rtol=FLOATS[dtype], atol=20 * FLOATS[dtype])
    with pytest.raises(ValueError, match="`bidirectional` must be False for a text that is pooled piece by piece"):
        SequencePooling(pooling, 8, True).read(random(6, SEQ, 8))


# Attention.


def make_attention(name: str, sizes: tuple, dtype: torch.dtype = torch.float64, coverage: bool = False) -> Attention:
    return randomize(Attention(ATTENTION_SCORES[name](*sizes), coverage)).to(dtype)


@pytest.mark.parametrize("name", ATTENTION_SCORES)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "{}-{}-{}heads".format(*sizes))
def test_scores_are_the_equations(name, sizes):
    """Scores without a mask, from the published formula, for each head."""
    query_size, key_size, heads = sizes
    attention = make_attention(name, sizes)
    queries, keys = random(3, 4, query_size), random(3, SEQ, key_size, seed=1)
    memory = attention.prepare(keys, None)
    projected = attention.score.project_queries(queries)
    projected = projected.view(3, 4, heads, -1).transpose(1, 2)
    actual = attention.score(projected, memory).detach().numpy()
    assert actual.shape == (3, heads, 4, SEQ)
    weights = part(to_numpy(attention), "score")
    for row in range(3):
        for position in range(4):
            expected = SCORES[name](weights, queries[row, position].numpy(), keys[row].numpy(), heads)
            np.testing.assert_allclose(actual[row, :, position], expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ATTENTION_SCORES)
@PRECISIONS
def test_attention_is_the_equations(name, dtype):
    """Contexts and weights of every head over sources with every kind of padding, in every precision."""
    # Scores of moderate size, as a trained model has them: the precision of the softmax is that of its input.
    tolerance = FLOATS[dtype]
    for sizes in SIZES:
        query_size, key_size, heads = sizes
        attention = make_attention(name, sizes)
        with torch.no_grad():
            for parameter in attention.parameters():
                parameter.mul_(0.3)
        attention = attention.to(dtype)
        for mask in (None, make_mask(SEQ)):
            queries, values = random(6, 4, query_size, dtype=dtype), random(6, SEQ, key_size, seed=1, dtype=dtype)
            context, alphas = attention(queries, attention.prepare(values, mask))
            assert context.dtype == alphas.dtype == dtype
            assert context.shape == (6, 4, key_size)
            assert alphas.shape == (6, heads, 4, SEQ)
            weights = to_numpy(attention)
            array_mask = np.ones((6, SEQ)) if mask is None else mask.numpy()
            for row in range(6):
                for position in range(4):
                    query, memory = queries[row, position].double().numpy(), values[row].double().numpy()
                    expected = attend(name, weights, query, memory, array_mask[row], heads)
                    for actual, reference in zip((context[row, position], alphas[row, :, position]), expected):
                        np.testing.assert_allclose(
                            actual.detach().double(), reference, rtol=tolerance, atol=3 * tolerance, err_msg=str(sizes)
                        )


@pytest.mark.parametrize("name", ATTENTION_SCORES)
@PRECISIONS
def test_padding_gets_no_weight(name, dtype):
    """
    Exactly zero at padding, rows that sum to one over the tokens, zeros in place of NaN for a source without any; and
    what lies under the padding changes nothing and gets no gradient, however large it is.
    """
    for sizes in SIZES:
        attention = make_attention(name, sizes, dtype)
        mask = make_mask(SEQ)
        padding = (mask == 0).unsqueeze(-1)
        queries, values = random(6, 4, sizes[0], dtype=dtype), random(6, SEQ, sizes[1], seed=1, dtype=dtype)
        found = []
        for filled in (values, values.masked_fill(padding, 50), values.masked_fill(padding, -50)):
            leaves = [tensor.clone().requires_grad_() for tensor in (queries, filled)]
            context, alphas = attention(leaves[0], attention.prepare(leaves[1], mask))
            assert (alphas.masked_select(mask[:, None, None] == 0) == 0).all(), sizes
            sums = alphas.double().sum(-1)
            torch.testing.assert_close(sums[:5], torch.ones_like(sums[:5]), rtol=0, atol=FLOATS[dtype])
            assert (sums[5] == 0).all(), sizes
            assert (context[5] == 0).all(), sizes
            objective = (context * random(*context.shape, seed=2, dtype=dtype)).sum()
            gradients = torch.autograd.grad(objective, [*leaves, *attention.parameters()])
            assert all(torch.isfinite(gradient).all() for gradient in gradients), sizes
            assert (gradients[1].masked_select(padding) == 0).all(), sizes
            assert (gradients[0][5] == 0).all(), sizes
            found.append((context, alphas, *gradients))
        for results in found[1:]:
            for actual, expected in zip(results, found[0], strict=True):
                assert torch.equal(actual, expected), sizes


@pytest.mark.parametrize("name", ATTENTION_SCORES)
@PRECISIONS
def test_large_scores_stay_finite(name, dtype):
    """Scores far apart give one token all of the weight, and no NaN in the forward or in the backward."""
    attention = make_attention(name, (6, 6, 2), dtype)
    queries, values = random(6, 4, 6, dtype=dtype) * 30, random(6, SEQ, 6, seed=1, dtype=dtype) * 30
    queries.requires_grad_()
    context, alphas = attention(queries, attention.prepare(values, make_mask(SEQ)))
    assert torch.isfinite(context).all()
    sums = alphas.double().sum(-1)[:5]
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=FLOATS[dtype])
    (gradient,) = torch.autograd.grad(context.sum(), queries)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", ATTENTION_SCORES)
def test_heads_are_separate(name):
    """A head reads its own part of queries, keys and values only: another part changes only that head's context."""
    attention = make_attention(name, (6, 6, 3))
    queries, values = random(2, 4, 6), random(2, SEQ, 6, seed=1)
    context, _ = attention(queries, attention.prepare(values, None))
    memory = attention.prepare(values, None)
    changed = memory._replace(values=memory.values.clone(), keys=memory.keys.clone())
    changed.values[:, 1] += 1
    changed.keys[:, 1] *= -1
    other, _ = attention(queries, changed)
    different = (context != other).any(0).any(0)
    assert different.tolist() == [False, False, True, True, False, False]


HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


@pytest.mark.parametrize("name", ATTENTION_SCORES)
@pytest.mark.parametrize("coverage", [False, True], ids=["plain", "coverage"])
@HALF
def test_long_sources_in_half_precision(name, coverage, dtype):
    """2,000 positions, and a coverage of 2,000 targets: finite, near float64, gradients too, nothing for empty rows."""
    length = 2000
    attention = make_attention(name, (8, 16, 2), coverage=coverage)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.mul_(0.3)
    mask = torch.ones(3, length, dtype=torch.long)
    mask[1, 1500:] = 0
    mask[2] = 0
    results = []
    for precision in (torch.float64, dtype):
        attention = attention.to(dtype).to(precision)
        queries, values = random(3, 2, 8, dtype=dtype), random(3, length, 16, seed=1, dtype=dtype)
        leaves = [tensor.to(precision).requires_grad_() for tensor in (queries, values)]
        memory = attention.prepare(leaves[1], mask)
        state = tuple(torch.ones_like(part) for part in attention.initial_state(memory))
        context, alphas = attention(leaves[0], memory, state)
        gradients = torch.autograd.grad(context.sum(), [*leaves, *attention.parameters()])
        assert all(torch.isfinite(result).all() for result in (context, alphas, *gradients))
        assert (alphas[2] == 0).all()
        assert (alphas[1, :, :, 1500:] == 0).all()
        results.append(alphas)
    # Weights are around 1 / 2,000; those of the local score are in few places.
    scale = results[0].amax(-1, keepdim=True).clamp_min(1e-9)
    assert ((results[1].double() - results[0]).abs() / scale).max() < {torch.bfloat16: 0.2, torch.float16: 0.03}[dtype]


@HALF
def test_coverage_counts_on_in_half_precision(dtype):
    """A sum of 2,000 small weights is not stuck where the next one is less than its precision."""
    attention = make_attention("additive", (4, 4, 1), dtype, coverage=True)
    memory = attention.prepare(random(1, 8, 4, dtype=dtype), None)
    state = attention.initial_state(memory)
    context = torch.zeros(1, 1, 4, dtype=dtype)
    for _ in range(2000):
        state = attention.next_state(state, torch.full((1, 1, 1, 8), 1 / 8, dtype=dtype), context)
    assert (state[0] == 250).all()


@pytest.mark.parametrize("name", ["additive", "normalized_additive"])
def test_additive_scores_computed_again_are_those_kept(name, monkeypatch):
    """Some queries at a time: the same scores, gradients and second derivatives as all at once."""
    attention, mask = make_attention(name, (6, 12, 2)), make_mask(SEQ)
    results = []
    for most, at_once in ((2**18, 2**19), (0, 600), (0, 1)):
        monkeypatch.setattr("hf_rnn.attention.MOST_TANH_KEPT", most)
        monkeypatch.setitem(TANH_AT_ONCE, "cpu", at_once)
        queries, values = random(6, 5, 6).requires_grad_(), random(6, SEQ, 12, seed=1).requires_grad_()
        context, alphas = attention(queries, attention.prepare(values, mask))
        inputs = [queries, values, *attention.parameters()]
        first = torch.autograd.grad((context * random(6, 5, 12, seed=2)).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs)
        with torch.no_grad():
            without_gradients, _ = attention(queries, attention.prepare(values, mask))
        results.append([context, alphas, without_gradients, *first, *second])
    for others in results[1:]:
        for actual, expected in zip(others, results[0], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_additive_scores_keep_no_tanh():
    """What the graph of a large comparison keeps does not grow with the product of target, source and features."""
    attention = make_attention("additive", (64, 64, 1), torch.float32)
    queries, values = random(4, 50, 64, dtype=torch.float32), random(4, 60, 64, seed=1, dtype=torch.float32)
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attention(queries.requires_grad_(), attention.prepare(values, None))
    assert max(kept) < 4 * 50 * 60 * 64 / 10


# What reads the state of the attention: score, and whether with coverage.
WITH_STATE = [(name, True) for name in ATTENTION_SCORES] + [("location", False)]


@pytest.mark.parametrize(("name", "coverage"), WITH_STATE)
def test_keys_with_a_state_computed_again_are_those_kept(name, coverage, monkeypatch):
    """Position by position: the same contexts, weights, gradients and second derivatives."""
    attention, mask = make_attention(name, (6, 12, 2), coverage=coverage), make_mask(SEQ)
    results = []
    for most in (2**18, 0):
        monkeypatch.setattr("hf_rnn.attention.MOST_TANH_KEPT", most)
        queries, values = random(6, 5, 6).requires_grad_(), random(6, SEQ, 12, seed=1).requires_grad_()
        context, alphas, _ = attention.walk(queries, attention.prepare(values, mask))
        inputs = [queries, values, *attention.parameters()]
        first = torch.autograd.grad((context * random(6, 5, 12, seed=2)).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs, allow_unused=True)
        results.append([context, alphas, *first, *(gradient for gradient in second if gradient is not None)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("name", "coverage"), WITH_STATE)
def test_attention_with_a_state_keeps_no_keys(name, coverage, monkeypatch):
    """What the graph of a large source keeps is much less than the keys that every position had."""
    attention = make_attention(name, (64, 64, 1), torch.float32, coverage)
    queries, values = random(4, 20, 64, dtype=torch.float32), random(4, 60, 64, seed=1, dtype=torch.float32)
    kept = {}
    for most in (2**18, 0):
        monkeypatch.setattr("hf_rnn.attention.MOST_TANH_KEPT", most)
        storages = {}

        def keep(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            attention.walk(queries.requires_grad_(), attention.prepare(values, None))
        kept[most] = sum(tensor.numel() for tensor in storages.values())
    of_all_positions = 4 * 20 * 60 * 64
    assert kept[0] < of_all_positions / 3 < of_all_positions < kept[2**18]


def test_a_local_score_sees_its_window():
    """Tokens further away than the window have no weight, those inside have some; every head has its own window."""
    attention = randomize(Attention(LocalScore(6, 6, 2, window=2)).double())
    queries, values, mask = random(4, 5, 6) * 3, random(4, 30, 6, seed=1), torch.ones(4, 30, dtype=torch.long)
    mask[0, :10] = 0
    mask[1, 20:] = 0
    mask[2, 5:15] = 0
    _, alphas = attention(queries, attention.prepare(values, mask))
    features = torch.tanh(attention.score.position(queries)) * attention.score.vector
    share = torch.sigmoid(features.unflatten(-1, (2, 3)).sum(-1))  # [batch, target, heads]
    assert share.std() > 0.2
    for row in range(4):
        tokens = mask[row].bool()
        places = torch.arange(int(tokens.sum())).double()
        near = (places - len(places) * share[row].T.unsqueeze(-1)).abs() <= 2
        assert torch.equal(alphas[row][:, :, tokens] > 0, near)


def test_the_mask_may_have_any_type():
    """Non-zero means a token: as integers, booleans or floats."""
    attention = make_attention("general", (6, 6, 1))
    pooling = SequencePooling("mean", 6, False)
    queries, values, mask = random(6, 4, 6), random(6, SEQ, 6, seed=1), make_mask(SEQ)
    expected, _ = attention(queries, attention.prepare(values, mask))
    for other in (mask.bool(), mask.float(), mask.to(torch.int32)):
        assert torch.equal(attention(queries, attention.prepare(values, other))[0], expected)
        assert torch.equal(pooling(values, other)[0], pooling(values, mask)[0])
