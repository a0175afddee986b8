"""The state of recurrent layers as layers of a transformers `Cache`. Imports nothing of the package.

`DynamicCache(config=...)`, `StaticCache(config=...)` and `generate` build these layers from `config.layer_types`. What
a layer holds has the same size however long the text: the first state (the hidden state) in `keys` `[batch, size]`, all
further states side by side in `values` `[batch, size of the rest]`. The state of an attention, whose size is that of
the source, has a layer of its own, likewise but `[batch, heads, size]`.
"""

import warnings
from dataclasses import fields

import torch
from transformers.cache_utils import (
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DynamicCache,
    EncoderDecoderCache,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput


State = tuple[torch.Tensor, ...]


class RecurrentStateLayer(CacheLayerMixin):
    """
    The state of one recurrent layer, and how many tokens it has read.

    Between `activate_past_recording()` and the next `crop()` it also keeps the states it passed through, so that
    `crop(-n)` takes it back by n tokens: assisted and prompt-lookup decoding rest on that.
    """

    _layer_type = "recurrent_state"
    # Known by this and not by the class, of which each checkpoint that brings its own code has another.
    holds_recurrent_state = True
    writes_in_place = False
    # What chooses rows of a hidden state `[batch, size]`; whoever can make use of it that some are the same sets it.
    select_rows = staticmethod(lambda states, index: states.index_select(0, index))
    is_compileable = True
    is_croppable = True
    is_sliding = False
    # The sizes are those of states, not of heads and positions.
    supports_early_init = False

    def __init__(self, **kwargs):
        super().__init__()
        self.cumulative_length: int | torch.Tensor = 0
        # False again after `reset`, where the tensors of a static layer stay in place.
        self.has_state = False
        self.record_past = False
        # Pairs of keys and values `[steps, batch, size]`; the last step is the present state.
        self.history: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def batch_size(self) -> int:
        """Number of rows; not there before the first update."""
        if not self.is_initialized:
            raise AttributeError("batch_size")
        return self.keys.shape[0]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states, value_states
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        num_tokens: int = 1,
        history: tuple[torch.Tensor, torch.Tensor] | None = None,
        initial: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            key_states (`torch.Tensor` of shape `(batch, size)`): The new hidden state.
            value_states (`torch.Tensor` of shape `(batch, size of the rest)`): The other new states.
            num_tokens (`int`): How many tokens were read to get there.
            history: Needed while recording: keys and values `(num_tokens, batch, size)` after each token.
            initial: Needed while recording: keys and values `(batch, size)` before the first token.

        Returns:
            The new keys and values.
        """
        if self.record_past and history is not None:
            if self.history is None:
                self.history = tuple(states.unsqueeze(0) for states in initial)
            self.history = tuple(torch.cat(pair) for pair in zip(self.history, history))
        self._store(key_states, value_states)
        self.has_state = True
        self.cumulative_length += num_tokens
        return self.keys, self.values

    def _store(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        else:
            self.keys, self.values = keys, values

    def get_seq_length(self) -> int:
        """Number of tokens read so far, padding included."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """There is no limit, which transformers writes as -1."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over everything read so far and the present tokens."""
        return self.get_seq_length() + query_length, 0

    def activate_past_recording(self) -> None:
        """From now on keep the states that are passed through, until `crop`."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """
        Takes the state back by `-tokens_to_remove` tokens and forgets the states that led to it.

        Raises:
            `ValueError`: `tokens_to_remove` is positive.
            `RuntimeError`: More tokens are to be removed than were recorded.
        """
        tokens_to_remove = int(tokens_to_remove)
        if tokens_to_remove > 0:
            raise ValueError(f"`tokens_to_remove` must be zero or negative, got {tokens_to_remove}.")
        if tokens_to_remove < 0:
            recorded = 0 if self.history is None else self.history[0].shape[0] - 1
            if -tokens_to_remove > recorded:
                raise RuntimeError(
                    f"Cannot take the recurrent state back by {-tokens_to_remove} tokens: {recorded} were recorded. "
                    "Call `activate_past_recording()` before the tokens are read."
                )
            self._store(*(states[tokens_to_remove - 1] for states in self.history))
            self.cumulative_length += tokens_to_remove
        self.history = None

    def reset(self) -> None:
        """Back to the beginning: no token read, no state."""
        self.keys = self.values = self.history = None
        self.is_initialized = self.has_state = False
        super().reset()

    def _change_rows(self, change) -> None:
        if self.is_initialized:
            self.keys, self.values = change(self.keys, 0), change(self.values, 0)
        if self.history is not None:
            self.history = tuple(change(states, 1) for states in self.history)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""

        def change(states, dim):
            index = beam_idx.to(states.device)
            # The hidden state is multiplied with a weight in the next step.
            return self.select_rows(states, index) if states is self.keys else states.index_select(dim, index)

        self._change_rows(change)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times in a row."""
        self._change_rows(lambda states, dim: states.repeat_interleave(repeats, dim=dim))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices` (positions, or a mask)."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().squeeze(-1)
        self._change_rows(lambda states, dim: states.index_select(dim, indices.to(states.device)))


class RecurrentStateStaticLayer(RecurrentStateLayer):
    """The same at fixed addresses, for compiled decoding: the tensors are written in place, the counter is one too."""

    # Its place is in the table of static layers, filled below.
    _layer_type = None
    writes_in_place = True

    def __init__(self, max_cache_len: int | None = None, **kwargs):
        super().__init__()
        self.max_cache_len = max_cache_len
        self.cumulative_length = torch.tensor(0, dtype=torch.long)

    def lazy_initialization(self, key_states, value_states):
        super().lazy_initialization(key_states.clone(), value_states.clone())
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not torch.compiler.is_compiling():
            for tensor in (self.keys, self.values, self.cumulative_length):
                torch._dynamo.mark_static_address(tensor)

    def _store(self, keys, values):
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        else:
            self.keys.copy_(keys)
            self.values.copy_(values)

    def get_seq_length(self):
        return self.cumulative_length if self.is_initialized else 0

    def reset(self):
        """Back to the beginning, at the same addresses."""
        self.history = None
        self.has_state = False
        if self.is_initialized:
            self.keys.zero_()
            self.values.zero_()
            self.cumulative_length.zero_()

    def _change_rows(self, change):
        if self.is_initialized:
            keys, values = change(self.keys, 0), change(self.values, 0)
            if keys.shape == self.keys.shape:
                self._store(keys, values)
            else:
                # Another number of rows needs other addresses.
                length = self.cumulative_length.clone()
                self.is_initialized = False
                self.cumulative_length = length
                self.lazy_initialization(keys, values)
        if self.history is not None:
            self.history = tuple(change(states, 1) for states in self.history)


STATIC_LAYER_TYPE_MAPPING[RecurrentStateLayer._layer_type] = RecurrentStateStaticLayer


# What transformers calls the cache, as an argument and in outputs: `cache` since 5.24, `past_key_values` before.
_CACHE_FIELD = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


def given_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """
    The one argument that has two names. The older of them is warned of where transformers does so for its own models.

    Raises:
        `ValueError`: Both are given.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("Give `past_key_values` or `cache`, not both: they are two names of the same state.")
    if past_key_values is None:
        return cache
    if _CACHE_FIELD == "cache" and not torch.compiler.is_compiling():
        warnings.warn(
            "`past_key_values` is deprecated since transformers 5.24. Use `cache` instead.", FutureWarning, stacklevel=3
        )
    return past_key_values


def cache_output(cache: Cache | None) -> dict[str, Cache | None]:
    """The keyword argument of an output class that holds the cache."""
    return {_CACHE_FIELD: cache}


def cache_of(outputs: ModelOutput) -> Cache | None:
    """The cache that is held by what a model returned."""
    return getattr(outputs, _CACHE_FIELD)


def _decoder_cache(past_key_values: Cache) -> Cache:
    is_pair = isinstance(past_key_values, EncoderDecoderCache)
    return past_key_values.self_attention_cache if is_pair else past_key_values


def _state_layer(past_key_values: Cache, layer_idx: int) -> RecurrentStateLayer:
    past_key_values = _decoder_cache(past_key_values)
    # `DynamicCache()` without a config adds its layers as they are asked for, and would add the wrong ones; with one it
    # makes none for an attention that has a state, which is to be like the others.
    while len(past_key_values.layers) <= layer_idx:
        first = next(iter(past_key_values.layers), None)
        is_like_others = getattr(first, "holds_recurrent_state", False)
        past_key_values.layers.append(type(first)() if is_like_others else RecurrentStateLayer())
        past_key_values.layers[-1].record_past = is_like_others and first.record_past
    layer = past_key_values.layers[layer_idx]
    if not getattr(layer, "holds_recurrent_state", False):
        raise TypeError(
            f"`past_key_values` must hold recurrent states, but its layer {layer_idx} is a {type(layer).__name__}. "
            "Make it with `DynamicCache(config=model.config)`, or leave it out."
        )
    return layer


def _check_layers(past_key_values: Cache, num_layers: int) -> None:
    if not isinstance(past_key_values, Cache):
        raise TypeError(
            f"`past_key_values` must be a cache of recurrent states, got a {type(past_key_values).__name__}. "
            "Make it with `DynamicCache(config=model.config)`, or leave it out."
        )
    layers = _decoder_cache(past_key_values).layers
    # Without a configuration the layers of a cache are made as they are asked for.
    if len(layers) != num_layers and any(getattr(layer, "has_state", False) for layer in layers):
        raise ValueError(f"`past_key_values` must hold the states of {num_layers} layers, got {len(layers)}.")


def cache_to_fill(
    config, past_key_values: Cache | None, use_cache: bool | None, training: bool, num_layers: int
) -> Cache | None:
    """
    The cache that a forward writes its final state to, or None.

    Args:
        config: The configuration of the model, which says what happens where `use_cache` is None and no cache is given.
            Even then no state is kept while training, because it would keep the graph of the batch alive.
        past_key_values (`Cache`, *optional*): The cache to go on from, which is then the one to fill.
        use_cache (`bool`, *optional*): Whether the state is asked for.
        training (`bool`): Whether the model is in training mode.
        num_layers (`int`): How many layers a cache of this model has.

    Raises:
        `TypeError`: `past_key_values` is no cache.
        `ValueError`: It holds the states of a model with another number of layers.
    """
    if past_key_values is not None:
        _check_layers(past_key_values, num_layers)
    if use_cache is None:
        use_cache = past_key_values is not None or (config.use_cache and not training)
    if not use_cache or past_key_values is not None:
        return past_key_values if use_cache else None
    cache = DynamicCache(config=config)
    return EncoderDecoderCache(cache, DynamicCache(config=config)) if config.is_encoder_decoder else cache


def is_recording(past_key_values: Cache | None, layer_idx: int) -> bool:
    """Whether the layer keeps the states it passes through, so that they have to be given to [`write_state`]."""
    return past_key_values is not None and _state_layer(past_key_values, layer_idx).record_past


def read_state(
    past_key_values: Cache | None, layer_idx: int, sizes: list[int], batch_size: int | None = None
) -> State | None:
    """
    The state of a layer, or None before the first token.

    Args:
        past_key_values (`Cache`, *optional*): The cache.
        layer_idx (`int`): Which layer.
        sizes (`list[int]`): The widths of its states.
        batch_size (`int`, *optional*): The number of rows that go on from it; any where not given.

    Returns:
        `tuple` of `torch.Tensor` of shape `(batch, size)`, or None.

    Raises:
        `TypeError`: The cache is not one of recurrent states.
        `ValueError`: The states are of another model or of another number of rows.
    """
    if past_key_values is None:
        return None
    layer = _state_layer(past_key_values, layer_idx)
    if not layer.has_state:
        return None
    found = (layer.keys.shape[0], layer.keys.shape[-1] + layer.values.shape[-1])
    wanted = (found[0] if batch_size is None else batch_size, sum(sizes))
    if found != wanted or layer.keys.shape[-1] != sizes[0]:
        raise ValueError(
            f"`past_key_values` must hold states of {wanted[0]} rows and {wanted[1]} features in layer {layer_idx}, "
            f"got {found[0]} rows and {found[1]} features."
        )
    keys, values = layer.keys, layer.values
    if layer.writes_in_place and torch.is_grad_enabled():  # a backward would find what was written since
        keys, values = keys.clone(), values.clone()
    # One state beside the first needs no time to be taken apart; a split into no parts could not be read from a file of
    # torch.export.
    return (keys, values)[: len(sizes)] if len(sizes) <= 2 else (keys, *values.split(sizes[1:], dim=-1))


def _pack(state: State) -> tuple[torch.Tensor, torch.Tensor]:
    if len(state) == 2:
        return state
    first, *rest = state
    return first, torch.cat(rest, dim=-1) if rest else first.new_empty(*first.shape[:-1], 0)


def write_state(
    past_key_values: Cache | None,
    layer_idx: int,
    state: State,
    num_tokens: int,
    history: State | None = None,
    initial: State | None = None,
) -> None:
    """
    Stores the state of a layer; does nothing without a cache.

    Args:
        past_key_values (`Cache`, *optional*): The cache.
        layer_idx (`int`): Which layer.
        state (`tuple` of `torch.Tensor` of shape `(batch, size)`): The state after the last token.
        num_tokens (`int`): Number of tokens read.
        history (`tuple` of `torch.Tensor` of shape `(num_tokens, batch, size)`): The states after each token.
        initial (`tuple` of `torch.Tensor` of shape `(batch, size)`): The state before the first token.
    """
    if past_key_values is None:
        return
    layer = _state_layer(past_key_values, layer_idx)
    recorded = {} if history is None else {"history": _pack(history), "initial": _pack(initial)}
    layer.update(*_pack(state), num_tokens=num_tokens, **recorded)


def detach_state(past_key_values: Cache) -> Cache:
    """
    Cuts the state off from the computation that led to it, in place, so that the next piece of a text can go on from it
    after `backward()` (truncated backpropagation through time).

    Args:
        past_key_values (`Cache`): A cache of recurrent states.

    Returns:
        The same cache.
    """
    is_pair = isinstance(past_key_values, EncoderDecoderCache)
    for layer in (past_key_values.self_attention_cache if is_pair else past_key_values).layers:
        if layer.is_initialized:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        if layer.history is not None:
            layer.history = tuple(states.detach() for states in layer.history)
    return past_key_values
