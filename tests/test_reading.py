"""Readers that look at the question: the equations, which tokens are which, and what rows without a question give."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import pipeline

import reference
from clients import make_client_model, make_tokenizer
from hf_rnn import RNNConfig, RNNForQuestionAnswering, loop_only
from hf_rnn.configuration_rnn import QUESTION_ATTENTIONS
from hf_rnn.export import export_model, load
from hf_rnn.question_attention import SPAN_HEADS, QuestionLayout, masked_softmax
from matrix import EOS, PAD, READERS, VOCAB_SIZE, case_id, make_config, make_mask, make_model, make_tokens
from reference import read, to_numpy


NAME = "RNNForQuestionAnswering"
ATTENTIONS = pytest.mark.parametrize("attention", QUESTION_ATTENTIONS)
LENGTH = 11
HALF = {torch.bfloat16: 0.15, torch.float16: 0.03}


def make_rows(seed: int = 0) -> dict:
    """
    Questions that end at various places, then two texts beside each other, and a row of each odd kind: a separator
    first, a separator last, none at all; with padding of every kind and a row of nothing else.
    """
    input_ids = make_tokens(12, LENGTH, seed=seed)
    input_ids[input_ids == EOS] = 7
    for row, place in enumerate([3, 3, 4, 5, 2, 3, 0, LENGTH - 1, None, 1, 6, 5]):
        if place is not None:
            input_ids[row, place] = EOS
    input_ids[:6, 8] = EOS  # behind the text, or between two of them
    mask = torch.cat([make_mask(LENGTH), torch.ones(6, LENGTH, dtype=torch.long)])
    mask[9, 7:] = 0
    mask[10, :2] = 0
    mask[11, 5] = 0  # its separator
    return {"input_ids": input_ids, "attention_mask": mask}


def logits_of(outputs) -> torch.Tensor:
    return torch.stack([outputs.start_logits, outputs.end_logits], dim=-1).detach()


def test_every_head_has_a_reference():
    assert reference.SPAN_HEADS.keys() == SPAN_HEADS.keys() == set(QUESTION_ATTENTIONS)


@pytest.mark.parametrize("options", READERS, ids=case_id)
def test_readers_are_the_equations(options):
    """On rows of every kind, on the fast path and by the loop; lowest wherever no answer may stand."""
    model = make_model(NAME, num_hidden_layers=2, **options)
    inputs = make_rows()
    expected = read(model.config, to_numpy(model), *(value.numpy() for value in inputs.values()))
    lowest = torch.finfo(torch.float64).min
    for enabled in (False, True):
        with loop_only(enabled):
            actual = logits_of(model(**inputs)).numpy()
        allowed = np.isfinite(expected)
        assert (actual[~allowed] == lowest).all()
        np.testing.assert_allclose(actual[allowed], expected[allowed], rtol=1e-9, atol=1e-10)
    assert not allowed[5].any()  # nothing but padding
    assert allowed[7, :, 0].tolist() == [True] + [False] * (LENGTH - 1)  # nothing but a question
    assert allowed[8].all()  # nothing but a text


@ATTENTIONS
@pytest.mark.parametrize("cell_type", ["gru", "lstm"])
def test_gradients_of_readers_are_those_of_the_equations(attention, cell_type):
    """Central differences of the NumPy model, each parameter moved by itself along a random direction."""
    model = make_model(NAME, question_attention=attention, cell_type=cell_type, bidirectional=True)
    inputs, rng = make_rows(), np.random.default_rng(0)
    arrays, weights = [value.numpy() for value in inputs.values()], to_numpy(model)
    allowed = np.isfinite(read(model.config, weights, *arrays))
    factors = np.where(allowed, rng.standard_normal(allowed.shape), 0)
    outputs = model(**inputs)
    logits = torch.stack([outputs.start_logits, outputs.end_logits], dim=-1)
    (logits.masked_fill(~torch.from_numpy(allowed), 0) * torch.from_numpy(factors)).sum().backward()
    for name, parameter in model.named_parameters():
        direction = rng.standard_normal(weights[name].shape)

        def moved(step, name=name, direction=direction):
            values = read(model.config, weights | {name: weights[name] + step * direction}, *arrays)
            return (np.where(allowed, values, 0) * factors).sum()

        slope = (moved(1e-6) - moved(-1e-6)) / 2e-6
        actual = (parameter.grad.numpy() * direction).sum()
        assert actual == pytest.approx(slope, rel=1e-5, abs=1e-6), name
        assert abs(slope) > 1e-6, name


# Which tokens are which.


def test_the_question_ends_with_the_first_separator():
    ids = torch.tensor([[7, 8, EOS, 9, 7, EOS], [9, 9, 9, EOS, EOS, 5], [7, 8, 9, 7, 8, 9]])
    layout = QuestionLayout.of_rows(ids, torch.ones_like(ids).bool(), [EOS])
    assert layout.columns == slice(0, 4)
    assert layout.question.long().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
    assert layout.passage.long().tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1]]
    assert layout.places.long().tolist() == [[1, 0, 0, 1, 1, 0], [1, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1]]
    assert layout.exact_matches(ids).long().tolist() == [[0, 0, 0, 0, 1, 0], [0] * 6, [0] * 6]


def test_types_go_before_separators():
    """The first row's types say another thing than its separator; the second's say nothing."""
    ids = torch.tensor([[7, EOS, 8, 9, 7, EOS], [7, 8, EOS, 9, 7, EOS]])
    types = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    layout = QuestionLayout.of_rows(ids, torch.ones_like(ids).bool(), [EOS], types)
    assert layout.question.long().tolist() == [[1, 1, 1], [1, 1, 1]]
    assert layout.passage.long().tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 0]]
    # Padding has the type of a question in what tokenizers return, and belongs to none.
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]).bool()
    layout = QuestionLayout.of_rows(ids, mask, [], types)
    assert layout.columns == slice(1, 3)
    assert layout.question.long().tolist() == [[1, 1], [0, 0]]
    assert layout.places.long().tolist() == [[0, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]]


@ATTENTIONS
def test_types_and_separators_say_the_same(attention):
    model = make_model(NAME, question_attention=attention, bidirectional=True)
    inputs = make_rows()
    expected = logits_of(model(**inputs))
    ends = (inputs["input_ids"] == EOS) & inputs["attention_mask"].bool()
    types = ((ends.cumsum(1) - ends.long()) > 0).long()
    assert torch.equal(logits_of(model(**inputs, token_type_ids=types)), expected)
    assert not torch.equal(logits_of(model(**inputs, token_type_ids=types.roll(2, dims=1))), expected)


@ATTENTIONS
def test_the_separator_of_the_configuration(attention):
    """`sep_token_id`, else one or several `eos_token_id`; where there is none, the types have to be given."""
    inputs = make_rows()
    expected = logits_of(make_model(NAME, question_attention=attention)(**inputs))
    for options in ({"sep_token_id": EOS, "eos_token_id": 9}, {"eos_token_id": [EOS]}, {"eos_token_id": [EOS, 99]}):
        assert torch.equal(logits_of(make_model(NAME, question_attention=attention, **options)(**inputs)), expected)
    model = make_model(NAME, question_attention=attention, eos_token_id=None)
    with pytest.raises(ValueError, match="`token_type_ids` must be given"):
        model(**inputs)
    model(**inputs, token_type_ids=torch.ones_like(inputs["input_ids"]))


@ATTENTIONS
def test_wrong_inputs_are_refused(attention):
    model, inputs = make_model(NAME, question_attention=attention), make_rows()
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="`inputs_embeds` must be None and `input_ids` given"):
        model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])
    with pytest.raises(ValueError, match="exactly one of `input_ids`"):
        model(attention_mask=inputs["attention_mask"])
    with pytest.raises(ValueError, match=r"`token_type_ids` must have the shape \(12, 11\), got \(12, 10\)"):
        model(**inputs, token_type_ids=inputs["input_ids"][:, 1:])
    with pytest.raises(ValueError, match="`attention_mask` must have the shape"):
        model(inputs["input_ids"], attention_mask=inputs["attention_mask"][:, 1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"question_attention": "bidaf"}, r"`question_attention` must be one of \['aligned', 'flow'\], got 'bidaf'"),
        ({"question_attention": True}, "question_attention"),
        ({"sep_token_id": -1}, "`sep_token_id` must be None or at least 0, got -1"),
    ],
)
def test_wrong_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RNNConfig(**options)


def test_a_plain_span_head_is_what_it_was():
    """No parameter more, no token forbidden, and types mean nothing."""
    model, inputs = make_model(NAME), make_rows()
    assert {key for key in model.state_dict() if not key.startswith("model.")} == {"qa_outputs.weight"}
    assert model.state_dict()["qa_outputs.weight"].shape == (2, 6)
    logits = logits_of(model(**inputs))
    assert ((logits > -1e9).all(-1) == inputs["attention_mask"].bool()).all()
    assert torch.equal(logits_of(model(**inputs, token_type_ids=torch.ones_like(inputs["input_ids"]))), logits)


@ATTENTIONS
def test_a_body_serves_with_and_without_questions(attention, tmp_path):
    """The layers of a reader are those of any other model, and go from one to the other."""
    plain, reader = make_model(NAME), make_model(NAME, question_attention=attention, seed=1)
    plain.save_pretrained(tmp_path)
    loaded = RNNForQuestionAnswering.from_pretrained(tmp_path, question_attention=attention, dtype=torch.float64)
    state = plain.model.state_dict()
    assert state.keys() == reader.model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.model.state_dict().items())


# Numbers.


@ATTENTIONS
@pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_readers_in_half_precision(attention, dtype, scale):
    """Near the equations where numbers are moderate; finite, with finite gradients, where they are large."""
    model = make_model(NAME, question_attention=attention, bidirectional=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
        model.model.embed_tokens.weight.mul_(scale)
    inputs = make_rows()
    half = model.to(dtype)
    expected = torch.from_numpy(read(half.config, to_numpy(half), *(value.numpy() for value in inputs.values())))
    outputs = half(**inputs)
    actual, allowed = logits_of(outputs), expected.isfinite()
    assert actual.dtype == dtype
    assert actual.isfinite().all()
    if scale == 1:
        torch.testing.assert_close(actual[allowed].double(), expected[allowed], rtol=HALF[dtype], atol=HALF[dtype])
    places = allowed[..., 0].long().argmax(1)
    loss = half(**inputs, start_positions=places, end_positions=places).loss
    loss.backward()
    for name, parameter in half.named_parameters():
        assert parameter.grad.isfinite().all(), name


@ATTENTIONS
def test_readers_under_autocast(attention):
    model = make_model(NAME, torch.float32, question_attention=attention, bidirectional=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    inputs = make_rows()
    expected = logits_of(model(**inputs))
    with torch.autocast("cpu", torch.bfloat16):
        actual = logits_of(model(**inputs))
    assert actual.isfinite().all()
    is_allowed = expected > -1e30
    assert torch.equal(actual > -1e30, is_allowed)
    torch.testing.assert_close(actual[is_allowed].float(), expected[is_allowed], rtol=0.05, atol=0.05)


def test_softmax_over_nothing_is_zero():
    scores = torch.tensor([[1.0, 2.0, -torch.inf], [5.0, 6.0, 7.0]])
    weights = masked_softmax(scores, torch.tensor([[True, True, False], [False, False, False]]))
    torch.testing.assert_close(weights, torch.cat([F.pad(scores[:1, :2].softmax(1), (0, 1)), torch.zeros(1, 3)]))


@ATTENTIONS
def test_rows_do_not_know_of_each_other(attention):
    """Each row alone, cut to its tokens, gives what it gives among others, its gradient included."""
    model = make_model(NAME, question_attention=attention, bidirectional=True, cell_type="gru")
    inputs = make_rows()
    together = logits_of(model(**inputs))
    for row, tokens in enumerate(inputs["attention_mask"].bool()):
        if tokens.any():
            alone = logits_of(model(inputs["input_ids"][row, tokens][None]))
            torch.testing.assert_close(together[row, tokens], alone[0], rtol=1e-10, atol=1e-12)
    embeddings = model.get_input_embeddings()
    model(**inputs).start_logits[3].clamp(min=-1e3).sum().backward()
    read_ids = inputs["input_ids"][3][inputs["attention_mask"][3].bool()].unique()
    touched = embeddings.weight.grad.abs().sum(1).nonzero().flatten()
    assert set(touched.tolist()) <= set(read_ids.tolist())


@ATTENTIONS
def test_rows_without_a_single_token(attention):
    model = make_model(NAME, question_attention=attention, bidirectional=True)
    outputs = model(make_tokens(3, 0), output_hidden_states=True)
    assert outputs.start_logits.shape == outputs.end_logits.shape == (3, 0)
    outputs = model(make_tokens(3, 4), attention_mask=torch.zeros(3, 4))
    assert (logits_of(outputs) == torch.finfo(torch.float64).min).all()


@ATTENTIONS
def test_tokens_under_padding_say_nothing(attention):
    """Not even where they are separators or stand in the question."""
    model = make_model(NAME, question_attention=attention, bidirectional=True)
    inputs = make_rows()
    expected = logits_of(model(**inputs))
    for fill in (EOS, PAD, 7, 8):
        filled = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, fill)
        torch.testing.assert_close(logits_of(model(**inputs | {"input_ids": filled})), expected, rtol=1e-10, atol=0)


@ATTENTIONS
def test_dropouts_of_readers(attention):
    """Every place acts while training, and none in evaluation."""
    inputs = make_rows()
    fields = ["embedding_dropout", "output_dropout", "classifier_dropout", "hidden_dropout"]
    for field in fields:
        options = {"question_attention": attention, "num_hidden_layers": 2}
        plain, model = make_model(NAME, **options), make_model(NAME, **options, **{field: 0.5})
        expected = logits_of(plain(**inputs))
        assert torch.equal(logits_of(model(**inputs)), expected), field
        assert not torch.equal(logits_of(model.train()(**inputs)), expected), field


@ATTENTIONS
def test_the_loss_is_the_mean_of_start_and_end(attention):
    model, inputs = make_model(NAME, question_attention=attention), make_rows()
    rows = {key: value[[0, 6, 8]] for key, value in inputs.items()}
    starts, ends = torch.tensor([4, 1, 0]), torch.tensor([6, 9, 0])
    outputs = model(**rows, start_positions=starts, end_positions=ends)
    expected = (F.cross_entropy(outputs.start_logits, starts) + F.cross_entropy(outputs.end_logits, ends)) / 2
    torch.testing.assert_close(outputs.loss, expected)


@ATTENTIONS
def test_the_first_hidden_states_are_what_the_first_layer_reads(attention):
    model, inputs = make_model(NAME, question_attention=attention), make_rows()
    states = model(**inputs, output_hidden_states=True).hidden_states
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    changed = (states[0] != embeddings).any(-1)
    assert len(states) == 3
    assert not changed[7].any()  # a question alone
    assert not changed[(inputs["input_ids"] == EOS)].any()
    assert changed[0, 4:8].all()


@ATTENTIONS
def test_compiled_readers(attention):
    """One graph without breaks for all sizes, which computes what the model does, with gradients."""
    model = make_model(NAME, question_attention=attention, bidirectional=True).train()
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=count)
    whole = make_rows()
    for rows, length in [(12, 11), (11, 9), (6, 8), (9, 10)]:
        inputs = {key: value[:rows, :length] for key, value in whole.items()}
        results = []
        for module in (compiled, model):
            outputs = module(**inputs)
            objective = outputs.start_logits.clamp(min=-1e3).sum() + outputs.end_logits.clamp(min=-1e3).square().sum()
            results.append([logits_of(outputs), *torch.autograd.grad(objective, list(model.parameters()))])
        for pair in zip(*results, strict=True):
            torch.testing.assert_close(*pair, rtol=1e-8, atol=1e-9)
    assert len(graphs) <= 3
    torch._dynamo.reset()


@ATTENTIONS
def test_exported_readers(attention):
    """Traced once, run with batches and lengths that were not seen."""
    model = make_model(NAME, question_attention=attention, bidirectional=True)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq")}
    inputs = make_rows()
    shapes = {"input_ids": axes, "attention_mask": axes}
    traced = {key: value[:3, :6].clone() for key, value in inputs.items()}
    program = torch.export.export(model, (), traced, dynamic_shapes=shapes, strict=False).module()
    for rows, length in [(12, 11), (1, 9), (5, 3)]:
        given = {key: value[:rows, :length] for key, value in inputs.items()}
        torch.testing.assert_close(logits_of(program(**given)), logits_of(model(**given)), rtol=1e-10, atol=1e-12)


@ATTENTIONS
def test_readers_in_onnx(attention, tmp_path):
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module, reason="needs the extra: pip install 'hf_rnn[onnx]'")
    model = make_model(NAME, torch.float32, question_attention=attention, bidirectional=True)
    export_model(model, tmp_path / "reader")
    runner = load(tmp_path / "reader", threads=1)
    inputs = make_rows()
    for rows, length in [(12, 11), (1, 9), (5, 3)]:
        given = {key: value[:rows, :length] for key, value in inputs.items()}
        expected = model(**given)
        results = runner(**{key: value.numpy() for key, value in given.items()})
        assert results.keys() == {"start_logits", "end_logits"}
        for name, result in results.items():
            torch.testing.assert_close(torch.from_numpy(result), expected[name], rtol=1e-4, atol=1e-5)


# What it is for.


def find_the_answer(batch: int, generator: torch.Generator) -> dict:
    """
    A question of one word and a text of words and digits: the answer is the two tokens behind the word that was asked
    for, or none where the text lacks it.
    """
    words, digits = torch.arange(5, 17), torch.arange(17, VOCAB_SIZE)
    rows, starts = [], []
    for _ in range(batch):
        order = words[torch.randperm(len(words), generator=generator)]
        values = digits[torch.randint(0, len(digits), (4, 2), generator=generator)]
        text = torch.cat([order[:4, None], values], dim=1).flatten()
        asked = int(torch.randint(0, 5, (1,), generator=generator))  # the fifth word is not there
        rows.append(torch.cat([order[asked : asked + 1], torch.tensor([EOS]), text, torch.tensor([EOS])]))
        starts.append(0 if asked == 4 else 2 + 3 * asked + 1)
    starts = torch.tensor(starts)
    ends = torch.where(starts > 0, starts + 1, 0)
    return {"input_ids": torch.stack(rows), "start_positions": starts, "end_positions": ends}


@ATTENTIONS
def test_a_reader_learns_to_look_things_up(attention):
    """Answers and their absence on texts that it has not seen, where a plain span head of the same size fails."""
    found = {}
    for kind in (attention, None):
        torch.manual_seed(0)
        config = make_config(NAME, hidden_size=24, embedding_size=24, num_hidden_layers=1, bidirectional=True)
        config.question_attention = kind
        model = RNNForQuestionAnswering(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        generator = torch.Generator().manual_seed(1)
        for _ in range(150):
            model(**find_the_answer(32, generator)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        test = find_the_answer(200, torch.Generator().manual_seed(2))
        with torch.no_grad():
            outputs = model.eval()(**test)
        is_right = (outputs.start_logits.argmax(1) == test["start_positions"]) & (
            outputs.end_logits.argmax(1) == test["end_positions"]
        )
        found[kind] = is_right.double().mean().item()
    assert found[attention] > 0.9
    assert found[None] < 0.8


@ATTENTIONS
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_the_pipeline_asks_first(attention, padding_side):
    """A reader gets the question in front even where the tokenizer pads at the left; a batch is rows alone."""
    tokenizer = make_tokenizer(padding_side=padding_side)
    model = make_client_model(NAME, tokenizer, question_attention=attention, bidirectional=True)
    reader = pipeline("extractive-question-answering", model=model, tokenizer=tokenizer)
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    questions = ["who sat on the mat ?", "where is London"]
    context = "the cat sat on the mat in the house . " * 12 + "London is where Anna lives"
    options = {"max_seq_len": 32, "doc_stride": 8, "handle_impossible_answer": True, "top_k": 3}
    alone = [reader(question=question, context=context, **options) for question in questions]
    first = seen[0]["input_ids"][0].tolist()
    assert tokenizer.decode(first[1:7]) == questions[0]
    assert first[0] == tokenizer.cls_token_id
    together = reader(question=questions, context=context, batch_size=4, **options)
    for one, other in zip(alone, together, strict=True):
        assert [answer["answer"] for answer in one] == [answer["answer"] for answer in other]
        assert all(answer["answer"] == context[answer["start"] : answer["end"]] for answer in one)
        scores = [[answer["score"] for answer in answers] for answers in (one, other)]
        np.testing.assert_allclose(*scores, rtol=1e-4)
