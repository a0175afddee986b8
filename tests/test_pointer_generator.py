"""Copying words of the source: the mixture against NumPy, and the laws at its wider logits."""

import numpy as np
import pytest
import torch
from transformers import DataCollatorForSeq2Seq, set_seed

from hf_rnn.export.graphs import make_graphs
from hf_rnn.generation import decode_with_copies, encode_with_copies
from hf_rnn.modeling_rnn_seq2seq import RNNSeq2SeqForConditionalGeneration
from hf_rnn.recurrent_cache import cache_of
from matrix import BOS, DECODERS, EOS, ON_A_CPU, PAD, VOCAB_SIZE, make_mask, make_model
from reference import part, project_to_vocabulary, seq2seq, sigmoid, softmax, to_numpy
from word_tokenizer import UNKNOWN, make_tokenizer


NAME = "RNNSeq2SeqForConditionalGeneration"
COPIES = 6
NUM_IDS = VOCAB_SIZE + COPIES
OPTIONS = [decoder | {"num_attention_heads": 2} for decoder in DECODERS]
OPTIONS += [{"attention_score": "location", "use_coverage": True}, {"tie_word_embeddings": False, "residual": True}]


def make_pointer(dtype=torch.float64, **options):
    return make_model(NAME, dtype, pointer_generator=True, num_copy_ids=COPIES, unk_token_id=UNKNOWN, **options)


def make_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Tokens of which about every third is beyond the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    known = torch.randint(5, VOCAB_SIZE, shape, generator=generator)
    extended = torch.randint(VOCAB_SIZE, NUM_IDS, shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.35, extended, known)


def make_batch() -> dict:
    return {
        "input_ids": make_ids(6, 7),
        "attention_mask": make_mask(),
        "decoder_input_ids": make_ids(6, 5, seed=1),
        # A source without a token has a target, and a target without one a source.
        "decoder_attention_mask": make_mask(5)[[0, 1, 2, 3, 5, 4]],
    }


def expected_probabilities(model, batch: dict, states: np.ndarray) -> np.ndarray:
    """P(w) word by word, zero at padding; `states` are the outputs of the decoder's top layer."""
    weights = to_numpy(model)
    arrays = {key: value.numpy() for key, value in batch.items()}
    known = {key: np.where(value < VOCAB_SIZE, value, UNKNOWN) for key, value in arrays.items() if "ids" in key}
    encoded, vectors, alphas = seq2seq(
        model.config,
        part(weights, "model"),
        known["input_ids"],
        arrays["attention_mask"],
        known["decoder_input_ids"],
        arrays["decoder_attention_mask"],
    )
    vocabulary = softmax(project_to_vocabulary(weights, vectors))
    embeddings = weights["model.shared.weight"]
    heads = model.config.num_attention_heads
    result = np.zeros((*vocabulary.shape[:2], NUM_IDS))
    for row, position in np.argwhere(arrays["decoder_attention_mask"]):
        alpha = alphas[row, :, position]
        values = encoded[row].reshape(len(encoded[row]), heads, -1)
        context = np.concatenate([alpha[head] @ values[:, head] for head in range(heads)])
        features = [context, states[row, position], embeddings[known["decoder_input_ids"][row, position]]]
        gate = weights["copy_gate.weight"][0] @ np.concatenate(features) + weights["copy_gate.bias"][0]
        generate = sigmoid(gate) if arrays["attention_mask"][row].any() else 1.0
        result[row, position, :VOCAB_SIZE] = generate * vocabulary[row, position]
        for source, token_id in enumerate(arrays["input_ids"][row]):
            result[row, position, token_id] += (1 - generate) * alpha.mean(0)[source]
    return result


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_mixture_is_the_equations(options):
    """Log-probabilities of all ids, those of words that only a source has included, with padding on both sides."""
    model, batch = make_pointer(**options), make_batch()
    tokens = batch["decoder_attention_mask"].bool()
    outputs = model(**batch, output_hidden_states=True)
    expected = expected_probabilities(model, batch, outputs.decoder_hidden_states[-1].detach().numpy())
    assert outputs.logits.shape == (6, 5, NUM_IDS)
    assert torch.isfinite(outputs.logits).all()
    actual = outputs.logits.exp()[tokens].detach().numpy()
    np.testing.assert_allclose(actual, expected[tokens.numpy()], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(actual.sum(-1), 1, rtol=1e-9)
    assert (actual[:, VOCAB_SIZE:] > 0.01).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_finite_in_float32(dtype):
    """In half precision too, and where the gate or the attention leaves nothing."""
    model, batch = make_pointer(dtype), make_batch()
    for bias in (-1e4, 0.0, 1e4):
        with torch.no_grad():
            model.copy_gate.bias.fill_(bias)
        loss_and_logits = model(**batch, labels=make_ids(6, 5, seed=2))
        assert loss_and_logits.logits.dtype == torch.float32
        assert torch.isfinite(loss_and_logits.logits).all()
        model.zero_grad()
        loss_and_logits.loss.backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_pieces_and_rows_alone_are_the_whole(options):
    """Laws 1 and 2 at the tokens: steps with a cache, rows alone, what stands at padding."""
    model, batch = make_pointer(**options), make_batch()
    tokens = batch["decoder_attention_mask"].bool()
    expected = model(**batch).logits
    cache, steps = None, []
    for position in range(5):
        outputs = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=batch["decoder_input_ids"][:, position : position + 1],
            decoder_attention_mask=batch["decoder_attention_mask"][:, : position + 1],
            cache=cache,
            use_cache=True,
        )
        cache = cache_of(outputs)
        steps.append(outputs.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1)[tokens], expected[tokens])
    changed = {key: value.clone() for key, value in batch.items()}
    changed["input_ids"][batch["attention_mask"] == 0] = NUM_IDS - 1
    changed["decoder_input_ids"][~tokens] = 5
    torch.testing.assert_close(model(**changed).logits[tokens], expected[tokens])
    # Padding behind a text shows what its last token showed, where generation goes on.
    torch.testing.assert_close(expected[1, -1], expected[1, 1])
    for row in range(4):
        kept, target = batch["attention_mask"][row].bool(), tokens[row]
        alone = model(
            input_ids=batch["input_ids"][row : row + 1, kept],
            decoder_input_ids=batch["decoder_input_ids"][row : row + 1, target],
        )
        torch.testing.assert_close(alone.logits[0], expected[row, target])


SEARCHES = {
    "greedy": {"num_beams": 1},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize("search", SEARCHES)
def test_words_beyond_the_vocabulary_are_generated(search):
    """With a cache what there is without one, in batches as alone, right-padded prompts included; scores add up."""
    produced = 0
    for options in OPTIONS:
        model = make_pointer(**options)
        with torch.no_grad():
            model.copy_gate.bias.sub_(4)
        batch = {key: value[:4] for key, value in make_batch().items()}
        batch["decoder_input_ids"][:, 0] = BOS
        batch["decoder_attention_mask"] = torch.tensor(
            [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]]
        )
        prompts = {key: batch[key] for key in ("input_ids", "attention_mask")}
        for given in (prompts, batch):
            results = []
            for use_cache in (True, False):
                set_seed(0)
                results.append(
                    model.generate(
                        **given,
                        **({"do_sample": False} | SEARCHES[search]),
                        use_cache=use_cache,
                        max_new_tokens=6,
                        return_dict_in_generate=True,
                        output_scores=True,
                    )
                )
            assert torch.equal(results[0].sequences, results[1].sequences)
            new_tokens = results[0].sequences[:, -6:]
            produced += int((new_tokens >= VOCAB_SIZE).sum())
            if "do_sample" in SEARCHES[search]:
                continue
            repeats = len(new_tokens) // 4
            for row in range(4):
                alone = {
                    key: value[row : row + 1, given[key.replace("input_ids", "attention_mask")][row].bool()]
                    for key, value in given.items()
                }
                sequences = model.generate(**alone, **SEARCHES[search], do_sample=False, max_new_tokens=6)[:, 1:]
                start = given["decoder_input_ids"].shape[1] if "decoder_input_ids" in given else 1
                start_alone = alone["decoder_input_ids"].shape[1] - 1 if "decoder_input_ids" in given else 0
                batched = results[0].sequences[row * repeats : (row + 1) * repeats, start:].tolist()
                for one, other in zip(batched, sequences[:, start_alone:].tolist()):
                    length = min(len(one), len(other))
                    assert one[:length] == other[:length]
                    assert all(token == PAD for token in one[length:] + other[length:])
            if search == "beams":
                scores = model.compute_transition_scores(
                    results[0].sequences, results[0].scores, results[0].beam_indices, normalize_logits=False
                )
                lengths = (results[0].beam_indices >= 0).sum(-1)
                torch.testing.assert_close(scores.sum(-1) / lengths, results[0].sequences_scores, rtol=1e-5, atol=1e-5)
    assert produced > 10


def test_the_loss_counts_copied_labels():
    """The negative log-probability of the labels, those beyond the vocabulary too, by any number of items."""
    model, batch = make_pointer(), make_batch()
    labels = make_ids(6, 5, seed=3).masked_fill(batch["decoder_attention_mask"] == 0, -100)
    logits = model(**batch).logits
    picked = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)[labels != -100]
    for trained in (model.eval(), model.train()):
        torch.testing.assert_close(trained(**batch, labels=labels).loss.double(), -picked.mean(), rtol=1e-5, atol=1e-5)
        loss = trained(**batch, labels=labels, num_items_in_batch=50).loss
        torch.testing.assert_close(loss.double(), -picked.sum() / 50, rtol=1e-5, atol=1e-5)


def test_words_beyond_the_vocabulary_are_read_as_unknown(tmp_path):
    """By encoder and decoder, after saving and loading too."""
    model, batch = make_pointer(torch.float32), make_batch()
    model.save_pretrained(tmp_path)
    loaded = RNNSeq2SeqForConditionalGeneration.from_pretrained(tmp_path)
    unknown = {key: value.masked_fill(value >= VOCAB_SIZE, UNKNOWN) for key, value in batch.items()}
    outputs = model(**batch, output_hidden_states=True)
    others = model(**unknown, output_hidden_states=True)
    assert torch.equal(outputs.encoder_last_hidden_state, others.encoder_last_hidden_state)
    assert torch.equal(outputs.decoder_hidden_states[0], others.decoder_hidden_states[0])
    assert not torch.allclose(outputs.logits, others.logits)
    assert torch.equal(loaded(**batch).logits, outputs.logits)
    assert model(**batch).decoder_hidden_states is None
    assert model(**batch).cross_attentions is None


@ON_A_CPU
def test_what_cannot_be_copied_is_refused():
    model, batch = make_pointer(torch.float32), make_batch()
    with pytest.raises(ValueError, match=rf"must be below .* \({NUM_IDS}\) of a pointer-generator, got {NUM_IDS}"):
        model(**(batch | {"input_ids": batch["input_ids"] + COPIES + VOCAB_SIZE - int(batch["input_ids"].max())}))
    embeddings = model.get_input_embeddings()(torch.zeros(6, 7, dtype=torch.long))
    with pytest.raises(ValueError, match="there is nothing else to copy"):
        model(inputs_embeds=embeddings, decoder_input_ids=batch["decoder_input_ids"])
    with pytest.raises(ValueError, match="`pointer_generator` must be False to export"):
        make_graphs(model)


def test_words_there_and_back():
    """Every word that the vocabulary lacks has an id of its own in source and target, as far as there are ids."""
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    source, target = (
        ["the", "Zorg", "sits", "on", "Blip", "the", "Zorg", "Quux"],
        ["Blip", "sits", "Nix", "Zorg", "Quux"],
    )
    encoded = encode_with_copies(source, tokenizer, 2, target)
    known = tokenizer.convert_tokens_to_ids(["the", "sits", "on"])
    the, sits, on = known
    assert encoded == {
        "input_ids": [the, size, sits, on, size + 1, the, size, UNKNOWN, EOS],
        "labels": [size + 1, sits, UNKNOWN, size, UNKNOWN, EOS],
        "copied_words": ["Zorg", "Blip"],
    }
    decoded = decode_with_copies([BOS, *encoded["labels"], PAD, size + 7], tokenizer, encoded["copied_words"])
    assert decoded == ["Blip", "sits", "<unk>", "Zorg", "<unk>", "<unk>"]
    assert encode_with_copies(["mat"], tokenizer, 2) == {
        "input_ids": [tokenizer.convert_tokens_to_ids("mat"), EOS],
        "copied_words": [],
    }


def test_new_words_are_copied_exactly():
    """A model learns to repeat, in reverse order, sources of words that it knows and words that it does not."""
    tokenizer = make_tokenizer()
    words = ["cat", "mat", "time", "text", *(f"name{index}" for index in range(40))]
    generator = torch.Generator().manual_seed(0)

    def make_rows(number: int, among: list[str]) -> list[dict]:
        rows = []
        for _ in range(number):
            source = [among[index] for index in torch.randint(len(among), (4,), generator=generator)]
            rows.append(encode_with_copies(source, tokenizer, COPIES, source[::-1]) | {"words": source[::-1]})
        return rows

    torch.manual_seed(0)
    config = make_pointer().config
    config.update(
        {"vocab_size": len(tokenizer), "hidden_size": 32, "embedding_size": 16, "attention_score": "additive"}
    )
    config.decoder_type = "bahdanau"
    model = RNNSeq2SeqForConditionalGeneration(config).train()
    collate = DataCollatorForSeq2Seq(tokenizer, model)
    fields = ("input_ids", "labels")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        batch = collate([{field: row[field] for field in fields} for row in make_rows(64, words)])
        optimizer.zero_grad()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    # Names that were never seen.
    rows = make_rows(50, ["cat", "mat", *(f"other{index}" for index in range(40))])
    batch = collate([{"input_ids": row["input_ids"]} for row in rows])
    for beams in (1, 3):
        sequences = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], num_beams=beams, max_new_tokens=8
        )
        right = [
            decode_with_copies(sequence, tokenizer, row["copied_words"]) == row["words"]
            for sequence, row in zip(sequences, rows)
        ]
        assert sum(right) >= 45
