"""Configuration of the `rnn_seq2seq` family. Imports no torch."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_checks import (
    AnyLength,
    CheckedOnLoading,
    check_at_least,
    check_at_most,
    check_finite,
    check_layers,
    check_one_of,
    check_recurrence,
    check_stock_fields,
    fill_defaults,
    raises_value_error,
)


DECODER_TYPES = ("luong", "bahdanau", "gnmt")
# Of windows and filters; longer than any source.
MAX_WIDTH = 2**20


@raises_value_error
@strict
class RNNSeq2SeqConfig(AnyLength, CheckedOnLoading, PreTrainedConfig):
    r"""
    Configuration of a recurrent encoder-decoder with attention, for [`RNNSeq2SeqModel`] and its head.

    Args:
        vocab_size (`int`, *optional*, defaults to 32000): Number of tokens, shared by source and target.
        embedding_size (`int`, *optional*): Width of the token embeddings; `hidden_size` where not given.
        hidden_size (`int`, *optional*, defaults to 512): Width of the hidden state, per direction.
        encoder_layers (`int`, *optional*, defaults to 2): Number of recurrent layers of the encoder.
        decoder_layers (`int`, *optional*, defaults to 2): Number of recurrent layers of the decoder.
        encoder_bidirectional (`bool`, *optional*, defaults to `True`): Whether the encoder reads in both directions.
        cell_type (`str`, *optional*, defaults to `"lstm"`):
            `"rnn_tanh"`, `"rnn_relu"`, `"gru"`, `"lstm"` or any other key of `RECURRENT_CELLS`.
        attention_score (`str`, *optional*, defaults to `"general"`):
            `"dot"`, `"scaled_dot"`, `"general"`, `"local"`, `"additive"`, `"normalized_additive"`, `"location"` or any
            other key of `ATTENTION_SCORES`.
        num_attention_heads (`int`, *optional*, defaults to 1):
            Number of heads. Queries, keys and values are divided among them, so it divides `hidden_size`.
        attention_window (`int`, *optional*, defaults to 10):
            How many tokens to each side of the predicted position the `"local"` score sees.
        location_filters (`int`, *optional*, defaults to 32):
            Number of filters, for each head, that the `"location"` score passes over the weights of the step before.
        location_width (`int`, *optional*, defaults to 31): Width of such a filter, an odd number.
        use_coverage (`bool`, *optional*, defaults to `False`):
            Whether the score also reads how much weight each source position got so far
            ([See et al., 2017](https://huggingface.co/papers/1704.04368)). With it, as with `"location"`, the weights
            of a target are computed one position after the other.
        decoder_type (`str`, *optional*, defaults to `"luong"`):
            `"luong"` attends with the top state and combines it with the context
            ([Luong et al., 2015](https://huggingface.co/papers/1508.04025)); `"bahdanau"` attends with the previous
            top state and feeds the context into the step
            ([Bahdanau et al., 2015](https://huggingface.co/papers/1409.0473)); `"gnmt"` attends with the output of
            the first layer and feeds the context to the layers above, as GNMT v2 does
            ([Wu et al., 2016](https://huggingface.co/papers/1609.08144)).
        input_feeding (`bool`, *optional*, defaults to `False`):
            Whether a `"luong"` decoder also reads the attentional vector of the step before (section 3.3 there).
            Such a decoder, like `"bahdanau"`, has to run step by step.
        residual (`bool`, *optional*, defaults to `False`):
            Whether every layer after the first adds its input to its output.
        embedding_dropout (`float`, *optional*, defaults to 0.0): Dropout on the token embeddings.
        hidden_dropout (`float`, *optional*, defaults to 0.0): Dropout between the recurrent layers.
        output_dropout (`float`, *optional*, defaults to 0.0):
            Dropout on the output of the encoder and on the attentional vector of the decoder.
        recurrent_dropout (`float`, *optional*, defaults to 0.0):
            Dropout on the hidden state inside the recurrence, sampled once per sequence
            ([Gal and Ghahramani, 2016](https://huggingface.co/papers/1512.05287)). Runs the step-by-step loop.
        initializer_range (`float`, *optional*):
            Standard deviation of new embeddings and of a new projection to the vocabulary, tied or not; where not
            given 2.5 divided by the root of `embedding_size`, so that wide and narrow models start to learn alike.
            Recurrent weights start orthogonal, other weights Glorot uniform, biases at zero.
        forget_gate_bias (`float`, *optional*, defaults to 1.0): Initial bias of an LSTM's forget gate.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`):
            Whether the output projection shares its weight with the embeddings. Where their widths differ, a learned
            projection without bias stands in between.
        use_cache (`bool`, *optional*, defaults to `True`):
            Whether the decoder's state is returned. While training it is returned only on request.
        decoder_start_token_id (`int`, *optional*, defaults to 1): Token that starts every target.
        pointer_generator (`bool`, *optional*, defaults to `False`):
            Whether words may be copied from the source
            ([See et al., 2017](https://huggingface.co/papers/1704.04368)). Ids from `vocab_size` on then stand for
            words of a source that the vocabulary lacks, counted in each row; they are read as `unk_token_id`, and the
            logits, which are log-probabilities, are `vocab_size + num_copy_ids` wide.
        num_copy_ids (`int`, *optional*, defaults to 50): How many such words one source may have.
        unk_token_id (`int`, *optional*): The unknown token, which a pointer-generator needs.
        scheduled_sampling (`float`, *optional*, defaults to 0.0):
            Chance, while training, that the decoder reads the word that it predicted itself in place of the right one
            ([Bengio et al., 2015](https://huggingface.co/papers/1506.03099)). `hf_rnn.training.ScheduledSampling`
            advances it.
        label_smoothing (`float`, *optional*, defaults to 0.0):
            Share of a uniform distribution over the vocabulary in the labels while training. Padding takes no part.
        coverage_loss_weight (`float`, *optional*, defaults to 0.0):
            Weight, while training, of the loss for attending again to what was attended to (See et al., 2017).
        guided_alignment_weight (`float`, *optional*, defaults to 1.0):
            Weight, while training, of the loss for attending otherwise than the `alignments` say that are given to the
            model ([Chen et al., 2016](https://huggingface.co/papers/1607.01628)).

    Raises:
        `ValueError`: A field of a wrong type or value; the message names the field, the value and what is allowed.

    Example:

    ```python
    >>> from hf_rnn import RNNSeq2SeqConfig, RNNSeq2SeqForConditionalGeneration

    >>> config = RNNSeq2SeqConfig(vocab_size=1000, hidden_size=128, attention_score="additive")
    >>> model = RNNSeq2SeqForConditionalGeneration(config)
    ```"""

    model_type = "rnn_seq2seq"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "encoder_last_hidden_state"]
    attribute_map = {"num_hidden_layers": "encoder_layers"}
    base_model_fsdp_plan = {
        "shared": "free_full_weight",
        "encoder.layers.*": "free_full_weight",
        "decoder.layers.*": "free_full_weight",
    }

    vocab_size: int = 32000
    embedding_size: int | None = None
    hidden_size: int = 512
    encoder_layers: int = 2
    decoder_layers: int = 2
    encoder_bidirectional: bool = True
    cell_type: str = "lstm"
    attention_score: str = "general"
    num_attention_heads: int = 1
    attention_window: int = 10
    location_filters: int = 32
    location_width: int = 31
    use_coverage: bool = False
    decoder_type: str = "luong"
    input_feeding: bool = False
    residual: bool = False
    embedding_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    output_dropout: float | int = 0.0
    recurrent_dropout: float | int = 0.0
    initializer_range: float | int | None = None
    forget_gate_bias: float | int = 1.0
    tie_word_embeddings: bool = True
    use_cache: bool = True
    is_encoder_decoder: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int | None = 1
    pointer_generator: bool = False
    num_copy_ids: int = 50
    unk_token_id: int | None = None
    scheduled_sampling: float | int = 0.0
    label_smoothing: float | int = 0.0
    coverage_loss_weight: float | int = 0.0
    guided_alignment_weight: float | int = 1.0

    def __post_init__(self, **kwargs):
        fill_defaults(self)
        check_stock_fields(self, kwargs)
        check_layers(self, "encoder_layers", "decoder_layers")
        super().__post_init__(**kwargs)
        self.validate_recurrence()
        self.validate_attention()
        self.validate_losses()
        self.validate_copying()

    def validate_copying(self):
        """Raises `ValueError` where fields of the copying are out of range or do not fit together."""
        check_at_least(self, 0, "num_copy_ids")
        check_at_most(self, MAX_WIDTH, "num_copy_ids")
        is_token = self.unk_token_id is not None and 0 <= self.unk_token_id < self.vocab_size
        if not is_token and (self.pointer_generator or self.unk_token_id is not None):
            raise ValueError(
                f"`unk_token_id` must be a token below `vocab_size` ({self.vocab_size}), or None unless "
                f"`pointer_generator` is True, got {self.unk_token_id}."
            )

    def validate_losses(self):
        """Raises `ValueError` where what changes the training is out of range."""
        if not 0 <= self.scheduled_sampling <= 1:
            raise ValueError(f"`scheduled_sampling` must be a chance in [0, 1], got {self.scheduled_sampling}.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"`label_smoothing` must be a share in [0, 1), got {self.label_smoothing}.")
        check_finite(self, "coverage_loss_weight", "guided_alignment_weight")
        check_at_least(self, 0, "coverage_loss_weight", "guided_alignment_weight")

    def validate_recurrence(self):
        """Raises `ValueError` where fields of the recurrence are out of range."""
        check_layers(self, "encoder_layers", "decoder_layers")
        check_recurrence(self)

    def validate_attention(self):
        """Raises `ValueError` where fields of the attention are out of range or do not fit together."""
        # Imported here, so that reading a configuration file needs no torch: the table of scores is open.
        from .attention import ATTENTION_SCORES

        check_one_of(self, "attention_score", ATTENTION_SCORES)
        check_one_of(self, "decoder_type", DECODER_TYPES)
        check_at_least(self, 1, "num_attention_heads", "attention_window", "location_filters", "location_width")
        check_at_most(self, MAX_WIDTH, "attention_window", "location_filters", "location_width")
        if self.location_width % 2 == 0:
            raise ValueError(f"`location_width` must be an odd number, got {self.location_width}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`num_attention_heads` must divide `hidden_size` ({self.hidden_size}), got {self.num_attention_heads}."
            )
        if self.input_feeding and self.decoder_type != "luong":
            raise ValueError(
                f"`input_feeding` must be False unless `decoder_type` is 'luong', got True with {self.decoder_type!r}."
            )
        if self.decoder_type == "gnmt" and self.decoder_layers < 2:
            raise ValueError(
                "`decoder_layers` must be at least 2 with `decoder_type` 'gnmt', whose layers above the first read the "
                f"context, got {self.decoder_layers}."
            )

    def validate_layer_type(self):
        """The base class knows a closed list of layer types, none of which is a recurrent state."""

    @property
    def layer_types(self) -> list[str]:
        """The kind of cache layer that each decoder layer asks for."""
        # `get_text_config(decoder=True)` moves `decoder_layers` to `num_hidden_layers`.
        return ["recurrent_state"] * vars(self).get("decoder_layers", self.num_hidden_layers)

    @property
    def num_output_ids(self) -> int:
        """Number of ids that can be predicted."""
        return self.vocab_size + (self.num_copy_ids if self.pointer_generator else 0)

    @property
    def attention_has_state(self) -> bool:
        """Whether the attention reads what earlier positions attended to; it then has the last layer of the cache."""
        from .attention import ATTENTION_SCORES

        # The base class asks before the fields are checked.
        score = ATTENTION_SCORES.get(self.attention_score)
        return self.use_coverage is True or (score is not None and score.needs_previous_weights)

    @property
    def num_encoder_hidden_states(self) -> int:
        """How many `encoder_hidden_states` there are: the embeddings and the output of each layer."""
        return self.encoder_layers + 1

    @property
    def num_decoder_hidden_states(self) -> int:
        """How many `decoder_hidden_states` there are: the embeddings and the output of each layer."""
        return self.decoder_layers + 1

    @property
    def encoder_output_size(self) -> int:
        """Width of the encoder's output: `hidden_size` times the number of directions."""
        return self.hidden_size * (2 if self.encoder_bidirectional else 1)


__all__ = ["RNNSeq2SeqConfig"]
