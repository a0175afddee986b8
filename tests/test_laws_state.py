"""
Law 1: step by step = whole sequence = in chunks with the state carried, outputs and gradients.
Law 2: a row's result depends neither on its padding nor on its neighbours nor on the size of the batch.
"""

import pytest
import torch

from hf_rnn import RNNConfig, RNNSeq2SeqConfig, loop_only
from hf_rnn.configuration_rnn import POOLING_TYPES
from matrix import MODEL_CLASSES, PAD, VOCAB_SIZE, make_inputs, make_mask, make_model, make_tokens, options_of


RNN_CLASSES = [name for name, (config_class, _) in MODEL_CLASSES.items() if config_class is RNNConfig]
SEQ2SEQ_CLASSES = [name for name, (config_class, _) in MODEL_CLASSES.items() if config_class is RNNSeq2SeqConfig]
POOLED = ["RNNForSequenceClassification", "RNNForMultipleChoice"]
SEQ = 7
# Lengths of the pieces that a sequence is read in.
STEPS, CHUNKS = [1] * 20, [2, 1, 4, 3]


def assert_close(actual, expected, where, rtol=1e-10, atol=1e-11):
    assert actual.shape == expected.shape, where
    difference = (actual - expected).detach().abs()
    is_close = bool((difference <= atol + rtol * expected.abs()).all())
    assert is_close, f"{where}: off by {difference.max()}"


def projection(*shape: int) -> torch.Tensor:
    """Random numbers, the same for the same shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def gradients(objective: torch.Tensor, model) -> dict[str, torch.Tensor]:
    grads = torch.autograd.grad(objective, list(model.parameters()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(model.named_parameters(), grads)
    }


def features(outputs) -> torch.Tensor:
    """The logits, or the last hidden state where there is no head."""
    if "start_logits" in outputs:
        return torch.stack([outputs.start_logits, outputs.end_logits], dim=-1)
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


# Law 1.


def one_directional_options(name: str) -> list[dict]:
    return [options for options in options_of(name) if not options.get("bidirectional")]


def read_in_pieces(model, inputs: dict, pieces: list[int], whole_mask: bool):
    """
    The outputs of a model that reads its (target) tokens in pieces of the given lengths, the state carried, and the
    last cache. `whole_mask`: whether a call is given the mask of all that was read, or of its own piece.
    """
    prefix = "decoder_" if model.config.is_encoder_decoder else ""
    tokens, mask = inputs[f"{prefix}input_ids"], inputs.get(f"{prefix}attention_mask")
    fixed = {}
    if model.config.is_encoder_decoder:
        encoder = model.get_encoder()
        fixed["attention_mask"] = inputs.get("attention_mask")
        fixed["encoder_outputs"] = encoder(inputs["input_ids"], attention_mask=inputs.get("attention_mask"))
    results, cache, start = [], None, 0
    for piece in pieces:
        end = min(start + piece, tokens.shape[1])
        given = {f"{prefix}input_ids": tokens[:, start:end]}
        if mask is not None:
            given[f"{prefix}attention_mask"] = mask[:, (0 if whole_mask else start) : end]
        outputs = model(**fixed, **given, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        results.append(features(outputs))
        start = end
        if start == tokens.shape[1]:
            return torch.cat(results, dim=1), cache
    raise AssertionError("the pieces are too short")


def carried_inputs(name: str, padded: bool) -> dict:
    """Sequences in which some pieces of some rows hold nothing but padding, and whole rows do."""
    if name in RNN_CLASSES:
        inputs = {"input_ids": make_tokens(7, SEQ)}
    else:
        inputs = {"input_ids": make_tokens(7, 5), "decoder_input_ids": make_tokens(7, SEQ, seed=1)}
    if padded:
        mask = torch.cat([make_mask(SEQ), torch.ones(1, SEQ, dtype=torch.long)])
        mask[6, 2:] = 0  # only the first piece has tokens
        if name in SEQ2SEQ_CLASSES:
            inputs |= {"attention_mask": make_mask(5)[[0, 1, 2, 3, 5, 4, 1]], "decoder_attention_mask": mask}
        else:
            inputs["attention_mask"] = mask
    return inputs


def final_states(cache) -> list[torch.Tensor]:
    cache = getattr(cache, "self_attention_cache", cache)
    return [states for layer in cache.layers for states in (layer.keys, layer.values)]


@pytest.mark.parametrize("name", ["RNNModel", "RNNForCausalLM", *SEQ2SEQ_CLASSES])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_steps_and_chunks_are_the_whole(name, padded):
    """Outputs at every position, final states, and the gradient of every parameter through the carried state."""
    for options in one_directional_options(name):
        model = make_model(name, **options)
        inputs = carried_inputs(name, padded)
        whole = model(**inputs, use_cache=True)
        expected = features(whole)
        objective = projection(*expected.shape)
        expected_gradients = gradients((expected * objective).sum(), model)
        for pieces, whole_mask in [(STEPS, True), (CHUNKS, False)]:
            where = f"{options}, {'steps' if pieces is STEPS else 'chunks'}"
            actual, cache = read_in_pieces(model, inputs, pieces, whole_mask)
            assert_close(actual, expected, where)
            for states, reference in zip(final_states(cache), final_states(whole.past_key_values), strict=True):
                assert_close(states, reference, f"{where}, final states")
            actual_gradients = gradients((actual * objective).sum(), model)
            for parameter, gradient in expected_gradients.items():
                assert_close(actual_gradients[parameter], gradient, f"{where}, {parameter}")


@pytest.mark.parametrize("name", ["RNNModel", "RNNForCausalLM"])
def test_no_state_is_left_on_the_model(name):
    """A call without a cache starts anew, whatever was called before; a given cache is filled, not copied."""
    for options in one_directional_options(name):
        model = make_model(name, **options)
        tokens = make_tokens(2, SEQ)
        first = model(tokens, use_cache=True)
        again = model(tokens, use_cache=False)
        assert again.past_key_values is None
        assert torch.equal(features(first), features(again))
        cache = first.past_key_values
        assert cache.get_seq_length() == SEQ
        assert model(tokens, past_key_values=cache).past_key_values is cache
        assert cache.get_seq_length() == 2 * SEQ


@pytest.mark.parametrize("name", ["RNNModel", "RNNForCausalLM", *SEQ2SEQ_CLASSES])
def test_state_is_kept_while_training_only_on_request(name):
    """It would keep the graph of the batch alive."""
    model, inputs = make_model(name), make_inputs(name)
    assert model(**inputs).past_key_values is not None
    model.train()
    assert model(**inputs).past_key_values is None
    assert model(**inputs, use_cache=True).past_key_values is not None


# Law 2. A layout is where the tokens of every row lie: a mask with as many ones in each row as any other layout.

LENGTHS = [7, 4, 5, 1, 0, 3]
TARGET_LENGTHS = [3, 6, 0, 1, 4, 2]
LAYOUTS = ["right", "left", "middle", "ends", "holes", "long holes"]


def make_layout(kind: str, lengths: list[int]) -> torch.Tensor:
    """A mask `[batch, width]` with `lengths[row]` ones in each row."""
    width = max(lengths) + {"right": 0, "left": 0, "middle": 4, "ends": 3, "holes": 2, "long holes": 6}[kind]
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    generator = torch.Generator().manual_seed(width)
    for row, length in enumerate(lengths):
        if kind == "right":
            positions = torch.arange(length)
        elif kind == "left":
            positions = torch.arange(width - length, width)
        elif kind == "middle":  # padding in one piece inside of the row
            first = length - length // 2
            positions = torch.cat([torch.arange(first), torch.arange(width - length + first, width)])
        elif kind == "ends":
            positions = torch.arange(length) + 1 + (width - length - 2) // 2
        else:
            positions = torch.randperm(width, generator=generator)[:length]
        mask[row, positions] = 1
    assert mask.sum(1).tolist() == lengths
    return mask


def place(rows: list[torch.Tensor], mask: torch.Tensor, fill: int | None) -> torch.Tensor:
    """Lays the values of every row out over the ones of its mask; `fill` elsewhere, or random token ids."""
    placed = make_tokens(*mask.shape, seed=mask.shape[1]) if fill is None else torch.full_like(mask, fill)
    for row, values in enumerate(rows):
        placed[row, mask[row].bool()] = values
    return placed


def rows_of(lengths: list[int], seed: int, high: int = VOCAB_SIZE) -> list[torch.Tensor]:
    tokens = torch.randint(0, high, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    return [values[:length] for values, length in zip(tokens, lengths)]


def laid_out(name: str, kind: str, fill: int | None = None, with_labels: bool = False) -> tuple[dict, torch.Tensor]:
    """
    The inputs of a class in a layout, always the same rows, and the mask of the positions at which its results stand
    (None where they stand for a whole row).
    """
    mask = make_layout(kind, LENGTHS)
    inputs = {"input_ids": place(rows_of(LENGTHS, 0), mask, fill), "attention_mask": mask}
    result_mask, per_token = mask, True
    if name in SEQ2SEQ_CLASSES:
        result_mask = make_layout(kind, TARGET_LENGTHS)
        inputs["decoder_input_ids"] = place(rows_of(TARGET_LENGTHS, 1), result_mask, fill)
        inputs["decoder_attention_mask"] = result_mask
    elif name == "RNNForMultipleChoice":
        # Choices of a question are rows, too: the batch and its reverse, side by side.
        for key in inputs:
            inputs[key] = torch.stack([inputs[key], inputs[key].flip(0)], dim=1)
        per_token = False
    elif name == "RNNForSequenceClassification":
        per_token = False
    if with_labels:
        if name == "RNNForQuestionAnswering":
            # The second token, or none: the loss ignores what lies behind the end.
            position = (mask.cumsum(1) == 2).long().argmax(1).masked_fill(mask.sum(1) < 2, mask.shape[1])
            inputs |= {"start_positions": position, "end_positions": position}
        elif per_token:
            high = 4 if name == "RNNForTokenClassification" else VOCAB_SIZE
            labels = rows_of(TARGET_LENGTHS if name in SEQ2SEQ_CLASSES else LENGTHS, 2, high)
            inputs["labels"] = place(labels, result_mask, -100)
        else:
            inputs["labels"] = torch.tensor([1, 0, 1, 1, 0, 0])
    return inputs, result_mask.bool() if per_token else None


def results(model, inputs: dict, mask: torch.Tensor | None) -> torch.Tensor:
    """The results `[tokens of all rows, ...]` or `[rows, ...]` of a model, in the same order for every layout."""
    outputs = features(model(**inputs))
    return outputs if mask is None else outputs[mask]


def rows_alone(model, name: str) -> torch.Tensor:
    """The same, each row computed alone, without any padding where it has tokens."""
    inputs, mask = laid_out(name, "right")
    found = []
    for row in range(len(LENGTHS)):
        alone = {key: value[row : row + 1] for key, value in inputs.items()}
        for key in ("", "decoder_"):
            # A row without a token keeps one position; of several choices the longest counts.
            if f"{key}attention_mask" in alone:
                length = max(1, int(alone[f"{key}attention_mask"].sum(-1).max()))
                for part in ("input_ids", "attention_mask"):
                    alone[f"{key}{part}"] = alone[f"{key}{part}"][..., :length]
                if alone[f"{key}attention_mask"].all():
                    del alone[f"{key}attention_mask"]
        outputs = features(model(**alone))
        found.append(outputs if mask is None else outputs[:, : int(mask[row].sum())].flatten(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_rows_in_every_layout_are_the_rows_alone(name):
    """Each row alone, by the loop, against the batch in every layout, with random tokens under the padding."""
    for options in options_of(name):
        model = make_model(name, **options)
        with torch.no_grad(), loop_only():
            expected = rows_alone(model, name)
        for kind in LAYOUTS:
            with torch.no_grad():
                assert_close(results(model, *laid_out(name, kind)), expected, f"{options}, {kind}")


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_gradients_do_not_see_padding(name):
    """The gradient of every parameter is the same in every layout."""
    for options in options_of(name):
        model = make_model(name, **options)
        expected = None
        for kind in LAYOUTS:
            outputs = results(model, *laid_out(name, kind))
            actual = gradients((outputs * projection(*outputs.shape)).sum(), model)
            expected = expected or actual
            for parameter, gradient in expected.items():
                assert_close(actual[parameter], gradient, f"{options}, {kind}, {parameter}")


def loss_and_gradients(model, inputs: dict):
    loss = model(**inputs).loss
    return loss.detach().double(), gradients(loss, model)


def assert_same_loss(actual: tuple, expected: tuple, where: str, rtol: float = 1e-5, atol: float = 1e-6):
    """Loss and gradients. The stock losses are computed in float32, from which the tolerances come."""
    assert torch.isfinite(expected[0]), where
    assert_close(actual[0], expected[0], f"{where}, loss", rtol, atol)
    for parameter, gradient in expected[1].items():
        assert_close(actual[1][parameter], gradient, f"{where}, {parameter}", rtol, atol)


WITH_LOSS = [name for name in MODEL_CLASSES if name not in ("RNNModel", "RNNSeq2SeqModel")]


@pytest.mark.parametrize("name", WITH_LOSS)
def test_tokens_under_padding_change_nothing(name):
    """Other token ids at the padding, here even the padding's own: the same loss and the same gradients."""
    for options in options_of(name):
        model = make_model(name, **options)
        for kind in ("right", "holes"):
            one, other = (laid_out(name, kind, fill, with_labels=True)[0] for fill in (None, PAD))
            assert not torch.equal(one["input_ids"], other["input_ids"])
            actual, expected = (loss_and_gradients(model, inputs) for inputs in (one, other))
            assert_same_loss(actual, expected, f"{options}, {kind}", rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in WITH_LOSS if name != "RNNForCausalLM"])
def test_losses_do_not_see_padding(name):
    """The same loss with its gradients, wherever the tokens of a row lie."""
    for options in options_of(name):
        model = make_model(name, **options)
        expected = loss_and_gradients(model, laid_out(name, "right", with_labels=True)[0])
        for kind in ("left", "holes"):
            actual = loss_and_gradients(model, laid_out(name, kind, with_labels=True)[0])
            assert_same_loss(actual, expected, f"{options}, {kind}")


@pytest.mark.parametrize("kind", LAYOUTS[1:])
def test_language_model_loss_does_not_see_padding(kind):
    """
    Nothing comes before the first token of a text, so that it is not predicted, not even from padding at the left; and
    across a hole the next token is predicted from the last.
    """
    for options in options_of("RNNForCausalLM"):
        model = make_model("RNNForCausalLM", **options)
        one, other = (laid_out("RNNForCausalLM", layout)[0] for layout in (kind, "right"))
        for inputs in (one, other):
            inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        assert_same_loss(loss_and_gradients(model, one), loss_and_gradients(model, other), f"{options}, {kind}")


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_neighbours_do_not_matter(name):
    """A batch in which all other rows are exchanged leaves a row as it is; so does another order of the rows."""
    for options in options_of(name):
        model = make_model(name, **options)
        inputs, mask = laid_out(name, "holes")
        order = torch.tensor([3, 1, 5, 0, 4, 2])
        with torch.no_grad():
            outputs = features(model(**inputs))
            shuffled = features(model(**{key: value[order] for key, value in inputs.items()}))
            changed = {key: value.clone() for key, value in inputs.items()}
            for key, value in changed.items():
                value[1:] = 1 if "mask" in key else value[1:].flip(-1)
            first = features(model(**changed))[0]
        assert_close(shuffled, outputs[order], str(options))
        kept = mask[0] if mask is not None else slice(None)
        assert_close(first[kept], outputs[0][kept], str(options))


@pytest.mark.parametrize("name", POOLED)
@pytest.mark.parametrize("pooling", POOLING_TYPES)
def test_every_pooling_ignores_padding(name, pooling):
    """Results and gradients of all pooling types, rows without a token included."""
    for options in options_of(name):
        if options.get("residual"):
            continue
        attending = {"pooling_heads": 2, "pooling_attention_size": 4} if pooling == "attention" else {}
        model = make_model(name, pooling=pooling, **attending, **options)
        with torch.no_grad(), loop_only():
            alone = rows_alone(model, name)
        expected = None
        for kind in LAYOUTS:
            where = f"{options}, {kind}"
            outputs = results(model, *laid_out(name, kind))
            assert_close(outputs, alone, where)
            actual = gradients((outputs * projection(*outputs.shape)).sum(), model)
            expected = expected or actual
            for parameter, gradient in expected.items():
                assert_close(actual[parameter], gradient, f"{where}, {parameter}")


def test_outputs_at_padding_repeat_the_last_one():
    """At padding a model shows the output of the last token read in each direction, before the first one zeros."""
    for options in options_of("RNNModel"):
        if "word_encoder" in options:  # there padding shows the word before it
            continue
        model = make_model("RNNModel", **options)
        inputs, mask = laid_out("RNNModel", "holes")
        outputs = model(**inputs).last_hidden_state
        for row, tokens in enumerate(mask):
            half = model.config.hidden_size
            last = torch.zeros(half, dtype=torch.float64)
            for position in range(mask.shape[1]):
                last = outputs[row, position, :half] if tokens[position] else last
                assert_close(outputs[row, position, :half], last, f"{options}, {row}, {position}")
            last = torch.zeros_like(outputs[row, 0, half:])
            for position in reversed(range(mask.shape[1])):
                last = outputs[row, position, half:] if tokens[position] else last
                assert_close(outputs[row, position, half:], last, f"{options}, {row}, {position}")


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_masks_of_another_shape_are_refused(name):
    """A mask that is too short, or that has a row for every position: an error that says so."""
    model, (inputs, _) = make_model(name), laid_out(name, "right")
    mask = inputs["attention_mask"]
    for wrong in (mask[..., 1:], mask[:, None].expand(*mask.shape[:1], mask.shape[-1], *mask.shape[1:])):
        with pytest.raises(ValueError, match="`attention_mask` must have the shape"):
            model(**(inputs | {"attention_mask": wrong}))


def test_answers_never_lie_in_padding():
    for options in options_of("RNNForQuestionAnswering"):
        model = make_model("RNNForQuestionAnswering", **options)
        for kind in LAYOUTS:
            inputs, mask = laid_out("RNNForQuestionAnswering", kind)
            outputs = model(**inputs)
            for logits in (outputs.start_logits, outputs.end_logits):
                rows = mask.any(1)
                assert mask[rows].gather(1, logits[rows].argmax(1, keepdim=True)).all(), f"{options}, {kind}"
                probabilities = logits.softmax(1)[rows]
                assert (probabilities[~mask[rows]] == 0).all(), f"{options}, {kind}"


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_one_token_and_one_row(name):
    """The smallest batch there is, by every path, with a mask and without."""
    for options in options_of(name):
        model = make_model(name, **options)
        inputs, _ = laid_out(name, "right")
        inputs = {key: value[..., :1] for key, value in inputs.items()}
        one = {key: value[:1] for key, value in inputs.items() if "mask" not in key}
        with torch.no_grad():
            expected = features(model(**inputs))[:1]
            assert_close(features(model(**one)), expected, str(options))
            with loop_only():
                assert_close(features(model(**one)), expected, str(options))
