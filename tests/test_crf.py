"""The linear-chain CRF over the labels of tokens, its label schemes, and intents beside the labels.

What is exact is compared with all paths written out, in float64.
"""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch.library import opcheck
from transformers import AutoModelForTokenClassification, PreTrainedTokenizerFast, Trainer, pipeline

from clients import SENTENCES, make_tokenizer, save_checkpoint
from hf_rnn import (
    RNNConfig,
    RNNForSequenceClassification,
    RNNForTokenClassification,
    loop_only,
    lora_target_parameters,
    without_fast_paths,
)
from hf_rnn.crf import LinearChainCRF
from hf_rnn.crf_operators import chain_best_paths, chain_sums, chain_sums_backward
from hf_rnn.label_schemes import forbidden_steps
from hf_rnn.training import ids_without_label
from matrix import INTENTS, ON_A_CPU, SPANS, make_inputs, make_intents, make_mask, make_model, make_tokens
from reference import all_paths
from test_compile import compare, fresh_compiler, random_mask  # noqa: F401
from test_export import UNSEEN_SIZES, as_numpy, needs_onnx, ragged_mask
from test_laws_distributed import make_arguments


NAME = "RNNForTokenClassification"
LABELS = 3
WITH_CRF = {"use_crf": True, "bidirectional": True, "id2label": SPANS}
JOINT = WITH_CRF | INTENTS
# Chains without padding, with padding at the right, at the left, in the middle and everywhere, and of one token.
MASK = torch.cat([make_mask(5), torch.tensor([[0, 0, 0, 1, 0]])]).bool()
# Where texts begin within rows; in one row at a token that is out of the chain, in another twice in a row.
STARTS = torch.zeros_like(MASK)
STARTS[0, 2] = STARTS[3, 3] = STARTS[4, 1] = STARTS[4, 2] = True
SCHEMES = {
    "bio": ["O", "B-A", "I-A", "B-B", "I-B"],
    "bioes": ["O", "B-A", "I-A", "E-A", "S-A", "S-B"],
    "bilou": ["O", "B-A", "I-A", "L-A", "U-A", "U-B"],
}
with_starts = pytest.mark.parametrize("starts", [None, STARTS], ids=["texts", "packed"])
paths_of_sums = pytest.mark.parametrize("loop", [False, True], ids=["products", "sums"])


def make_crf(num_labels: int = LABELS, dtype: torch.dtype = torch.float64, seed: int = 0, forbidden=None):
    """A field with random scores."""
    crf = LinearChainCRF(num_labels, forbidden).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in crf.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return crf


def make_emissions(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> torch.Tensor:
    emissions = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    return emissions.to(dtype).requires_grad_()


def brute_force(crf, emissions, mask, starts=None) -> list[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """For each row the positions of its chain, all paths over it and their scores; by autograd, if asked for."""
    rows = []
    for row, tokens in enumerate(mask):
        positions = tokens.nonzero().flatten().tolist()
        paths = torch.tensor(list(itertools.product(range(crf.num_labels), repeat=len(positions))), dtype=torch.long)
        scores = emissions.new_zeros(len(paths))
        for index, position in enumerate(positions):
            labels = paths[:, index]
            scores = scores + emissions[row, position][labels]
            if index == 0:
                scores = scores + crf.start_transitions[labels]
                continue
            before = paths[:, index - 1]
            if starts is not None and starts[row, positions[index - 1] + 1 : position + 1].any():
                scores = scores + crf.end_transitions[before] + crf.start_transitions[labels]
            else:
                scores = scores + crf.transitions[before, labels]
        if positions:
            scores = scores + crf.end_transitions[paths[:, -1]]
        rows.append((positions, paths, scores))
    return rows


def gradients(objective: torch.Tensor, crf, emissions) -> list[torch.Tensor]:
    return list(torch.autograd.grad(objective, [emissions, *crf.parameters()]))


def assert_close(actual, expected, rtol=1e-10, atol=1e-11):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


# The field against all paths.


@paths_of_sums
@with_starts
def test_partition_and_likelihood_are_those_of_all_paths(starts, loop):
    """With the gradients of all parameters and of the emissions, for every kind of mask."""
    crf, emissions = make_crf(), make_emissions(*MASK.shape, LABELS)
    labels = torch.randint(0, LABELS, MASK.shape, generator=torch.Generator().manual_seed(2))
    with loop_only(loop):
        partition = crf.log_partition(emissions, MASK, starts)
        likelihood = crf.log_likelihood(emissions, labels.masked_fill(~MASK, -100), MASK, starts)
        score = crf.path_score(emissions, labels, MASK, starts)
        weights = torch.linspace(-1, 2, len(MASK), dtype=torch.float64)
        actual = gradients((partition * weights).sum() + (likelihood * weights.flip(0)).sum(), crf, emissions)
    objective = 0
    for row, (positions, paths, scores) in enumerate(brute_force(crf, emissions, MASK, starts)):
        expected = scores.logsumexp(0)
        of_labels = scores[(paths == labels[row, positions]).all(1)].sum()
        assert_close(partition[row], expected)
        assert_close(score[row], of_labels)
        assert_close(likelihood[row], of_labels - expected)
        objective = objective + expected * weights[row] + (of_labels - expected) * weights.flip(0)[row]
    for pair in zip(actual, gradients(objective, crf, emissions), strict=True):
        assert_close(*pair)
    assert (actual[0][~MASK] == 0).all()
    assert likelihood[5] == 0  # without a token
    alone = (emissions[6, 3] + crf.start_transitions + crf.end_transitions).log_softmax(0)
    assert_close(likelihood[6], alone[labels[6, 3]])


def test_the_reference_knows_the_same_paths():
    """The equations in NumPy, written from the definition row by row."""
    crf, emissions = make_crf(), make_emissions(*MASK.shape, LABELS)
    weights = {name: parameter.detach().numpy() for name, parameter in crf.named_parameters()}
    for row, (positions, paths, scores) in enumerate(brute_force(crf, emissions, MASK)):
        expected = all_paths(weights, emissions[row, positions].detach().numpy())
        assert list(expected) == [tuple(path) for path in paths.tolist()]
        np.testing.assert_allclose(list(expected.values()), scores.detach().numpy(), rtol=1e-12)


@paths_of_sums
@with_starts
def test_marginals_are_those_of_all_paths(starts, loop):
    crf, emissions = make_crf(), make_emissions(*MASK.shape, LABELS)
    with loop_only(loop):
        marginals = crf.marginals(emissions, MASK, starts)
        logarithms = crf.log_marginals(emissions, MASK, starts)
    assert_close(marginals.sum(-1), torch.ones(MASK.shape, dtype=torch.float64))
    assert_close(logarithms.exp(), marginals)
    assert_close(logarithms[~MASK], emissions.log_softmax(-1)[~MASK])
    objective = 0
    projection = make_emissions(*MASK.shape, LABELS, seed=4).detach()
    for row, (positions, paths, scores) in enumerate(brute_force(crf, emissions, MASK, starts)):
        probabilities = scores.softmax(0)
        for index, position in enumerate(positions):
            for label in range(LABELS):
                expected = probabilities[paths[:, index] == label].sum()
                assert_close(marginals[row, position, label], expected)
                objective = objective + expected.log() * projection[row, position, label]
    actual = (logarithms * projection)[MASK].sum()
    for pair in zip(gradients(actual, crf, emissions), gradients(objective, crf, emissions), strict=True):
        assert_close(*pair, rtol=1e-8, atol=1e-10)


@with_starts
@pytest.mark.parametrize("num_paths", [1, 2, 7])
def test_best_paths_are_the_best_of_all_paths(starts, num_paths):
    """Exactly these, in this order, with their scores and the gradients of those; and none where there are fewer."""
    crf, emissions = make_crf(), make_emissions(*MASK.shape, LABELS)
    found, scores = crf.best_paths(emissions, MASK, starts, num_paths)
    best, best_score = crf.viterbi(emissions, MASK, starts)
    assert torch.equal(best, found[:, 0])
    assert torch.equal(best_score, scores[:, 0])
    actual, objective = [], []
    for row, (positions, paths, expected) in enumerate(brute_force(crf, emissions, MASK, starts)):
        order = expected.argsort(descending=True)[:num_paths]
        assert found[row, : len(order), positions].tolist() == paths[order].tolist()
        assert (found[row][:, ~MASK[row]] == -100).all()
        assert (found[row, len(order) :] == -100).all()
        assert (scores[row, len(order) :] == -torch.inf).all()
        actual.append(scores[row, : len(order)])
        objective.append(expected[order])
    actual, objective = torch.cat(actual), torch.cat(objective)
    assert_close(actual, objective)
    weights = torch.linspace(1, 2, len(actual), dtype=torch.float64)
    results = [gradients((values * weights).sum(), crf, emissions) for values in (actual, objective)]
    for pair in zip(*results, strict=True):
        assert_close(*pair)
    with pytest.raises(ValueError, match="`num_paths` must be an integer of at least 1, got 0"):
        crf.best_paths(emissions, MASK, num_paths=0)


@paths_of_sums
@with_starts
def test_gradcheck(starts, loop):
    crf, emissions = make_crf(), make_emissions(*MASK.shape, LABELS)

    def function(emissions, *parameters):
        crf_of = dict(zip(dict(crf.named_parameters()), parameters))
        return torch.func.functional_call(
            crf, crf_of, (lambda crf: (crf.log_partition(emissions, MASK, starts), crf.log_marginals(emissions, MASK)),)
        )

    with loop_only(loop):
        assert torch.autograd.gradcheck(function, (emissions, *crf.parameters()), fast_mode=True)


@with_starts
def test_transformations_of_functions(starts):
    """`torch.func` finds the derivatives that backward finds, forward ones and second ones, too."""
    crf = make_crf(forbidden=forbidden_steps(["O", "B-A", "I-A"]))
    emissions = make_emissions(*MASK.shape, LABELS).detach()
    labels = torch.arange(MASK.shape[1]).expand(MASK.shape) % LABELS

    def objective(emissions, rows=slice(None)):
        mask, of_texts = MASK[rows], None if starts is None else starts[rows]
        likelihood = crf.log_likelihood(emissions, labels[rows], mask, of_texts)
        _, best = crf.viterbi(emissions, mask, of_texts)
        return (likelihood + best + crf.log_marginals(emissions, mask, of_texts)[..., 0].sum(1)).sum()

    expected = torch.autograd.functional.jacobian(objective, emissions)
    assert_close(torch.func.grad(objective)(emissions), expected)
    _, forward = torch.func.jvp(objective, (emissions,), (emissions.cos(),))
    assert_close(forward, (expected * emissions.cos()).sum())
    hessian = torch.func.hessian(lambda row: objective(row, slice(1)))(emissions[:1])
    assert_close(hessian, torch.autograd.functional.hessian(lambda row: objective(row, slice(1)), emissions[:1]))


def test_gradients_of_each_text():
    """By `torch.func.vmap` of the gradient of a model with a random field."""
    model, inputs = make_model(NAME, **WITH_CRF), make_inputs(NAME)
    parameters = dict(model.named_parameters())

    def loss(parameters, tokens, labels):
        return torch.func.functional_call(model, parameters, (tokens[None],), {"labels": labels[None]}).loss

    rows = inputs["input_ids"], inputs["labels"]
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, *rows)
    for index, row in enumerate(zip(*rows)):
        expected = torch.autograd.grad(loss(parameters, *row), parameters.values())
        for name, gradient in zip(parameters, expected):
            assert_close(found[name][index], gradient)


@with_starts
@pytest.mark.parametrize("mask", [None, MASK], ids=["no_mask", "mask"])
def test_products_are_the_sums(mask, starts):
    """The fast path and its plain twin, in sums and in every gradient, at a size where both have many steps."""
    crf, emissions = make_crf(9), make_emissions(7, 40, 9, scale=3)
    longer = [None if table is None else table.repeat(1, 8) for table in (mask, starts)]
    results = []
    for names in ((), ("crf_products",)):
        with without_fast_paths(*names) if names else loop_only(False):
            partition = crf.log_partition(emissions, *longer)
            results.append([partition, *gradients(partition.square().sum(), crf, emissions)])
    for pair in zip(*results, strict=True):
        assert_close(*pair)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_that_are_too_far_apart_for_products(dtype):
    """Then it is the sums, and exact: a label whose sum would be lost comes to be the only one that counts."""
    crf = make_crf(2, dtype)
    emissions = torch.tensor([[[0.0, 0.0], [2000.0, 0.0], [0.0, 5000.0]]], dtype=dtype, requires_grad=True)
    with torch.no_grad():
        crf.transitions.copy_(torch.tensor([[0.0, -4000.0], [-4000.0, 0.0]]))
    (_, _, scores), *_ = brute_force(crf, emissions, torch.ones(1, 3).bool())
    partition = crf.log_partition(emissions)
    assert_close(partition[0], scores.logsumexp(0), rtol=1e-6)
    actual, expected = (gradients(value.sum(), crf, emissions) for value in (partition, scores.logsumexp(0)))
    for pair in zip(actual, expected, strict=True):
        assert_close(*pair, rtol=1e-5, atol=1e-6)
    marginals = crf.log_marginals(emissions)
    assert marginals.isfinite().all()


def test_rows_are_independent_of_what_is_outside_of_their_chains():
    """Not even numbers that are none have an influence there, nor do they get a gradient."""
    crf = make_crf()
    emissions = make_emissions(*MASK.shape, LABELS)
    with torch.no_grad():
        emissions[~MASK] = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=torch.float64)
    for row, positions in enumerate(MASK):
        alone = emissions[row : row + 1, positions]
        assert_close(crf.log_partition(emissions, MASK)[row], crf.log_partition(alone)[0])
        assert_close(crf.marginals(emissions, MASK)[row, positions], crf.marginals(alone)[0])
        assert crf.viterbi(emissions, MASK)[0][row, positions].tolist() == crf.viterbi(alone)[0][0].tolist()
    actual = gradients(crf.log_partition(emissions, MASK).sum(), crf, emissions)
    assert all(gradient.isfinite().all() for gradient in actual)
    assert (actual[0][~MASK] == 0).all()


def test_texts_of_a_packed_row_are_independent():
    crf, emissions = make_crf(), make_emissions(1, 7, LABELS)
    starts = torch.tensor([[False, False, True, False, False, False, True]])
    pieces = emissions.split([2, 4, 1], dim=1)
    assert_close(crf.log_partition(emissions, None, starts)[0], sum(crf.log_partition(piece)[0] for piece in pieces))
    assert_close(crf.log_marginals(emissions, None, starts), torch.cat([crf.log_marginals(p) for p in pieces], dim=1))
    assert torch.equal(crf.viterbi(emissions, None, starts)[0], torch.cat([crf.viterbi(p)[0] for p in pieces], dim=1))


def test_empty_batches_and_texts():
    crf = make_crf()
    for shape in ((0, 4), (3, 0), (0, 0)):
        emissions = make_emissions(*shape, LABELS)
        assert torch.equal(crf.log_partition(emissions), torch.zeros(shape[0], dtype=torch.float64))
        labels = torch.zeros(shape, dtype=torch.long)
        assert torch.equal(crf.log_likelihood(emissions, labels), torch.zeros(shape[0], dtype=torch.float64))
        assert crf.path_logits(emissions).shape == (*shape, LABELS)
        assert crf.best_paths(emissions, num_paths=2)[0].shape == (shape[0], 2, shape[1])


def test_wrong_shapes_are_refused():
    crf, emissions = make_crf(), make_emissions(2, 4, LABELS)
    with pytest.raises(ValueError, match=r"`emissions` must have the shape \(batch, seq, 3\), got \(2, 4, 2\)"):
        crf.log_partition(emissions[..., :2])
    for name in ("mask", "starts"):
        with pytest.raises(ValueError, match=rf"`{name}` must have the shape \(2, 4\), got \(2, 3\)"):
            crf.viterbi(emissions, **{name: torch.ones(2, 3).bool()})


def test_logits_decode_to_the_best_path():
    """Where the labels that are most probable by themselves are another path, which they often are here."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        crf = make_crf(4, dtype)
        emissions = make_emissions(200, 6, 4, dtype=dtype)
        mask = torch.rand(200, 6, generator=torch.Generator().manual_seed(5)) > 0.2
        logits, marginals = crf.path_logits(emissions, mask), crf.marginals(emissions, mask)
        path, _ = crf.viterbi(emissions, mask)
        assert logits.dtype == dtype
        assert torch.equal(logits.argmax(-1)[mask], path[mask])
        # Behind the softmax of software that computes in float32, too.
        assert torch.equal(logits.float().softmax(-1).argmax(-1)[mask], path[mask])
        others = mask & (marginals.argmax(-1) != path)
        assert others.sum() > 20
        rounding = 6 * torch.finfo(dtype).eps + 1e-7
        assert_close(logits.exp().to(marginals.dtype)[~others], marginals[~others], rtol=0, atol=rounding)
        on_path = torch.zeros_like(logits).bool().scatter(2, path.clamp(min=0).unsqueeze(-1), True)
        unraised = others.unsqueeze(-1) & ~on_path
        assert_close(logits.exp().to(marginals.dtype)[unraised], marginals[unraised], rtol=0, atol=rounding)
        highest = logits.masked_fill(on_path, -torch.inf).amax(-1)[others]
        raised = logits[others].gather(-1, path[others].unsqueeze(-1)).squeeze(-1)
        assert (raised > highest).all()
        assert (raised - highest <= 8 * max(torch.finfo(dtype).eps, 1.2e-7) * (1 + highest.abs())).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("forbidden", [False, True], ids=["free", "constrained"])
def test_half_precision_on_long_texts(dtype, forbidden):
    """All sums are in float32: 2000 tokens with large scores give what float64 gives, and nothing that is no number."""
    tables = forbidden_steps(SCHEMES["bioes"]) if forbidden else None
    crf = make_crf(6, forbidden=tables).to(dtype)
    exact = LinearChainCRF(6, tables).double()
    exact.load_state_dict(crf.state_dict())
    emissions = make_emissions(3, 2000, 6, dtype=dtype, scale=20)
    mask = torch.ones(3, 2000).bool()
    mask[1, ::7] = False
    mask[2] = False
    partition = crf.log_partition(emissions, mask)
    assert partition.dtype == torch.float32
    doubled = emissions.detach().double().requires_grad_()
    expected = exact.log_partition(doubled, mask)
    assert_close(partition.double(), expected, rtol=1e-6, atol=0)
    actual, wanted = (
        gradients(values.sum(), *rest) for values, *rest in ((partition, crf, emissions), (expected, exact, doubled))
    )
    for gradient, other in zip(actual, wanted, strict=True):
        scale = other.abs().max().clamp(min=1)
        assert ((gradient.double() - other).abs().max() / scale) < 2 * torch.finfo(dtype).eps
    assert crf.path_logits(emissions, mask).isfinite().all()
    path, _ = exact.viterbi(doubled, mask)
    assert torch.equal(crf.viterbi(emissions, mask)[0], path)
    # The difference of two large numbers, but not computed as that.
    pairs = crf.log_likelihood(emissions, path, mask), exact.log_likelihood(doubled, path, mask)
    assert_close(pairs[0].double(), pairs[1], rtol=0, atol=2e-3)


def test_autocast_changes_nothing_inside():
    crf, emissions = make_crf(dtype=torch.float32), make_emissions(4, 9, LABELS, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        partition = crf.log_partition(emissions)
        actual = gradients(partition.sum(), crf, emissions)
    expected = crf.log_partition(emissions)
    assert torch.equal(partition, expected)
    for pair in zip(actual, gradients(expected.sum(), crf, emissions), strict=True):
        assert torch.equal(*pair)


def test_the_operators_are_what_they_say():
    """Schema, shapes, gradients: what a compiler assumes of them."""
    crf, emissions = make_crf(), make_emissions(*MASK.shape, LABELS)
    scores = [parameter.detach().requires_grad_() for parameter in crf.parameters()]
    transposed = [scores[0].detach().t().requires_grad_(), *scores[1:]]
    for starts, tables in itertools.product((None, STARTS), (scores, transposed)):
        arguments = (emissions, MASK.sum(1), starts, *tables)
        opcheck(chain_sums, arguments)
        detached = [None if tensor is None else tensor.detach() for tensor in arguments]
        sums, _ = chain_sums(*detached)
        opcheck(chain_sums_backward, (torch.randn_like(sums), sums, *detached))
        for number in (1, 3):
            opcheck(chain_best_paths, (*detached, number))


# Label schemes.


def is_allowed(scheme: str, path: list[str]) -> bool:
    """Whether the labels are spans as the scheme writes them: by reading them, not by a table of pairs."""
    inside, last = None, {"bio": "", "bioes": "E", "bilou": "L"}[scheme]
    for label in path:
        prefix, _, kind = label.partition("-")
        if prefix in "I" + last:
            if inside != kind:
                return False
            inside = None if prefix == last else kind
            continue
        if inside is not None and scheme != "bio":
            return False
        inside = kind if prefix == "B" else None
    return inside is None or scheme == "bio"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_forbidden_steps_are_those_of_the_scheme(scheme):
    """A path of any three labels is free of forbidden steps exactly where it is well-formed."""
    labels = SCHEMES[scheme]
    tables = forbidden_steps(labels)
    assert tables == forbidden_steps(labels, scheme)
    for path in itertools.product(range(len(labels)), repeat=3):
        forbidden = tables.start[path[0]] or tables.end[path[-1]]
        forbidden = forbidden or any(tables.transitions[one][other] for one, other in itertools.pairwise(path))
        assert forbidden != is_allowed(scheme, [labels[label] for label in path])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_constraints_leave_out_what_is_forbidden(scheme):
    """Partition, marginals and best paths are those of the well-formed paths alone."""
    labels = SCHEMES[scheme]
    tables = forbidden_steps(labels, scheme)
    crf, mask = make_crf(len(labels), forbidden=tables), MASK[:, :4]
    emissions = make_emissions(*mask.shape, len(labels), scale=2)
    partition, marginals = crf.log_partition(emissions, mask), crf.marginals(emissions, mask)
    found, scores = crf.best_paths(emissions, mask, num_paths=40)
    actual = gradients(partition.sum(), crf, emissions)
    objective = 0
    for row, (positions, paths, all_scores) in enumerate(brute_force(crf, emissions, mask)):
        allowed = torch.tensor([is_allowed(scheme, [labels[label] for label in path]) for path in paths.tolist()])
        paths, all_scores = paths[allowed], all_scores[allowed]
        objective = objective + all_scores.logsumexp(0)
        assert_close(partition[row], all_scores.logsumexp(0))
        for index, position in enumerate(positions):
            for label in range(len(labels)):
                expected = all_scores.softmax(0)[paths[:, index] == label].sum()
                assert_close(marginals[row, position, label], expected)
        order = all_scores.argsort(descending=True)[:40]
        assert found[row, : len(order), positions].tolist() == paths[order].tolist()
        assert (scores[row, len(order) :] == -torch.inf).all()
    for pair in zip(actual, gradients(objective, crf, emissions), strict=True):
        assert_close(*pair)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_decoded_paths_are_well_formed_whatever_the_scores(scheme, dtype):
    labels = SCHEMES[scheme]
    crf = make_crf(len(labels), dtype, forbidden=forbidden_steps(labels))
    for scale in (1, 100, 20000):
        emissions = make_emissions(60, 12, len(labels), dtype=dtype, scale=scale).clamp(-60000, 60000)
        mask = torch.rand(60, 12, generator=torch.Generator().manual_seed(6)) > 0.3
        path, _ = crf.viterbi(emissions, mask)
        logits = crf.path_logits(emissions, mask)
        assert logits.isfinite().all()
        assert torch.equal(logits.argmax(-1)[mask], path[mask])
        for row, tokens in zip(path, mask):
            assert is_allowed(scheme, [labels[label] for label in row[tokens].tolist()])


def test_labels_that_break_the_scheme_have_a_finite_loss():
    """About 10000 nats for each step that is not allowed, and the gradient of a loss without that constant."""
    crf = make_crf(5, torch.float32, forbidden=forbidden_steps(SCHEMES["bio"]))
    emissions = make_emissions(1, 4, 5, dtype=torch.float32)
    good, bad = torch.tensor([[1, 2, 0, 0]]), torch.tensor([[2, 2, 0, 4]])
    likelihoods = [crf.log_likelihood(emissions, labels) for labels in (good, bad)]
    assert -30 < likelihoods[0] < 0
    assert abs(likelihoods[1] + 20000) < 30
    for gradient in gradients(likelihoods[1].sum(), crf, emissions):
        assert gradient.isfinite().all()
        assert 0 < gradient.abs().max() < 10
    # A text for which nothing is allowed still has a path.
    crf = make_crf(2, torch.float32, forbidden=forbidden_steps(["B-A", "E-A"], "bioes"))
    emissions = make_emissions(1, 1, 2, dtype=torch.float32)
    assert crf.viterbi(emissions)[0].item() in (0, 1)
    assert crf.path_logits(emissions).isfinite().all()
    assert crf.log_partition(emissions).isfinite()


def test_schemes_are_found_by_their_labels():
    found = {
        "bio": [["O", "B-PER", "I-PER"], ["B", "I", "O"], ["B-a-b", "I-a-b"]],
        "bioes": [["O", "B-PER", "E-PER"], ["B", "I", "E", "S"]],
        "bilou": [["O", "B-PER", "L-PER", "U-LOC"]],
        None: [["LABEL_0", "LABEL_1"], ["O", "I-PER"], ["NOUN", "VERB"], ["O", "B-PER", "LOC"], ["B-A", "E-A", "U-A"]],
    }
    for scheme, several in found.items():
        for labels in several:
            assert forbidden_steps(labels) == (None if scheme is None else forbidden_steps(labels, scheme))
            assert forbidden_steps(labels, "none") is None
    assert forbidden_steps(SCHEMES["bio"], "iob2") == forbidden_steps(SCHEMES["bio"], "bio") is not None
    assert forbidden_steps(SCHEMES["bioes"], "iobes") == forbidden_steps(SCHEMES["bioes"], "bioes") is not None


def test_configurations():
    assert RNNConfig(use_crf=True).crf_constraints == "auto"
    names = {str(index): label for index, label in enumerate(SCHEMES["bilou"])}
    config = RNNConfig(use_crf=True, id2label=names, crf_constraints="bilou", id2intent={"1": "b", "0": "a"})
    assert config.id2intent == {1: "b", 0: "a"}
    assert config.num_intents == 2
    assert RNNConfig().num_intents == 0
    loaded = RNNConfig.from_dict(json.loads(config.to_json_string()))
    assert loaded.to_dict() == config.to_dict()
    with pytest.raises(ValueError, match=r"`crf_constraints` must name a scheme .* 'bio', .* with \['L-A', 'U-A'"):
        RNNConfig(use_crf=True, id2label=names, crf_constraints="bio")
    with pytest.raises(ValueError, match="`crf_constraints` must name a scheme"):
        RNNConfig.from_dict(config.to_dict(), num_labels=3)
    RNNConfig(id2label=names, crf_constraints="bio")  # nothing is constrained
    with pytest.raises(ValueError, match=r"`crf_constraints` must be one of .*'bio'.* got 'iob1'"):
        RNNConfig(crf_constraints="iob1")
    for wrong in ({}, {0: "a", 2: "b"}, {"a": "b"}, {-1: "a"}):
        with pytest.raises(ValueError, match="`id2intent` must be None or a dictionary from 0, 1, 2"):
            RNNConfig(id2intent=wrong)
    for wrong in ({0: 1}, ["a"], "a", {0.5: "a"}):
        with pytest.raises(ValueError, match="id2intent"):
            RNNConfig(id2intent=wrong)


# The model.


def test_the_loss_is_the_mean_over_labels_of_whole_chains():
    """Labels of -100 are skipped inside of the chain; their tokens still are read."""
    model, inputs = make_model(NAME, **WITH_CRF), make_inputs(NAME)
    mask = make_mask()
    labels = inputs["labels"] * 0 + torch.tensor([0, 1, 2, 0, 2, 0, 3])
    labels[:, [0, 3]] = -100
    outputs = model.train()(inputs["input_ids"], mask, labels=labels)
    assert outputs.logits.requires_grad
    chain = mask.bool() & (labels != -100)
    total = 0
    for row, (positions, paths, scores) in enumerate(brute_force(model.crf, outputs.logits, chain)):
        names = [[SPANS[label] for label in path] for path in paths.tolist()]
        scores = scores[torch.tensor([is_allowed("bio", path) for path in names])]
        paths = paths[torch.tensor([is_allowed("bio", path) for path in names])]
        gold = (paths == labels[row, positions]).all(1)
        assert gold.any() != (row == 2)  # which begins with I-A
        if gold.any():
            total = total + scores.logsumexp(0) - scores[gold].sum()
        else:
            total = (
                total
                - model.crf.log_likelihood(outputs.logits[row : row + 1], labels[row : row + 1], chain[row : row + 1])[
                    0
                ]
            )
    assert_close(outputs.loss, total / chain.sum())
    for number in (97, torch.tensor(97)):
        assert_close(model(inputs["input_ids"], mask, labels=labels, num_items_in_batch=number).loss, total / 97)
    # Without a single label the loss is zero, and so are its gradients.
    loss = model(inputs["input_ids"], mask, labels=torch.full_like(labels, -100)).loss
    assert loss == 0
    loss.backward()
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


def test_logits_in_evaluation():
    """With labels the chain has the tokens with labels, without all, and `chain_mask` says which."""
    model, inputs, mask = make_model(NAME, **WITH_CRF), make_inputs(NAME), make_mask()
    labels = inputs["labels"].masked_fill(torch.arange(7) % 3 == 1, -100)
    chain = mask.bool() & (labels != -100)
    emissions = model.train()(inputs["input_ids"], mask, labels=labels).logits
    unlabelled = model(inputs["input_ids"], mask).logits
    model.eval()
    for expected, more in (
        (model.crf.path_logits(emissions, chain), {"labels": labels}),
        (model.crf.path_logits(emissions, chain), {"chain_mask": (labels != -100).long()}),
        (model.crf.path_logits(emissions, mask.bool()), {}),
    ):
        outputs = model(inputs["input_ids"], mask, **more)
        assert_close(outputs.logits, expected)
        assert_close(
            outputs.logits.exp().sum(-1)[~mask.bool()], torch.ones(int((mask == 0).sum()), dtype=torch.float64)
        )
    assert_close(unlabelled, model(inputs["input_ids"], mask).logits)
    with pytest.raises(ValueError, match=r"`chain_mask` must have the shape \(6, 7\), got \(6, 6\)"):
        model(inputs["input_ids"], mask, chain_mask=mask[:, 1:])


def test_decode():
    model, inputs, mask = make_model(NAME, **JOINT), make_inputs(NAME), make_mask()
    decoded = model.decode(inputs["input_ids"], mask, num_paths=3)
    outputs = model(inputs["input_ids"], mask)
    assert torch.equal(outputs.logits.argmax(-1)[mask.bool()], decoded.paths[:, 0][mask.bool()])
    assert decoded.paths.shape == (6, 3, 7)
    assert (decoded.log_probabilities[:, 0] >= decoded.log_probabilities[:, 1]).all()
    assert decoded.log_probabilities[5].tolist() == [0, -torch.inf, -torch.inf]
    assert_close(decoded.intent_logits, outputs.intent_logits)
    assert_close(decoded.marginals.sum(-1), torch.ones(6, 7, dtype=torch.float64))
    for row in range(5):
        for rank in range(3):
            labels = decoded.paths[row : row + 1, rank]
            # The loss of these labels is the negative logarithm of their probability.
            loss = model(
                inputs["input_ids"][row : row + 1], mask[row : row + 1], labels=labels, num_items_in_batch=1
            ).loss
            assert_close(-loss, decoded.log_probabilities[row, rank])
    chain_mask = torch.arange(7).expand(6, 7) % 2
    paths = model.decode(inputs["input_ids"], mask, chain_mask=chain_mask).paths[:, 0]
    assert ((paths != -100) == (mask.bool() & chain_mask.bool())).all()
    with pytest.raises(ValueError, match="`use_crf` must be True"):
        make_model(NAME).decode(inputs["input_ids"])


def test_tokens_without_a_label_are_left_out():
    """What the configuration names is not in the chain where neither labels nor a mask say what is."""
    ignored = [3, 11, 500]
    model, inputs, mask = make_model(NAME, **WITH_CRF, crf_ignored_ids=ignored), make_inputs(NAME), make_mask()
    tokens = inputs["input_ids"]
    tokens[0, 2], tokens[1, 4], tokens[2, 0] = 11, 3, 3
    inside = ~torch.isin(tokens, torch.tensor(ignored))
    assert 0 < inside.sum() < inside.numel()
    torch.testing.assert_close(model(tokens, mask).logits, model(tokens, mask, chain_mask=inside).logits)
    decoded = model.decode(tokens, mask)
    assert ((decoded.paths[:, 0] != -100) == (mask.bool() & inside)).all()
    assert_close(decoded.marginals, model.decode(tokens, mask, chain_mask=inside).marginals)
    # Who says what is in the chain is believed.
    everything = torch.ones_like(tokens)
    assert (model.decode(tokens, mask, chain_mask=everything).paths[:, 0][mask.bool()] != -100).all()
    plain = make_model(NAME, **WITH_CRF)
    plain.load_state_dict(model.state_dict())
    labels = inputs["labels"]
    assert_close(model(tokens, mask, labels=labels).loss, plain(tokens, mask, labels=labels).loss)
    assert_close(
        model(attention_mask=mask, inputs_embeds=model.get_input_embeddings()(tokens)).logits,
        plain(tokens, mask).logits,
    )
    # Tokens that are added later have labels.
    model.resize_token_embeddings(600)
    tokens[3, 3] = 500
    assert model.decode(tokens, everything).paths[3, 0, 3] != -100
    with pytest.raises(ValueError, match=r"`crf_ignored_ids` must be token ids of at least 0, got \[-1\]"):
        RNNConfig(use_crf=True, crf_ignored_ids=[3, -1])
    with pytest.raises(ValueError, match="`crf_ignored_ids` must be None where `word_encoder` is set"):
        RNNConfig(use_crf=True, crf_ignored_ids=[3], word_encoder="cnn", first_continuation_id=5)


def test_other_heads_ignore_the_field():
    plain = make_model("RNNForSequenceClassification")
    other = make_model("RNNForSequenceClassification", use_crf=True, id2label=SPANS, **INTENTS)
    assert plain.state_dict().keys() == other.state_dict().keys()
    assert isinstance(other, RNNForSequenceClassification)


def test_graph_of_packed_texts():
    """The chains end and begin where the texts do."""
    model = make_model(NAME, **WITH_CRF).train()
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0]]).expand(6, -1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compare(model, compiled, make_inputs(NAME) | {"position_ids": positions})


@pytest.mark.parametrize("options", [WITH_CRF, JOINT], ids=["crf", "joint"])
def test_graphs_of_training_and_evaluation(options):
    """One graph serves all lengths and batch sizes, with gradients."""
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    for training in (True, False):
        graphs.clear()
        torch._dynamo.reset()
        model = make_model(NAME, **options).train(training)
        compiled = torch.compile(model, fullgraph=True, backend=count)
        for batch, seq in [(6, 7), (5, 8), (4, 12), (7, 31), (3, 9)]:
            inputs = make_inputs(NAME, batch, seq, with_labels=training, options=options)
            compare(model, compiled, inputs | {"attention_mask": random_mask(batch, seq)})
        assert len(graphs) <= 3


@pytest.mark.slow
def test_compiled_by_the_default_compiler():
    for training in (True, False):
        model = make_model(NAME, **JOINT).train(training)
        compiled = torch.compile(model, fullgraph=True)
        for batch, seq in [(6, 7), (5, 8), (4, 30)]:
            inputs = make_inputs(NAME, batch, seq, with_labels=training, options=JOINT)
            compare(model, compiled, inputs | {"attention_mask": random_mask(batch, seq)})


@ON_A_CPU
@pytest.mark.parametrize(
    "options", [WITH_CRF, JOINT, WITH_CRF | {"crf_ignored_ids": [4, 7, 9]}], ids=["crf", "joint", "ignored"]
)
def test_exported_program(options):
    from hf_rnn.export.graphs import make_graphs
    from hf_rnn.export.onnx_files import to_exported_program

    model = make_model(NAME, dtype=torch.float32, **options)
    graph = make_graphs(model)[1]["model"]
    module = to_exported_program(graph).module()
    for batch, length in UNSEEN_SIZES:
        inputs = {"input_ids": make_tokens(batch, length, seed=4), "attention_mask": ragged_mask(batch, length)}
        expected = model(**inputs)
        for name, result in zip(graph.outputs, module(*inputs.values()), strict=True):
            torch.testing.assert_close(result, expected[name], rtol=1e-5, atol=1e-5)


@ON_A_CPU
@pytest.mark.parametrize(
    "options",
    [JOINT | {"crf_ignored_ids": [4, 7, 9]}, pytest.param({"use_crf": True}, marks=pytest.mark.slow)],
    ids=["joint", "crf"],
)
def test_runs_in_onnx(options, tmp_path):
    needs_onnx()
    from hf_rnn.export import export_model, load

    model = make_model(NAME, dtype=torch.float32, **options)
    export_model(model, tmp_path / "model")
    tagger = load(tmp_path / "model", threads=1)
    for batch, length in UNSEEN_SIZES:
        inputs = {"input_ids": make_tokens(batch, length, seed=4), "attention_mask": ragged_mask(batch, length)}
        expected = model(**inputs)
        results = tagger(**as_numpy(inputs))
        assert set(results) == set(expected) - {"loss"}
        for name, result in results.items():
            torch.testing.assert_close(torch.from_numpy(result), expected[name], atol=1e-5, rtol=1e-5)
        mask = inputs["attention_mask"].bool()
        assert torch.equal(torch.from_numpy(results["logits"]).argmax(-1)[mask], expected.logits.argmax(-1)[mask])


def test_more_than_the_best_path_is_not_exported():
    from hf_rnn.crf_operators import best_paths_in_scan

    crf, emissions = make_crf(), make_emissions(*MASK.shape, LABELS)
    with pytest.raises(ValueError, match="Only the best path can be exported, got 2 paths"):
        best_paths_in_scan(emissions, MASK.sum(1), None, *crf.parameters(), 2)


# Stock software.


@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
def test_pipeline_finds_the_best_path(strategy, tmp_path):
    """Words are tokens here, so that all strategies say what the path says."""
    names = dict(enumerate(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]))
    tokenizer = make_tokenizer(special_tokens=False)
    folder = save_checkpoint(tmp_path, NAME, tokenizer, bidirectional=True, id2label=names, use_crf=True, **INTENTS)
    model = AutoModelForTokenClassification.from_pretrained(folder)
    tagger = pipeline("token-classification", model=folder, device="cpu", aggregation_strategy=strategy)
    differs = 0
    for sentence, entities in zip(SENTENCES, tagger(SENTENCES)):
        inputs = tokenizer(sentence, return_tensors="pt")
        decoded = model.decode(**inputs)
        path, words = decoded.paths[0, 0].tolist(), sentence.split()
        differs += decoded.marginals[0].argmax(-1).tolist() != path
        labels = [names[label] for label in path]
        if strategy == "none":
            expected = [(label, word) for label, word in zip(labels, words) if label != "O"]
            assert [(entity["entity"], entity["word"]) for entity in entities] == expected
            on_path = [decoded.marginals[0, i, label].item() for i, label in enumerate(path) if label]
            assert all(0 < entity["score"] <= 1 for entity in entities)
            assert all(e["score"] >= score - 1e-3 for e, score in zip(entities, on_path))
            continue
        spans = []
        for label, word in zip(labels, words):
            if label.startswith("I-"):
                spans[-1][1].append(word)
            elif label != "O":
                spans.append((label[2:], [word]))
        assert [(entity["entity_group"], entity["word"].split()) for entity in entities] == spans
    assert differs


def make_sub_word_tokenizer(kind: str, texts: list[str]):
    """Of a few tokens, such that most words are several, with special tokens around the text."""
    model = {
        "wordpiece": models.WordPiece(unk_token="<unk>"),
        "bytes": models.BPE(),
        "unigram": models.Unigram(),
    }[kind]
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    tokenizer = Tokenizer(model)
    trainer = {"wordpiece": trainers.WordPieceTrainer, "bytes": trainers.BpeTrainer, "unigram": trainers.UnigramTrainer}
    tokenizer.pre_tokenizer = {
        "wordpiece": pre_tokenizers.Whitespace(),
        "bytes": pre_tokenizers.ByteLevel(add_prefix_space=True),
        "unigram": pre_tokenizers.Metaspace(),
    }[kind]
    options = {"unk_token": "<unk>"} if kind == "unigram" else {}
    tokenizer.train_from_iterator(texts, trainer[kind](vocab_size=45, special_tokens=special, **options))
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        add_prefix_space=True,
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.mark.parametrize("kind", ["wordpiece", "bytes", "unigram"])
def test_pipeline_reads_labels_of_words(kind, tmp_path):
    """Special tokens and the rest of words have no label: the path goes through the first tokens of words."""
    tokenizer = make_sub_word_tokenizer(kind, SENTENCES * 3)
    ignored = ids_without_label(tokenizer)
    assert {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id} < set(ignored)
    assert tokenizer.unk_token_id not in ignored
    names = dict(enumerate(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]))
    options = {"bidirectional": True, "id2label": names, "use_crf": True, "crf_ignored_ids": ignored}
    folder = save_checkpoint(tmp_path, NAME, tokenizer, vocab_size=len(tokenizer), **options)
    model = AutoModelForTokenClassification.from_pretrained(folder)
    assert model.config.crf_ignored_ids == ignored
    tagger = pipeline("token-classification", model=folder, device="cpu", aggregation_strategy="first")
    for sentence in SENTENCES:
        encoded = tokenizer(sentence.split(), is_split_into_words=True, return_tensors="pt")
        words = encoded.word_ids()
        firsts = [word is not None and word != before for word, before in zip(words, [None, *words])]
        assert sum(firsts) == len(sentence.split()) < len(firsts) - 2
        path = model.decode(**encoded, chain_mask=torch.tensor([firsts])).paths[0, 0]
        assert torch.equal(model.decode(**encoded).paths[0, 0], path)
        if kind == "wordpiece":  # of the others pipelines have to guess where words begin
            spans = sum(names.get(label, "").startswith("B-") for label in path.tolist())
            assert len(tagger(sentence)) == spans


def make_trainer(folder, model, examples, **options):
    arguments = make_arguments(folder, 2, per_device_eval_batch_size=3, **options)
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {}

    trainer = Trainer(
        model=model, args=arguments, train_dataset=examples, eval_dataset=examples, compute_metrics=compute_metrics
    )
    return trainer, seen


@pytest.mark.parametrize("options", [WITH_CRF, JOINT], ids=["crf", "joint"])
def test_trainer_evaluates_best_paths(options, tmp_path):
    """`compute_metrics` by argmax, in batches of two sizes; labels of -100 inside; the mean loss over all labels."""
    model, inputs = make_model(NAME, **options), make_inputs(NAME, 8, options=options)
    inputs["attention_mask"] = torch.cat([make_mask(), make_mask()[:2]])
    inputs["labels"] = inputs["labels"].masked_fill((torch.arange(7) % 4 == 1) | (inputs["attention_mask"] == 0), -100)
    examples = [{key: value[row] for key, value in inputs.items()} for row in range(8)]
    label_names = ["labels", "intents"] if "intents" in inputs else ["labels"]
    trainer, seen = make_trainer(tmp_path, model, examples, label_names=label_names)
    metrics = trainer.evaluate()
    logits, labels = seen[0].predictions, seen[0].label_ids
    if "intents" in inputs:
        (logits, intent_logits), (labels, intents) = logits, labels
        assert_close(torch.from_numpy(intent_logits), model(**inputs).intent_logits)
        assert intents.tolist() == inputs["intents"].tolist()
    chain = labels != -100
    tagged = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    expected = model.decode(**tagged, chain_mask=torch.from_numpy(chain)).paths[:, 0].numpy()
    assert (logits.argmax(-1)[chain] == expected[chain]).all()
    assert (expected[~chain] == -100).all()
    assert math.isfinite(metrics["eval_loss"])


def test_trainer_asks_for_labels_alone():
    """No other argument is taken for a label, so that data without intents are evaluated."""
    from transformers.utils import find_labels

    assert find_labels(RNNForTokenClassification) == ["labels"]


@ON_A_CPU
@pytest.mark.parametrize("options", [WITH_CRF, INTENTS, {}], ids=["chain", "intents", "neither"])
def test_smoothed_labels_are_warned_of(options, tmp_path, monkeypatch):
    """Trainer takes the labels that it smooths away from the model, and smooths those of single tokens."""
    seen = []
    monkeypatch.setattr("hf_rnn.modeling_rnn.logger.warning_once", seen.append)
    inputs = make_inputs(NAME, 4, options=options)
    examples = [{key: value[row] for key, value in inputs.items()} for row in range(4)]
    for factor in (0.0, 0.1):
        model = make_model(NAME, **options)
        trainer, _ = make_trainer(tmp_path, model, examples, max_steps=1, label_smoothing_factor=factor)
        trainer.train()
        model.train()(inputs["input_ids"], labels=inputs["labels"])
        model.eval()(inputs["input_ids"])
        with torch.no_grad():
            model.train()(inputs["input_ids"])
        assert len(seen) == (1 if factor and options else 0)
    assert all("`label_smoothing_factor`" in message for message in seen)


@ON_A_CPU
@pytest.mark.parametrize("accumulated", [1, 4])
def test_training_learns_the_chain(accumulated, tmp_path):
    """Labels that only their order tells: of two equal tokens the first is B, the second I."""
    torch.manual_seed(0)
    config = RNNConfig(
        vocab_size=10, hidden_size=12, embedding_size=8, use_crf=True, id2label={0: "O", 1: "B-A", 2: "I-A"}, **INTENTS
    )
    model = RNNForTokenClassification(config)
    generator = torch.Generator().manual_seed(0)
    examples = []
    for index in range(64):
        first = int(torch.randint(0, 6, (), generator=generator))
        tokens = torch.randint(4, 10, (8,), generator=generator)
        labels = torch.zeros(8, dtype=torch.long)
        tokens[first : first + 2] = 3
        labels[first : first + 2] = torch.tensor([1, 2])
        tokens[7], labels[7] = index % 3, -100
        examples.append({"input_ids": tokens, "labels": labels, "intents": torch.tensor(index % 3)})
    trainer, seen = make_trainer(
        tmp_path,
        model,
        examples,
        max_steps=60 if accumulated == 1 else 40,
        gradient_accumulation_steps=accumulated,
        learning_rate=0.03,
        label_names=["labels", "intents"],
    )
    trainer.train()
    trainer.evaluate()
    (logits, intent_logits), (labels, intents) = seen[-1].predictions, seen[-1].label_ids
    assert (logits.argmax(-1) == labels)[labels != -100].mean() > 0.98
    assert (intent_logits.argmax(-1) == intents).mean() > 0.98
    assert (model.crf.transitions.detach() != 0).any()


def test_save_and_load(tmp_path):
    """The table of what is forbidden comes of the names, and is no weight."""
    model = make_model(NAME, dtype=torch.float32, **JOINT)
    model.save_pretrained(tmp_path)
    assert not [key for key in model.state_dict() if "forbidden" in key]
    inputs, mask = make_inputs(NAME, with_labels=False), make_mask()
    for options in ({}, {"device_map": "cpu"}, {"dtype": torch.bfloat16}):
        loaded = AutoModelForTokenClassification.from_pretrained(tmp_path, **options)
        for pair in zip(loaded.crf.forbidden, model.crf.forbidden, strict=True):
            assert torch.equal(*pair)
        if not options:
            outputs, expected = loaded(**inputs, attention_mask=mask), model(**inputs, attention_mask=mask)
            assert torch.equal(outputs.logits, expected.logits)
            assert torch.equal(outputs.intent_logits, expected.intent_logits)
    free = AutoModelForTokenClassification.from_pretrained(tmp_path, crf_constraints="none")
    assert free.crf.forbidden is None
    assert not torch.equal(free(**inputs, attention_mask=mask).logits, expected.logits)


def test_adapters_train_the_field():
    """What an adapter keeps whole, `modules_to_save`, is the field and the classifiers; decoding goes through it."""
    peft = pytest.importorskip("peft", reason="needs the package peft")
    model, inputs = make_model(NAME, dtype=torch.float32, **JOINT), make_inputs(NAME, options=JOINT)
    before = model.decode(inputs["input_ids"]).paths
    names = ["classifier", "crf", "intent_classifier"]
    config = peft.LoraConfig(
        target_modules=[], target_parameters=lora_target_parameters(model), modules_to_save=names, r=2
    )
    adapted = peft.get_peft_model(model, config)
    assert torch.equal(adapted.eval().decode(inputs["input_ids"]).paths, before)
    optimizer = torch.optim.SGD([weight for weight in adapted.parameters() if weight.requires_grad], lr=1.0)
    adapted(**inputs).loss.backward()
    optimizer.step()
    field = adapted.base_model.model.crf
    moved = field.modules_to_save["default"].transitions - field.original_module.transitions
    assert moved.abs().max() > 1e-3


# Intents.


def test_intents_beside_labels():
    """The loss is the negative log-likelihood of labels and intents together, by the number of labels."""
    for options in (JOINT, {"bidirectional": True, "pooling": "concat"} | INTENTS):
        model, mask = make_model(NAME, **options), make_mask()
        inputs = make_inputs(NAME) | {"attention_mask": mask}
        inputs["labels"] = inputs["labels"].masked_fill(mask == 0, -100)
        intents = make_intents(6)
        intents[2] = -100
        number = (inputs["labels"] != -100).sum()
        outputs = model(**inputs, intents=intents)
        assert outputs.intent_logits.shape == (6, 3)
        of_intents = torch.nn.functional.cross_entropy(outputs.intent_logits, intents, reduction="sum")
        of_labels = model(**inputs).loss.double()
        assert_close(outputs.loss.double(), of_labels + of_intents / number, rtol=1e-6)
        halved = model(**inputs, intents=intents, num_items_in_batch=2 * number).loss.double()
        assert_close(halved, outputs.loss.double() / 2, rtol=1e-6)
        del inputs["labels"]
        assert_close(model(**inputs, intents=intents).loss, of_intents / 5)
        assert "loss" not in model(**inputs)


def test_intents_of_single_texts_only():
    inputs = make_inputs(NAME)
    with pytest.raises(ValueError, match="`intents` must be None where the configuration has no `id2intent`"):
        make_model(NAME)(**inputs, intents=make_intents(6))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    with pytest.raises(ValueError, match="`position_ids` must not begin again at 0"):
        make_model(NAME, **JOINT)(**inputs, position_ids=positions)
