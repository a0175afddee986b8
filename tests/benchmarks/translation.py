"""
Translators: training steps against the arithmetic of OpenNMT-py and fairseq, and beam search.

The two peers are written anew here from what their authors published (Klein et al., 2017,
https://aclanthology.org/P17-4012; Ott et al., 2019, https://aclanthology.org/N19-4009; both after Luong et al., 2015,
https://aclanthology.org/D15-1166), with the weights of one of our models, so that all compute the same numbers: the
initial states of the decoder are made by our bridge, everything else is theirs.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from hf_rnn import RNNSeq2SeqConfig, RNNSeq2SeqForConditionalGeneration, without_fast_paths

from .harness import Measurement, Settings, benchmark, check_equal, matrix_products, measure, recurrence_shapes
from .padding import sentence_lengths
from .plain import PlainLayer, copy_of, embedding_of, linear_of, recurrence_of


def make_translator(settings: Settings, **options) -> RNNSeq2SeqForConditionalGeneration:
    """A model of 17.9 M parameters: vocabulary 8,000, embeddings 384, hidden 512, two layers on either side."""
    sizes = {
        "vocab_size": settings.size(8_000, 40),
        "embedding_size": settings.size(384, 10),
        "hidden_size": settings.size(512, 12),
        "encoder_bidirectional": False,
        "tie_word_embeddings": False,
    }
    model = RNNSeq2SeqForConditionalGeneration(RNNSeq2SeqConfig(**(sizes | options)))
    return model.to(settings.device)


def make_pairs(settings: Settings, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Source tokens, their lengths, and labels (-100 at padding) of 64 sentences."""
    batch = settings.size(64, 3)
    lengths = sentence_lengths(batch)
    sources, labels = (torch.randint(3, vocab_size, (batch, int(lengths.max()))) for _ in range(2))
    is_padding = torch.arange(sources.shape[1]) >= lengths[:, None]
    # Targets are as long as sources on average, but not one by one.
    labels = labels.masked_fill(is_padding[torch.randperm(batch)], -100)
    return sources.masked_fill(is_padding, 0).to(settings.device), lengths, labels.to(settings.device)


def mask_of(sources: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """1 `[batch, source]` where a source has a token."""
    return (torch.arange(sources.shape[1]) < lengths[:, None]).long().to(sources.device)


class OpenNMT(nn.Module):
    """An LSTM translator with the arithmetic of OpenNMT-py: batched products in the attention of each step."""

    def __init__(self, model: RNNSeq2SeqForConditionalGeneration):
        super().__init__()
        decoder = model.model.decoder
        self.config = model.config
        self.source_embedding = embedding_of(model.model.shared)
        self.target_embedding = self.source_embedding  # one for both, as in the model
        self.encoder = recurrence_of(model.model.encoder.layers)
        self.bridge = copy.deepcopy(decoder.bridge)
        if model.config.input_feeding:
            self.cells = nn.ModuleList(
                copy_of(nn.LSTMCell(layer.cell.input_size, layer.hidden_size), layer.cell) for layer in decoder.layers
            )
        else:
            self.decoder = recurrence_of(decoder.layers)
        self.attention_in = linear_of(decoder.attention.score.query)
        self.attention_out = linear_of(decoder.combine)
        self.generator = linear_of(model.lm_head)

    def encode(self, sources, lengths):
        """Outputs `[batch, source, hidden]`, and for each layer of the decoder its first states."""
        packed = pack_padded_sequence(self.source_embedding(sources), lengths, batch_first=True, enforce_sorted=False)
        outputs, (hiddens, cells) = self.encoder(packed)
        final_states = torch.stack([hiddens, cells], dim=1).permute(2, 0, 1, 3).flatten(1)
        return pad_packed_sequence(outputs, batch_first=True)[0], self.bridge(final_states)

    def attend(self, queries, memory, is_padding):
        """Attentional vectors `[batch, target, hidden]` of queries of that shape."""
        scores = torch.bmm(self.attention_in(queries), memory.transpose(1, 2))
        weights = torch.softmax(scores.masked_fill(is_padding.unsqueeze(1), -torch.inf), dim=-1)
        context = torch.bmm(weights, memory)
        return torch.tanh(self.attention_out(torch.cat([context, queries], dim=-1)))

    def step_cells(self, inputs, states):
        """One step of the stacked cells, which changes `states` in place; returns the output."""
        for index, cell in enumerate(self.cells):
            states[index] = cell(inputs, states[index])
            inputs = states[index][0]
        return inputs

    def decode(self, targets, memory, is_padding, states):
        """Attentional vectors `[batch, target, hidden]`."""
        embedded = self.target_embedding(targets)
        if not self.config.input_feeding:
            hiddens, cells = (torch.stack(of_layers) for of_layers in zip(*states))
            return self.attend(self.decoder(embedded, (hiddens, cells))[0], memory, is_padding)
        vector, vectors = torch.zeros_like(states[0][0]), []
        for inputs in embedded.unbind(1):
            output = self.step_cells(torch.cat([inputs, vector], dim=-1), states)
            vector = self.attend(output.unsqueeze(1), memory, is_padding).squeeze(1)
            vectors.append(vector)
        return torch.stack(vectors, dim=1)

    def forward(self, sources, lengths, labels):
        """The loss in nats per label."""
        targets = labels.roll(1, dims=1)
        targets[:, 0] = self.config.decoder_start_token_id
        targets = targets.masked_fill(targets == -100, self.config.pad_token_id)
        memory, states = self.encode(sources, lengths)
        is_padding = torch.arange(memory.shape[1], device=memory.device) >= lengths.to(memory.device)[:, None]
        logits = self.generator(self.decode(targets, memory, is_padding, states))
        log_probabilities = torch.log_softmax(logits.flatten(0, 1), dim=-1)
        return F.nll_loss(log_probabilities, labels.flatten(), ignore_index=-100, reduction="sum") / (
            (labels != -100).sum()
        )


class Fairseq(OpenNMT):
    """The same with the arithmetic of fairseq: time first, scores and contexts as sums of elementwise products."""

    def decode(self, targets, memory, is_padding, states):
        memory, is_padding = memory.transpose(0, 1).contiguous(), is_padding.t()  # [source, batch, ...]
        embedded = self.target_embedding(targets).transpose(0, 1)
        vector, vectors = torch.zeros_like(states[0][0]), []
        for inputs in embedded.unbind(0):
            query = self.step_cells(torch.cat([inputs, vector], dim=1), states)
            scores = (memory * self.attention_in(query).unsqueeze(0)).sum(dim=2)
            weights = torch.softmax(scores.float().masked_fill(is_padding, -torch.inf), dim=0).type_as(scores)
            context = (weights.unsqueeze(2) * memory).sum(dim=0)
            vector = torch.tanh(self.attention_out(torch.cat([context, query], dim=1)))
            vectors.append(vector)
        return torch.stack(vectors).transpose(0, 1)


def step_shapes(config: RNNSeq2SeqConfig, sources: int, targets: int, steps: int) -> list[tuple[int, int, int]]:
    """The products with weights over numbers of source tokens, of labels, and of positions that the decoder runs."""
    hidden, embedding = config.hidden_size, config.embedding_size
    widths = {"encoder": embedding, "decoder": embedding + (hidden if config.input_feeding else 0)}
    shapes = []
    for side, tokens in (("encoder", sources), ("decoder", steps)):
        for index in range(config.encoder_layers if side == "encoder" else config.decoder_layers):
            shapes += recurrence_shapes(tokens, hidden if index else widths[side], hidden)
    return [*shapes, (steps, hidden, hidden), (steps, 2 * hidden, hidden), (targets, hidden, config.vocab_size)]


PEERS = {"opennmt": OpenNMT, "fairseq": Fairseq}


@benchmark(
    "input-feeding-opennmt",
    "input-feeding translator, training step / OpenNMT-py's arithmetic",
    {"cpu": 0.55, "cuda": None},
    peer="opennmt",
)
@benchmark(
    "input-feeding-fairseq",
    "input-feeding translator, training step / fairseq's arithmetic",
    {"cpu": 0.55, "cuda": None},
    peer="fairseq",
)
@benchmark(
    "luong-opennmt",
    "translator without feeding, training step / OpenNMT-py's arithmetic",
    {"cpu": 0.50, "cuda": None},
    peer="opennmt",
    input_feeding=False,
)
def training_step(settings: Settings, peer: str, input_feeding: bool = True) -> Measurement:
    """Forward, backward and fused AdamW over 64 sentences of about 13 tokens; our model skips padding in the loss."""
    model = make_translator(settings, input_feeding=input_feeding).train()
    theirs = PEERS[peer](model)
    sources, lengths, labels = make_pairs(settings, model.config.vocab_size)
    mask = mask_of(sources, lengths)
    num_items = (labels != -100).sum()

    def loss_of_model():
        return model(input_ids=sources, attention_mask=mask, labels=labels, num_items_in_batch=num_items).loss

    def step(parameters, loss_function):
        optimizer = torch.optim.AdamW(parameters, fused=True)

        def run():
            optimizer.zero_grad()
            loss = loss_function()
            loss.backward()
            optimizer.step()
            return loss

        return run

    ours = step(model.parameters(), loss_of_model)
    baseline = step(theirs.parameters(), lambda: theirs(sources, lengths, labels))
    check_equal("losses", ours(), baseline(), 1e-3)
    decoder = model.model.decoder
    check_equal(
        "gradients",
        [weight.grad for weight in (model.lm_head.weight, decoder.combine.weight, model.model.shared.weight)],
        [weight.grad for weight in (theirs.generator.weight, theirs.attention_out.weight)]
        + [theirs.source_embedding.weight.grad],
        2e-3,
    )
    floor = matrix_products(
        step_shapes(model.config, int(lengths.sum()), int(num_items), labels.numel()), settings, backward=True
    )
    return measure(settings, baseline, ours, floor, rounds=7)


@benchmark(
    "attention-additive",
    "translator without feeding, additive, forward and backward / without fast paths",
    {"cpu": 0.55, "cuda": None},
    attention_score="additive",
)
@benchmark(
    "attention-location",
    "translator without feeding, location, forward and backward / without fast paths",
    {"cpu": 0.55, "cuda": None},
    attention_score="location",
)
@benchmark(
    "attention-local",
    "translator without feeding, local, forward and backward / without fast paths",
    {"cpu": 0.55, "cuda": None},
    attention_score="local",
)
@benchmark(
    "attention-coverage",
    "translator without feeding, coverage, forward and backward / without fast paths",
    {"cpu": 0.55, "cuda": None},
    attention_score="additive",
    use_coverage=True,
)
def attention_step(settings: Settings, **options) -> Measurement:
    """Scores whose gradients take ways of their own, against the same model on the plain operations of torch."""
    model = make_translator(settings, input_feeding=False, **options).train()
    sources, lengths, labels = make_pairs(settings, model.config.vocab_size)
    mask = mask_of(sources, lengths)

    def ours():
        model.zero_grad()
        loss = model(input_ids=sources, attention_mask=mask, labels=labels).loss
        loss.backward()
        return loss

    def baseline():
        with without_fast_paths():
            return ours()

    check_equal("losses", ours(), baseline(), 1e-3)
    num_items = int((labels != -100).sum())
    shapes = step_shapes(model.config, int(lengths.sum()), num_items, labels.numel())
    return measure(settings, baseline, ours, matrix_products(shapes, settings, backward=True), rounds=5)


@benchmark(
    "beam-5",
    "beam 5 translation, batch 16 / layers of the decoder through nn.LSTM, T = 1",
    {"cpu": 0.50, "cuda": None},
    batch=16,
)
@benchmark(
    "beam-5-single",
    "the same, one sentence",
    {"cpu": 0.50, "cuda": None},
    batch=1,
)
def beam_search(settings: Settings, batch: int) -> Measurement:
    """`generate()` to a fixed length, with identical tokens."""
    options = {"vocab_size": settings.size(8_000, 40), "eos_token_id": None}
    model = make_translator(settings, input_feeding=False, **options).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(10)  # a new model would be so unsure that rounding decides between beams
    theirs = copy.deepcopy(model)
    decoder = theirs.model.decoder
    for index, layer in enumerate(model.model.decoder.layers):
        decoder.layers[index] = PlainLayer(layer)
    num_tokens = settings.size(25, 4)
    sources = torch.randint(3, model.config.vocab_size, (batch, settings.size(13, 3)), device=settings.device)

    def ours():
        return model.generate(sources, num_beams=5, do_sample=False, max_new_tokens=num_tokens)

    def baseline():
        with without_fast_paths():
            return theirs.generate(sources, num_beams=5, do_sample=False, max_new_tokens=num_tokens)

    assert torch.equal(ours(), baseline()), "the translations differ"
    rows, config = 5 * batch, model.config
    shapes = step_shapes(config, 0, rows, rows)
    shapes = [shape for shape in shapes if shape[0] > 0]  # those of the decoder
    return measure(settings, baseline, ours, matrix_products(shapes, settings, times=num_tokens), rounds=7)
