"""Beams and samples that attend to one copy of their source. Imports nothing of the package but the choice of paths.

Transformers gives every beam a copy of what the encoder returned. Here all of a source share it, as long as the model
alone reads it, and what they have in common, which is everything before their first own token, is computed once.
"""

import functools
from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .fast_paths import is_watched, may_take


@dataclass
class SharedEncoderOutput(BaseModelOutputWithPooling):
    """
    What the encoder returned for sources to each of which several rows of the decoder attend.

    Args:
        rows_per_source (`int`, *optional*): How many rows, one behind the other; beside the fields of
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`].
    """

    rows_per_source: int | None = None


def count_rows_per_source(encoder_outputs) -> int:
    """How many rows of the decoder share a row of `encoder_outputs`."""
    return getattr(encoder_outputs, "rows_per_source", None) or 1


class SharedSources:
    """For models with an encoder: `generate` leaves one copy of what it returned for all beams or samples."""

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        encoder_outputs = model_kwargs.get("encoder_outputs")
        shares = (
            expand_size > 1
            and type(encoder_outputs) is BaseModelOutputWithPooling
            and not self.config.attention_has_state
            and may_take("shared_sources")
        )
        if shares:
            model_kwargs["encoder_outputs"] = {}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if shares:
            model_kwargs["encoder_outputs"] = SharedEncoderOutput(**encoder_outputs, rows_per_source=expand_size)
        return input_ids, model_kwargs


# What `generate` hands to a forward: with a row for each row of the decoder, and without rows.
_OF_ROWS = ("decoder_input_ids", "decoder_attention_mask", "attention_mask")
_OF_NO_ROWS = ("use_cache", "output_attentions", "output_hidden_states", "return_dict", "logits_to_keep")


def once_per_source(forward):
    """
    Wraps the `forward` of such a model: where it begins targets, and all rows of a source begin with the same tokens,
    it computes one of them and returns it for all.
    """

    @functools.wraps(forward)
    def wrapped(self, *args, **kwargs):
        rows = count_rows_per_source(kwargs.get("encoder_outputs"))
        if rows == 1 or args or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        given = {name: value for name, value in kwargs.items() if value is not None}
        cache = next((given[name] for name in ("cache", "past_key_values") if name in given), None)
        if not (_is_empty(cache) and _rows_are_alike(given, rows) and all(map(_is_the_same_for_all, self.modules()))):
            return forward(self, *args, **kwargs)
        given |= {name: given[name][::rows] for name in _OF_ROWS if name in given}
        given["encoder_outputs"] = BaseModelOutputWithPooling(
            **{name: value for name, value in given["encoder_outputs"].items() if name != "rows_per_source"}
        )
        outputs = forward(self, **given)
        cache.batch_repeat_interleave(rows)
        for name in ("logits", "decoder_hidden_states", "cross_attentions"):
            if outputs.get(name) is not None:
                outputs[name] = _repeat(outputs[name], rows)
        return outputs

    return wrapped


def _is_the_same_for_all(module: nn.Module) -> bool:
    """Whether rows that are the same stay so: nothing is dropped, and nobody watches how many there are."""
    return not (module.training or is_watched(module))


def _is_empty(cache: Cache | None) -> bool:
    """Whether it is a cache whose number of rows is not settled yet."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    return isinstance(cache, DynamicCache) and not any(layer.is_initialized for layer in cache.layers)


def _rows_are_alike(given: dict, rows: int) -> bool:
    """Whether nothing is given but what is known here, and the same for each of `rows` rows one behind the other."""
    known = {*_OF_ROWS, *_OF_NO_ROWS, "encoder_outputs", "cache", "past_key_values"}
    if "decoder_input_ids" not in given or given.keys() - known:
        return False
    of_rows = [given[name] for name in _OF_ROWS if name in given]
    if any(len(part) % rows for part in of_rows):
        return False
    of_rows = [part.unflatten(0, (-1, rows)) for part in of_rows]
    return all(torch.equal(part, part[:, :1].expand_as(part)) for part in of_rows)


def _repeat(part: torch.Tensor | tuple, rows: int) -> torch.Tensor | tuple:
    return tuple(_repeat(one, rows) for one in part) if isinstance(part, tuple) else part.repeat_interleave(rows, dim=0)
