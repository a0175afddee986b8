"""Checks that the configurations share. Imports neither torch nor, at import time, anything of the package."""

import contextlib
import functools
import math

from huggingface_hub.errors import StrictDataclassError


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
        with value_errors(cls):
            loaded = super().from_dict(config_dict, **kwargs)
            (loaded[0] if isinstance(loaded, tuple) else loaded).validate()
        return loaded


def check_at_least(config, minimum: int, *fields: str) -> None:
    """Raises `ValueError` where one of the integer `fields` is below `minimum`."""
    for field in fields:
        value = getattr(config, field)
        if value < minimum:
            raise ValueError(f"`{field}` must be an integer of at least {minimum}, got {value}.")


def check_dropouts(config) -> None:
    """Raises `ValueError` where a field named `*_dropout` lies outside of [0, 1)."""
    for field, value in vars(config).items():
        if field.endswith("_dropout") and value is not None and not 0 <= value < 1:
            raise ValueError(f"`{field}` must be a probability in [0, 1), got {value}.")


def check_finite(config, *fields: str, positive: bool = False) -> None:
    """Raises `ValueError` where one of the numbers in `fields` is not finite (or, with `positive`, not above zero)."""
    for field in fields:
        value = getattr(config, field)
        if not math.isfinite(value) or (positive and value <= 0):
            raise ValueError(f"`{field}` must be a {'positive ' if positive else ''}finite number, got {value}.")


def check_one_of(config, field: str, allowed) -> None:
    """Raises `ValueError` where `field` is none of the `allowed` values."""
    value = getattr(config, field)
    if value not in allowed:
        raise ValueError(f"`{field}` must be one of {sorted(allowed)}, got {value!r}.")


def check_recurrence(config) -> None:
    """The fields that both text families share: sizes, cell type, dropouts and initialisation."""
    # Imported here, so that reading a configuration file needs no torch: the table of cells is open.
    from .recurrent_cells import RECURRENT_CELLS

    check_at_least(config, 1, "vocab_size", "hidden_size", "embedding_size")
    check_one_of(config, "cell_type", RECURRENT_CELLS)
    check_dropouts(config)
    check_finite(config, "initializer_range", positive=True)
    check_finite(config, "forget_gate_bias")
