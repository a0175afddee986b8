"""Which weights of a model PEFT adapts. No modeling file imports this, and it needs no PEFT."""

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from .recurrent_cells import RecurrentCell


def lora_target_parameters(config_or_model: PreTrainedConfig | nn.Module) -> list[str]:
    r"""
    The names for `target_parameters` of a `peft.LoraConfig`: the matrices of every recurrent cell, in all layers and
    directions, of the encoder and the decoder. (They are parameters of cells and no linear layers, so that
    `target_modules` does not find them. Modules that a cell of your own may have are left out.)

    Args:
        config_or_model (`PreTrainedConfig` or `torch.nn.Module`):
            A configuration or a model, whose names fit the base model and every head on it; or any other module with
            recurrent layers in it, whose names are those in that module.

    Returns:
        `list[str]`: Names such as `"layers.0.cell.weight_hh"`.

    Raises:
        `ValueError`: There is no recurrent cell, or the argument is nothing of the above.

    Example:

    ```python
    >>> from hf_rnn import RNNConfig, RNNForCausalLM, lora_target_parameters
    >>> from peft import LoraConfig, get_peft_model

    >>> model = RNNForCausalLM(RNNConfig(vocab_size=1000, hidden_size=128))
    >>> model = get_peft_model(model, LoraConfig(r=8, target_parameters=lora_target_parameters(model)))
    ```"""
    names = [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in _base_of(config_or_model).named_modules()
        if isinstance(module, RecurrentCell)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim in (2, 3)  # what PEFT adapts
    ]
    if not names:
        raise ValueError(f"`config_or_model` must have recurrent cells, got {type(config_or_model).__name__}.")
    return names


def lora_target_modules(config_or_model: PreTrainedConfig | nn.Module) -> list[str]:
    r"""
    The names for `target_modules` of a `peft.LoraConfig`, to be used beside [`lora_target_parameters`]: the linear
    layers of the base model, which are those of the attention, of the bridge between encoder and decoder and of the
    attentional vector. Heads and embeddings are not among them, nor the modules of a cell: PEFT could not merge
    adapters that lie inside of what it adapts.

    Args:
        config_or_model (`PreTrainedConfig` or `torch.nn.Module`): As in [`lora_target_parameters`].

    Returns:
        `list[str]`: Names such as `"decoder.combine"`; none for a model without attention.

    Raises:
        `ValueError`: The argument is neither a configuration nor a module.
    """
    base = _base_of(config_or_model)
    in_cells = {inner for cell in base.modules() if isinstance(cell, RecurrentCell) for inner in cell.modules()}
    return [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and module not in in_cells]


def _base_of(config_or_model: PreTrainedConfig | nn.Module) -> nn.Module:
    if isinstance(config_or_model, PreTrainedModel):
        return config_or_model.base_model
    if isinstance(config_or_model, nn.Module):
        return config_or_model
    if not isinstance(config_or_model, PreTrainedConfig):
        raise ValueError(
            f"`config_or_model` must be a configuration or a module, got {type(config_or_model).__name__}."
        )
    with torch.device("meta"):
        return AutoModel.from_config(config_or_model)
