"""State that is carried between the batches of a training: right, or refused."""

import shutil

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainingArguments

from hf_rnn import RECURRENT_CELLS, detach_state
from hf_rnn.training import CarriedStateTrainer, StreamBlocks
from matrix import VOCAB_SIZE, make_model, make_tokens
from test_laws_distributed import StopAfter, assert_same_weights, make_arguments, run_torchrun


NAME = "RNNForCausalLM"
TEXT = make_tokens(8 * 24 + 3).tolist()
SGD = {
    "num_train_epochs": 1,
    "optim": "sgd",
    "learning_rate": 0.5,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
}


def make_trainer(
    folder, num_streams=4, block_size=6, batch_size=4, trainer=None, model_options=None, model=None, **options
):
    """A trainer of a tiny model on a text of 192 random tokens."""
    return CarriedStateTrainer(
        make_model(NAME, **(model_options or {})) if model is None else model,
        make_arguments(folder, batch_size, **(SGD | {"num_train_epochs": 1, "remove_unused_columns": True} | options)),
        train_dataset=StreamBlocks(TEXT, block_size, num_streams),
        eval_dataset=StreamBlocks(TEXT[:97], block_size, num_streams),
        **(trainer or {}),
    )


def train(folder, **options):
    """The weights after a training."""
    trainer = make_trainer(folder, **options)
    trainer.train()
    return trainer.model.state_dict()


def train_by_hand(num_streams=4, block_size=6, steps_per_update=1, epochs=1, **model_options):
    """Truncated backpropagation through time in a plain loop over plain tensors."""
    model = make_model(NAME, **model_options).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    length = (len(TEXT) - 1) // num_streams
    read = torch.tensor(TEXT[: num_streams * length]).view(num_streams, length)
    following = torch.tensor(TEXT[1 : num_streams * length + 1]).view(num_streams, length)
    for _ in range(epochs):
        cache, starts = None, range(0, length, block_size)
        for step, start in enumerate(starts):
            block = slice(start, start + block_size)
            outputs = model(read[:, block], past_key_values=cache, use_cache=True)
            cache = detach_state(outputs.past_key_values)
            loss = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), following[:, block].flatten())
            (loss / steps_per_update).backward()
            if (step + 1) % steps_per_update == 0:
                optimizer.step()
                optimizer.zero_grad()
    return model.state_dict()


# The streams.


@pytest.mark.parametrize(("block_size", "num_streams"), [(6, 4), (5, 3), (100, 2), (1, 7), (7, 1)])
def test_streams(block_size, num_streams):
    """Put together again, the blocks of the streams are the text, and what is predicted is the text one token on."""
    blocks = StreamBlocks(TEXT, block_size, num_streams)
    read, predicted = ([[] for _ in range(num_streams)] for _ in range(2))
    for index in range(len(blocks)):
        item = blocks[index]
        assert (item["stream"], item["block"]) == (index % num_streams, index // num_streams)
        assert 1 <= len(item["input_ids"]) <= block_size
        read[item["stream"]] += item["input_ids"].tolist()
        predicted[item["stream"]] += item["shift_labels"].tolist()
    whole = [token for stream in read for token in stream]
    assert whole == TEXT[: len(whole)]
    assert len(TEXT) - 1 - len(whole) < num_streams
    assert [token for stream in predicted for token in stream] == TEXT[1 : len(whole) + 1]
    with pytest.raises(IndexError):
        blocks[len(blocks)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((TEXT, 0, 4), "`block_size`"), ((TEXT, 6, 0), "`num_streams`"), ((TEXT[:7], 2, 4), "`input_ids`")],
)
def test_streams_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        StreamBlocks(*arguments)


# Training.


@pytest.mark.parametrize("cell_type", RECURRENT_CELLS)
def test_training(cell_type, tmp_path):
    """Two epochs are those of a loop by hand, which starts each of them from nothing."""
    expected = train_by_hand(epochs=2, cell_type=cell_type)
    actual = train(tmp_path, num_train_epochs=2, model_options={"cell_type": cell_type})
    assert_same_weights(actual, expected, 1e-6)
    without = train(tmp_path, num_train_epochs=2, block_size=200, model_options={"cell_type": cell_type})
    assert any((without[key] - expected[key]).abs().max() > 1e-3 for key in expected)


def test_state_and_gradients(tmp_path):
    """Losses are those of the whole streams read in one go, gradients end where a block begins."""
    trainer = make_trainer(tmp_path, block_size=12)
    model, blocks = trainer.model.train(), list(trainer.get_train_dataloader())
    whole = model(torch.cat([batch["input_ids"] for batch in blocks], dim=1)).logits
    following = torch.cat([batch["shift_labels"] for batch in blocks], dim=1)
    for index, batch in enumerate(blocks):
        loss = trainer.compute_loss(model, batch)
        piece = slice(12 * index, 12 * index + 12)
        expected = torch.nn.functional.cross_entropy(whole[:, piece].flatten(0, 1), following[:, piece].flatten())
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        loss.backward()  # a second time through an earlier block would fail
    _, state = trainer._carried[True][0, 1, 2, 3]
    assert not any(layer.keys.requires_grad or layer.values.requires_grad for layer in state.layers)


def test_accumulated_steps(tmp_path):
    """With as many streams as rows the blocks that are added up follow one another."""
    expected = train_by_hand(steps_per_update=4)
    assert_same_weights(train(tmp_path, gradient_accumulation_steps=4), expected, 1e-6)


def test_accumulated_rows(tmp_path):
    """Law 7: with more streams than rows the pieces of a batch of 4 are two batches of 2, each with its own state."""
    whole = train(tmp_path)
    pieces = train(tmp_path, batch_size=2, gradient_accumulation_steps=2)
    assert_same_weights(pieces, whole, 1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant, tmp_path):
    """A block that is computed anew starts from its state again."""
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    assert_same_weights(train(tmp_path, **options), train(tmp_path), 1e-12)


def test_bf16(tmp_path):
    """States in mixed precision go from batch to batch."""
    weights = train(tmp_path, bf16=True)
    for key, weight in train(tmp_path).items():
        torch.testing.assert_close(weights[key], weight, rtol=0.1, atol=0.05)


@pytest.mark.slow
def test_torch_compile(tmp_path):
    """States go in and out of a compiled model."""
    actual = train(tmp_path, torch_compile=True, max_steps=4)
    assert_same_weights(actual, train(tmp_path, max_steps=4), 1e-6)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"dataloader_num_workers": 2}, 0),
        ({"neftune_noise_alpha": 1e-5}, 1e-4),  # hardly any noise
        ({"train_sampling_strategy": "sequential"}, 0),
        (
            {"load_best_model_at_end": True, "metric_for_best_model": "eval_epoch", "greater_is_better": True}
            | {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
            | {"save_strategy": "steps", "save_steps": 1},
            0,
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_options(options, tolerance, tmp_path):
    """They change nothing in what is carried, and noise on the embeddings no more than its size."""
    expected = train(tmp_path / "expected")
    callback = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = make_trainer(tmp_path, trainer={"callbacks": [callback]} if "eval_steps" in options else None, **options)
    evaluate = trainer.evaluate
    # The last checkpoint is the best.
    trainer.evaluate = lambda *args, **kwargs: evaluate(*args, **kwargs) | {"eval_epoch": trainer.state.epoch}
    trainer.train()
    assert_same_weights(trainer.model.state_dict(), expected, tolerance)
    if "neftune_noise_alpha" in options:
        assert any(not torch.equal(weight, expected[key]) for key, weight in trainer.model.state_dict().items())


def test_evaluation_in_between(tmp_path):
    """Evaluations start from nothing, see the whole of each stream, and leave the states of the training alone."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}
    trainer = make_trainer(tmp_path, **options)
    trainer.train()
    assert_same_weights(trainer.model.state_dict(), train(tmp_path), 1e-12)
    first, second = trainer.evaluate()["eval_loss"], trainer.evaluate()["eval_loss"]
    assert first == second
    read, following = (torch.tensor(tokens).view(4, 24) for tokens in (TEXT[:96], TEXT[1:97]))
    logits = trainer.model(read).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten()).item()
    assert first == pytest.approx(expected, rel=1e-6)
    assert "past_key_values" not in trainer.predict(trainer.eval_dataset).predictions


@pytest.mark.parametrize("stop_after", [3, 8, 10])
def test_resuming(stop_after, tmp_path):
    """Law 8: from the middle of an epoch, and from its end, with states in the checkpoint."""
    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1}
    whole = train(tmp_path / "whole", **options)
    train(tmp_path / "parts", trainer={"callbacks": [StopAfter(stop_after)]}, **options)
    checkpoint = tmp_path / "parts" / f"checkpoint-{stop_after}"
    trainer = make_trainer(tmp_path / "parts", **options)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert_same_weights(trainer.model.state_dict(), whole, 0)
    # Without the states it is refused, but at the end of an epoch, where there are none to carry.
    (checkpoint / "carried_state_0.safetensors").unlink()
    trainer = make_trainer(tmp_path / "parts", **options)
    if stop_after == 8:
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert_same_weights(trainer.model.state_dict(), whole, 0)
    else:
        with pytest.raises(ValueError, match="only from a checkpoint with the states"):
            trainer.train(resume_from_checkpoint=str(checkpoint))
    shutil.rmtree(tmp_path / "parts")


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_sampling_strategy": "group_by_length"}, "`train_sampling_strategy`"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor`"),
    ],
)
def test_refused_options(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)


def test_refused_devices(tmp_path, monkeypatch):
    """`DataParallel` forgets what its replicas know."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="torchrun"):
        make_trainer(tmp_path)


@pytest.mark.parametrize("name", ["RNNForMaskedLM", "RNNSeq2SeqForConditionalGeneration", "RNNModel"])
def test_refused_models(name, tmp_path):
    with pytest.raises(ValueError, match="recurrent language model"):
        CarriedStateTrainer(make_model(name), make_arguments(tmp_path, 4))


@pytest.mark.parametrize(("num_streams", "batch_size"), [(6, 4), (4, 8), (3, 4)])
def test_refused_numbers_of_rows(num_streams, batch_size, tmp_path):
    """Rows of a batch that are not all at the same place."""
    with pytest.raises(ValueError, match="multiple of the rows of a batch"):
        train(tmp_path, num_streams=num_streams, batch_size=batch_size)


def test_refused_sizes_of_batches_that_are_found(tmp_path):
    """`auto_find_batch_size` tries other numbers of rows: right where they divide the streams, refused elsewhere."""

    def train_with_room_for(rows, num_streams):
        options = {"num_streams": num_streams, "batch_size": 4, "auto_find_batch_size": True}
        trainer = make_trainer(tmp_path, **options)
        forward = trainer.model.forward

        def forward_in_little_memory(input_ids, **inputs):
            if len(input_ids) > rows:
                raise RuntimeError("CUDA out of memory. An imagined one.")
            return forward(input_ids=input_ids, **inputs)

        trainer.model.forward = forward_in_little_memory
        trainer.train()
        return trainer.model.state_dict()

    with pytest.raises(ValueError, match=r"multiple of the rows of a batch on all processes together \(3\), got 4"):
        train_with_room_for(3, num_streams=4)
    assert_same_weights(train_with_room_for(3, num_streams=12), train(tmp_path, num_streams=12, batch_size=3), 1e-12)


def test_refused_order(tmp_path):
    """Blocks that do not follow on what was read before."""
    trainer = make_trainer(tmp_path)
    blocks = list(trainer.get_train_dataloader())
    model = trainer.model.train()
    for second in (2, 1):
        trainer.compute_loss(model, blocks[0])
        if second == 2:
            with pytest.raises(ValueError, match="Block 2 of streams 0 to 3 came where block 1 should have"):
                trainer.compute_loss(model, blocks[second])
        else:
            trainer.compute_loss(model, blocks[second])
    with pytest.raises(ValueError, match="`StreamBlocks`"):
        trainer.compute_loss(model, {"input_ids": make_tokens(4, 6), "labels": make_tokens(4, 6)})


# By hand.


def test_a_state_with_its_graph():
    """Without `detach_state` the graph of two blocks is one, for one `backward`; with it there are two."""
    model, tokens = make_model(NAME).train(), make_tokens(2, 12)
    outputs = model(tokens[:, :6], labels=tokens[:, :6], use_cache=True)
    second = model(tokens[:, 6:], labels=tokens[:, 6:], past_key_values=outputs.past_key_values)
    outputs.loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        second.loss.backward()
    outputs = model(tokens[:, :6], labels=tokens[:, :6], use_cache=True)
    assert detach_state(outputs.past_key_values) is outputs.past_key_values
    second = model(tokens[:, 6:], labels=tokens[:, 6:], past_key_values=outputs.past_key_values)
    outputs.loss.backward()
    second.loss.backward()


def test_a_stream_after_training(tmp_path):
    """The Trainer turns `use_cache` off; a state that is given is gone on from all the same."""
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    model, tokens = trainer.model.eval(), make_tokens(1, 9)
    assert not model.config.use_cache
    assert model(tokens).past_key_values is None
    outputs = model(tokens[:, :4], use_cache=True)
    for position in range(4, 9):
        outputs = model(tokens[:, position : position + 1], past_key_values=outputs.past_key_values)
    torch.testing.assert_close(outputs.logits[:, -1], model(tokens).logits[:, -1])
    assert outputs.logits.shape[-1] == VOCAB_SIZE


# Two processes.


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Each process carries its own rows: the weights of one process with all of them; resumed in the middle as well."""
    run_torchrun("carried_state_worker.py", tmp_path)
    expected = train(tmp_path / "one", num_train_epochs=2)
    assert_same_weights(torch.load(tmp_path / "whole.pt"), expected, 1e-6)
    assert_same_weights(torch.load(tmp_path / "resumed.pt"), torch.load(tmp_path / "whole.pt"), 0)
    assert_same_weights(torch.load(tmp_path / "sharded.pt"), expected, 1e-6)
    assert "multiple of the rows of a batch" in (tmp_path / "refused.txt").read_text()
