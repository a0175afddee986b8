"""What the library is compared with: torch's own modules, with the weights of one of its models."""

import torch
from torch import nn


MODULES = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN}
WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def recurrence_of(layers) -> nn.Module:
    """`nn.LSTM`, `nn.GRU` or `nn.RNN` with copies of the weights of recurrent layers."""
    first = layers[0]
    weight = first.cell.weight_hh
    module = MODULES[first.cell.torch_kernel](
        first.cell.input_size,
        first.hidden_size,
        num_layers=len(layers),
        batch_first=True,
        bidirectional=first.cell_reverse is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    for name, parameter in module.named_parameters():
        parameter.data.copy_(weights_of(layers)[name])
    return module


def weights_of(layers) -> dict[str, nn.Parameter]:
    """The weights of recurrent layers by the names that torch's modules have for them."""
    return {
        f"{name}_l{index}{suffix}": getattr(cell, name)
        for index, layer in enumerate(layers)
        for cell, suffix in zip(layer.cells, ("", "_reverse"))
        for name in WEIGHTS
    }


def copy_of(module: nn.Module, copied: nn.Module) -> nn.Module:
    """`module` with copies of the parameters of another."""
    module.load_state_dict(copied.state_dict())
    parameter = next(copied.parameters())
    return module.to(parameter.device, parameter.dtype)


def linear_of(linear: nn.Linear) -> nn.Linear:
    """A copy of a projection."""
    return copy_of(nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None), linear)


def embedding_of(embedding: nn.Embedding) -> nn.Embedding:
    """A copy of an embedding."""
    return copy_of(nn.Embedding(embedding.num_embeddings, embedding.embedding_dim), embedding)


class PlainLanguageModel(nn.Module):
    """The script that anybody writes: embedding, `nn.LSTM` and a projection that shares its weight with the former."""

    def __init__(self, model):
        super().__init__()
        self.embedding = embedding_of(model.model.embed_tokens)
        self.recurrence = recurrence_of(model.model.layers)
        self.head = linear_of(model.lm_head)
        if model.config.tie_word_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids: torch.Tensor, state=None):
        """Logits `[batch, seq, vocab_size]` and the new state."""
        outputs, state = self.recurrence(self.embedding(input_ids), state)
        return self.head(outputs), state


class PlainLayer(nn.Module):
    """One layer of a decoder through `nn.LSTM`, in the place of a `RecurrentLayer`."""

    def __init__(self, layer):
        super().__init__()
        self.recurrence = recurrence_of([layer])
        self.state_sizes = layer.state_sizes

    def forward(
        self, hidden_states, state=None, padding=None, needs_state=True, needs_history=False, needs_gates=False
    ):
        """As that of the layer, without padding."""
        state = tuple(states.unsqueeze(0).contiguous() for states in state)
        outputs, state = self.recurrence(hidden_states, state)
        return outputs, tuple(states.squeeze(0) for states in state), None
