"""Configuration of the `rnn` family. Imports no torch."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_checks import (
    MAX_SIZE,
    AnyLength,
    CheckedOnLoading,
    check_at_least,
    check_at_most,
    check_layers,
    check_names,
    check_one_of,
    check_recurrence,
    check_stock_fields,
    fill_defaults,
    raises_value_error,
)
from .label_schemes import CONSTRAINTS, forbidden_steps


POOLING_TYPES = ("last", "mean", "max", "concat", "attention")
QUESTION_ATTENTIONS = ("aligned", "flow")


@raises_value_error
@strict
class RNNConfig(AnyLength, CheckedOnLoading, PreTrainedConfig):
    r"""
    Configuration of a stack of recurrent layers over token embeddings, for [`RNNModel`] and the heads on it.

    Args:
        vocab_size (`int`, *optional*, defaults to 32000): Number of tokens.
        embedding_size (`int`, *optional*): Width of the token embeddings; `hidden_size` where not given.
        hidden_size (`int`, *optional*, defaults to 512): Width of the hidden state, per direction.
        num_hidden_layers (`int`, *optional*, defaults to 2): Number of recurrent layers.
        cell_type (`str`, *optional*, defaults to `"lstm"`):
            `"rnn_tanh"`, `"rnn_relu"`, `"gru"`, `"lstm"` or any other key of `RECURRENT_CELLS`.
        bidirectional (`bool`, *optional*, defaults to `False`): Whether a second recurrence reads from right to left.
        residual (`bool`, *optional*, defaults to `False`):
            Whether every layer after the first adds its input to its output.
        pooling (`str`, *optional*, defaults to `"last"`):
            How a sequence becomes one vector for the sequence heads: `"last"` (the final state of each direction),
            `"mean"`, `"max"`, `"concat"` (of the three before) or `"attention"` (a learned weighted mean). Padding
            never takes part.
        pooling_heads (`int`, *optional*, defaults to 1):
            Number of weighted means side by side, for `pooling="attention"`
            ([Lin et al., 2017](https://huggingface.co/papers/1703.03130)).
        pooling_attention_size (`int`, *optional*):
            Width of a tanh layer before the scores of `pooling="attention"`, as in
            [Yang et al. (2016)](https://aclanthology.org/N16-1174/); none where not given.
        word_encoder (`str`, *optional*):
            Where given, the recurrent layers read words of which each is made of several tokens, such as characters or
            sub-words: `"cnn"` makes a word's vector by a convolution over its tokens and the greatest value of each
            filter, a key of `RECURRENT_CELLS` by a layer of such cells in both directions. The sequence stays one of
            tokens: at all tokens of a word stands what the layers made of the word. Not for language models.
        first_continuation_id (`int`, *optional*):
            For a `word_encoder`: token ids from this one on continue the word before them, those below begin a new one.
        word_encoder_size (`int`, *optional*, defaults to 64): Width of what the word encoder makes of a word.
        word_encoder_width (`int`, *optional*, defaults to 3): Width of the filters of `"cnn"` in tokens, an odd number.
        word_vocab_size (`int`, *optional*, defaults to 0):
            For a `word_encoder`: number of words that have an embedding of their own beside it, the unknown one
            included; 0 for none. `hf_rnn.training.set_word_table` says which.
        word_embedding_size (`int`, *optional*): Width of these embeddings; `hidden_size` where not given.
        word_dropout (`float`, *optional*, defaults to 0.0):
            Chance to read a known word as an unknown one while training.
        embedding_dropout (`float`, *optional*, defaults to 0.0):
            Dropout on the token embeddings; with a `word_encoder` on the vectors of words.
        hidden_dropout (`float`, *optional*, defaults to 0.0): Dropout between the recurrent layers.
        output_dropout (`float`, *optional*, defaults to 0.0): Dropout on the output of the last layer.
        recurrent_dropout (`float`, *optional*, defaults to 0.0):
            Dropout on the hidden state inside the recurrence, sampled once per sequence
            ([Gal and Ghahramani, 2016](https://huggingface.co/papers/1512.05287)). Runs the step-by-step loop.
        classifier_dropout (`float`, *optional*): Dropout before a classifier; none where not given.
        question_attention (`str`, *optional*):
            How [`RNNForQuestionAnswering`] brings question and text together: `"aligned"` (exact matches and an aligned
            question embedding into the first layer, answers by a bilinear form with the question,
            [Chen et al., 2017](https://aclanthology.org/P17-1171/)) or `"flow"` (the same inputs, then attention in
            both directions between text and question, and two recurrent layers over it,
            [Seo et al., 2017](https://arxiv.org/abs/1611.01603)). Where not given, a linear map of the outputs.
        use_crf (`bool`, *optional*, defaults to `False`):
            Whether [`RNNForTokenClassification`] has a conditional random field over the labels of a text
            ([`LinearChainCRF`]). The other heads have no chain of labels and ignore it.
        crf_constraints (`str`, *optional*, defaults to `"auto"`):
            Which label such a field lets follow which: what the scheme `"bio"` (also `"iob2"`), `"bioes"` (`"iobes"`)
            or `"bilou"` says of the names in `id2label`, for example that I-PER only stands behind B-PER and I-PER;
            `"auto"`, the one of these that all the names fit, if any; or `"none"`. Labels of the older scheme IOB1
            look like `"bio"` and need `"none"`.
        crf_ignored_ids (`list[int]`, *optional*):
            Token ids that such a field leaves out where neither labels nor a `chain_mask` say what it covers, as in a
            pipeline: those which have no label in the training data, such as special tokens and the sub-words behind
            the first one of a word. `hf_rnn.training.ids_without_label` lists them. Not for a `word_encoder`, where
            the first token of each word is covered.
        id2intent (`dict[int, str]`, *optional*):
            Names of the intents that [`RNNForTokenClassification`] chooses from for a whole text, beside the label of
            each token; no intents where not given. `pooling` says how the text becomes one vector. The other heads
            ignore it.
        initializer_range (`float`, *optional*):
            Standard deviation of new embeddings and of a new projection to the vocabulary, tied or not; where not
            given 2.5 divided by the root of `embedding_size`, so that wide and narrow models start to learn alike.
            Recurrent weights start orthogonal, other weights Glorot uniform, biases at zero.
        forget_gate_bias (`float`, *optional*, defaults to 1.0): Initial bias of an LSTM's forget gate.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the output projection shares its weight with the embeddings. Where their widths differ, a learned
            projection without bias stands in between.
        use_cache (`bool`, *optional*, defaults to `True`):
            Whether the recurrent state is returned. While training the state is returned only on request.

        sep_token_id (`int`, *optional*):
            The token that ends a question before a text; with `question_attention` alone. `eos_token_id` where not
            given.

    Raises:
        `ValueError`: A field of a wrong type or value; the message names the field, the value and what is allowed.

    Example:

    ```python
    >>> from hf_rnn import RNNConfig, RNNForCausalLM

    >>> config = RNNConfig(vocab_size=1000, hidden_size=128, cell_type="gru")
    >>> model = RNNForCausalLM(config)
    ```"""

    model_type = "rnn"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "gates"]
    base_model_fsdp_plan = {"embed_tokens": "free_full_weight", "layers.*": "free_full_weight"}

    vocab_size: int = 32000
    embedding_size: int | None = None
    hidden_size: int = 512
    num_hidden_layers: int = 2
    cell_type: str = "lstm"
    bidirectional: bool = False
    residual: bool = False
    pooling: str = "last"
    pooling_heads: int = 1
    pooling_attention_size: int | None = None
    word_encoder: str | None = None
    first_continuation_id: int | None = None
    word_encoder_size: int = 64
    word_encoder_width: int = 3
    word_vocab_size: int = 0
    word_embedding_size: int | None = None
    word_dropout: float | int = 0.0
    embedding_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    output_dropout: float | int = 0.0
    recurrent_dropout: float | int = 0.0
    classifier_dropout: float | int | None = None
    question_attention: str | None = None
    use_crf: bool = False
    crf_constraints: str = "auto"
    crf_ignored_ids: list[int] | None = None
    id2intent: dict[int, str] | dict[str, str] | None = None
    initializer_range: float | int | None = None
    forget_gate_bias: float | int = 1.0
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    sep_token_id: int | None = None

    def __post_init__(self, **kwargs):
        fill_defaults(self)
        if self.word_embedding_size is None:
            self.word_embedding_size = self.hidden_size
        check_stock_fields(self, kwargs)
        check_layers(self, "num_hidden_layers")
        check_names(self, "id2intent")
        if self.id2intent is not None:
            # Keys are always strings in JSON.
            self.id2intent = {int(key): name for key, name in self.id2intent.items()}
        super().__post_init__(**kwargs)
        self.validate_recurrence()

    def validate_recurrence(self):
        """Raises `ValueError` where fields are out of range or do not fit together."""
        check_layers(self, "num_hidden_layers")
        check_recurrence(self)
        self.validate_pooling()
        self.validate_words()
        check_one_of(self, "crf_constraints", CONSTRAINTS)
        check_names(self, "id2intent")
        if self.question_attention is not None:
            check_one_of(self, "question_attention", QUESTION_ATTENTIONS)
            if self.word_encoder is not None:
                raise ValueError(
                    "`question_attention` compares tokens and must be None where `word_encoder` is set, got "
                    f"{self.question_attention!r}."
                )
        if self.use_crf:
            forbidden_steps(self.label_names, self.crf_constraints)
        self.validate_ignored_ids()

    def validate_ignored_ids(self):
        """Raises `ValueError` where `crf_ignored_ids` are no token ids, or where nothing reads them."""
        if self.crf_ignored_ids is None:
            return
        wrong = [index for index in self.crf_ignored_ids if index < 0]
        if wrong:
            raise ValueError(f"`crf_ignored_ids` must be token ids of at least 0, got {wrong[:5]}.")
        if self.word_encoder is not None:
            raise ValueError(
                "`crf_ignored_ids` must be None where `word_encoder` is set, which tells what begins a word."
            )

    def validate_words(self):
        """Raises `ValueError` where the fields of `word_encoder` are out of range or do not fit together."""
        check_at_least(self, 1, "word_encoder_size", "word_encoder_width", "word_embedding_size")
        check_at_least(self, 0, "word_vocab_size")
        check_at_most(
            self, MAX_SIZE, "word_encoder_size", "word_encoder_width", "word_embedding_size", "word_vocab_size"
        )
        if self.word_encoder is None:
            for field, default in (("first_continuation_id", None), ("word_vocab_size", 0)):
                if getattr(self, field) != default:
                    raise ValueError(
                        f"`{field}` must be {default} where `word_encoder` is None, got {getattr(self, field)}."
                    )
            return
        # Imported here, so that reading a configuration file needs no torch: the table of cells is open.
        from .recurrent_cells import RECURRENT_CELLS

        check_one_of(self, "word_encoder", ("cnn", *RECURRENT_CELLS))
        if self.word_encoder == "cnn" and self.word_encoder_width % 2 == 0:
            raise ValueError(f"`word_encoder_width` must be an odd number, got {self.word_encoder_width}.")
        if self.word_encoder != "cnn" and self.word_encoder_size % 2 == 1:
            raise ValueError(
                f"`word_encoder_size` must be an even number where two directions of a {self.word_encoder!r} share "
                f"it, got {self.word_encoder_size}."
            )
        if self.first_continuation_id is None or self.first_continuation_id < 0:
            raise ValueError(
                "`first_continuation_id` must say from which token id on words are continued, an integer of at least "
                f"0, got {self.first_continuation_id}."
            )
        if self.word_vocab_size == 1:
            raise ValueError("`word_vocab_size` must be 0, or the unknown word and at least one other, got 1.")

    def validate_pooling(self):
        """Raises `ValueError` where the fields of `pooling` are out of range or do not fit together."""
        check_one_of(self, "pooling", POOLING_TYPES)
        check_at_least(self, 1, "pooling_heads")
        check_at_most(self, MAX_SIZE, "pooling_heads")
        if self.pooling_attention_size is not None:
            check_at_least(self, 1, "pooling_attention_size")
            check_at_most(self, MAX_SIZE, "pooling_attention_size")
        if self.pooling != "attention" and (self.pooling_heads != 1 or self.pooling_attention_size is not None):
            field = "pooling_heads" if self.pooling_heads != 1 else "pooling_attention_size"
            raise ValueError(
                f"`{field}` is for `pooling='attention'` alone, got {getattr(self, field)} with {self.pooling!r}."
            )

    def validate_layer_type(self):
        """The base class knows a closed list of layer types, none of which is a recurrent state."""

    @property
    def layer_types(self) -> list[str]:
        """The kind of cache layer that each recurrent layer asks for."""
        return ["recurrent_state"] * self.num_hidden_layers

    @property
    def num_hidden_states(self) -> int:
        """How many `hidden_states` there are: the embeddings and the output of each layer."""
        return self.num_hidden_layers + 1

    @property
    def input_size(self) -> int:
        """Width of what the first recurrent layer reads."""
        if self.word_encoder is None:
            return self.embedding_size
        return self.word_encoder_size + (self.word_embedding_size if self.word_vocab_size else 0)

    @property
    def label_names(self) -> list[str]:
        """The labels in the order of their numbers."""
        return [str(self.id2label.get(index, index)) for index in range(self.num_labels)]

    @property
    def num_intents(self) -> int:
        """How many intents there are to choose from; 0 where there are none."""
        return len(self.id2intent or ())

    @property
    def output_size(self) -> int:
        """Width of the last hidden state: `hidden_size` times the number of directions."""
        return self.hidden_size * (2 if self.bidirectional else 1)


__all__ = ["RNNConfig"]
