"""Training steps of language models."""

import torch
from torch.nn import functional as F

from hf_rnn import RNNConfig, RNNForCausalLM

from .harness import Settings, benchmark, check_as_exact, check_equal, matrix_products, measure, recurrence_shapes
from .plain import PlainLanguageModel, weights_of


def make_language_model(settings: Settings, **options) -> RNNForCausalLM:
    """A model of 9.3 M parameters: vocabulary 10,000, hidden 512, 2 layers, tied embeddings."""
    sizes = {
        "vocab_size": settings.size(10_000, 50),
        "hidden_size": settings.size(512, 16),
        "num_hidden_layers": 2,
        "tie_word_embeddings": True,
        "eos_token_id": None,  # a text goes on as long as it is asked for
    }
    return RNNForCausalLM(RNNConfig(**(sizes | options))).to(settings.device)


def step_shapes(config: RNNConfig, tokens: int) -> list[tuple[int, int, int]]:
    """The products of a language model over a number of tokens."""
    layers = [
        shape
        for index in range(config.num_hidden_layers)
        for shape in recurrence_shapes(
            tokens, config.hidden_size if index else config.embedding_size, config.hidden_size
        )
    ]
    return [*layers, (tokens, config.hidden_size, config.vocab_size)]


@benchmark("lm-step", "language model, training step / bare nn.LSTM script, same head", {"cpu": 0.90, "cuda": 1.03})
@benchmark(
    "lm-step-bf16", "the same in bfloat16 autocast / the script in bfloat16 autocast", {"cuda": 1.03}, autocast=True
)
@benchmark(
    "lm-step-4096",
    "the same, hidden 4,096, batch 256, bfloat16 autocast",
    {"cuda": 1.03},
    autocast=True,
    hidden_size=4096,
    batch=256,
)
@benchmark(
    "lm-step-4096-fp32", "the same, hidden 4,096, batch 256, in float32", {"cuda": 1.03}, hidden_size=4096, batch=256
)
@benchmark("lm-step-batch-4096", "the same, batch 4,096, bfloat16 autocast", {"cuda": 1.03}, autocast=True, batch=4096)
def training_step(settings: Settings, autocast: bool = False, hidden_size: int | None = None, batch: int = 32):
    """Forward, backward and fused AdamW; labels and `num_items_in_batch` as Trainer passes them."""
    model = make_language_model(settings, **({} if hidden_size is None else {"hidden_size": hidden_size})).train()
    script = PlainLanguageModel(model)
    batch, seq = settings.size((batch, 50), (3, 5))
    input_ids = torch.randint(3, model.config.vocab_size, (batch, seq), device=settings.device)
    num_items = torch.tensor(batch * (seq - 1), device=settings.device)

    def loss_of_model():
        return model(input_ids=input_ids, labels=input_ids, num_items_in_batch=num_items).loss

    def loss_of_script():
        logits, _ = script(input_ids)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten())

    def gradients(loss_function, weights, autocast=autocast):
        with torch.autocast(settings.device, torch.bfloat16, enabled=autocast):
            loss = loss_function()
        return [loss.detach(), *torch.autograd.grad(loss, weights)]

    def step(parameters, loss_function):
        optimizer = torch.optim.AdamW(parameters, fused=True)

        def run():
            optimizer.zero_grad()
            with torch.autocast(settings.device, torch.bfloat16, enabled=autocast):
                loss = loss_function()
            loss.backward()
            optimizer.step()

        return run

    weights = [*script.recurrence.parameters(), script.head.weight]
    ours = gradients(loss_of_model, [*weights_of(model.model.layers).values(), model.lm_head.weight])
    theirs = gradients(loss_of_script, weights)
    if autocast:
        check_as_exact("loss and gradients", ours, theirs, gradients(loss_of_script, weights, autocast=False))
    else:
        check_equal("loss and gradients", ours, theirs, 1e-3)
    del ours, theirs
    dtype = torch.bfloat16 if autocast else torch.float32
    floor = matrix_products(step_shapes(model.config, batch * seq), settings, backward=True, dtype=dtype)
    return measure(settings, step(script.parameters(), loss_of_script), step(model.parameters(), loss_of_model), floor)


@benchmark("compiled-lm", "the same without optimizer, compiled (inductor) / not compiled", {"cpu": None, "cuda": None})
def compiled_step(settings: Settings):
    """Forward and backward. The operator of a layer runs its forward again in the backward."""
    model = make_language_model(settings).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if settings.quick else "inductor")
    input_ids = torch.randint(3, model.config.vocab_size, settings.size((32, 50), (3, 5)), device=settings.device)

    def gradients(run):
        return torch.autograd.grad(run(input_ids=input_ids, labels=input_ids).loss, list(model.parameters()))

    check_equal("gradients", gradients(compiled), gradients(model), 1e-3)
    return measure(settings, lambda: gradients(model), lambda: gradients(compiled), rounds=5)
