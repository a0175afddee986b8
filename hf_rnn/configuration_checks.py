"""Checks that the configurations share. Imports neither torch nor, at import time, anything of the package."""

import contextlib
import functools
import math

from huggingface_hub.errors import StrictDataclassError


# More than anything needs, and few enough for a slip of the pen not to fill the memory.
MAX_LAYERS = 4096
MAX_LABELS = 2**20
# What torch can count in every place where it counts features or tokens.
MAX_SIZE = 2**31 - 1


# Of tokens in a text: more than any memory holds, and still a number that every client can count with.
NO_LIMIT = 2**53
# New logits are about as many times as large as the states that they are made of, which are small in gated cells.
INITIAL_SCALE = 2.5


@contextlib.contextmanager
def value_errors(config_class):
    """Within this context whatever makes a configuration invalid is a `ValueError`."""
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(f"{config_class.__name__}: {error}") from error


def raises_value_error(config_class):
    """Class decorator: whatever makes a configuration invalid leaves its constructor as a `ValueError`."""
    init = config_class.__init__

    @functools.wraps(init)
    def checked_init(self, *args, **kwargs):
        with value_errors(config_class):
            init(self, *args, **kwargs)

    config_class.__init__ = checked_init
    return config_class


class CheckedOnLoading:
    """To be put before `PreTrainedConfig`: fields that are overridden on loading are checked as those of a new one."""

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        if not isinstance(config_dict, dict):
            raise ValueError(f"{cls.__name__} is made of a dictionary, got a {type(config_dict).__name__}.")
        with value_errors(cls):
            loaded = super().from_dict(config_dict, **kwargs)
            (loaded[0] if isinstance(loaded, tuple) else loaded).validate()
        return loaded


class AnyLength:
    """To be put before `PreTrainedConfig`: texts may have any length, and clients that ask for a limit are told so."""

    @property
    def max_position_embeddings(self) -> int:
        """How many tokens a text may have: more than there are. It is the same for all models, and no field."""
        return NO_LIMIT

    @max_position_embeddings.setter
    def max_position_embeddings(self, value):
        if value != NO_LIMIT:
            raise ValueError(
                "`max_position_embeddings` cannot be given, there is no limit to the length of a text (the tokenizer's "
                f"`model_max_length` cuts texts), got {value!r}."
            )


def fill_defaults(config) -> None:
    """Fills the fields of both text families that follow from others where they are not given."""
    if config.embedding_size is None:
        config.embedding_size = config.hidden_size
    if config.initializer_range is None and config.embedding_size > 0:
        config.initializer_range = INITIAL_SCALE / config.embedding_size**0.5


def check_at_least(config, minimum: int, *fields: str) -> None:
    """Raises `ValueError` where one of the numbers in `fields` is below `minimum`."""
    for field in fields:
        value = getattr(config, field)
        if value < minimum:
            kind = "an integer" if isinstance(value, int) else "a number"
            raise ValueError(f"`{field}` must be {kind} of at least {minimum}, got {value}.")


def check_at_most(config, maximum: int, *fields: str) -> None:
    """Raises `ValueError` where one of the integer `fields` is above `maximum`."""
    for field in fields:
        value = getattr(config, field)
        if value > maximum:
            raise ValueError(f"`{field}` must be an integer of at most {maximum}, got {value}.")


def check_layers(config, *fields: str) -> None:
    """Raises `ValueError` where a number of layers is out of range; the base class makes a list of as many."""
    check_at_least(config, 1, *fields)
    check_at_most(config, MAX_LAYERS, *fields)


def check_dropouts(config) -> None:
    """Raises `ValueError` where a field named `*_dropout` lies outside of [0, 1)."""
    for field, value in vars(config).items():
        if field.endswith("_dropout") and value is not None and not 0 <= value < 1:
            raise ValueError(f"`{field}` must be a probability in [0, 1), got {value}.")


def check_finite(config, *fields: str, positive: bool = False) -> None:
    """Raises `ValueError` where one of the numbers in `fields` is not finite (or, with `positive`, not above zero)."""
    for field in fields:
        value = getattr(config, field)
        if value is None or not math.isfinite(value) or (positive and value <= 0):
            raise ValueError(f"`{field}` must be a {'positive ' if positive else ''}finite number, got {value}.")


def check_one_of(config, field: str, allowed) -> None:
    """Raises `ValueError` where `field` is none of the `allowed` values."""
    value = getattr(config, field)
    if value not in allowed:
        raise ValueError(f"`{field}` must be one of {sorted(allowed)}, got {value!r}.")


# The floating types of torch, by name.
DTYPES = ("float16", "half", "bfloat16", "float32", "float", "float64", "double")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def check_stock_fields(config, others: dict) -> None:
    """
    Raises `ValueError` where a field that configurations of transformers share would stop the base class half-way, or
    be believed by it.

    Args:
        config: A configuration whose base class has not seen its fields yet.
        others (`dict`): The keywords of its constructor that are no fields.
    """
    if config.problem_type is not None:
        check_one_of(config, "problem_type", PROBLEM_TYPES)
    num_labels = others.get("num_labels", 1)
    if not isinstance(num_labels, int) or isinstance(num_labels, bool) or not 1 <= num_labels <= MAX_LABELS:
        raise ValueError(f"`num_labels` must be an integer from 1 to {MAX_LABELS}, got {num_labels!r}.")
    if config.id2label is not None and not (
        isinstance(config.id2label, dict) and config.id2label and all(map(_is_index, config.id2label))
    ):
        raise ValueError(f"`id2label` must be a dictionary from 0, 1, 2, ... to labels, got {config.id2label!r}.")
    if config.label2id is not None and not isinstance(config.label2id, dict):
        raise ValueError(f"`label2id` must be a dictionary from labels to 0, 1, 2, ..., got {config.label2id!r}.")
    for field, value in {"dtype": config.dtype, "torch_dtype": others.get("torch_dtype")}.items():
        name = value if isinstance(value, str) else str(value).removeprefix("torch.")
        if value is not None and name not in DTYPES:
            raise ValueError(f"`{field}` must be one of {sorted(DTYPES)}, got {value!r}.")
    if "layer_types" in others:
        raise ValueError(
            f"`layer_types` follows from the number of layers and cannot be given, got {others['layer_types']!r}."
        )


def check_names(config, field: str) -> None:
    """Raises `ValueError` where `field` is neither None nor a dictionary from 0, 1, 2, ... to names."""
    value = getattr(config, field)
    if value is None:
        return
    is_right = isinstance(value, dict) and value and all(map(_is_index, value))
    if (
        not is_right
        or sorted(map(int, value)) != list(range(len(value)))
        or not all(isinstance(name, str) for name in value.values())
    ):
        raise ValueError(f"`{field}` must be None or a dictionary from 0, 1, 2, ... to names, got {value!r}.")


def _is_index(key) -> bool:
    return str(key).isdecimal()


def check_token_ids(config) -> None:
    """Raises `ValueError` where a special token is negative; one beyond the vocabulary gets transformers' warning."""
    for field in ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id"):
        value = getattr(config, field, None)
        ids = value if isinstance(value, list) else [value]
        if any(token_id is not None and token_id < 0 for token_id in ids):
            raise ValueError(f"`{field}` must be None or at least 0, got {value}.")


def check_recurrence(config) -> None:
    """The fields that both text families share: sizes, cell type, dropouts and initialisation."""
    # Imported here, so that reading a configuration file needs no torch: the table of cells is open.
    from .recurrent_cells import RECURRENT_CELLS

    check_at_least(config, 1, "vocab_size", "hidden_size", "embedding_size")
    check_at_most(config, MAX_SIZE, "vocab_size", "hidden_size", "embedding_size")
    check_one_of(config, "cell_type", RECURRENT_CELLS)
    check_token_ids(config)
    check_dropouts(config)
    check_finite(config, "initializer_range", positive=True)
    check_finite(config, "forget_gate_bias")
