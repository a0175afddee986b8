"""The graphs that an exported model consists of: functions of named tensors, made of the model's own forward.

- A language model: `model` reads any number of tokens, with a mask, and gives logits at the positions that are asked
  for; `step` reads one token per row, without a mask. Both take the state in and give it out.
- An encoder-decoder: `encoder` reads sources and gives what the decoder attends to, with the keys projected once, and
  the decoder's first state; `decoder` reads one target token per row.
- Every other model: `model`.
"""

import copy
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from ..attention import AttentionMemory
from ..modeling_rnn import RNNForCausalLM, RNNForMultipleChoice, RNNPreTrainedModel
from ..modeling_rnn_seq2seq import RNNSeq2SeqForConditionalGeneration, RNNSeq2SeqModel
from ..recurrent_cache import cache_of, read_state, write_state
from ..recurrent_cells import RecurrentCell
from ..recurrent_layer import RecurrentLayer


class Graph(NamedTuple):
    """A function of tensors, and what has to be known to export it."""

    function: nn.Module
    inputs: dict[str, torch.Tensor]  # examples, by name in the order of the arguments
    axes: dict[str, dict[int, str]]  # which dimensions of which input vary, by name
    outputs: list[str]
    vocab_size: int

    def __call__(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The outputs by name."""
        with torch.no_grad():
            return dict(zip(self.outputs, self.function(*(inputs[name] for name in self.inputs))))


class StateDescription(NamedTuple):
    """One state of one layer: its name, its width, and its value before the first token where that is constant."""

    name: str
    size: int | None  # None: that of the source, for each head
    initial: float | list[float] | None


class _Function(nn.Module):
    """
    Gives a module to `torch.export`, which wants one, for a function that uses it. What it returns has no gaps in
    memory, because other graphs go on from it: a compiled one expects the strides of the examples.
    """

    def __init__(self, model: nn.Module, function: Callable):
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, *tensors):
        return tuple(tensor.contiguous() for tensor in self.function(*tensors))


BATCH, LENGTH = 3, 4  # of the examples: no special sizes


def check_model(model) -> None:
    """
    Raises:
        `ValueError`: This is not a model of this library's families, or one that cannot be exported.
    """
    if not isinstance(model, RNNPreTrainedModel | RNNSeq2SeqModel | RNNSeq2SeqForConditionalGeneration):
        advice = ""
        if hasattr(model, "_orig_mod"):
            advice = " Pass what was compiled, `model._orig_mod`."
        elif hasattr(model, "merge_and_unload"):
            advice = " Merge its adapters, and pass what `model.merge_and_unload()` returns."
        raise ValueError(f"`model` must be one of the rnn or rnn_seq2seq family, got {type(model).__name__}.{advice}")
    if getattr(model.config, "pointer_generator", False):
        raise ValueError("`pointer_generator` must be False to export a model: its graphs know no words of the source.")


def make_graphs(model: PreTrainedModel) -> tuple[str, dict[str, Graph], list[StateDescription]]:
    """
    Args:
        model (`PreTrainedModel`): A model of this library. The graphs work on a copy of it in float32.

    Returns:
        The kind of model, its graphs by name, and its states.

    Raises:
        `ValueError`: As from [`check_model`].
    """
    check_model(model)
    model = copy.deepcopy(model).to("cpu", torch.float32).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in ("output_attentions", "output_hidden_states", "output_gates"):  # a graph returns what it names
        setattr(model.config, name, False)
    if isinstance(model, RNNForCausalLM):
        return "language_model", *_language_model(model)
    if isinstance(model, RNNPreTrainedModel):
        return "encoder", {"model": _encoder_head(model)}, []
    return "translator", *_translator(model)


def _tokens(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.long)


def _encoder_head(model: RNNPreTrainedModel) -> Graph:
    choices = (2,) if isinstance(model, RNNForMultipleChoice) else ()
    axes = {0: "batch"} | ({1: "choices", 2: "length"} if choices else {1: "length"})
    input_ids = _tokens(BATCH, *choices, LENGTH)
    names = [
        name
        for name in ("start_logits", "end_logits", "logits", "last_hidden_state")
        if name in inspect.signature(_output_class(model)).parameters
    ]
    if getattr(model, "intent_classifier", None) is not None:
        names.append("intent_logits")
    # A base model with one direction would return its state.
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}

    def run(input_ids, attention_mask):
        outputs = model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **options)
        return [outputs[name] for name in names]

    return Graph(
        _Function(model, run),
        {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)},
        {"input_ids": axes, "attention_mask": axes},
        names,
        model.config.vocab_size,
    )


def _output_class(model: PreTrainedModel) -> type:
    return inspect.signature(type(model).forward).return_annotation


def _cells(layer: RecurrentLayer) -> list[RecurrentCell]:
    """The cells themselves, whatever adapter stands before them."""
    return layer.within_cells(list)


def _describe_states(layers, initial: list[tuple[torch.Tensor, ...]] | None, extra: str | None) -> list:
    """The states of the layers in the order of the cache; `extra` names one more in the first layer."""
    states = []
    for layer_idx, layer in enumerate(layers):
        names = [name for cell in _cells(layer) for name in cell.state_names]
        names += [extra] if extra and layer_idx == 0 else []
        sizes = [*layer.state_sizes] + [layer.hidden_size] * (len(names) - len(layer.state_sizes))
        for index, (name, size) in enumerate(zip(names, sizes)):
            value = None
            if initial is not None:
                row = initial[layer_idx][index][0]
                value = row[0].item() if (row == row[0]).all() else row.tolist()
            states.append(StateDescription(f"{layer_idx}.{name}", size, value))
    return states


def _layer_sizes(states: list[StateDescription], num_layers: int) -> list[list[int]]:
    return [[state.size for state in states if state.name.split(".")[0] == str(layer)] for layer in range(num_layers)]


def _fill_cache(cache, tensors, sizes: list[list[int]]) -> None:
    tensors = iter(tensors)
    for layer_idx, layer_sizes in enumerate(sizes):
        write_state(cache, layer_idx, tuple(next(tensors) for _ in layer_sizes), 0)


def _read_cache(cache, sizes: list[list[int]]) -> list[torch.Tensor]:
    return [
        tensor for layer_idx, layer_sizes in enumerate(sizes) for tensor in read_state(cache, layer_idx, layer_sizes)
    ]


def _language_model(model: RNNForCausalLM) -> tuple[dict[str, Graph], list[StateDescription]]:
    layers = model.model.layers
    example = torch.zeros(1, 1, dtype=torch.float32)
    states = _describe_states(layers, [layer.initial_state(example) for layer in layers], None)
    sizes = _layer_sizes(states, len(layers))

    def run(input_ids, attention_mask, positions, past):
        cache = DynamicCache(config=model.config)
        _fill_cache(cache, past, sizes)
        outputs = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            cache=cache,
            use_cache=True,
            logits_to_keep=positions,
            return_dict=True,
        )
        return [outputs.logits, *_read_cache(cache_of(outputs), sizes)]

    past = {f"past.{state.name}": torch.zeros(BATCH, state.size, dtype=torch.float32) for state in states}
    outputs = ["logits", *(f"present.{state.name}" for state in states)]
    rows = {name: {0: "batch"} for name in past}
    tokens = {0: "batch", 1: "length"}
    input_ids = _tokens(BATCH, LENGTH)
    whole = Graph(
        _Function(model, lambda ids, mask, positions, *past: run(ids, mask, positions, past)),
        {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "positions": _tokens(LENGTH - 1),
            **past,
        },
        {"input_ids": tokens, "attention_mask": tokens, "positions": {0: "positions"}, **rows},
        outputs,
        model.config.vocab_size,
    )
    # ONNX has a node for the LSTM that is as fast for one token as the step by itself, with eight-bit weights too, and
    # then both graphs share their weights.
    shares_weights = _cells(layers[0])[0].torch_kernel == "lstm"
    step = Graph(
        _Function(model, lambda ids, *past: run(ids, None, 0, past)),
        {"input_ids": _tokens(BATCH, LENGTH if shares_weights else 1), **past},
        {"input_ids": tokens if shares_weights else {0: "batch"}, **rows},
        outputs,
        model.config.vocab_size,
    )
    return {"model": whole, "step": step}, states


def _take_prepared(memory: AttentionMemory, mask, text=None) -> AttentionMemory:
    return memory


def _translator(
    model: RNNSeq2SeqModel | RNNSeq2SeqForConditionalGeneration,
) -> tuple[dict[str, Graph], list[StateDescription]]:
    base = getattr(model, "model", model)
    encoder, decoder = base.encoder, base.decoder
    attention = decoder.attention
    prepare = decoder.prepare_memory
    # The decoder is handed a memory that was prepared by the other graph.
    decoder.prepare_memory = _take_prepared
    states = _describe_states(decoder.layers, None, "attentional_vector" if decoder.runs_step_by_step else None)
    layer_sizes = _layer_sizes(states, len(decoder.layers))
    for name in attention.state_names:
        size = model.config.encoder_output_size if name == "context" else None
        states.append(StateDescription(f"attention.{name}", size, None))

    def encode(input_ids, attention_mask):
        outputs = encoder(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
        memory = prepare(outputs.last_hidden_state, attention_mask)
        initial = decoder._initial_states(None, outputs.pooler_output, memory)
        return [memory.keys, memory.values, *(tensor for layer in initial for tensor in layer)]

    def decode(input_ids, keys, values, mask, *past):
        memory = AttentionMemory(keys, values, mask.bool()[:, None, None])
        cache = DynamicCache(config=model.config)
        sizes = layer_sizes + ([attention.state_sizes(memory)] if attention.state_names else [])
        _fill_cache(cache, past, sizes)
        outputs = decoder(
            input_ids=input_ids,
            encoder_hidden_states=memory,
            cache=cache,
            use_cache=True,
            output_attentions=True,
            return_dict=True,
        )
        features = outputs.last_hidden_state
        if model is not base:
            features = model.lm_head(model.projection(features))
        return [features, *_read_cache(cache_of(outputs), sizes), outputs.cross_attentions[0]]

    present = [f"present.{state.name}" for state in states]
    input_ids = _tokens(BATCH, LENGTH)
    mask = torch.ones_like(input_ids)
    tokens = {0: "batch", 1: "source"}
    encoder_graph = Graph(
        _Function(model, encode),
        {"input_ids": input_ids, "attention_mask": mask},
        {"input_ids": tokens, "attention_mask": tokens},
        ["memory.keys", "memory.values", *present],
        model.config.vocab_size,
    )
    examples = encoder_graph(encoder_graph.inputs)
    memory = {name: examples[name] for name in ("memory.keys", "memory.values")} | {"memory.mask": mask}
    past = {f"past.{state.name}": examples[f"present.{state.name}"] for state in states}
    features = {0: "batch", 2: "source"}
    decoder_graph = Graph(
        _Function(model, decode),
        {"input_ids": _tokens(BATCH, 1), **memory, **past},
        {"input_ids": {0: "batch"}, "memory.keys": features, "memory.values": features, "memory.mask": tokens}
        | {f"past.{state.name}": {0: "batch"} | ({2: "source"} if state.size is None else {}) for state in states},
        ["last_hidden_state" if model is base else "logits", *present, "cross_attentions"],
        model.config.vocab_size,
    )
    return {"encoder": encoder_graph, "decoder": decoder_graph}, states
