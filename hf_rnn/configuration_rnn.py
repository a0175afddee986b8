"""Configuration of the `rnn` family. Imports no torch."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_checks import (
    AnyLength,
    CheckedOnLoading,
    check_layers,
    check_one_of,
    check_recurrence,
    check_stock_fields,
    fill_defaults,
    raises_value_error,
)


POOLING_TYPES = ("last", "mean", "max", "concat", "attention")


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
        embedding_dropout (`float`, *optional*, defaults to 0.0): Dropout on the token embeddings.
        hidden_dropout (`float`, *optional*, defaults to 0.0): Dropout between the recurrent layers.
        output_dropout (`float`, *optional*, defaults to 0.0): Dropout on the output of the last layer.
        recurrent_dropout (`float`, *optional*, defaults to 0.0):
            Dropout on the hidden state inside the recurrence, sampled once per sequence
            ([Gal and Ghahramani, 2016](https://huggingface.co/papers/1512.05287)). Runs the step-by-step loop.
        classifier_dropout (`float`, *optional*): Dropout before a classifier; none where not given.
        use_crf (`bool`, *optional*, defaults to `False`):
            Reserved for a conditional random field on [`RNNForTokenClassification`]; only `False` is accepted.
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
    embedding_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    output_dropout: float | int = 0.0
    recurrent_dropout: float | int = 0.0
    classifier_dropout: float | int | None = None
    use_crf: bool = False
    initializer_range: float | int | None = None
    forget_gate_bias: float | int = 1.0
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs):
        fill_defaults(self)
        check_stock_fields(self, kwargs)
        check_layers(self, "num_hidden_layers")
        super().__post_init__(**kwargs)
        self.validate_recurrence()

    def validate_recurrence(self):
        """Raises `ValueError` where fields are out of range or do not fit together."""
        check_layers(self, "num_hidden_layers")
        check_recurrence(self)
        check_one_of(self, "pooling", POOLING_TYPES)
        if self.use_crf:
            raise ValueError("`use_crf` must be False: there is no conditional random field yet, got True.")

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
    def output_size(self) -> int:
        """Width of the last hidden state: `hidden_size` times the number of directions."""
        return self.hidden_size * (2 if self.bidirectional else 1)


__all__ = ["RNNConfig"]
