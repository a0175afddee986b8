"""The files of a checkpoint: code that goes along with the weights, cards, and a look at what is read.

Imports nothing of the package.
"""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn


class CheckpointFiles:
    """To be put before `PreTrainedModel`: how a model is saved, loaded and pushed."""

    # Which class of which file each Auto class finds in a saved folder; filled by the registration table.
    _heads: ClassVar[dict[str, str]] = {}
    # Writes the card of a model that goes to the Hub; filled by the library, and None where only its code lies.
    _write_card: ClassVar[Callable | None] = None
    # What was said of this model for its cards, and the card in the folder that is being saved to.
    card_details: dict | None = None
    _card_in_folder: bytes | None = None

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
