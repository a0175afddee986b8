"""The `rnn` family: recurrent layers over token embeddings, and the heads on them."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    ModelOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_rnn import RNNConfig
from .crf import IGNORED_LABEL, LinearChainCRF
from .deferred_logits import vocabulary_logits
from .generation_masks import GenerationMasks
from .label_schemes import forbidden_steps
from .packed_sequences import (
    PackedPadding,
    find_text_starts,
    refuse_other_boundaries,
    refuse_packed_texts,
    text_starts,
)
from .pooling import SequencePooling
from .question_attention import SPAN_HEADS, QuestionFeatures, QuestionLayout
from .recurrent_cache import (
    cache_of,
    cache_output,
    cache_to_fill,
    given_cache,
    is_recording,
    read_state,
    write_state,
)
from .recurrent_layer import Dropout, GateValues, HiddenStates, Padding, make_layers
from .recurrent_model import (
    RecurrentPreTrainedModel,
    embed_inputs,
    hidden_states_recorder,
    select_positions,
    vocabulary_projection,
)
from .recurrent_stack import run_layers
from .word_encoder import WordEncoder, Words, WordTable, find_words


logger = logging.get_logger(__name__)


@dataclass
class RNNModelOutput(BaseModelOutputWithPast):
    """
    `BaseModelOutputWithPast` with `gates`, which `output_gates=True` asks for: for each layer a dictionary from the
    names of the cell's gates to their values `(batch, seq, hidden_size)`.
    """

    gates: tuple[dict[str, torch.FloatTensor], ...] | None = None


@dataclass
class RNNCausalLMOutput(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` with `gates` as in [`RNNModelOutput`]."""

    gates: tuple[dict[str, torch.FloatTensor], ...] | None = None


@dataclass
class RNNTokenClassifierOutput(TokenClassifierOutput):
    """`TokenClassifierOutput` with `intent_logits` `(batch, num_intents)`."""

    intent_logits: torch.FloatTensor | None = None


@dataclass
class RNNDecodedLabels(ModelOutput):
    """
    What [`~RNNForTokenClassification.decode`] returns.

    Args:
        paths (`torch.LongTensor` of shape `(batch, num_paths, seq)`):
            The most probable sequences of labels, the best one first; -100 outside of the chain, and throughout where
            there are fewer.
        log_probabilities (`torch.FloatTensor` of shape `(batch, num_paths)`):
            The logarithm of the probability of each; -inf where there are fewer.
        marginals (`torch.FloatTensor` of shape `(batch, seq, num_labels)`):
            The probability of each label of a token, over all sequences.
        intent_logits (`torch.FloatTensor` of shape `(batch, num_intents)`, *optional*): As in the forward.
    """

    paths: torch.LongTensor | None = None
    log_probabilities: torch.FloatTensor | None = None
    marginals: torch.FloatTensor | None = None
    intent_logits: torch.FloatTensor | None = None


class RNNPreTrainedModel(RecurrentPreTrainedModel):
    """Base class of the family."""

    config: RNNConfig
    _can_record_outputs = {
        "hidden_states": hidden_states_recorder("num_hidden_states"),
        "gates": OutputRecorder(GateValues),
    }

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As in transformers; a table of words goes with the vocabulary."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, WordTable):
                module.resize_vocabulary(self.config.vocab_size)
        return embeddings


class RNNModel(RNNPreTrainedModel):
    r"""
    Token embeddings and a stack of recurrent layers, in one direction or two.

    At padded positions the state of a row stays as it is and the output repeats the last one, wherever the padding
    lies. With one direction the state travels in `past_key_values`; with two directions there is none to carry.

    With a `word_encoder` the layers read words, see [`WordEncoder`], and whatever the model returns has what belongs to
    a word at each of its tokens (at padding, what belongs to the word before it). A word is read as a whole, so that
    there is no state to go on from.

    Args:
        config (`RNNConfig`): The configuration.
    """

    def __init__(self, config: RNNConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        self.word_encoder = None if config.word_encoder is None else WordEncoder(config)
        self.embedding_dropout = Dropout(config.embedding_dropout)
        self.embedded = HiddenStates()
        self.layers = make_layers(config, config.num_hidden_layers, config.input_size, config.bidirectional)
        self.output_dropout = Dropout(config.output_dropout)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        output_gates: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, seq)`, *optional*): Token ids.
            attention_mask (`torch.Tensor` of shape `(batch, past + seq)` or `(batch, seq)`, *optional*):
                Non-zero where there is a token, zero at padding, which may lie anywhere.
            past_key_values (`Cache`, *optional*): The state to go on from.
            cache (`Cache`, *optional*): The same, by the name that it has since transformers 5.24.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, seq, embedding_size)`, *optional*):
                Embeddings in place of `input_ids`.
            use_cache (`bool`, *optional*):
                Whether to return the state. By default as the configuration says, and not while training.
            position_ids (`torch.LongTensor` of shape `(batch, seq)` or `(1, seq)`, *optional*):
                The position of each token in its text. Where they begin again at 0 behind other tokens of the row, a
                new text begins, which knows nothing of the others (packing, padding-free batches). They say nothing
                else. A row of several texts has no state to go on from. The graph of a compiler or an exporter does
                not see the positions, and does not look for texts where `past_key_values` are given; in ONNX a row is
                always one text.
            output_gates (`bool`, *optional*):
                Whether to return the gates. The layers then run step by step and not on the fast paths: this is for
                looking at a model, not for training or serving one.

        Returns:
            `BaseModelOutputWithPast`: `last_hidden_state` `(batch, seq, output_size)`, `past_key_values` and, on
            request, `hidden_states`: the embeddings and the output of each layer. With `output_gates` a
            [`RNNModelOutput`], which has `gates` too: for each layer a dictionary from the cell's `gate_names` (of an
            LSTM `input`, `forget`, `cell`, `output`) to their values behind the activation `(batch, seq, hidden_size)`,
            zero at padding. Those of the direction from right to left have `_reverse` behind their names.

        Raises:
            `ValueError`: Not exactly one of `input_ids` and `inputs_embeds`, `inputs_embeds` for a model of words, one
                of them, a mask, positions or a state of a wrong shape, a state for a model with two directions or of
                words, a state given or asked for where a row holds several texts, texts in one row that are told by
                other arguments than `position_ids`, or `output_gates` with a cell that has no `gate_values`.
        """
        past_key_values = given_cache(past_key_values, cache)
        inputs_embeds = embed_inputs(self.config, self.embed_tokens, input_ids, inputs_embeds)
        batch_size, seq_length = inputs_embeds.shape[:2]
        padding = Padding.from_attention_mask(attention_mask, inputs_embeds, past_key_values is not None)
        mask = None if padding is None else padding.mask
        refuse_other_boundaries(position_ids, kwargs)
        starts = find_text_starts(position_ids, batch_size, seq_length, mask)
        if starts is not None:
            starts = starts.to(inputs_embeds.device)
        kwargs |= {"past_key_values": past_key_values, "use_cache": use_cache}
        if output_gates is not None:
            kwargs["output_gates"] = output_gates
        if self.word_encoder is not None:
            return self._read_words(input_ids, inputs_embeds, mask, starts, **kwargs)
        return self._read(inputs_embeds, padding, starts, **kwargs)

    def _read_words(
        self,
        input_ids: torch.Tensor | None,
        embeddings: torch.Tensor,
        mask: torch.Tensor | None,
        starts: torch.Tensor | None,
        **kwargs,
    ) -> BaseModelOutputWithPast | tuple:
        """[`RNNModel._read`] of the words of tokens, with what it made of each word at its tokens."""
        if input_ids is None:
            raise ValueError("`input_ids` must be given where `word_encoder` is set: embeddings do not show the words.")
        words = find_words(input_ids, self.config.first_continuation_id, mask, starts)
        vectors = self.word_encoder(input_ids, embeddings, words)
        padding = Padding.from_attention_mask(words.is_word, vectors)
        if starts is not None:
            nowhere = torch.zeros_like(words.first)
            starts = nowhere.scatter_reduce(1, words.number, starts.long(), "amax").bool()
        return_dict = kwargs.pop("return_dict", self.config.return_dict)
        outputs = self._read(vectors, padding, starts, return_dict=True, **kwargs)
        outputs.last_hidden_state = words.spread(outputs.last_hidden_state)
        if outputs.hidden_states is not None:
            outputs.hidden_states = tuple(
                None if states is None else words.spread(states) for states in outputs.hidden_states
            )
        if outputs.get("gates") is not None:
            is_token = words.is_token.unsqueeze(-1)
            outputs.gates = tuple(
                {name: words.spread(values) * is_token for name, values in gates.items()} for gates in outputs.gates
            )
        return outputs if return_dict else outputs.to_tuple()

    @capture_outputs
    def _read(
        self,
        inputs_embeds: torch.Tensor,
        padding: Padding | None,
        starts: torch.Tensor | None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_gates: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        The recurrent layers over vectors `(batch, seq, input_size)`.

        Args:
            inputs_embeds (`torch.Tensor` of shape `(batch, seq, input_size)`): The vectors.
            padding (`Padding`, *optional*): Where the tokens lie.
            starts (`torch.Tensor` of shape `(batch, seq)`, *optional*): True where a text begins within a row.
            past_key_values, use_cache, output_gates: As in [`RNNModel.forward`].
        """
        # A look into the layers: one into the configuration takes a few per cent of a single step.
        has_state = self.layers[0].cell_reverse is None and self.word_encoder is None
        if not has_state and past_key_values is not None:
            reason = "`bidirectional` is True" if self.config.bidirectional else "`word_encoder` is set"
            raise ValueError(f"`past_key_values` must be None where {reason}: there is no state to carry.")
        if not has_state:
            use_cache = False
        batch_size, seq_length = inputs_embeds.shape[:2]
        if starts is not None and not torch.compiler.is_compiling():
            if past_key_values is not None or use_cache:
                raise ValueError(
                    "`past_key_values` must be None and `use_cache` must not be True where `position_ids` begin again "
                    "at 0 within a row: several texts in one row have no state to go on from."
                )
            use_cache = False
        if starts is not None and past_key_values is None:
            padding = PackedPadding(starts, None if padding is None else padding.mask)
        target = cache_to_fill(self.config, past_key_values, use_cache, self.training, len(self.layers))
        needs_gates = bool(vars(self.config).get("output_gates", False) if output_gates is None else output_gates)
        hidden_states = self.embedded(self.embedding_dropout(inputs_embeds))
        states = [read_state(past_key_values, i, layer.state_sizes, batch_size) for i, layer in enumerate(self.layers)]
        recording = is_recording(target, 0)
        if recording and states[0] is None:
            states = [layer.initial_state(hidden_states) for layer in self.layers]
        hidden_states, new_states, histories = run_layers(
            self.layers, hidden_states, states, padding, target is not None, recording, needs_gates
        )
        for layer_idx, (state, history, initial) in enumerate(zip(new_states, histories, states)):
            write_state(target, layer_idx, state, seq_length, history, initial)
        output_class = RNNModelOutput if needs_gates else BaseModelOutputWithPast
        return output_class(last_hidden_state=self.output_dropout(hidden_states), **cache_output(target))

    def find_words(
        self,
        input_ids: torch.LongTensor | None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
    ) -> Words | None:
        """Where the words of a batch lie, None where the configuration has no `word_encoder`."""
        if self.word_encoder is None:
            return None
        starts = find_text_starts(position_ids, *input_ids.shape, attention_mask)
        return find_words(input_ids, self.config.first_continuation_id, attention_mask, starts)

    def read_mask(self, input_ids: torch.LongTensor | None, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        """
        Where the layers read something `(batch, seq)`, None for everywhere: at every token, or at the first token of
        every word.
        """
        words = self.find_words(input_ids, attention_mask)
        return attention_mask if words is None else words.starts


class RNNLanguageModelingHead(RNNPreTrainedModel):
    """What the language models share: a projection to the vocabulary, tied to the embeddings or not."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: RNNConfig):
        if config.word_encoder is not None:
            raise ValueError(f"`word_encoder` must be None for a language model, got {config.word_encoder!r}.")
        super().__init__(config)
        self.model = RNNModel(config)
        self.projection, self.lm_head = vocabulary_projection(config, config.output_size)
        self.post_init()


class RNNForCausalLM(GenerationMasks, RNNLanguageModelingHead, GenerationMixin):
    r"""
    A recurrent language model, which predicts each token from those before it.

    Args:
        config (`RNNConfig`): The configuration, with one direction.

    Raises:
        `ValueError`: `config.bidirectional` is set.
    """

    def __init__(self, config: RNNConfig):
        if config.bidirectional:
            raise ValueError("`bidirectional` must be False for a causal language model, got True.")
        super().__init__(config)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        output_gates: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        Args:
            input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, position_ids, cache, output_gates:
                As in [`RNNModel`].
            labels (`torch.LongTensor` of shape `(batch, seq)`, *optional*):
                The tokens themselves (they are shifted here); -100 where there is nothing to predict. The first token
                of a text is never predicted.
            logits_to_keep (`int` or `torch.Tensor`, *optional*):
                How many positions at the end, or which, to compute logits for; 0 for all.

        Returns:
            `CausalLMOutputWithPast`: `loss` in nats per predicted token, `logits` `(batch, seq, vocab_size)`. With
            `output_gates` a [`RNNCausalLMOutput`], which has `gates` too.
        """
        past_key_values = given_cache(past_key_values, cache)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            cache=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            position_ids=position_ids,
            return_dict=True,
            **kwargs if output_gates is None else kwargs | {"output_gates": output_gates},
        )
        hidden_states = self.projection(select_positions(outputs.last_hidden_state, logits_to_keep))
        logits = vocabulary_logits(self.lm_head, hidden_states, for_loss=self.training and labels is not None)
        loss = None
        if labels is not None:
            # Nothing stands before the first token of a text from which to predict it, padding at the left neither.
            if attention_mask is not None and past_key_values is None:
                mask = attention_mask.bool()
                labels = labels.masked_fill(mask & (mask.cumsum(1) == 1), -100)
            if position_ids is not None and past_key_values is None:
                labels = labels.masked_fill(text_starts(position_ids, attention_mask).to(labels.device), -100)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = {"loss": loss, "logits": logits, "hidden_states": outputs.hidden_states}
        output |= cache_output(cache_of(outputs))
        if "gates" in outputs:
            return RNNCausalLMOutput(**output, gates=outputs.gates)
        return CausalLMOutputWithPast(**output)


# Trainer looks here, and nowhere else, to see whether its own label smoothing has to shift the labels.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[RNNConfig.model_type] = RNNForCausalLM.__name__


class RNNForMaskedLM(RNNLanguageModelingHead):
    r"""
    A cloze model: the tokens behind a mask from what stands to their left and, with two directions, to their right.

    Args:
        config (`RNNConfig`): The configuration, with `bidirectional=True` if the right side is to be seen.
    """

    def __init__(self, config: RNNConfig):
        if not config.bidirectional:
            logger.warning_once("RNNForMaskedLM with `bidirectional=False` does not see what stands behind a mask.")
        super().__init__(config)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        r"""
        Args:
            input_ids, attention_mask, inputs_embeds, position_ids: As in [`RNNModel`].
            labels (`torch.LongTensor` of shape `(batch, seq)`, *optional*):
                The tokens behind the masks; -100 elsewhere.

        Returns:
            `MaskedLMOutput`: `loss` in nats per label, `logits` `(batch, seq, vocab_size)`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            return_dict=True,
            **kwargs | {"use_cache": False},
        )
        hidden_states = self.projection(outputs.last_hidden_state)
        logits = vocabulary_logits(self.lm_head, hidden_states, for_loss=self.training and labels is not None)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


def make_pooling(config: RNNConfig) -> SequencePooling:
    """The pooling that a configuration asks for."""
    return SequencePooling(
        config.pooling, config.output_size, config.bidirectional, config.pooling_heads, config.pooling_attention_size
    )


class PoolingHead(RNNPreTrainedModel):
    """What the heads on whole sequences share: pooling, whose weights come back as `attentions` where it attends."""

    def attentions_asked_for(self, weights: torch.Tensor | None, kwargs: dict) -> tuple[torch.Tensor] | None:
        """The weights that [`SequencePooling`] returned, where the arguments or the configuration want to see them."""
        asked = kwargs.get("output_attentions")
        asked = self.config.output_attentions if asked is None else asked
        return (weights,) if asked and weights is not None else None


class RNNForSequenceClassification(PoolingHead):
    r"""
    A class, several labels or numbers for a whole sequence.

    Args:
        config (`RNNConfig`): The configuration; `pooling` says how the sequence becomes one vector.
    """

    def __init__(self, config: RNNConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = RNNModel(config)
        self.pooling = make_pooling(config)
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.classifier = nn.Linear(self.pooling.output_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        r"""
        Args:
            input_ids, attention_mask, inputs_embeds: As in [`RNNModel`].
            position_ids: As in [`RNNModel`], but a row must hold one text.
            labels (`torch.Tensor` of shape `(batch,)` or `(batch, num_labels)`, *optional*):
                Classes, or the labels or numbers that `config.problem_type` asks for.

        Returns:
            `SequenceClassifierOutput`: `loss`, `logits` `(batch, num_labels)` and, where `config.pooling` is
            `"attention"` and `output_attentions` asks for it, `attentions`: one tensor `(batch, heads, 1, seq)` of the
            weights by which the sequence became one vector.

        Raises:
            `ValueError`: `position_ids` begin again at 0 within a row.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs | {"use_cache": False},
        )
        refuse_packed_texts(position_ids, *outputs.last_hidden_state.shape[:2], attention_mask)
        mask = self.model.read_mask(input_ids, attention_mask)
        pooled, weights = self.pooling(outputs.last_hidden_state, mask)
        logits = self.classifier(self.dropout(pooled))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
            num_items = kwargs.get("num_items_in_batch")
            if num_items is not None and self.config.problem_type != "single_label_classification":
                # The stock losses for the other problem types are means over this batch alone.
                loss = loss * labels.numel() / num_items
        return SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=self.attentions_asked_for(weights, kwargs),
        )


class RNNForTokenClassification(PoolingHead):
    r"""
    A class for every token; with `config.id2intent` also one, the intent, for the whole text.

    With `config.use_crf` the labels of a text are a chain ([`LinearChainCRF`]), in which each depends on the ones
    beside it:

    - In the chain are the tokens that are not padding, with `labels` those that have one: sub-words and special tokens
      with the label -100 are skipped, and the tokens beside them follow each other. Without labels a `chain_mask` says
      which are in the chain; without that, as in a pipeline, all are but those of `config.crf_ignored_ids`. With
      `config.word_encoder` they are the first tokens of words alone: give all other tokens the label -100. Another one
      is not read, but it counts among the labels by whose number the loss is divided.
    - The logits are made for software that knows nothing of chains. The largest one at each token of the chain is that
      of the best path (Viterbi), so that `logits.argmax(-1)`, `pipeline("token-classification")` and the
      `compute_metrics` of a `Trainer` find it; they are the logarithms of the marginal probabilities of the labels,
      where the label of the best path is raised just above the others if another one is at least as probable. Outside
      of the chain they are those of each token by itself. While training with labels the logits are the scores that
      go into the chain, which costs nothing.
    - [`~RNNForTokenClassification.decode`] gives the best paths with their probabilities, and the marginals.

    Neither the chain nor the intents are learned with the `label_smoothing_factor` of a `Trainer`, which takes the
    labels away and smooths those of single tokens; a forward without labels while training says so once.

    Args:
        config (`RNNConfig`): The configuration.
    """

    def __init__(self, config: RNNConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = RNNModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.classifier = nn.Linear(config.output_size, config.num_labels)
        self.crf, self.ignored = None, None
        if config.use_crf and config.crf_ignored_ids:
            # No buffer, see [`LinearChainCRF`]. The last place stands for tokens that are added.
            self.ignored = torch.zeros(config.vocab_size + 1, dtype=torch.bool, device="cpu")
            self.ignored[[index for index in config.crf_ignored_ids if index < config.vocab_size]] = True
        if config.use_crf:
            self.crf = LinearChainCRF(config.num_labels, forbidden_steps(config.label_names, config.crf_constraints))
        self.pooling, self.intent_classifier = None, None
        if config.num_intents:
            self.pooling = make_pooling(config)
            self.intent_classifier = nn.Linear(self.pooling.output_size, config.num_intents)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        intents: torch.LongTensor | None = None,
        chain_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        r"""
        Args:
            input_ids, attention_mask, inputs_embeds: As in [`RNNModel`].
            labels (`torch.LongTensor` of shape `(batch, seq)`, *optional*): Classes; -100 where there is none.
            position_ids: As in [`RNNModel`]; with intents a row must hold one text.
            intents (`torch.LongTensor` of shape `(batch,)`, *optional*):
                The intent of each text; -100 where there is none.
            chain_mask (`torch.Tensor` of shape `(batch, seq)`, *optional*):
                With `use_crf`, non-zero at the tokens that have a label.

        Returns:
            `TokenClassifierOutput`: `loss` in nats per label, `logits` `(batch, seq, num_labels)`. With intents a
            [`RNNTokenClassifierOutput`], which has `intent_logits` `(batch, num_intents)` too.

            The loss is the negative log-likelihood of all labels, with `use_crf` of whole chains, and of all intents
            that are given, divided by the number of labels, which is `num_items_in_batch` where it is passed (of
            intents without labels by the number of intents).

        Raises:
            `ValueError`: `intents` for a model without, `position_ids` that begin again at 0 within a row for a model
                with intents, or, with `use_crf`, a `chain_mask` or labels of a wrong shape.
        """
        if intents is not None and self.intent_classifier is None:
            raise ValueError("`intents` must be None where the configuration has no `id2intent`.")
        if labels is None and self.training:
            self.warn_of_missing_labels()
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            return_dict=True,
            **kwargs | {"use_cache": False},
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        words = self.model.find_words(input_ids, attention_mask, position_ids)
        read_mask = attention_mask if words is None else words.starts
        num_items, loss = kwargs.get("num_items_in_batch"), None
        if self.crf is not None:
            chain = self.chain_of(logits, read_mask, chain_mask, labels, input_ids)
            starts = find_text_starts(position_ids, *logits.shape[:2], attention_mask)
            if labels is not None:
                loss = -self.crf(lambda crf: crf.log_likelihood(logits, labels, chain, starts)).sum()
                if num_items is None:  # labels within words count, as they do for Trainer
                    num_items = self.chain_of(logits, attention_mask, chain_mask, labels).sum().clamp(min=1)
                loss = loss / num_items
            if labels is None or not self.training:
                logits = self.crf(lambda crf: crf.path_logits(logits, chain, starts))
                logits = logits if words is None else words.repeat_first(logits)
        elif labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, config=self.config, **kwargs)
        output = {"loss": loss, "logits": logits, "hidden_states": outputs.hidden_states}
        if self.intent_classifier is None:
            return TokenClassifierOutput(**output)
        intent_logits, weights = self.read_intents(outputs.last_hidden_state, read_mask, position_ids)
        output["attentions"] = self.attentions_asked_for(weights, kwargs)
        if intents is not None:
            intent_loss = nn.functional.cross_entropy(
                intent_logits.to(torch.promote_types(intent_logits.dtype, torch.float32)), intents, reduction="sum"
            )
            if num_items is None:
                num_items = ((intents if labels is None else labels) != IGNORED_LABEL).sum().clamp(min=1)
            output["loss"] = intent_loss / num_items + (0 if loss is None else loss)
        return RNNTokenClassifierOutput(**output, intent_logits=intent_logits)

    def warn_of_missing_labels(self) -> None:
        """Says once what is not learned where something trains a chain or intents without labels of the tokens."""
        has_more = self.crf is not None or self.intent_classifier is not None
        if has_more and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            logger.warning_once(
                "RNNForTokenClassification with `use_crf` or `id2intent` got no `labels` while training. With "
                "`label_smoothing_factor` (or a `compute_loss_func`) Trainer keeps them to itself and makes a loss of "
                "its own from the logits of single tokens; neither the chain nor the intents are learned from it. Set "
                "`label_smoothing_factor` to 0."
            )

    @torch.no_grad()
    def decode(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        chain_mask: torch.Tensor | None = None,
        num_paths: int = 1,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RNNDecodedLabels:
        r"""
        The most probable sequences of labels, for models with `use_crf`.

        Args:
            input_ids, attention_mask, inputs_embeds, position_ids, chain_mask: As in the forward.
            num_paths (`int`, *optional*, defaults to 1): How many.

        Returns:
            [`RNNDecodedLabels`].

        Raises:
            `ValueError`: The model has no `use_crf`, or `num_paths` is less than 1.
        """
        if self.crf is None:
            raise ValueError("`use_crf` must be True in the configuration to decode chains of labels, got False.")
        hidden_states = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            return_dict=True,
            **kwargs | {"use_cache": False},
        ).last_hidden_state
        words = self.model.find_words(input_ids, attention_mask, position_ids)
        read_mask = attention_mask if words is None else words.starts
        emissions = self.classifier(self.dropout(hidden_states))
        chain = emissions, self.chain_of(emissions, read_mask, chain_mask, input_ids=input_ids)
        chain = *chain, find_text_starts(position_ids, *emissions.shape[:2], attention_mask)

        def run(crf: LinearChainCRF):
            paths, scores = crf.best_paths(*chain, num_paths=num_paths)
            return paths, scores - crf.log_partition(*chain).unsqueeze(-1), crf.marginals(*chain)

        paths, log_probabilities, marginals = self.crf(run)
        intent_logits = None
        if self.intent_classifier is not None:
            intent_logits, _ = self.read_intents(hidden_states, read_mask, position_ids)
        return RNNDecodedLabels(
            paths=paths,
            log_probabilities=log_probabilities,
            marginals=marginals,
            intent_logits=intent_logits,
        )

    def read_intents(
        self, hidden_states: torch.Tensor, read_mask: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The logits `(batch, num_intents)` of the intents, and the weights of the pooling as it returns them."""
        refuse_packed_texts(position_ids, *hidden_states.shape[:2], read_mask)
        pooled, weights = self.pooling(hidden_states, read_mask)
        return self.intent_classifier(self.dropout(pooled)), weights

    def chain_of(
        self,
        emissions: torch.Tensor,
        read_mask: torch.Tensor | None = None,
        chain_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """True at the tokens `(batch, seq)` that are in the chain of labels, of those that were read."""
        if self.ignored is not None and input_ids is not None and chain_mask is None and labels is None:
            ignored = self.ignored.to(input_ids.device)
            chain_mask = ~ignored[input_ids.clamp(max=len(ignored) - 1)]
        chain = emissions.new_ones(emissions.shape[:2], dtype=torch.bool)
        for name, values in {"chain_mask": chain_mask, "labels": labels}.items():
            if values is not None and values.shape != chain.shape:
                raise ValueError(f"`{name}` must have the shape {tuple(chain.shape)}, got {tuple(values.shape)}.")
        for mask in (read_mask, chain_mask, None if labels is None else labels != IGNORED_LABEL):
            chain = chain if mask is None else chain & mask.bool()
        return chain


class RNNForQuestionAnswering(RNNPreTrainedModel):
    r"""
    The first and the last token of an answer in a text: logits over its positions, lowest at padding.

    With `config.question_attention` the tokens of a row are told apart into a question, which stands first, and a text,
    as in [`QuestionLayout`], and the logits are lowest at all tokens that are not the text's, but for the first token
    of the row, which stands for "no answer". With `config.word_encoder` answers are whole words: they begin at the
    first token of a word and end at the last one of a word, to which positions within a word are moved.

    Args:
        config (`RNNConfig`): The configuration; `question_attention` says how question and text come together.
    """

    def __init__(self, config: RNNConfig):
        super().__init__(config)
        self.model = RNNModel(config)
        if config.question_attention is None:
            self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
            self.qa_outputs = nn.Linear(config.output_size, 2, bias=False)
        else:
            self.question_features = QuestionFeatures(config)
            self.qa_outputs = SPAN_HEADS[config.question_attention](config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:
        r"""
        Args:
            input_ids, attention_mask: As in [`RNNModel`].
            inputs_embeds: As in [`RNNModel`]; not with `question_attention`, which compares the tokens themselves.
            position_ids: As in [`RNNModel`], but a row must hold one text.
            start_positions (`torch.LongTensor` of shape `(batch,)`, *optional*): Position of the first token.
            end_positions (`torch.LongTensor` of shape `(batch,)`, *optional*): Position of the last token.
            token_type_ids (`torch.LongTensor` of shape `(batch, seq)`, *optional*):
                0 at the question and 1 at the text; read with `question_attention` alone. By default the question ends
                with the first `sep_token_id`, or `eos_token_id` where the configuration has none.

        Returns:
            `QuestionAnsweringModelOutput`: `loss`, `start_logits` and `end_logits` `(batch, seq)`. With
            `question_attention` the first of `hidden_states` is what the first layer reads: the embeddings and, at the
            text, what is added to them.

        Raises:
            `ValueError`: `position_ids` begin again at 0 within a row; with `question_attention` no `input_ids`,
                `token_type_ids` of a wrong shape, or nothing by which to tell the question from the text.
        """
        layout = None
        if self.config.question_attention is not None:
            inputs_embeds, layout = self.ask(input_ids, attention_mask, inputs_embeds, token_type_ids)
            input_ids = None
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs | {"use_cache": False},
        )
        refuse_packed_texts(position_ids, *outputs.last_hidden_state.shape[:2], attention_mask)
        if layout is None:
            logits = self.qa_outputs(self.dropout(outputs.last_hidden_state))
            places = None if attention_mask is None else attention_mask.bool()
        else:
            logits, places = self.qa_outputs(outputs.last_hidden_state, layout), layout.places
        if places is not None:
            logits = logits.masked_fill(~places.unsqueeze(-1), torch.finfo(logits.dtype).min)
        words = self.model.find_words(input_ids, attention_mask)
        if words is not None:
            logits = logits.masked_fill(~torch.stack([words.starts, words.ends], dim=-1), torch.finfo(logits.dtype).min)
            start_positions, end_positions = words.move_to_edges(start_positions, end_positions)
        start_logits, end_logits = (scores.contiguous() for scores in logits.unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss, start_logits=start_logits, end_logits=end_logits, hidden_states=outputs.hidden_states
        )

    def ask(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
    ) -> tuple[torch.Tensor, QuestionLayout]:
        """What the first layer reads `(batch, seq, embedding_size)`, and which tokens are the question's."""
        if inputs_embeds is not None:
            raise ValueError(
                "`inputs_embeds` must be None and `input_ids` given where `question_attention` is set: the tokens of "
                "the text are compared with those of the question."
            )
        embeddings = embed_inputs(self.config, self.model.embed_tokens, input_ids, None)
        padding = Padding.from_attention_mask(attention_mask, input_ids)
        mask = torch.ones_like(input_ids, dtype=torch.bool) if padding is None else padding.mask
        separators = self.config.eos_token_id if self.config.sep_token_id is None else self.config.sep_token_id
        separators = [] if separators is None else separators if isinstance(separators, list) else [separators]
        layout = QuestionLayout.of_rows(input_ids, mask, separators, token_type_ids)
        return embeddings + self.question_features(embeddings, input_ids, layout), layout


class RNNForMultipleChoice(PoolingHead):
    r"""
    The best of several sequences.

    Args:
        config (`RNNConfig`): The configuration; `pooling` says how a sequence becomes one vector.
    """

    def __init__(self, config: RNNConfig):
        super().__init__(config)
        self.model = RNNModel(config)
        self.pooling = make_pooling(config)
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.classifier = nn.Linear(self.pooling.output_size, 1, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MultipleChoiceModelOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, choices, seq)`, *optional*): Token ids.
            attention_mask (`torch.Tensor` of shape `(batch, choices, seq)`, *optional*):
                Non-zero where there is a token.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, choices, seq, embedding_size)`, *optional*):
                Embeddings in place of `input_ids`.
            labels (`torch.LongTensor` of shape `(batch,)`, *optional*): The right choice.
            position_ids (`torch.LongTensor` of shape `(batch, choices, seq)` or `(1, seq)`, *optional*):
                As in [`RNNModel`], but a row must hold one text.

        Returns:
            `MultipleChoiceModelOutput`: `loss`, `logits` `(batch, choices)` and, as in
            [`RNNForSequenceClassification`], `attentions`: one tensor `(batch * choices, heads, 1, seq)`.

        Raises:
            `ValueError`: Not exactly one of `input_ids` and `inputs_embeds`, a mask of a wrong shape, or
                `position_ids` that begin again at 0 within a row.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        shape = (inputs_embeds if input_ids is None else input_ids).shape[:3]
        if (inputs_embeds is None and input_ids.dim() != 3) or (input_ids is None and inputs_embeds.dim() != 4):
            raise ValueError(
                "`input_ids` must have the shape (batch, choices, seq), and `inputs_embeds` one dimension more, got "
                f"{tuple((inputs_embeds if input_ids is None else input_ids).shape)}."
            )
        if attention_mask is not None and attention_mask.shape != shape:
            raise ValueError(f"`attention_mask` must have the shape {tuple(shape)}, got {tuple(attention_mask.shape)}.")
        input_ids, attention_mask, inputs_embeds, position_ids = (
            tensor if tensor is None or tensor.dim() < 3 else tensor.flatten(0, 1)
            for tensor in (input_ids, attention_mask, inputs_embeds, position_ids)
        )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs | {"use_cache": False},
        )
        refuse_packed_texts(position_ids, *outputs.last_hidden_state.shape[:2], attention_mask)
        pooled, weights = self.pooling(outputs.last_hidden_state, self.model.read_mask(input_ids, attention_mask))
        logits = self.classifier(self.dropout(pooled)).view(shape[:2])
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            num_items = kwargs.get("num_items_in_batch")
            loss = loss / (labels.numel() if num_items is None else num_items)
        return MultipleChoiceModelOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=self.attentions_asked_for(weights, kwargs),
        )


__all__ = [
    "RNNForCausalLM",
    "RNNForMaskedLM",
    "RNNForMultipleChoice",
    "RNNForQuestionAnswering",
    "RNNForSequenceClassification",
    "RNNForTokenClassification",
    "RNNModel",
    "RNNPreTrainedModel",
]
