"""What the models of all families share: flags, initialisation, the inputs, the projection to the vocabulary.

Imports the cells, the attention, the layer, the chain of labels and how checkpoints are saved.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils.output_capturing import OutputRecorder

from .attention import AttentionScore, CoverageFeatures
from .checkpoint_files import CheckpointFiles
from .crf import LinearChainCRF
from .fast_paths import as_now
from .packed_linear import forget_copies
from .recurrent_cache import RecurrentStateLayer
from .recurrent_cells import RecurrentCell
from .recurrent_layer import HiddenStates
from .repeated_rows import select_rows
from .word_encoder import WordTable


# Caches know of no fast path by themselves.
RecurrentStateLayer.select_rows = staticmethod(select_rows)


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


def checkpoint_as_now(checkpoint_function: Callable) -> Callable:
    """`checkpoint_function` for functions that run again in another context, or another thread, on the same paths."""

    def run(function, *args):
        return checkpoint_function(function if torch.compiler.is_compiling() else as_now(function), *args)

    return run


class RecurrentPreTrainedModel(CheckpointFiles, PreTrainedModel):
    """Base class of the families: weights, and what transformers needs to know of them."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RecurrentLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _can_compile_fullgraph = True

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        cell_type = getattr(config, "cell_type", None)
        self.model_tags = ["hf_rnn", config.model_type, *([cell_type] if cell_type else []), "custom_code"]

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, RecurrentCell | AttentionScore | CoverageFeatures | LinearChainCRF | WordTable):
            module.init_weights(self.config)
        elif isinstance(module, nn.Linear | nn.Conv1d):
            if self._predicts_tokens(module):
                init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            else:
                init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def _predicts_tokens(self, module: nn.Module) -> bool:
        """Whether it is the projection to the vocabulary, or what `resize_token_embeddings` takes its new rows from."""
        head = self.get_output_embeddings()
        return head is not None and (module is head or all(module is not part for part in self.modules()))

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
    def maybe_distribute_model(cls, model, distributed_config, *args, **kwargs):
        """As in transformers; weights are shared before they are sharded, so that FSDP sees that they are one."""
        if distributed_config is not None:
            model.tie_weights()
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, **kwargs):
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant", True):
            gradient_checkpointing_func = checkpoint_nested(gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, checkpoint_as_now(gradient_checkpointing_func), **kwargs)


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
    if logits_to_keep == 0:
        return hidden_states
    return hidden_states[:, -logits_to_keep:]
