"""What `generate` is to know of masks and positions of a recurrence. Imports nothing of the package."""

import inspect

import torch


class GenerationMasks:
    """Masks of a model that generates: a recurrence asks for one number per token that it reads, and no more."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # `generate` asks for it at every step, and what has wrappers around it takes long to look at.
        cls.forward.__signature__ = inspect.signature(cls.forward)

    @staticmethod
    def create_masks_for_generate(attention_mask=None, **kwargs):
        """No mask over pairs of positions, with a static cache neither."""
        return attention_mask

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        """None: each row is one text, of which positions have nothing to say."""
        return None

    def _validate_model_kwargs(self, model_kwargs):
        # Many tokenizers return them; a recurrence takes them, as GPT-2 does, and has no use for them.
        model_kwargs.pop("token_type_ids", None)
        super()._validate_model_kwargs(model_kwargs)

    def _get_static_cache_init_shape(self):
        """A static cache is filled by the first step, and not before with the sizes of attention heads."""
        return None

    # `generate` looks at this signature to see whether a prompt may be given as `inputs_embeds`.
    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, is_first_iteration=False, **kwargs):
        """The inputs of the next forward, with a mask for just the tokens that it reads."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        # Each row must be one text, which the positions of the prompt tell; from then on a recurrence counts itself.
        if not is_first_iteration:
            inputs.pop("position_ids", None)
        prefix = "decoder_" if self.config.is_encoder_decoder else ""
        mask = inputs.get(f"{prefix}attention_mask")
        if mask is not None:
            tokens = inputs.get(f"{prefix}input_ids")
            seq_length = (inputs["inputs_embeds"] if tokens is None else tokens).shape[1]
            # Also of a single token, which may be a piece of a prompt with padding; with strides that do not grow with
            # the text, for which a step would be compiled anew.
            mask = mask[:, mask.shape[1] - seq_length :].clone(memory_format=torch.contiguous_format)
            inputs[f"{prefix}attention_mask"] = mask
        return inputs
