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
from .deferred_logits import vocabulary_logits
from .generation_masks import GenerationMasks
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
from .recurrent_layer import GateValues, HiddenStates, Padding, make_layers
from .recurrent_model import (
    RecurrentPreTrainedModel,
    embed_inputs,
    hidden_states_recorder,
    select_positions,
    vocabulary_projection,
)


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


class RNNPreTrainedModel(RecurrentPreTrainedModel):
    """Base class of the family."""

    config: RNNConfig
    _can_record_outputs = {
        "hidden_states": hidden_states_recorder("num_hidden_states"),
        "gates": OutputRecorder(GateValues),
    }


class RNNModel(RNNPreTrainedModel):
    r"""
    Token embeddings and a stack of recurrent layers, in one direction or two.

    At padded positions the state of a row stays as it is and the output repeats the last one, wherever the padding
    lies. With one direction the state travels in `past_key_values`; with two directions there is none to carry.

    Args:
        config (`RNNConfig`): The configuration.
    """

    def __init__(self, config: RNNConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.embedded = HiddenStates()
        self.layers = make_layers(config, config.num_hidden_layers, config.embedding_size, config.bidirectional)
        self.output_dropout = nn.Dropout(config.output_dropout)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
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
            `ValueError`: Not exactly one of `input_ids` and `inputs_embeds`, one of them, a mask, positions or a state
                of a wrong shape, a state for a model with two directions, a state given or asked for where a row holds
                several texts, texts in one row that are told by other arguments than `position_ids`, or `output_gates`
                with a cell that has no `gate_values`.
        """
        past_key_values = given_cache(past_key_values, cache)
        inputs_embeds = embed_inputs(self.config, self.embed_tokens, input_ids, inputs_embeds)
        if self.config.bidirectional and past_key_values is not None:
            raise ValueError(
                "`past_key_values` must be None where `bidirectional` is True: there is no state to carry."
            )
        if self.config.bidirectional:
            use_cache = False
        batch_size, seq_length = inputs_embeds.shape[:2]
        padding = Padding.from_attention_mask(attention_mask, inputs_embeds, past_key_values is not None)
        mask = None if padding is None else padding.mask
        refuse_other_boundaries(position_ids, kwargs)
        starts = find_text_starts(position_ids, batch_size, seq_length, mask)
        if starts is not None and not torch.compiler.is_compiling():
            if past_key_values is not None or use_cache:
                raise ValueError(
                    "`past_key_values` must be None and `use_cache` must not be True where `position_ids` begin again "
                    "at 0 within a row: several texts in one row have no state to go on from."
                )
            use_cache = False
        if starts is not None and past_key_values is None:
            padding = PackedPadding(starts.to(inputs_embeds.device), mask)
        target = cache_to_fill(self.config, past_key_values, use_cache, self.training)
        needs_gates = bool(getattr(self.config, "output_gates", False) if output_gates is None else output_gates)
        hidden_states = self.embedded(self.embedding_dropout(inputs_embeds))
        for layer_idx, layer in enumerate(self.layers):
            state = read_state(past_key_values, layer_idx, layer.state_sizes, batch_size)
            recording = is_recording(target, layer_idx)
            if recording and state is None:
                state = layer.initial_state(hidden_states)
            hidden_states, new_state, history = layer(
                hidden_states, state, padding, target is not None, recording, needs_gates
            )
            write_state(target, layer_idx, new_state, seq_length, history, state)
        output_class = RNNModelOutput if needs_gates else BaseModelOutputWithPast
        return output_class(last_hidden_state=self.output_dropout(hidden_states), **cache_output(target))


class RNNLanguageModelingHead(RNNPreTrainedModel):
    """What the language models share: a projection to the vocabulary, tied to the embeddings or not."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: RNNConfig):
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


class RNNForSequenceClassification(RNNPreTrainedModel):
    r"""
    A class, several labels or numbers for a whole sequence.

    Args:
        config (`RNNConfig`): The configuration; `pooling` says how the sequence becomes one vector.
    """

    def __init__(self, config: RNNConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = RNNModel(config)
        self.pooling = SequencePooling(config.pooling, config.output_size, config.bidirectional)
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
            `SequenceClassifierOutput`: `loss`, `logits` `(batch, num_labels)`.

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
        logits = self.classifier(self.dropout(self.pooling(outputs.last_hidden_state, attention_mask)))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
            num_items = kwargs.get("num_items_in_batch")
            if num_items is not None and self.config.problem_type != "single_label_classification":
                # The stock losses for the other problem types are means over this batch alone.
                loss = loss * labels.numel() / num_items
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class RNNForTokenClassification(RNNPreTrainedModel):
    r"""
    A class for every token.

    Args:
        config (`RNNConfig`): The configuration.
    """

    def __init__(self, config: RNNConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = RNNModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.classifier = nn.Linear(config.output_size, config.num_labels)
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
    ) -> TokenClassifierOutput:
        r"""
        Args:
            input_ids, attention_mask, inputs_embeds, position_ids: As in [`RNNModel`].
            labels (`torch.LongTensor` of shape `(batch, seq)`, *optional*): Classes; -100 where there is none.

        Returns:
            `TokenClassifierOutput`: `loss` in nats per label, `logits` `(batch, seq, num_labels)`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            return_dict=True,
            **kwargs | {"use_cache": False},
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, config=self.config, **kwargs)
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class RNNForQuestionAnswering(RNNPreTrainedModel):
    r"""
    The first and the last token of an answer in a text: logits over its positions, lowest at padding.

    With `config.question_attention` the tokens of a row are told apart into a question, which stands first, and a text,
    as in [`QuestionLayout`], and the logits are lowest at all tokens that are not the text's, but for the first token
    of the row, which stands for "no answer".

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


class RNNForMultipleChoice(RNNPreTrainedModel):
    r"""
    The best of several sequences.

    Args:
        config (`RNNConfig`): The configuration; `pooling` says how a sequence becomes one vector.
    """

    def __init__(self, config: RNNConfig):
        super().__init__(config)
        self.model = RNNModel(config)
        self.pooling = SequencePooling(config.pooling, config.output_size, config.bidirectional)
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
            position_ids (`torch.LongTensor` of shape `(batch, choices, seq)`, *optional*):
                As in [`RNNModel`], but a row must hold one text.

        Returns:
            `MultipleChoiceModelOutput`: `loss`, `logits` `(batch, choices)`.

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
            None if tensor is None else tensor.flatten(0, 1)
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
        pooled = self.pooling(outputs.last_hidden_state, attention_mask)
        logits = self.classifier(self.dropout(pooled)).view(shape[:2])
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            num_items = kwargs.get("num_items_in_batch")
            loss = loss / (labels.numel() if num_items is None else num_items)
        return MultipleChoiceModelOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


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
