"""Exports a model to a folder with everything that a program needs to run it."""

import copy
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..extras import require
from . import runner
from .graphs import Graph, check_model, make_graphs
from .onnx_files import SHARED_WEIGHTS, quantize, share_weights, to_exported_program, write_onnx


FORMATS = ("onnx", "torch")
# What a folder with a model holds beside weights and code.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
)
# How far an export may be from the model, as a share of the largest number of the output (or of one, if that is more).
TOLERANCE = 1e-4
# Rows and length of the inputs with which an export is checked; the examples that were traced have 3 and 4.
CHECKED_SIZES = ((1, 1), (1, 7), (2, 1), (5, 19))


@torch.autocast("cpu", enabled=False)  # graphs are in float32, whatever is on around them
def export_model(
    model: PreTrainedModel | str | os.PathLike,
    folder: str | os.PathLike,
    format: str = "onnx",
    int8: bool = False,
    overwrite: bool = False,
    tokenizer_folder: str | os.PathLike | None = None,
) -> dict:
    """
    Exports a model and checks the result.

    Args:
        model (`PreTrainedModel`, `str` or `PathLike`): The model, or a folder from which to load it. A copy of it in
            float32 is exported.
        folder (`str` or `PathLike`): Where to write. Nothing is there, or nothing is changed, until all is done.
        format (`str`): `"onnx"`, for [`runner.load`] and every other ONNX runtime, or `"torch"`, for
            `torch.export.load`, before which `import hf_rnn` has to stand.
        int8 (`bool`): Whether weights get eight bits (`"onnx"` only).
        overwrite (`bool`): Whether what is at `folder` may be replaced. What holds the model or its tokenizer, or the
            program's own folder, never is.
        tokenizer_folder (`str` or `PathLike`, *optional*): Where the files of the tokenizer lie; in the folder of the
            model where not given.

    Returns:
        `dict`: `kind`, `folder`, `files`; `differences` and `int8_differences`, by graph the largest difference from
        the model on random inputs as a share of the largest output (or of one, if that is more), before and after the
        weights got eight bits; `checked_sizes`, the rows and lengths of these inputs.

    Raises:
        `ValueError`: A wrong argument, a model of another library, a cell that the format cannot express, or a `folder`
            that must not be replaced.
        `FileExistsError`: There is something at `folder`, and `overwrite` is False.
        `ImportError`: The packages of the extra `onnx` are missing.
        `RuntimeError`: What was written does not compute what the model does.
    """
    if format not in FORMATS:
        raise ValueError(f"`format` must be one of {list(FORMATS)}, got {format!r}.")
    if int8 and format != "onnx":
        raise ValueError(f"`int8` must be False unless `format` is 'onnx', got True with {format!r}.")
    if not isinstance(model, str | os.PathLike):
        check_model(model)
    if format == "onnx":
        require("onnx", "onnxscript", "onnxruntime")
    folder = Path(folder).absolute()
    if not folder.is_symlink():  # a link is replaced itself
        folder = folder.resolve()
    if os.path.lexists(folder) and not overwrite:
        raise FileExistsError(f"{folder} exists already: choose another folder, or pass `overwrite` to replace it.")
    source = model.name_or_path if isinstance(model, PreTrainedModel) else model
    _check_may_be_replaced(folder, {"the model": source, "the tokenizer": tokenizer_folder})
    if not isinstance(model, PreTrainedModel):
        tokenizer_folder = tokenizer_folder or model
        model = load_model(model)
    kind, graphs, states = make_graphs(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        files = _write_graphs(graphs, temporary, format)
        differences, int8_differences = check(graphs, temporary, files), {}
        worst = max(differences.values())
        if worst > TOLERANCE:
            raise RuntimeError(
                f"What was written differs from the model by {worst:.1e} of its largest output, where {TOLERANCE:.0e} "
                f"is allowed: {differences}. Nothing was kept."
            )
        if format == "onnx":
            paths = [temporary / file for file in files.values()]
            if int8:
                for path in paths:
                    quantize(path)
            if len(paths) > 1:
                share_weights(paths, temporary / SHARED_WEIGHTS)
            if int8:
                int8_differences = check(graphs, temporary, files)
            shutil.copyfile(runner.__file__, temporary / "runner.py")
        _write_description(temporary, model, kind, graphs, states, files, format, int8)
        _copy_configuration(temporary, model, tokenizer_folder)
        _replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return {
        "kind": kind,
        "folder": str(folder),
        "files": sorted(path.name for path in folder.iterdir()),
        "differences": differences,
        "int8_differences": int8_differences,
        "checked_sizes": CHECKED_SIZES,
    }


def _check_may_be_replaced(folder: Path, needed: dict[str, str | os.PathLike | None]) -> None:
    """Raises `ValueError` where what is at `folder` holds one of the folders that are needed, by what they hold."""
    if not os.path.lexists(folder):
        return
    for name, path in {**needed, "the current directory": Path.cwd()}.items():
        # The name of a model on the Hub is not there.
        if path and Path(path).exists() and Path(path).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"`folder` must not hold {name} ({path}), which would be deleted with it, got {folder}.")


def load_model(path: str | os.PathLike) -> PreTrainedModel:
    """
    The model of a folder or of the Hub, with the class under which it was saved.

    Raises:
        `FileNotFoundError`: There is no such folder.
        `ValueError`: It is not a model of this library.
    """
    if not Path(path).exists() and (Path(path).is_absolute() or os.fspath(path).startswith(".")):
        raise FileNotFoundError(f"`model` must be a folder with a saved model or its name on the Hub: no {path} here.")
    import transformers

    from .. import REGISTRATION

    config = transformers.AutoConfig.from_pretrained(path)
    classes = {
        model_class.__name__: model_class
        for config_class, model_classes in REGISTRATION.items()
        for model_class in model_classes
        if isinstance(config, config_class)
    }
    architecture = (config.architectures or [None])[0]
    if architecture not in classes:
        raise ValueError(
            f"`model` must have been saved by one of the classes of this library, but the `architectures` of {path} "
            f"are {config.architectures} with `model_type` {config.model_type!r}."
        )
    return classes[architecture].from_pretrained(path, dtype=torch.float32)


def _write_graphs(graphs: dict[str, Graph], folder: Path, format: str) -> dict[str, str]:
    """Writes one file per graph; their names by graph."""
    suffix = "onnx" if format == "onnx" else "pt2"
    files = {name: f"{name}.{suffix}" for name in graphs}
    for name, graph in graphs.items():
        if format == "onnx":
            write_onnx(graph, folder / files[name])
        else:
            torch.export.save(to_exported_program(graph), folder / files[name])
    return files


def check(graphs: dict[str, Graph], folder: Path, files: dict[str, str]) -> dict[str, float]:
    """
    The largest difference of each file from its graph on random inputs of `CHECKED_SIZES`, as a share of the largest
    number of the output (or of one, if that is more).
    """
    generator = torch.Generator().manual_seed(0)
    differences = {}
    for name, graph in graphs.items():
        run = _open(folder / files[name])
        worst = 0.0
        for batch, length in CHECKED_SIZES:
            inputs = _random_inputs(graph, batch, length, generator)
            expected = graph(inputs)
            for output, result in run(inputs, graph.outputs).items():
                scale = max(1.0, expected[output].abs().max().item())
                worst = max(worst, (result - expected[output]).abs().max().item() / scale)
        differences[name] = worst
    return differences


def _open(path: Path):
    """What runs a file: a function of tensors by name and the names of the outputs."""
    if path.suffix == ".pt2":
        module = torch.export.load(path).module()
        return lambda inputs, outputs: dict(zip(outputs, module(*inputs.values())))
    session = runner._Graph(path, threads=None, providers=None)

    def run(inputs, outputs):
        results = session({name: tensor.numpy() for name, tensor in inputs.items()})
        return {name: torch.from_numpy(results[name]) for name in outputs}

    return run


def _random_inputs(graph: Graph, batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    sizes = {"batch": batch, "choices": 3, "positions": 2}
    inputs = {}
    for name, example in graph.inputs.items():
        shape = list(example.shape)
        for dim, axis in graph.axes[name].items():
            shape[dim] = sizes.get(axis, length)
        if name.endswith("mask"):
            inputs[name] = (torch.rand(shape, generator=generator) > 0.3).long()
            if batch > 1:
                inputs[name][-1] = 0
        elif name == "positions":
            inputs[name] = torch.randint(0, length, shape, generator=generator)
        elif example.is_floating_point():
            inputs[name] = torch.randn(shape, generator=generator, dtype=example.dtype)
        else:
            inputs[name] = torch.randint(0, graph.vocab_size, shape, generator=generator)
    return inputs


def _write_description(folder, model, kind, graphs, states, files, format, int8) -> None:
    def describe(tensors: dict[str, torch.Tensor], axes) -> dict:
        return {
            name: {
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": [axes.get(name, {}).get(dim, size) for dim, size in enumerate(tensor.shape)],
            }
            for name, tensor in tensors.items()
        }

    description = {
        "format": format,
        "format_version": runner.FORMAT_VERSION,
        "kind": kind,
        "model_class": type(model).__name__,
        "int8": int8,
        "graphs": {
            name: {"file": files[name], "inputs": describe(graph.inputs, graph.axes), "outputs": graph.outputs}
            for name, graph in graphs.items()
        },
        "states": [state._asdict() for state in states],
    }
    (folder / runner.DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _copy_configuration(folder: Path, model: PreTrainedModel, tokenizer_folder) -> None:
    config = copy.deepcopy(model.config)
    vars(config).pop("auto_map", None)  # the code that it names stays behind
    config.to_json_file(folder / "config.json", use_diff=False)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer_folder is not None:
        for name in TOKENIZER_FILES:
            if (Path(tokenizer_folder) / name).is_file():
                shutil.copyfile(Path(tokenizer_folder) / name, folder / name)


def _replace_folder(temporary: Path, folder: Path) -> None:
    """Puts `temporary` in the place of `folder`; what was there is deleted when the new one stands."""
    os.chmod(temporary, 0o777 & ~_umask())
    if not os.path.lexists(folder):
        os.replace(temporary, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    try:
        os.replace(folder, old / folder.name)
        os.replace(temporary, folder)
    except BaseException:
        if os.path.lexists(old / folder.name):
            os.replace(old / folder.name, folder)  # if this fails, too, the error says where everything lies
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
