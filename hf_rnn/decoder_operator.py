"""What a decoder has to do position by position as one operator, for the graphs of `torch.compile`.

As in the case of [`recurrent_layer`], a compiler that looked into the loop over time would unroll it, anew for each
length. Exporters write out one step of a decoder, and do not meet the operator. Imports the attention, the layers, what
describes modules and what such operators have in common.
"""

import functools
import json
import threading
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import nn
from torch.func import functional_call

from .attention import AttentionMemory
from .bare_cells import aside, compare, effects, is_as_compared, parts_of, set_attributes
from .fast_paths import autocast_dtype, loop_only
from .opaque_operators import (
    NAMESPACE,
    Known,
    draw_seed,
    is_trained,
    is_transformed,
    let_graphs_ask,
    random_numbers_of,
    register_gradient,
)
from .recurrent_cells import State
from .recurrent_layer import GateValues, HiddenStates
from .recurrent_padding import Padding


# The parts that work at each position; all others come before the loop or behind it.
_AT_EACH_POSITION = ("layers", "attention", "combine", "output_dropout")
# Of what is set on modules. With checkpoints the same is computed; transformers notes what it has initialised.
_IGNORED = frozenset(["forward", "gradient_checkpointing", "_gradient_checkpointing_func", "_is_hf_initialized"])

# The classes of decoders by their names. Each is made from a configuration, and has `layers`, `attention`,
# `runs_step_by_step` and `run_positions(hidden_states, states, padding, memory, needs_state, recording)`.
DECODERS: dict[str, type[nn.Module]] = {}


def register_decoder(decoder_class: type[nn.Module]) -> type[nn.Module]:
    """A decorator, which puts a class into `DECODERS` and lets a compiler ask what is known of its objects."""
    DECODERS[decoder_class.__name__] = decoder_class
    let_graphs_ask(decoder_class, _what_is_known)
    return decoder_class


class _Bare(nn.Module):
    """A decoder without weights of its own, to be called with those that the operator was given."""

    def __init__(self, description: str):
        super().__init__()
        class_name, config, attributes = json.loads(description)
        decoder_class = DECODERS[class_name]

        def make():
            with torch.device("meta"):
                return decoder_class(decoder_class.config_class.from_dict(json.loads(config)))

        self.decoder = aside(make).train()
        set_attributes(self.decoder, attributes)
        # Parameters, then buffers.
        self.weight_names = [
            name
            for name, _ in (*self.decoder.named_parameters(), *self.decoder.named_buffers())
            if name.startswith(_AT_EACH_POSITION)
        ]
        self.hidden_states: list[torch.Tensor] = []
        for layer in self.decoder.layers:
            layer.recorded.register_forward_hook(lambda module, inputs, output: self.hidden_states.append(output))

    @property
    def num_states(self) -> list[int]:
        """How many tensors make the state of each layer, and at last of the attention if it has one."""
        numbers = [len(layer.state_sizes) for layer in self.decoder.layers]
        numbers[0] += self.decoder.runs_step_by_step
        of_attention = len(self.decoder.attention.state_names)
        return [*numbers, of_attention] if of_attention else numbers

    def run(self, weights: Sequence[torch.Tensor], *arguments) -> list[torch.Tensor]:
        """The outputs, the weights of attention, the hidden states of each layer, and perhaps the final states."""
        names = (f"decoder.{name}" for name in self.weight_names)
        return functional_call(self, dict(zip(names, weights, strict=True)), arguments)

    def forward(self, embeddings, states, keys, values, padding, source_mask, needs_state: bool):
        states = list(states)
        of_layers = []
        for number in self.num_states:
            of_layers.append(tuple(states[:number]))
            del states[:number]
        memory = AttentionMemory(keys, values, source_mask)
        self.hidden_states.clear()
        outputs, attended, new_states, _ = self.decoder.run_positions(
            embeddings, of_layers, padding, memory, needs_state, recording=False
        )
        results = [outputs, attended, *self.hidden_states]
        self.hidden_states.clear()
        return [*results, *sum(new_states, ())] if needs_state else results


# One for each thread, because running it replaces its weights for that time.
_local = threading.local()


def _bare(description: str) -> _Bare:
    class_name = json.loads(description)[0]
    key, known = (DECODERS[class_name], description), _local.__dict__.setdefault("known", {})
    if key not in known:
        known[key] = _Bare(description)
    return known[key]


@functools.lru_cache(maxsize=16)
def _as_made(decoder_class: type[nn.Module], config: str) -> dict[str, nn.Module]:
    return _parts(_Bare(json.dumps([decoder_class.__name__, config, {}])).decoder)


def _parts(decoder: nn.Module) -> dict[str, nn.Module]:
    """The modules that work at each position. What is recorded is recorded behind the loop."""
    return {
        path: part
        for path, part in parts_of(decoder).items()
        if path.startswith(_AT_EACH_POSITION) and not isinstance(part, HiddenStates | GateValues)
    }


def _what_is_known(decoder: nn.Module) -> Known:
    config = decoder.config.to_json_string()
    if DECODERS.get(type(decoder).__name__) is not type(decoder):
        return Known()
    try:
        as_made = _as_made(type(decoder), config)
    except Exception:  # its cells have left their table
        return Known()
    found = compare(_parts(decoder), as_made, _IGNORED)
    of_cells = [effects(layer.cell) for layer in decoder.layers] if found is not None else []
    if found is None or any(of_cell is None or of_cell[1] for of_cell in of_cells):
        return Known()
    attributes, read = found
    # Rates may have been set on modules, and modules to training one by one.
    drops = any(part.training for part in _parts(decoder).values()) and any(
        value > 0 for name, value in read.items() if isinstance(value, float) and name.endswith(("dropout", ".p"))
    )
    description = json.dumps([type(decoder).__name__, config, attributes], sort_keys=True)
    draws = drops or any(draws for draws, _ in of_cells)
    return Known(description, tuple(_bare(description).weight_names), draws, read)


def run_positions_opaquely(
    decoder: nn.Module,
    hidden_states: torch.Tensor,
    states: list[State],
    padding: Padding | None,
    memory: AttentionMemory,
    needs_state: bool,
    recording: bool,
) -> tuple[torch.Tensor, torch.Tensor, list[State | None], list[None]]:
    """
    `decoder.run_positions` as one operator in the graph, of which `recording` must be False. Runs the loop in the graph
    where the operator would not do the same: an adapter or a hook in the decoder, a cell that cannot be described or
    writes to its buffers, or a transformation of functions that is to go through it.
    """
    is_known = is_as_compared(decoder, decoder._graph_numbers(), decoder._graph_others())
    description = decoder._graph_description()
    if not is_known or not description or is_transformed():
        return decoder.run_positions(hidden_states, states, padding, memory, needs_state, recording)
    parts = [part for state in states for part in state]
    weights = [attrgetter(name)(decoder) for name in decoder._graph_weight_names()]
    # With checkpoints nothing is to be kept.
    keeps = not (decoder.gradient_checkpointing and decoder.training)
    keeps = keeps and is_trained([hidden_states, *parts, memory.keys, memory.values, *weights])
    results = (_for_training if keeps else recurrent_decoder)(
        hidden_states,
        parts,
        memory.keys,
        memory.values,
        weights,
        None if padding is None else padding.mask,
        memory.mask,
        description,
        needs_state,
        str(autocast_dtype(hidden_states.device.type) or "").removeprefix("torch."),
        draw_seed(decoder._graph_draws()),
    )
    outputs, weights, *results = results
    for layer, of_layer in zip(decoder.layers, results):
        layer.recorded(of_layer)
    new_states, results = [], results[len(decoder.layers) :]
    for state in states:
        new_states.append(tuple(results[: len(state)]) if needs_state else None)
        results = results[len(state) :]
    return outputs, weights, new_states, [None] * len(states)


def _run(
    embeddings, states, keys, values, weights, mask, source_mask, description, needs_state, autocast, seed, looks=True
) -> list[torch.Tensor]:
    device = embeddings.device
    padding = mask
    if mask is not None:
        padding = Padding.from_attention_mask(mask, embeddings) if looks else Padding(mask)
    dtype = getattr(torch, autocast) if autocast else None
    with torch.autocast(device.type, dtype, dtype is not None, cache_enabled=False), random_numbers_of(seed, device):
        return _bare(description).run(weights, embeddings, states, keys, values, padding, source_mask, needs_state)


@torch.library.custom_op(f"{NAMESPACE}::recurrent_decoder", mutates_args=())
def recurrent_decoder(
    embeddings: torch.Tensor,
    states: Sequence[torch.Tensor],
    keys: torch.Tensor,
    values: torch.Tensor,
    weights: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
    source_mask: torch.Tensor | None,
    description: str,
    needs_state: bool,
    autocast: str,
    seed: torch.Tensor | None,
) -> list[torch.Tensor]:
    """
    Args:
        embeddings (`torch.Tensor` of shape `(batch, target, embedding_size)`): The inputs.
        states (`Sequence` of `torch.Tensor` of shape `(batch, ...)`): The state of each layer, of the attention too.
        keys, values, source_mask: The [`AttentionMemory`].
        weights (`Sequence` of `torch.Tensor`): The parameters, then the buffers of what works at each position.
        mask (`torch.Tensor` of shape `(batch, target)`, *optional*): True where there is a token.
        description (`str`): The class of the decoder, its configuration, and what was set on its modules, in JSON.
        needs_state (`bool`): Whether the final states are asked for.
        autocast (`str`): The type of autocast, empty where that is off.
        seed (`torch.Tensor` of shape `()`, *optional*): Of the random numbers that are drawn.

    Returns:
        The outputs `(batch, target, hidden_size)`, the weights of attention `(batch, heads, target, source)`, the
        hidden states of each layer `(batch, target, size)`, and the final states if they are asked for.
    """
    results = _run(
        embeddings, states, keys, values, weights, mask, source_mask, description, needs_state, autocast, seed
    )
    # No result may share its memory with another or with an argument.
    return [result.clone(memory_format=torch.contiguous_format) for result in results]


@recurrent_decoder.register_fake
def _shapes(embeddings, states, keys, values, weights, mask, source_mask, description, needs_state, autocast, seed):
    # Two positions show the types of all; the loop looks at no values.
    two, mask_of_two = (None if part is None else torch.stack([part[:, 0]] * 2, dim=1) for part in (embeddings, mask))
    rest = mask_of_two, source_mask, description, True, autocast, None
    with torch.no_grad(), loop_only():
        results = _run(two, states, keys, values, weights, *rest, looks=False)
    target, num_layers = embeddings.shape[1], len(_bare(description).decoder.layers)
    outputs, attended, *rest = results
    shapes = [
        (outputs, (outputs.shape[0], target, *outputs.shape[2:])),
        (attended, (*attended.shape[:2], target, *attended.shape[3:])),
        *((hidden, (hidden.shape[0], target, *hidden.shape[2:])) for hidden in rest[:num_layers]),
        *((state, state.shape) for state in (rest[num_layers:] if needs_state else [])),
    ]
    return [embeddings.new_empty(shape, dtype=result.dtype) for result, shape in shapes]


SCHEMA = (
    "Tensor embeddings, Tensor[] states, Tensor keys, Tensor values, Tensor[] weights, Tensor? mask, "
    "Tensor? source_mask, str description, bool needs_state, str autocast, Tensor? seed"
)
_for_training = register_gradient(recurrent_decoder, "recurrent_decoder", SCHEMA, _run, _shapes, number=5)
