"""The `rnn_seq2seq` family: a recurrent encoder, a recurrent decoder that attends to it, and the head on them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPooling,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs, maybe_install_capturing_hooks

from .attention import ATTENTION_SCORES, Attention, AttentionMemory, CrossAttentions, merge_heads, split_heads
from .configuration_rnn_seq2seq import RNNSeq2SeqConfig
from .decoder_operator import register_decoder, run_positions_opaquely
from .deferred_logits import vocabulary_logits
from .fast_paths import may_take
from .generation_masks import GenerationMasks
from .hyperbolic_tangent import tanh, tanh_
from .kept_for_texts import keep, may_keep
from .large_products import large_linear
from .linear_modules import apply_linear, apply_transposed, is_just_linear
from .opaque_operators import is_compiled
from .packed_linear import begin_text, packed_linear
from .pointer_generator import CopyGate, mixture_log_probabilities, repeat_at_padding, without_extended_ids
from .recurrent_cache import (
    cache_of,
    cache_output,
    cache_to_fill,
    given_cache,
    is_recording,
    read_state,
    write_state,
)
from .recurrent_cells import Linear, State
from .recurrent_kernels import loop_linear
from .recurrent_layer import Dropout, HiddenStates, Padding, RecurrentLayer, make_layers
from .recurrent_model import (
    RecurrentPreTrainedModel,
    embed_inputs,
    hidden_states_recorder,
    select_positions,
    vocabulary_projection,
)
from .recurrent_segments import Segments, find_loop_segments, read_steps, show_steps
from .recurrent_stack import run_layers
from .seq2seq_losses import coverage_loss, guided_alignment_loss, mean_over_labels, uniform_loss
from .shared_sources import SharedSources, count_rows_per_source, once_per_source


def shift_tokens_right(labels: torch.Tensor, decoder_start_token_id: int | None, pad_token_id: int | None):
    """
    The decoder's inputs for given labels `[batch, target]`: the start token, then all labels but the last.

    Raises:
        `ValueError`: `decoder_start_token_id` is None.
    """
    if decoder_start_token_id is None:
        raise ValueError("`decoder_start_token_id` must be set in the configuration to make inputs of the decoder.")
    shifted = labels.roll(1, dims=1)
    shifted[:, :1] = decoder_start_token_id
    # Behind a label that is ignored nothing is predicted, so that any token will do.
    return shifted.masked_fill(shifted == -100, decoder_start_token_id if pad_token_id is None else pad_token_id)


@dataclass
class CopyableEncoderOutput(BaseModelOutputWithPooling):
    """
    What the encoder of a pointer-generator returns.

    Args:
        source_ids (`torch.LongTensor` of shape `(batch, source)`, *optional*): The tokens that were read, which may be
            copied; beside the fields of [`~transformers.modeling_outputs.BaseModelOutputWithPooling`].
    """

    source_ids: torch.LongTensor | None = None


def positions_before_last_label(labels: torch.Tensor) -> torch.Tensor:
    """True `[batch, target]` up to the last label of a row that is not ignored (-100): nothing depends on the rest."""
    return (labels != -100).flip(1).cumsum(1).flip(1) > 0


def _hold(is_token: torch.Tensor | None, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """`new`, but `old` in rows where there is no token; `new` everywhere where nothing is known of that."""
    return new if is_token is None else torch.where(is_token, new, old)


class RNNSeq2SeqPreTrainedModel(RecurrentPreTrainedModel):
    """Base class of the family."""

    config: RNNSeq2SeqConfig

    def known_ids(self, input_ids: torch.Tensor | None) -> torch.Tensor | None:
        """The tokens as they are embedded: words that only a pointer-generator knows are unknown ones."""
        unknown = self.config.unk_token_id if self.config.pointer_generator else None
        return without_extended_ids(input_ids, self.config.vocab_size, unknown)


class RNNSeq2SeqEncoder(RNNSeq2SeqPreTrainedModel):
    """
    Token embeddings and a stack of recurrent layers, in one direction or two.

    Args:
        config (`RNNSeq2SeqConfig`): The configuration.
    """

    _can_record_outputs = {"hidden_states": hidden_states_recorder("num_encoder_hidden_states")}

    def __init__(self, config: RNNSeq2SeqConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        self.embedding_dropout = Dropout(config.embedding_dropout)
        self.embedded = HiddenStates()
        self.layers = make_layers(config, config.encoder_layers, config.embedding_size, config.encoder_bidirectional)
        self.output_dropout = Dropout(config.output_dropout)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, source)`, *optional*): Source tokens.
            attention_mask (`torch.Tensor` of shape `(batch, source)`, *optional*): Non-zero where there is a token.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, source, embedding_size)`, *optional*):
                Embeddings in place of `input_ids`.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` `(batch, source, encoder_output_size)`, and in
            `pooler_output` the final states side by side: for each layer, each direction and each state of the cell
            `hidden_size` numbers.

        Raises:
            `ValueError`: Not exactly one of `input_ids` and `inputs_embeds`, or a mask of a wrong shape.
        """
        inputs_embeds = embed_inputs(self.config, self.embed_tokens, self.known_ids(input_ids), inputs_embeds)
        padding = Padding.from_attention_mask(attention_mask, inputs_embeds)
        hidden_states = self.embedded(self.embedding_dropout(inputs_embeds))
        hidden_states, final_states, _ = run_layers(self.layers, hidden_states, [None] * len(self.layers), padding)
        fields = {
            "last_hidden_state": self.output_dropout(hidden_states),
            "pooler_output": torch.cat(sum(final_states, ()), dim=-1),
        }
        if self.config.pointer_generator:
            return CopyableEncoderOutput(**fields, source_ids=input_ids)
        return BaseModelOutputWithPooling(**fields)


class StateBridge(nn.Module):
    r"""
    From the final states of the encoder to the initial states of the decoder: each layer of the decoder starts from
    the layer of the encoder at the same distance from the top (the lowest, if there is none),

        h_0 = tanh(W_h [h_left-to-right; h_right-to-left] + b_h)

    and likewise, but without the tanh, for every other state of the cell.

    Args:
        config (`RNNSeq2SeqConfig`): The configuration.
        num_states (`int`): Number of states of the cell.
    """

    def __init__(self, config: RNNSeq2SeqConfig, num_states: int):
        super().__init__()
        self.hidden_size = config.hidden_size
        self.num_states = num_states
        self.num_directions = 2 if config.encoder_bidirectional else 1
        self.encoder_layers = config.encoder_layers
        offset = config.encoder_layers - config.decoder_layers
        self.sources = [max(0, layer_idx + offset) for layer_idx in range(config.decoder_layers)]
        self.projections = nn.ModuleList(
            nn.ModuleList(nn.Linear(config.encoder_output_size, config.hidden_size) for _ in range(num_states))
            for _ in range(config.decoder_layers)
        )

    def forward(self, final_states: torch.Tensor) -> list[State]:
        """
        Args:
            final_states (`torch.Tensor` of shape `(batch, layers * directions * states * hidden_size)`):
                `pooler_output` of the encoder.

        Returns:
            For each layer of the decoder its states `(batch, hidden_size)`.

        Raises:
            `ValueError`: The states have another width than this encoder's.
        """
        shape = (self.encoder_layers, self.num_directions, self.num_states, self.hidden_size)
        if final_states.shape[-1] != math.prod(shape):
            raise ValueError(
                f"The encoder's final states must have the width {math.prod(shape)} (layers, directions, states and "
                f"`hidden_size`: {shape}), got {final_states.shape[-1]}."
            )
        final_states = final_states.unflatten(-1, shape).transpose(2, 3).flatten(3)  # [batch, layer, state, features]
        states = []
        for source, projections in zip(self.sources, self.projections):
            hidden, *others = (linear(final_states[:, source, index]) for index, linear in enumerate(projections))
            states.append((tanh(hidden), *others))
        return states


@register_decoder
class RNNSeq2SeqDecoder(RNNSeq2SeqPreTrainedModel):
    r"""
    Token embeddings and a stack of recurrent layers that attend to the encoder's output v_1 ... v_S. For the input
    embedding x_t, the outputs s_t of the top layer and the context c(q) of a query q:

    - `"luong"`: s_t = layers(x_t), or with input feeding layers([x_t; a_{t-1}]); a_t = tanh(W [c(s_t); s_t])
    - `"bahdanau"`: c_t = c(h_{t-1}) for the hidden state h of the top layer; s_t = layers([x_t; c_t]);
      a_t = tanh(W [c_t; s_t; x_t])
    - `"gnmt"`: u_t = first layer(x_t); c_t = c(u_t); every layer above reads [output of the layer below; c_t];
      a_t = s_t

    The attentional vector a_t is the output. `"luong"` without input feeding and `"gnmt"` run over a whole target at
    once, the others step by step (and their layers take no part in gradient checkpointing). Where the score reads what
    earlier positions attended to, the attention of the first two runs step by step between layers that do not.

    Args:
        config (`RNNSeq2SeqConfig`): The configuration.
    """

    _can_record_outputs = {
        "hidden_states": hidden_states_recorder("num_decoder_hidden_states"),
        "cross_attentions": OutputRecorder(CrossAttentions, index=0),
    }

    def __init__(self, config: RNNSeq2SeqConfig):
        super().__init__(config)
        hidden_size, memory_size = config.hidden_size, config.encoder_output_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        self.embedding_dropout = Dropout(config.embedding_dropout)
        self.embedded = HiddenStates()
        input_size = config.embedding_size
        if config.decoder_type == "bahdanau":
            input_size += memory_size
        elif config.input_feeding:
            input_size += hidden_size
        if config.decoder_type == "gnmt":
            self.layers = make_layers(config, 1, input_size)
            for layer_idx in range(1, config.decoder_layers):
                self.layers.append(RecurrentLayer(config, hidden_size + memory_size, layer_idx))
        else:
            self.layers = make_layers(config, config.decoder_layers, input_size)
        self.bridge = StateBridge(config, len(self.layers[0].state_sizes))
        score = ATTENTION_SCORES[config.attention_score].from_config(config, hidden_size, memory_size)
        score.apply_linear, score.apply_transposed, score.tanh_ = apply_linear, apply_transposed, tanh_
        self.attention = Attention(score, config.use_coverage)
        self.cross_attentions = CrossAttentions()
        combined_size = {
            "luong": memory_size + hidden_size,
            "bahdanau": memory_size + hidden_size + config.embedding_size,
        }.get(config.decoder_type)
        self.combine = None if combined_size is None else nn.Linear(combined_size, hidden_size, bias=False)
        self.output_dropout = Dropout(config.output_dropout)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def runs_step_by_step(self) -> bool:
        """Whether a position depends on what was computed at the one before beyond the recurrence of a layer."""
        return self.config.decoder_type == "bahdanau" or self.config.input_feeding

    @property
    def loops_over_positions(self) -> bool:
        """Whether positions come one behind the other beyond the recurrence of a layer, in the attention perhaps."""
        return self.runs_step_by_step or bool(self.attention.state_names)

    # The top hidden state is that of the recurrence, not the attentional vector made of it.
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.FloatTensor | None = None,
        encoder_final_states: torch.FloatTensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        rows_per_source: int = 1,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, target)`, *optional*): Target tokens, shifted right.
            attention_mask (`torch.Tensor` of shape `(batch, past + target)` or `(batch, target)`, *optional*):
                Non-zero where there is a target token.
            encoder_hidden_states (`torch.FloatTensor` of shape `(batch, source, encoder_output_size)`):
                What to attend to.
            encoder_final_states (`torch.FloatTensor` of shape `(batch, encoder states)`):
                `pooler_output` of the encoder, from which the first state is made. Not needed to go on from a state.
            encoder_attention_mask (`torch.Tensor` of shape `(batch, source)`, *optional*):
                Non-zero where there is a source token.
            past_key_values (`Cache`, *optional*): The state to go on from.
            cache (`Cache`, *optional*): The same, by the name that it has since transformers 5.24.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, target, embedding_size)`, *optional*):
                Embeddings in place of `input_ids`.
            use_cache (`bool`, *optional*):
                Whether to return the state. By default as the configuration says, and not while training.
            rows_per_source (`int`, *optional*, defaults to 1):
                How many rows, one behind the other, attend to the same source, as beams do. What belongs to sources
                then has a `batch` smaller by that factor. Not where the attention has a state.

        Returns:
            `BaseModelOutputWithPastAndCrossAttentions`: `last_hidden_state` `(batch, target, hidden_size)`, the
            attentional vectors; `past_key_values`; on request `hidden_states`, the embeddings and the output of each
            layer, and `cross_attentions`, one tensor `(batch, heads, target, source)`, which at padding has the weights
            of the token before it.

        Raises:
            `ValueError`: Not exactly one of `input_ids` and `inputs_embeds`, one of them, a mask, a state or what the
                encoder returned of a wrong shape, or nothing to attend to or to start from.
        """
        past_key_values = given_cache(past_key_values, cache)
        tokens = self.known_ids(input_ids)
        inputs_embeds = embed_inputs(self.config, self.embed_tokens, tokens, inputs_embeds, prefix="decoder_")
        batch_size, seq_length = inputs_embeds.shape[:2]
        if encoder_hidden_states is None:
            raise ValueError("`encoder_hidden_states` must be given: there is nothing else to attend to.")
        source_shape, memory_size = tuple(encoder_hidden_states.shape), self.config.encoder_output_size
        if batch_size % rows_per_source or (rows_per_source > 1 and self.attention.state_names):
            raise ValueError(
                f"`rows_per_source` must divide the {batch_size} rows, and be 1 where attention has a state."
            )
        num_sources = batch_size // rows_per_source
        if len(source_shape) != 3 or source_shape[0] != num_sources or source_shape[2] != memory_size:
            raise ValueError(
                f"`encoder_hidden_states` must have the shape ({num_sources}, source, {memory_size}), got "
                f"{source_shape}."
            )
        num_layers = len(self.layers) + self.config.attention_has_state
        target = cache_to_fill(self.config, past_key_values, use_cache, self.training, num_layers)
        # Of texts that are read step by step.
        text = target if seq_length == 1 else None
        memory = self.prepare_memory(encoder_hidden_states, encoder_attention_mask, text)
        states = self._initial_states(past_key_values, encoder_final_states, memory, rows_per_source)
        recording = is_recording(target, 0)
        padding = Padding.from_attention_mask(attention_mask, inputs_embeds, past_key_values is not None)
        hidden_states = self.embedded(self.embedding_dropout(inputs_embeds))
        run = self.run_positions
        # A single position goes into a graph as it is.
        if is_compiled() and self.loops_over_positions and seq_length > 1 and not recording:
            run = partial(run_positions_opaquely, self)
        outputs, weights, new_states, histories = run(
            hidden_states, states, padding, memory, target is not None, recording
        )
        self.cross_attentions(weights)
        for layer_idx, initial in enumerate(states):
            write_state(target, layer_idx, new_states[layer_idx], seq_length, histories[layer_idx], initial)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=outputs, **cache_output(target))

    def run_positions(
        self,
        hidden_states: torch.Tensor,
        states: list[State],
        padding: Padding | None,
        memory: AttentionMemory,
        needs_state: bool,
        recording: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, list[State | None], list[State | None]]:
        """
        All positions, step by step or layer by layer.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, target, embedding_size)`): The embeddings.
            states: What each layer starts from, and the attention if it has a state, see `_initial_states`.
            padding (`Padding`, *optional*): Where the tokens lie.
            memory (`AttentionMemory`): What to attend to.
            needs_state, recording (`bool`): Whether the final states are asked for, and those after each position.

        Returns:
            The attentional vectors `(batch, target, hidden_size)`, the weights `(batch, heads, target, source)`, and
            for each of `states` the final ones and those after each position.
        """
        run = self._run_steps if self.runs_step_by_step else self._run_layers
        return run(hidden_states, states, padding, memory, needs_state, recording)

    def _initial_states(
        self,
        past_key_values: Cache | None,
        final_states: torch.Tensor | None,
        memory: AttentionMemory,
        rows_per_source: int = 1,
    ) -> list[State]:
        """
        The states of each layer, then that of the attention if it has one. Step by step, those of the first layer end
        with the last attentional vector.
        """
        num_sources = memory.keys.shape[0]
        batch_size = num_sources * rows_per_source
        states = []
        for layer_idx, layer in enumerate(self.layers):
            sizes = list(layer.state_sizes)
            if layer_idx == 0 and self.runs_step_by_step:
                sizes.append(self.config.hidden_size)
            states.append(read_state(past_key_values, layer_idx, sizes, batch_size))
        if self.attention.state_names:
            sizes = self.attention.state_sizes(memory)
            states.append(read_state(past_key_values, len(self.layers), sizes, batch_size))
        if states[0] is not None:
            return states
        if not torch.compiler.is_compiling():
            begin_text(is_long=False)  # perhaps of a source that was read before
        if final_states is None:
            raise ValueError(
                "`encoder_outputs` must hold the encoder's final states in `pooler_output`, its second entry: pass on "
                "what the encoder of this model returned."
            )
        if final_states.shape[0] != num_sources:
            raise ValueError(
                f"The encoder's final states must be those of {num_sources} rows, got {final_states.shape[0]}."
            )
        states = self.bridge(final_states)
        if rows_per_source > 1:
            states = [tuple(part.repeat_interleave(rows_per_source, dim=0) for part in state) for state in states]
        if self.runs_step_by_step:
            states[0] = (*states[0], torch.zeros_like(states[0][0]))
        if self.attention.state_names:
            states.append(self.attention.initial_state(memory))
        return states

    def _gather_around_steps(self) -> None:
        """FSDP gathers the parameters of a layer around its `forward`; here it has to around every `step` as well."""
        for layer in self.layers:
            if isinstance(layer, FSDPModule) and "step" not in vars(layer):
                register_fsdp_forward_method(layer, "step")

    def prepare_memory(
        self, features: torch.Tensor, mask: torch.Tensor | None, text: Cache | None = None
    ) -> AttentionMemory:
        """
        What to attend to.

        Args:
            features (`torch.Tensor` of shape `(batch, source, encoder_output_size)`): What the encoder returned.
            mask (`torch.Tensor` of shape `(batch, source)`, *optional*): Non-zero where there is a token.
            text (`Cache`, *optional*): The cache of texts of which more steps will follow, for which what all of them
                need is kept.
        """
        attention, parameters = self.attention, list(self.attention.score.parameters())
        if text is None or not may_keep(features, *parameters):
            return attention.prepare(features, mask)
        kept = keep(text, "keys", features, parameters, lambda: attention.keys_for_steps(features))
        memory = attention.prepare(features, mask, *kept)
        # For W [c; s] = W_c c + W_s s in "luong", c = sum_j alpha_j v_j: W_c v_j in place of v_j.
        maps_values = (
            self.config.decoder_type == "luong"
            and self.config.num_attention_heads == 1
            and self.config.hidden_size <= self.config.encoder_output_size
            and not attention.state_names
            and is_just_linear(self.combine)
            and may_take("mapped_values")
            and may_keep(features, self.combine.weight)
        )
        if not maps_values:
            return memory
        weight = self.combine.weight
        (values,) = keep(
            text, "values", features, [weight], lambda: (large_linear(features, weight[:, : features.shape[-1]]),)
        )
        return memory._replace(values=split_heads(values, 1), are_values_mapped=True)

    def _attentional_vectors(
        self,
        context: torch.Tensor,
        *features: torch.Tensor,
        linear: Linear | None = None,
        memory: AttentionMemory | None = None,
    ):
        if memory is not None and memory.are_values_mapped:
            first_column = self.config.encoder_output_size
            combined = context + packed_linear(*features, self.combine.weight, first_column=first_column)
        else:
            combined = apply_linear(self.combine, torch.cat([context, *features], dim=-1), linear)
        return self.output_dropout(tanh(combined))

    def _run_layers(
        self,
        hidden_states: torch.Tensor,
        states: list[State],
        padding: Padding | None,
        memory: AttentionMemory,
        needs_state: bool,
        recording: bool,
    ):
        """Layer by layer over all positions at once."""
        of_attention = states[-1] if self.attention.state_names else ()
        target_mask = None if padding is None else padding.mask
        # The layers up to the one that attends, which is the last of them but for "gnmt".
        layers = list(self.layers)
        attending = 1 if self.config.decoder_type == "gnmt" else len(layers)
        hidden_states, new_states, histories = run_layers(
            layers[:attending], hidden_states, states[:attending], padding, needs_state, recording
        )
        context, weights, attended = self.attention.walk(hidden_states, memory, of_attention, target_mask)
        for layer, state in zip(layers[attending:], states[attending:]):
            inputs = torch.cat([hidden_states, context], dim=-1)
            hidden_states, new_state, history = layer(inputs, state, padding, needs_state, recording)
            new_states.append(new_state)
            histories.append(history)
        if self.config.decoder_type == "gnmt":
            outputs = self.output_dropout(hidden_states)
        else:
            outputs = self._attentional_vectors(context, hidden_states, memory=memory)
        if self.attention.state_names:
            new_states.append(attended[-1] if attended else of_attention)
            histories.append(_stack_steps(attended, of_attention) if recording else None)
        return outputs, weights, new_states, histories

    def _run_steps(
        self,
        embeddings: torch.Tensor,
        states: list[State],
        padding: Padding | None,
        memory: AttentionMemory,
        needs_state: bool,
        recording: bool,
    ):
        """
        Position by position through all layers. At padding the last attentional vector and the last weights are
        repeated; before the first token the weights are zero.
        """
        self._gather_around_steps()
        if embeddings.shape[1] == 0:
            return self._run_no_step(embeddings, states, memory, recording)
        feeds = self.config.input_feeding
        *first, vector = states[0]
        states = [tuple(first), *states[1:]]
        num_steps = embeddings.shape[1]
        linear = loop_linear(embeddings, num_steps)
        linears = [layer.loop_linear(embeddings, num_steps) for layer in self.layers]
        shares_sources = memory.keys.shape[0] != embeddings.shape[0]
        in_segments = not (needs_state or recording or shares_sources)
        if in_segments and not any(layer.recurrent_dropout for layer in self.layers):
            segments = find_loop_segments(padding)
            if segments is not None:
                return self._run_segments(embeddings, [*states, (vector,)], memory, segments, linears, linear)
        is_token = [None] * embeddings.shape[1] if padding is None else padding.mask.unsqueeze(-1).unbind(1)

        contexts, weights, vectors, layer_outputs, steps = [], [], [], [], []
        for position, embedding in enumerate(embeddings.unbind(1)):
            outputs, states, context, weight = self._step(
                embedding, states, vector, memory, is_token[position], linears, linear
            )
            if feeds:
                new = self._attentional_vectors(context.squeeze(1), outputs[-1], linear=linear, memory=memory)
                vector = _hold(is_token[position], new, vector)
                vectors.append(vector)
            if is_token[position] is not None:
                last = weights[-1] if weights else torch.zeros_like(weight)
                weight = torch.where(is_token[position][..., None, None], weight, last)
            contexts.append(context)
            weights.append(weight)
            layer_outputs.append(outputs)
            steps.append(list(states))
        for layer, outputs in zip(self.layers, zip(*layer_outputs)):
            hidden_states = layer.recorded(torch.stack(outputs, dim=1))
        if not feeds:
            # Nothing waits for these, so that all positions are done at once.
            all_vectors = self._attentional_vectors(torch.cat(contexts, dim=1), hidden_states, embeddings)
            for position, new in enumerate(all_vectors.unbind(1)):
                vector = _hold(is_token[position], new, vector)
                vectors.append(vector)
        for step, step_vector in zip(steps, vectors):
            step[0] = (*step[0], step_vector)
        histories = [None] * len(states)
        if recording:
            histories = [_stack_steps(layer_steps) for layer_steps in zip(*steps)]
        return torch.stack(vectors, dim=1), torch.cat(weights, dim=2), steps[-1], histories

    def _step(
        self,
        embedding: torch.Tensor,
        states: list[State],
        vector: torch.Tensor,
        memory: AttentionMemory,
        is_token: torch.Tensor | None,
        linears: list[Linear],
        linear: Linear,
    ) -> tuple[list[torch.Tensor], list[State], torch.Tensor, torch.Tensor]:
        """One position: the output of each layer, the new states, the context and the weights."""
        feeds, states, outputs = self.config.input_feeding, list(states), []
        of_attention = states[-1] if self.attention.state_names else ()
        if not feeds:
            top = states[len(self.layers) - 1][0]
            context, weights = self.attention(top.unsqueeze(1), memory, of_attention)
        inputs = torch.cat([embedding, vector if feeds else context.squeeze(1)], dim=-1)
        for index, layer in enumerate(self.layers):
            inputs, states[index] = layer.step(inputs, states[index], is_token, linears[index], linear)
            outputs.append(inputs)
        if feeds:
            context, weights = self.attention(inputs.unsqueeze(1), memory, of_attention)
        if of_attention:
            states[-1] = self.attention.next_state(of_attention, weights, context, is_token)
        return outputs, states, context, weights

    def _run_segments(
        self,
        embeddings: torch.Tensor,
        states: list[State],
        memory: AttentionMemory,
        segments: Segments,
        linears: list[Linear],
        linear: Linear,
    ):
        """
        [`~RNNSeq2SeqDecoder._run_steps`] with those rows alone that have not ended, and without the final states; the
        last of `states` is the vector to feed. At padding everything is repeated, the weights too.
        """
        feeds = self.config.input_feeding
        steps = segments.direction(False)
        features = read_steps(embeddings, steps)
        initial = [state[0] for state in states]
        states = [tuple(part.index_select(0, segments.order) for part in state) for state in states]
        memory = memory.change_rows(lambda part: part.index_select(0, segments.order))
        contexts, weights, vectors, layer_outputs = [], [], [], []
        for start, stop, rows, first in segments.pieces:
            *states, (vector,) = [tuple(part[:rows] for part in state) for state in states]
            memory = memory.change_rows(lambda part, rows=rows: part[:rows])
            for embedding in features[first : first + (stop - start) * rows].split(rows):
                outputs, states, context, weight = self._step(embedding, states, vector, memory, None, linears, linear)
                if feeds:
                    vector = self._attentional_vectors(context.squeeze(1), outputs[-1], linear=linear)
                    vectors.append(vector)
                contexts.append(context.squeeze(1))
                weights.append(weight)
                layer_outputs.append(outputs)
            states.append((vector,))
        layer_outputs = [torch.cat(outputs) for outputs in zip(*layer_outputs)]
        for layer, outputs, first_output in zip(self.layers, layer_outputs, initial):
            layer.recorded(show_steps(outputs, steps, first_output))
        if feeds:
            vectors = torch.cat(vectors)
        else:
            vectors = self._attentional_vectors(torch.cat(contexts), layer_outputs[-1], features)
        weights = torch.cat(weights)
        shown = show_steps(weights.flatten(1), steps, weights.new_zeros(1, 1))
        weights = shown.unflatten(-1, (weights.shape[1], -1)).transpose(1, 2)
        no_states = [None] * len(states[:-1])
        return show_steps(vectors, steps, initial[-1]), weights, no_states, no_states

    def _run_no_step(self, embeddings: torch.Tensor, states: list[State], memory: AttentionMemory, recording: bool):
        """A target without a single position leaves the states as they are."""
        outputs = embeddings.new_empty(embeddings.shape[0], 0, self.config.hidden_size)
        for layer in self.layers:
            layer.recorded(outputs)
        _, num_heads, source, _ = memory.keys.shape
        weights = memory.values.new_empty(embeddings.shape[0], num_heads, 0, source)
        histories = [None] * len(states)
        if recording:
            histories = [_stack_steps([], state) for state in states]
        return outputs, weights, states, histories


def _stack_steps(steps: Sequence[State], initial: State = ()) -> State:
    """The states after each step `[steps, batch, ...]`; `initial` has their shape where there is no step."""
    if not steps:
        return tuple(part.new_empty(0, *part.shape) for part in initial)
    return tuple(map(torch.stack, zip(*steps)))


class RNNSeq2SeqModel(RNNSeq2SeqPreTrainedModel):
    r"""
    A recurrent encoder and a recurrent decoder that attends to it, with one embedding for source and target tokens.

    Args:
        config (`RNNSeq2SeqConfig`): The configuration.
    """

    _tied_weights_keys = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }

    def __init__(self, config: RNNSeq2SeqConfig):
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.embedding_size)
        self.encoder = RNNSeq2SeqEncoder(config)
        self.decoder = RNNSeq2SeqDecoder(config)
        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict:
        # Source and target share their embedding whether the projection shares it or not.
        return super().get_expanded_tied_weights_keys(True) if all_submodels else dict(self._tied_weights_keys)

    def get_input_embeddings(self):
        return self.shared

    def set_input_embeddings(self, value):
        self.shared = self.encoder.embed_tokens = self.decoder.embed_tokens = value

    def _embed(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """
        Hooks on `get_input_embeddings()`, such as the noise of NEFTune, are to act on source and target, whose own
        embeddings share no more than its weight: where there are any, the tokens are embedded by it.
        """
        if input_ids is None or inputs_embeds is not None or not self.shared._forward_hooks:
            return input_ids, inputs_embeds
        return None, self.shared(self.known_ids(input_ids))

    def encode(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """What [`RNNSeq2SeqEncoder`] returns for a source; hooks on the shared embeddings act on it."""
        input_ids, inputs_embeds = self._embed(input_ids, inputs_embeds)
        return self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, return_dict=True, **kwargs
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutputWithPooling | tuple[torch.FloatTensor, ...] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqModelOutput:
        r"""
        Args:
            input_ids, attention_mask, inputs_embeds: The source, as in [`RNNSeq2SeqEncoder`].
            decoder_input_ids, decoder_attention_mask, decoder_inputs_embeds, past_key_values, use_cache, cache: The
                target, as in [`RNNSeq2SeqDecoder`]. Without any the source tokens, shifted right, are the target.
            encoder_outputs (`BaseModelOutputWithPooling` or `tuple`, *optional*):
                What the encoder returned for the source, in place of `input_ids`.

        Returns:
            `Seq2SeqModelOutput`: the attentional vectors `last_hidden_state` `(batch, target, hidden_size)`, and what
            encoder and decoder return.

        Raises:
            `ValueError`: No target can be made, or what encoder and decoder refuse.
        """
        if encoder_outputs is None:
            encoder_outputs = self.encode(input_ids, attention_mask, inputs_embeds, **kwargs)
        elif not hasattr(encoder_outputs, "last_hidden_state"):
            last_hidden_state, final_states, hidden_states = (*encoder_outputs[:3], None, None)[:3]
            encoder_outputs = BaseModelOutputWithPooling(last_hidden_state, final_states, hidden_states)
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            if input_ids is None:
                raise ValueError("Give `decoder_input_ids` or `decoder_inputs_embeds` where there are no `input_ids`.")
            decoder_input_ids = shift_tokens_right(
                input_ids, self.config.decoder_start_token_id, self.config.pad_token_id
            )
        decoder_input_ids, decoder_inputs_embeds = self._embed(decoder_input_ids, decoder_inputs_embeds)
        rows_per_source = count_rows_per_source(encoder_outputs)
        if rows_per_source > 1 and attention_mask is not None:
            attention_mask = attention_mask[::rows_per_source]
        decoder_outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_final_states=encoder_outputs.get("pooler_output"),
            encoder_attention_mask=attention_mask,
            cache=given_cache(past_key_values, cache),
            inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            rows_per_source=rows_per_source,
            return_dict=True,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            decoder_hidden_states=decoder_outputs.hidden_states,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.get("hidden_states"),
            **cache_output(cache_of(decoder_outputs)),
        )


class RNNSeq2SeqForConditionalGeneration(GenerationMasks, SharedSources, RNNSeq2SeqPreTrainedModel, GenerationMixin):
    r"""
    The encoder-decoder with a projection to the vocabulary: translation, transliteration, correction, summaries.

    Args:
        config (`RNNSeq2SeqConfig`): The configuration.
    """

    _tied_weights_keys = {"lm_head.weight": "model.shared.weight"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: RNNSeq2SeqConfig):
        super().__init__(config)
        self.model = RNNSeq2SeqModel(config)
        self.projection, self.lm_head = vocabulary_projection(config, config.hidden_size)
        gate_size = config.encoder_output_size + config.hidden_size + config.embedding_size
        self.copy_gate = CopyGate(gate_size) if config.pointer_generator else None
        self.post_init()
        if config.pointer_generator or config.coverage_loss_weight > 0:
            self._install_hooks()

    # A graph cannot hold the lock under which the hooks are installed that record what is asked for.
    @torch.compiler.assume_constant_result
    def _install_hooks(self) -> bool:
        for module in (self.model.encoder, self.model.decoder):
            maybe_install_capturing_hooks(module)
        return True

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """The decoder's inputs `[batch, target]` for labels of that shape, for data collators."""
        return shift_tokens_right(labels, self.config.decoder_start_token_id, self.config.pad_token_id)

    @can_return_tuple
    @once_per_source
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutputWithPooling | tuple[torch.FloatTensor, ...] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        alignments: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqLMOutput:
        r"""
        Args:
            input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs, past_key_values,
            inputs_embeds, decoder_inputs_embeds, use_cache, cache: As in [`RNNSeq2SeqModel`].
            labels (`torch.LongTensor` of shape `(batch, target)`, *optional*):
                The target tokens; -100 where there is none. The decoder's inputs are made of them if none are given,
                and in training on a CPU nothing is computed behind the last label of a row.
            logits_to_keep (`int` or `torch.Tensor`, *optional*):
                How many positions at the end, or which, to compute logits for; 0 for all.
            alignments (`torch.Tensor` of shape `(batch, target, source)`, *optional*):
                How much the words that are predicted belong to those of the source, zero or more, to train attention
                with; see `guided_alignment_weight`.

        Returns:
            `Seq2SeqLMOutput`: `loss` in nats per label, while training with what the configuration adds to it; `logits`
            `(batch, target, vocab_size)`, and what [`RNNSeq2SeqModel`] returns.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
            # On other devices and in graphs a mask costs more than the steps that it saves.
            saves_steps = self.training and labels.device.type == "cpu" and not torch.compiler.is_compiling()
            if saves_steps and decoder_attention_mask is None:
                decoder_attention_mask = positions_before_last_label(labels)
        trains = self.training and labels is not None
        if trains and decoder_input_ids is not None and self.config.scheduled_sampling > 0:
            if encoder_outputs is None:
                encoder_outputs = self.model.encode(input_ids, attention_mask, inputs_embeds, **kwargs)
            decoder_input_ids = self._mix_in_predictions(
                decoder_input_ids, decoder_attention_mask, encoder_outputs, attention_mask, input_ids
            )
        returns_attentions = kwargs.get("output_attentions", self.config.output_attentions)
        if trains and (alignments is not None or self.config.coverage_loss_weight > 0):
            kwargs["output_attentions"] = True
            if torch.compiler.is_dynamo_compiling():
                self._install_hooks()
        returns_states = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        if self.copy_gate is not None:
            kwargs |= {"output_attentions": True, "output_hidden_states": True}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            return_dict=True,
            **kwargs,
        )
        hidden_states = self.projection(select_positions(outputs.last_hidden_state, logits_to_keep))
        for_loss = trains and self.config.label_smoothing == 0 and self.copy_gate is None
        logits = vocabulary_logits(self.lm_head, hidden_states, for_loss=for_loss)
        if self.copy_gate is not None:
            source_ids = getattr(encoder_outputs, "source_ids", None) if input_ids is None else input_ids
            logits = self._mix_in_copies(logits, outputs, source_ids, decoder_attention_mask, logits_to_keep)
        loss = None
        if labels is not None:
            # The labels are aligned with the logits already.
            loss = self.loss_function(
                logits=logits, labels=None, vocab_size=self.config.num_output_ids, shift_labels=labels, **kwargs
            )
            if self.training:
                number = kwargs.get("num_items_in_batch")
                loss = self._add_losses(loss, logits, labels, outputs, decoder_attention_mask, alignments, number)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            decoder_hidden_states=outputs.decoder_hidden_states if returns_states else None,
            cross_attentions=outputs.cross_attentions if returns_attentions else None,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states if returns_states else None,
            **cache_output(cache_of(outputs)),
        )

    def _mix_in_copies(self, logits, outputs, source_ids, target_mask, logits_to_keep):
        """The log-probabilities `(batch, target, vocab_size + num_copy_ids)` of generating or copying."""
        if source_ids is None:
            raise ValueError("Give `input_ids`, or `encoder_outputs` with `source_ids`: there is nothing else to copy.")
        num_ids = self.config.num_output_ids
        if not torch.compiler.is_compiling() and source_ids.device.type == "cpu" and source_ids.numel() > 0:
            highest = int(source_ids.max())
            if highest >= num_ids:
                raise ValueError(
                    f"`input_ids` must be below `vocab_size` + `num_copy_ids` ({num_ids}) of a pointer-generator, got "
                    f"{highest}."
                )
        values = outputs.encoder_last_hidden_state
        weights = outputs.cross_attentions[0]
        context = merge_heads(weights @ split_heads(values, weights.shape[1]))
        embedded, *_, top = outputs.decoder_hidden_states
        gates = self.copy_gate(torch.cat([context, top, embedded], dim=-1))
        gates = select_positions(repeat_at_padding(gates, target_mask), logits_to_keep)
        weights = select_positions(repeat_at_padding(weights.mean(1), target_mask), logits_to_keep)
        return mixture_log_probabilities(logits, gates, weights, source_ids, num_ids)

    def compute_transition_scores(self, sequences, scores, *args, **kwargs):
        """As in transformers, which takes the number of scores for `vocab_size`."""
        # All that it asks of a model.
        model = SimpleNamespace(config=SimpleNamespace(get_text_config=self._text_config_with_width))
        return GenerationMixin.compute_transition_scores(model, sequences, scores, *args, **kwargs)

    def _beam_search(self, *args, **kwargs):
        # Older transformers take it for the number of scores here, too.
        if not self.config.pointer_generator:
            return super()._beam_search(*args, **kwargs)
        vars(self.config)["get_text_config"] = self._text_config_with_width
        try:
            return super()._beam_search(*args, **kwargs)
        finally:
            vars(self.config).pop("get_text_config", None)

    def _text_config_with_width(self, *args, **kwargs) -> SimpleNamespace:
        """A text configuration of which only the number of scores is known."""
        return SimpleNamespace(vocab_size=self.config.num_output_ids)

    @torch.no_grad()
    def _mix_in_predictions(
        self, decoder_input_ids, decoder_attention_mask, encoder_outputs, attention_mask, input_ids
    ):
        """
        The decoder's inputs with a share `scheduled_sampling` of what the model itself predicts after those before
        them. The first token is kept, and so is what stands at padding or behind it.
        """
        mixed = decoder_input_ids.clone()
        is_own = torch.rand(mixed.shape, device=mixed.device) < self.config.scheduled_sampling
        if decoder_attention_mask is not None:
            mask = decoder_attention_mask.bool()
            is_own[:, 1:] &= mask[:, 1:] & mask[:, :-1]
        cache, position_mask = None, None
        for position in range(mixed.shape[1] - 1):
            if decoder_attention_mask is not None:
                position_mask = decoder_attention_mask[:, position : position + 1]
            outputs = self.forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                decoder_input_ids=mixed[:, position : position + 1],
                decoder_attention_mask=position_mask,
                encoder_outputs=encoder_outputs,
                cache=cache,
                use_cache=True,
                return_dict=True,
            )
            cache = cache_of(outputs)
            predicted = outputs.logits[:, -1].argmax(-1)
            mixed[:, position + 1] = torch.where(is_own[:, position + 1], predicted, mixed[:, position + 1])
        return mixed

    def _add_losses(self, loss, logits, labels, outputs, target_mask, alignments, num_items_in_batch):
        """The loss with what the configuration adds to it while training."""
        config = self.config
        if config.label_smoothing > 0:
            uniform = mean_over_labels(uniform_loss(logits, config.vocab_size), labels, num_items_in_batch)
            loss = (1 - config.label_smoothing) * loss + config.label_smoothing * uniform
        if config.coverage_loss_weight > 0:
            repeated = coverage_loss(outputs.cross_attentions[0], target_mask)
            loss = loss + config.coverage_loss_weight * mean_over_labels(repeated, labels, num_items_in_batch)
        if alignments is not None:
            astray = guided_alignment_loss(outputs.cross_attentions[0], alignments)
            loss = loss + config.guided_alignment_weight * mean_over_labels(astray, labels, num_items_in_batch)
        return loss


__all__ = [
    "RNNSeq2SeqForConditionalGeneration",
    "RNNSeq2SeqModel",
    "RNNSeq2SeqPreTrainedModel",
]
