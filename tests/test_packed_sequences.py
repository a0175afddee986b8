"""Several texts in one row, told by `position_ids`: law 2 holds for them as for texts with a row each."""

import pytest
import torch
from datasets import Dataset
from torch.library import opcheck
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Trainer, TrainingArguments

from clients import SENTENCES, make_tokenizer, save_checkpoint
from hf_rnn import RECURRENT_CELLS, loop_only
from hf_rnn.packed_sequences import PackedPadding
from hf_rnn.recurrent_layer import RecurrentLayer
from hf_rnn.recurrent_operator import recurrent_layer
from matrix import ON_A_CPU, PAD, make_config, make_inputs, make_model, make_tokens


# Lengths of the texts in two rows, and the tokens (1) and padding (0) of these rows where there is a mask: at both
# ends, within a text, between two, and a text of one token.
LENGTHS = [[4, 1, 6], [2, 9]]
MASKS = {
    "no_mask": None,
    "mask": torch.tensor([[0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 0], [1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1]]),
}
CELLS = pytest.mark.parametrize("cell_type", RECURRENT_CELLS)
WITH_MASK = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
HEADS = [
    ("RNNModel", False),
    ("RNNModel", True),
    ("RNNForCausalLM", False),
    ("RNNForMaskedLM", True),
    ("RNNForTokenClassification", False),
    ("RNNForTokenClassification", True),
]


def make_positions(mask: torch.Tensor | None = None) -> torch.Tensor:
    """Positions of the tokens of `LENGTHS`; at padding zeros, which say nothing there."""
    positions = torch.tensor([[index for length in row for index in range(length)] for row in LENGTHS])
    if mask is None:
        return positions
    starts = torch.zeros_like(positions)
    for row, lengths in enumerate(LENGTHS):
        begin = 0
        for length in lengths:
            tokens = mask[row, begin : begin + length]
            starts[row, begin : begin + length] = (tokens.cumsum(0) - 1) * tokens
            begin += length
    return starts


def split(values: torch.Tensor, fill: float = 0) -> torch.Tensor:
    """Values `[2, seq, ...]` of packed rows as rows of single texts, padded at the right with `fill`."""
    pieces = [piece for row, lengths in zip(values, LENGTHS) for piece in row.split(lengths)]
    return torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_value=fill)


def join(values: torch.Tensor) -> torch.Tensor:
    """The way back."""
    pieces = iter(values)
    return torch.stack([torch.cat([next(pieces)[:length] for length in lengths]) for lengths in LENGTHS])


def as_rows(inputs: dict, mask: torch.Tensor | None) -> dict:
    """The same inputs with one text in a row."""
    rows = {key: split(value, -100 if key == "labels" else PAD) for key, value in inputs.items()}
    return rows | {"attention_mask": split(torch.ones(2, 11, dtype=torch.long) if mask is None else mask)}


def gradients_of(model, objective: torch.Tensor) -> list[torch.Tensor]:
    gradients = torch.autograd.grad(objective, list(model.parameters()), allow_unused=True)
    return [gradient for gradient in gradients if gradient is not None]


def check(name: str, bidirectional: bool, mask: torch.Tensor | None, call=None, **options) -> None:
    """Outputs, loss and all gradients of packed rows are those of one text in a row."""
    model = make_model(name, bidirectional=bidirectional, **options)
    call = model if call is None else call(model)
    inputs = make_inputs(name, 2, 11)
    packed = call(**inputs, attention_mask=mask, position_ids=make_positions(mask))
    rows = model(**as_rows(inputs, mask))
    key = "last_hidden_state" if name == "RNNModel" else "logits"
    torch.testing.assert_close(packed[key], join(rows[key]))
    weights = torch.linspace(-1, 1, packed[key].numel(), dtype=torch.float64).view_as(packed[key])
    objectives = [(packed[key] * weights).sum(), (join(rows[key]) * weights).sum()]
    if "labels" in inputs:
        torch.testing.assert_close(packed.loss, rows.loss)
        objectives = [objectives[0] + packed.loss, objectives[1] + rows.loss]
    for pair in zip(*(gradients_of(model, objective) for objective in objectives), strict=True):
        torch.testing.assert_close(*pair)


@CELLS
@WITH_MASK
@pytest.mark.parametrize(("name", "bidirectional"), HEADS, ids=lambda value: str(value))
def test_texts_in_one_row_are_independent(name, bidirectional, mask, cell_type):
    check(name, bidirectional, mask, cell_type=cell_type)
    with loop_only():
        check(name, bidirectional, mask, cell_type=cell_type, residual=True)


def test_a_text_changes_nothing_in_the_others():
    model = make_model("RNNModel", bidirectional=True)
    tokens, positions = make_tokens(2, 11), make_positions()
    before = model(tokens, position_ids=positions).last_hidden_state
    tokens[0, 5:] = (tokens[0, 5:] + 1) % 29
    after = model(tokens, position_ids=positions).last_hidden_state
    assert torch.equal(before[0, :5], after[0, :5])
    assert torch.equal(before[1], after[1])
    assert not torch.isclose(before[0, 5:], after[0, 5:]).any(-1).all()


def test_positions_for_all_rows():
    model = make_model("RNNForCausalLM")
    inputs = make_inputs("RNNForCausalLM", 2, 11)
    positions = make_positions()[:1]
    for key in ("logits", "loss"):
        actual = model(**inputs, position_ids=positions)[key]
        torch.testing.assert_close(actual, model(**inputs, position_ids=positions.repeat(2, 1))[key])


def test_first_tokens_are_not_predicted():
    """Whatever the labels say, and divided by the number that the trainer counted."""
    model = make_model("RNNForCausalLM")
    tokens, positions = make_tokens(2, 11), make_positions()
    expected = model(tokens, labels=tokens.masked_fill(positions == 0, -100), position_ids=positions).loss
    torch.testing.assert_close(model(tokens, labels=tokens, position_ids=positions).loss, expected)
    number = int((positions != 0).sum())
    given = model(tokens, labels=tokens, position_ids=positions, num_items_in_batch=torch.tensor(2 * number)).loss
    torch.testing.assert_close(given, expected / 2)
    rows = as_rows({"input_ids": tokens, "labels": tokens}, None)
    torch.testing.assert_close(model(**rows, num_items_in_batch=torch.tensor(2 * number)).loss, given)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_hidden_states(bidirectional):
    """They come in the layout of the inputs."""
    model = make_model("RNNModel", bidirectional=bidirectional)
    inputs = {"input_ids": make_tokens(2, 11)}
    packed = model(**inputs, position_ids=make_positions(), output_hidden_states=True).hidden_states
    rows = model(**as_rows(inputs, None), output_hidden_states=True).hidden_states
    assert len(packed) == model.config.num_hidden_layers + 1
    for pair in zip(packed, rows, strict=True):
        torch.testing.assert_close(pair[0], join(pair[1]))


def test_embeddings_gradient_checkpointing_and_dropout():
    model = make_model("RNNForCausalLM", hidden_dropout=0.5, embedding_dropout=0.5, recurrent_dropout=0.5).train()
    inputs = make_inputs("RNNForCausalLM", 2, 11) | {"position_ids": make_positions()}
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    results = []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        loss = model(inputs_embeds=embeddings, **inputs).loss
        results.append([loss, *torch.autograd.grad(loss, [embeddings, *model.model.layers.parameters()])])
    for pair in zip(*results, strict=True):
        torch.testing.assert_close(*pair)


def test_ordinary_positions_change_nothing():
    """Positions of one text in each row, with padding at either side filled with zeros, ones or less."""
    model = make_model("RNNForCausalLM")
    tokens = make_tokens(2, 7)
    for mask in (torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]]), torch.ones(2, 7, dtype=torch.long)):
        expected = model(tokens, attention_mask=mask, labels=tokens, use_cache=True)
        positions = mask.cumsum(1) - 1
        for fill in (-1, 0, 1, 5):
            filled = positions.masked_fill(mask == 0, fill)
            actual = model(tokens, attention_mask=mask, labels=tokens, position_ids=filled, use_cache=True)
            assert torch.equal(actual.logits, expected.logits)
            assert torch.equal(actual.loss, expected.loss)
            assert torch.equal(actual.past_key_values.layers[0].keys, expected.past_key_values.layers[0].keys)
    past = model(tokens, use_cache=True).past_key_values
    following = model(tokens[:, :3], past_key_values=past, position_ids=torch.arange(7, 10)[None])
    torch.testing.assert_close(following.logits, model(torch.cat([tokens, tokens[:, :3]], 1)).logits[:, 7:])


def test_generation():
    """Positions that a caller gives, as for any model, change nothing; `generate` makes none of its own."""
    model = make_model("RNNForCausalLM")
    tokens = make_tokens(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": mask}
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
    for use_cache in (True, False):
        expected = model.generate(tokens, use_cache=use_cache, **options)
        assert torch.equal(model.generate(tokens, use_cache=use_cache, position_ids=positions, **options), expected)
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True
    )
    model.generate(tokens, **options)
    assert seen == [None] * 5


def test_a_row_of_texts_has_no_state():
    model = make_model("RNNForCausalLM")
    tokens, positions = make_tokens(2, 11), make_positions()
    assert model(tokens, position_ids=positions).past_key_values is None
    past = model(tokens).past_key_values
    for options in ({"past_key_values": past}, {"use_cache": True}):
        with pytest.raises(ValueError, match=r"`past_key_values` must be None and `use_cache` must not be True"):
            model(tokens, position_ids=positions, **options)
    with pytest.raises(ValueError, match="no state to go on from"):
        model.generate(tokens, position_ids=positions, max_new_tokens=2)


@pytest.mark.parametrize("name", ["RNNForSequenceClassification", "RNNForQuestionAnswering", "RNNForMultipleChoice"])
def test_heads_with_one_result_for_a_row(name):
    model = make_model(name)
    inputs = make_inputs(name, 2, 11)
    shape = inputs["input_ids"].shape
    ordinary = torch.arange(11).expand(shape)
    for positions in (ordinary, torch.arange(11)[None]):
        assert torch.equal(model(**inputs, position_ids=positions).loss, model(**inputs).loss)
    with pytest.raises(ValueError, match=r"`position_ids` must have the shape .* got \(11,\)"):
        model(**inputs, position_ids=torch.arange(11))
    packed = ordinary.clone()
    packed[-1, ..., 4:] -= 4
    with pytest.raises(ValueError, match=r"`position_ids` must not begin again at 0 within a row"):
        model(**inputs, position_ids=packed)
    # What stands at padding says nothing.
    mask = torch.ones(shape, dtype=torch.long)
    mask[-1, ..., 4] = 0
    model(**inputs, position_ids=ordinary.where(mask.bool(), 0), attention_mask=mask)


def test_wrong_positions():
    model = make_model("RNNForCausalLM")
    tokens = make_tokens(2, 5)
    for shape in [(5,), (3, 5), (2, 4), (3, 2, 5)]:
        with pytest.raises(ValueError, match=r"`position_ids` must have the shape \(2, 5\) or \(1, 5\)"):
            model(tokens, position_ids=torch.zeros(shape, dtype=torch.long))
    with pytest.raises(ValueError, match="got 4 followed by 2 in row 1"):
        model(tokens, position_ids=torch.tensor([[0, 1, 2, 3, 4], [2, 3, 4, 2, 3]]))
    for name in ("cu_seq_lens_q", "seq_idx"):
        with pytest.raises(ValueError, match=f"`position_ids` must be given with `{name}`"):
            model(tokens, **{name: torch.tensor([[0, 0, 1, 1, 1]])})


@pytest.mark.parametrize(("name", "bidirectional"), HEADS[2:4], ids=lambda value: str(value))
@WITH_MASK
def test_compiled(name, bidirectional, mask):
    """One whole graph splits rows as the values say."""
    torch._dynamo.reset()
    check(name, bidirectional, mask, lambda model: torch.compile(model, fullgraph=True, backend="aot_eager"))


def test_one_graph_for_all_splits():
    torch._dynamo.reset()
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    model = make_model("RNNForCausalLM").train()
    compiled = torch.compile(model, fullgraph=True, backend=count)
    for batch, seq in [(6, 7), (5, 8), (4, 12), (7, 31)]:
        inputs = make_inputs("RNNForCausalLM", batch, seq)
        for period in (2, 3, seq):
            positions = (torch.arange(seq) % period).repeat(batch, 1)
            actual = compiled(**inputs, position_ids=positions).loss
            torch.testing.assert_close(actual, model(**inputs, position_ids=positions).loss)
    assert len(graphs) <= 3


def test_exported():
    model = make_model("RNNForCausalLM")
    example = {"input_ids": make_tokens(3, 6), "position_ids": torch.arange(6).repeat(3, 1), "use_cache": False}
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq")}
    shapes = {"input_ids": sizes, "position_ids": sizes, "use_cache": None}
    program = torch.export.export(model, (), example, dynamic_shapes=shapes).module()
    inputs = {"input_ids": make_tokens(2, 11), "position_ids": make_positions(), "use_cache": False}
    torch.testing.assert_close(program(**inputs).logits, model(**inputs).logits)


@CELLS
@pytest.mark.parametrize("bidirectional", [False, True])
@WITH_MASK
def test_the_operator(cell_type, bidirectional, mask):
    """It is what its schema says, and gives each row's last state where a graph asks for it."""
    layer = RecurrentLayer(make_config("RNNModel", cell_type=cell_type), 5, 0, bidirectional).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    starts = (make_positions() == 0) & (torch.arange(11) > 0)
    inputs = torch.randn(2, 11, 5, dtype=torch.float64, requires_grad=True)
    states = [torch.randn(2, size, dtype=torch.float64, requires_grad=True) for size in layer.state_sizes]
    weights = [weight for cell in layer.cells for weight in cell.parameters()]
    mask = None if mask is None else mask.bool()
    opcheck(recurrent_layer, (inputs, states, weights, [], mask, cell_type, starts, None))
    outputs, *final = recurrent_layer(inputs, states, weights, [], mask, cell_type, starts, None)
    with loop_only():
        expected, last, _ = layer(inputs, tuple(states), PackedPadding(starts, mask))
    for pair in zip([outputs, *final], [expected, *last], strict=True):
        torch.testing.assert_close(*pair)
    if not bidirectional:
        torch.testing.assert_close(final[0], outputs[:, -1])


def train(folder, collator, rows: bool, **options):
    """Losses and weights of a few steps on `SENTENCES`, through the stock trainer."""
    tokenizer = make_tokenizer(special_tokens=False)
    model = AutoModelForCausalLM.from_pretrained(save_checkpoint(folder / "start", "RNNForCausalLM", tokenizer))
    data = [{"input_ids": tokenizer(text)["input_ids"]} for text in SENTENCES]
    if not rows:
        data = [{**text, "labels": text["input_ids"]} for text in data]
    arguments = TrainingArguments(
        output_dir=str(folder / "run"), per_device_train_batch_size=3, per_device_eval_batch_size=2, max_steps=4,
        learning_rate=1e-2, use_cpu=True, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
        **options,
    )  # fmt: skip
    data = Dataset.from_list(data)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data, data_collator=collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [*losses, trainer.evaluate()["eval_loss"]], model


def pad(features: list[dict]) -> dict:
    pieces = [torch.tensor(feature["input_ids"]) for feature in features]
    tokens = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(piece) for piece in pieces], batch_first=True)
    labels = tokens.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


@ON_A_CPU
@pytest.mark.parametrize("accumulated", [1, 2])
def test_flattening_collator(tmp_path, accumulated):
    """Training and evaluation without padding are those with padding."""
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    results = [
        train(tmp_path / str(rows), pad if rows else collator, rows, gradient_accumulation_steps=accumulated)
        for rows in (True, False)
    ]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for pair in zip(*(model.parameters() for _, model in results), strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("option", ["packing", "padding_free"])
def test_sft(tmp_path, option):
    """What TRL trains on packed texts is what it trains on padded ones."""
    trl = pytest.importorskip("trl", reason="needs the extra `clients`")
    tokenizer = make_tokenizer(special_tokens=False)
    losses, seen = [], []
    for packing in ({option: True, "max_length": 32 if option == "packing" else None}, {}):
        folder = tmp_path / str(len(losses))
        model = AutoModelForCausalLM.from_pretrained(save_checkpoint(folder / "start", "RNNForCausalLM", tokenizer))
        # All texts go into one batch, in which their order does not matter.
        arguments = trl.SFTConfig(
            output_dir=str(folder / "run"), use_cpu=True, bf16=False, report_to="none", save_strategy="no",
            logging_steps=1, disable_tqdm=True, gradient_checkpointing=False, max_steps=4, learning_rate=1e-2,
            per_device_train_batch_size=len(SENTENCES), **packing,
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict({"text": SENTENCES}),
            processing_class=tokenizer,
        )
        batch = next(iter(trainer.get_train_dataloader()))
        seen.append(batch["input_ids"].shape[0])
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert seen == [1, len(SENTENCES)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
