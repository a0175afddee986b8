"""What the models of all families share: flags, initialisation, saving, the projection to the vocabulary.

Imports the cells, the attention and the layer.
"""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils.output_capturing import OutputRecorder

from .attention import AttentionScore, CoverageFeatures
from .packed_linear import forget_copies
from .recurrent_cells import RecurrentCell
from .recurrent_layer import HiddenStates


def checkpoint_nested(checkpoint_function: Callable) -> Callable:
    """
    `checkpoint_function` (a `torch.utils.checkpoint.checkpoint` with its options) for functions that take and return
    tuples of tensors, such as states: with `use_reentrant=True` it would lose the gradients of what lies in a tuple.
    """

    def run(function, *args):
        leaves, structure = tree_flatten(args)
        result_structure = None

        def flat_function(*leaves):
            nonlocal result_structure
            results, result_structure = tree_flatten(function(*tree_unflatten(leaves, structure)))
            return tuple(results)

        results = checkpoint_function(flat_function, *leaves)
        return tree_unflatten(results, result_structure)

    return run


class RecurrentPreTrainedModel(PreTrainedModel):
    """Base class of the families: weights, loading, saving, and what transformers needs to know of them."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RecurrentLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _can_compile_fullgraph = True
    # Which class of which file each Auto class finds in a saved folder; filled by the registration table.
    _heads: ClassVar[dict[str, str]] = {}
    # Writes the card of a model that goes to the Hub; filled by the library, and None where only its code lies.
    _write_card: ClassVar[Callable | None] = None
    # What was said of this model for its cards, and the card in the folder that is being saved to.
    card_details: dict | None = None
    _card_in_folder: bytes | None = None

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        cell_type = getattr(config, "cell_type", None)
        self.model_tags = ["hf_rnn", config.model_type, *([cell_type] if cell_type else []), "custom_code"]

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, RecurrentCell | AttentionScore | CoverageFeatures):
            module.init_weights(self.config)
        elif isinstance(module, nn.Linear | nn.Conv1d):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def _apply(self, fn, recurse: bool = True):
        forget_copies(self)  # of weights that move or change their type
        return super()._apply(fn, recurse)

    def init_parallel_plans(self):
        """
        As in transformers, but for modules that share a weight: they are sharded with what is left of the model, in one
        piece. Apart from each other, each would keep rows of its own where the rows cannot be divided evenly, and use
        old ones after a step. A part of a model leaves out what is planned for the model around it.
        """
        super().init_parallel_plans()
        tied = self.get_expanded_tied_weights_keys(all_submodels=True).items()
        # Where anything is tied, transformers plans for the embedding what it finds for the head.
        sharing = {name.rpartition(".")[0] for pair in tied for name in (*pair, "lm_head.weight")}
        children = dict(self.named_children())
        self._fsdp_plan = {
            name: style
            for name, style in self._fsdp_plan.items()
            if name.split(".")[0] in children and name not in sharing
        }

    @classmethod
    def maybe_distribute_model(cls, model, *args, **kwargs):
        """As in transformers; weights are shared before they are sharded, so that FSDP sees that they are one."""
        model.tie_weights()
        return super().maybe_distribute_model(model, *args, **kwargs)

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, **kwargs):
        super()._set_gradient_checkpointing(enable, checkpoint_nested(gradient_checkpointing_func), **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """
        As in transformers, but weights are read from safetensors unless `use_safetensors=False` asks for a pickle, and
        are looked at once they are loaded.

        Raises:
            `OSError`: A file is not there or is damaged; the message names it.
            `ValueError`: The configuration is wrong, or weights are not a number; the message names them.
        """
        kwargs.setdefault("use_safetensors", True)
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except (SafetensorError, json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
            damaged = ", ".join(_damaged_files(pretrained_model_name_or_path, kwargs.get("subfolder", "")))
            if not damaged and not isinstance(error, SafetensorError | json.JSONDecodeError):
                raise
            raise OSError(
                f"The checkpoint {str(pretrained_model_name_or_path)!r} cannot be read: "
                f"{damaged or 'one of its files'} is damaged ({error!r})."
            ) from error
        _check_weights(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def save_pretrained(self, save_directory, *args, **kwargs):
        """
        As in transformers; the code of the model is saved beside the weights, and `auto_map` in `config.json` names
        all heads of the family, so that each of them loads with `trust_remote_code=True` where this library is not
        installed. With `push_to_hub=True` a `README.md` that lies in the folder goes along as it is.
        """
        if self._heads:
            self.config.auto_map = dict(self._heads)
        elif getattr(self.config, "auto_map", None) is not None:
            self.config.auto_map = self._with_own_code(self.config.auto_map)
        card = Path(save_directory) / "README.md"
        self._card_in_folder = card.read_bytes() if card.is_file() else None
        try:
            return super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self._card_in_folder = None

    def _with_own_code(self, auto_map: dict) -> dict:
        """Classes that another repository was asked for are looked for in the folder, if their code is saved there."""
        own = {
            auto_class: name.split("--")[-1]
            for auto_class, name in auto_map.items()
            if isinstance(name, str) and "--" in name
        }
        if not own:
            return auto_map
        code = Path(inspect.getfile(type(self))).parent
        return auto_map | {
            auto_class: name for auto_class, name in own.items() if (code / f"{name.split('.')[0]}.py").is_file()
        }

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        # By now transformers has put its own card, or that of the repository, into the folder.
        if self._card_in_folder is not None:
            (Path(working_dir) / "README.md").write_bytes(self._card_in_folder)
        elif self._write_card is not None:
            self._write_card(working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


def _damaged_files(folder, subfolder: str) -> list[str]:
    """Names of the files of weights and of their indices in a local folder that cannot be read."""
    damaged = []
    for path in sorted(Path(folder, subfolder).glob("*.safetensors*")) if folder is not None else []:
        try:
            if path.suffix == ".json":
                dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
            else:
                with safe_open(path, "pt"):
                    pass
        except (SafetensorError, KeyError, TypeError, ValueError):
            damaged.append(path.name)
    return damaged


def _check_weights(model: nn.Module) -> None:
    """
    Raises `ValueError` where parameters hold a NaN, at the price of reading them once. Left out are parameters without
    memory of their own (on the meta device, offloaded to disk), in pieces over several devices, or quantized.
    """
    broken = [
        name
        for name, parameter in model.named_parameters()
        if type(parameter.data) is torch.Tensor
        and parameter.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        and not parameter.is_meta
        and parameter.numel() > 0
        # The smallest of numbers with a NaN among them is NaN.
        and parameter.detach().amin().isnan()
    ]
    if broken:
        raise ValueError(f"Weights must be numbers, but there are NaNs in {', '.join(broken)}.")


class GenerationMasks:
    """Masks of a model that generates: a recurrence asks for one number per token that it reads, and no more."""

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
        # Each row is one text, in which a recurrence counts for itself.
        inputs.pop("position_ids", None)
        prefix = "decoder_" if self.config.is_encoder_decoder else ""
        mask = inputs.get(f"{prefix}attention_mask")
        if mask is not None:
            tokens = inputs.get(f"{prefix}input_ids")
            seq_length = (inputs["inputs_embeds"] if tokens is None else tokens).shape[1]
            # A single token after the prompt is one that was just generated.
            is_new_token = seq_length == 1 and not is_first_iteration
            inputs[f"{prefix}attention_mask"] = None if is_new_token else mask[:, mask.shape[1] - seq_length :]
        return inputs


def embed_inputs(
    config,
    embed_tokens: nn.Module,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    prefix: str = "",
) -> torch.Tensor:
    """
    The embeddings `[batch, seq, embedding_size]` of tokens, or those that are given in their place.

    Args:
        config: A configuration with `embedding_size`.
        embed_tokens (`nn.Module`): The embeddings of the tokens.
        input_ids (`torch.Tensor` of shape `(batch, seq)`, *optional*): The tokens.
        inputs_embeds (`torch.Tensor` of shape `(batch, seq, embedding_size)`, *optional*): Embeddings in their place.
        prefix (`str`): What the names of the two begin with, for messages.

    Raises:
        `ValueError`: Not exactly one of the two, or one of a wrong shape.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(f"Give exactly one of `{prefix}input_ids` and `{prefix}inputs_embeds`.")
    if inputs_embeds is None:
        if input_ids.dim() != 2:
            raise ValueError(f"`{prefix}input_ids` must have the shape (batch, seq), got {tuple(input_ids.shape)}.")
        return embed_tokens(input_ids)
    # A kernel would read past the end of features that are too few.
    if inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != config.embedding_size:
        raise ValueError(
            f"`{prefix}inputs_embeds` must have the shape (batch, seq, {config.embedding_size}), got "
            f"{tuple(inputs_embeds.shape)}."
        )
    return inputs_embeds


def hidden_states_recorder(number_of_states: str) -> OutputRecorder:
    """
    What `output_hidden_states` records: whatever passes through [`HiddenStates`], the embeddings included.

    Args:
        number_of_states (`str`): The field of the configuration that says how many they are; negative indices in
            `output_hidden_states` count from there.
    """
    recorder = OutputRecorder(HiddenStates, index=0, capture_initial_hidden_state=False)
    # Not an argument of the constructor in older versions of transformers, which know no negative indices.
    recorder.num_hidden_layers_key = number_of_states
    return recorder


def vocabulary_projection(config, input_size: int) -> tuple[nn.Module, nn.Linear]:
    """
    Two steps from features `[..., input_size]` to logits `[..., vocab_size]`: a change of width, which only tied
    embeddings of another size need, and the projection, whose weight may be tied.
    """
    head_size = config.embedding_size if config.tie_word_embeddings else input_size
    projection = nn.Identity() if head_size == input_size else nn.Linear(input_size, head_size, bias=False)
    return projection, nn.Linear(head_size, config.vocab_size)


def select_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """
    The last `logits_to_keep` positions of `[batch, seq, size]` (0: all), or those whose indices are given.

    Raises:
        `ValueError`: A negative number, or neither a number nor a tensor.
    """
    if isinstance(logits_to_keep, torch.Tensor):
        return hidden_states[:, logits_to_keep]
    if not isinstance(logits_to_keep, int) or logits_to_keep < 0:
        raise ValueError(
            "`logits_to_keep` must be a number of positions, 0 or more, or a tensor of indices, got "
            f"{logits_to_keep!r}."
        )
    return hidden_states[:, -logits_to_keep:]
