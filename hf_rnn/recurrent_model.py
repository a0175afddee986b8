"""What the models of all families share: flags, initialisation, saving, the projection to the vocabulary.

Imports the cells, the attention and the layer.
"""

from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .attention import AttentionScore
from .recurrent_cells import RecurrentCell


class RecurrentPreTrainedModel(PreTrainedModel):
    """Base class of the families: weights, loading, saving, and what transformers needs to know of them."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RecurrentLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _can_compile_fullgraph = True
    # Which class of which file each Auto class finds in a saved folder; filled by the registration table.
    _heads: ClassVar[dict[str, str]] = {}

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, RecurrentCell | AttentionScore):
            module.init_weights(self.config)
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """
        As in transformers; the code of the model is saved beside the weights, and `auto_map` in `config.json` names
        all heads of the family, so that each of them loads with `trust_remote_code=True` where this library is not
        installed.
        """
        if self._heads:
            self.config.auto_map = dict(self._heads)
        return super().save_pretrained(save_directory, *args, **kwargs)


class GenerationMasks:
    """Masks of a model that generates: a recurrence asks for one number per token that it reads, and no more."""

    @staticmethod
    def create_masks_for_generate(attention_mask=None, **kwargs):
        """No mask over pairs of positions, with a static cache neither."""
        return attention_mask

    # `generate` looks at this signature to see whether a prompt may be given as `inputs_embeds`.
    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, **kwargs):
        """The inputs of the next forward, with a mask for just the tokens that it reads."""
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        prefix = "decoder_" if self.config.is_encoder_decoder else ""
        mask = inputs.get(f"{prefix}attention_mask")
        if mask is not None:
            tokens = inputs.get(f"{prefix}input_ids")
            seq_length = (inputs["inputs_embeds"] if tokens is None else tokens).shape[1]
            inputs[f"{prefix}attention_mask"] = mask[:, mask.shape[1] - seq_length :]
        return inputs


def vocabulary_projection(config, input_size: int) -> tuple[nn.Module, nn.Linear]:
    """
    Two steps from features `[..., input_size]` to logits `[..., vocab_size]`: a change of width, which only tied
    embeddings of another size need, and the projection, whose weight may be tied.
    """
    head_size = config.embedding_size if config.tie_word_embeddings else input_size
    projection = nn.Identity() if head_size == input_size else nn.Linear(input_size, head_size, bias=False)
    return projection, nn.Linear(head_size, config.vocab_size)


def select_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The last `logits_to_keep` positions of `[batch, seq, size]` (0: all), or those whose indices are given."""
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    return hidden_states[:, kept]
