"""What only a GPU has: decode steps captured in a CUDA graph, and the sizes of GNMT v2."""

import torch
from transformers import StaticCache

from hf_rnn import RNNSeq2SeqConfig, RNNSeq2SeqForConditionalGeneration

from .decoding import decode, make_decoder, with_cache
from .harness import Measurement, Settings, Skipped, benchmark, interleave, measure, summarize


class CapturedStep:
    """A greedy decode step of a language model in a CUDA graph: the state and the token stay where they are."""

    def __init__(self, model, batch: int, device: str):
        self.first = torch.arange(3, 3 + batch, device=device).unsqueeze(1)
        self.token = self.first.clone()
        self.cache = StaticCache(config=model.config, max_cache_len=1)
        self.model = model
        # Once aside: it makes the tensors of the state, and whatever libraries set up at first.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()

    @torch.no_grad()
    def _step(self):
        logits = self.model(input_ids=self.token, cache=self.cache, use_cache=True).logits
        self.token.copy_(logits[:, -1:].argmax(-1))

    @torch.no_grad()
    def decode(self, num_tokens: int) -> torch.Tensor:
        """Greedy tokens `[batch, num_tokens]` from the beginning of a text."""
        self.token.copy_(self.first)
        for layer in self.cache.layers:  # zeros are the first state; `reset` would have the next step begin anew
            layer.keys.zero_()
            layer.values.zero_()
        tokens = []
        for _ in range(num_tokens):
            self.graph.replay()
            tokens.append(self.token.clone())
        return torch.cat(tokens, dim=1)


@benchmark("graph-1", "decode step in a CUDA graph, batch 1, identical tokens / eager", {"cuda": 0.50}, batch=1)
@benchmark("graph-32", "decode step in a CUDA graph, batch 32, identical tokens / eager", {"cuda": 0.50}, batch=32)
def captured_step(settings: Settings, batch: int) -> Measurement:
    """The whole forward of the model, as in the lines of eager steps."""
    model = make_decoder(settings, batch)
    captured, eager = CapturedStep(model, batch, settings.device), with_cache(model)
    num_tokens = settings.size(64, 3)

    def ours():
        return captured.decode(num_tokens)

    def baseline():
        return decode(eager, batch, num_tokens, settings.device)

    assert torch.equal(ours(), baseline()), "the tokens differ"
    return measure(settings, baseline, ours)


GNMT_TOKENS = 140_900  # a second, GNMT v2 on one A100 with mixed precision, as NVIDIA's DeepLearningExamples publish


@benchmark("gnmt", "training of GNMT v2's sizes, time per token / as published for one A100", {"cuda": 1.0})
def gnmt(settings: Settings) -> Measurement:
    """
    Hidden 1,024, four layers on either side, vocabulary 32,320, batch 128, 25 tokens of source and of target, float16
    autocast. All layers of the encoder read in both directions, where GNMT's do so in the first alone: ours has more to
    do. Source and target tokens are counted, as there.
    """
    if not torch.cuda.is_available():
        raise Skipped("there is no GPU")
    config = RNNSeq2SeqConfig(
        vocab_size=settings.size(32_320, 50),
        hidden_size=settings.size(1024, 12),
        encoder_layers=4,
        decoder_layers=4,
        decoder_type="gnmt",
        attention_score="additive",
        residual=True,
    )
    model = RNNSeq2SeqForConditionalGeneration(config).to(settings.device).train()
    batch, seq = settings.size((128, 25), (3, 5))
    sources, labels = (torch.randint(3, config.vocab_size, (batch, seq), device=settings.device) for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler(settings.device)

    def step():
        optimizer.zero_grad()
        with torch.autocast(settings.device, torch.float16):
            loss = model(input_ids=sources, labels=labels).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    rates = [2 * batch * seq / time for time in interleave({"step": step}, settings)["step"]]
    result = summarize([GNMT_TOKENS / rate for rate in rates])
    return result._replace(note=f"{sum(rates) / len(rates):.0f} tokens a second")
