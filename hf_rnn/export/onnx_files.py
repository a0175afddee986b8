"""Writes graphs as ONNX files: the trace, the names, the weights that the files share, and eight-bit weights."""

import contextlib
import hashlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from ..extras import require
from .graphs import Graph


SHARED_WEIGHTS = "weights.bin"
SMALLEST_SHARED = 1024  # bytes; what is smaller stays in the graph
ALIGNMENT = 4096  # so that weights can be mapped from the file


def to_exported_program(graph: Graph) -> torch.export.ExportedProgram:
    """The graph as torch.export gives it, with the dimensions that vary left open."""
    dims: dict[str, torch.export.Dim] = {}
    shapes = [
        {dim: dims.setdefault(name, torch.export.Dim(name)) for dim, name in graph.axes[input_name].items()}
        for input_name in graph.inputs
    ]
    # Only sizes above one are shown to the tracer, which would take one for a constant; dimensions stay open downwards.
    with torch.no_grad():
        return torch.export.export(
            graph.function, tuple(graph.inputs.values()), dynamic_shapes=(tuple(shapes),), strict=False
        )


def write_onnx(graph: Graph, path: Path) -> None:
    """
    Writes one graph as an ONNX file, all weights within it.

    Raises:
        `ImportError`: The packages of the extra `onnx` are missing.
    """
    require("onnx", "onnxscript")
    with _quiet():
        program = torch.onnx.export(
            to_exported_program(graph),
            dynamo=True,
            verbose=False,
            input_names=list(graph.inputs),
            output_names=graph.outputs,
        )
        _fold_constants(program.model)
    _name_axes(graph, program.model.graph)
    program.save(path)


def _fold_constants(onnx_model) -> None:
    """Computes what depends on weights alone, of whatever size: above all the gates in ONNX's order."""
    from onnxscript import optimizer
    from onnxscript.optimizer import fold_constants

    everything = 2**62
    fold_constants(onnx_model, input_size_limit=everything, output_size_limit=everything)
    optimizer.remove_unused_nodes(onnx_model)


def _name_axes(graph: Graph, onnx_graph) -> None:
    """Gives the dimensions that vary the names of the graph, in place of the tracer's."""
    import onnx_ir

    names = {
        str(value.shape[dim]): name
        for value in onnx_graph.inputs
        for dim, name in graph.axes.get(value.name, {}).items()
    }
    for value in [*onnx_graph.inputs, *onnx_graph.outputs]:
        value.shape = onnx_ir.Shape([size if isinstance(size, int) else names.get(str(size)) for size in value.shape])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on optional packages and on constants that it does not fold."""
    loggers = [logging.getLogger(name) for name in ("", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def quantize(path: Path) -> None:
    """
    Gives the weights of matrix products, of LSTM nodes and of embeddings eight bits, in place. What runs between them
    is quantised anew for each row at run time.
    """
    require("onnx", "onnxruntime")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantized = path.with_suffix(".int8.onnx")
    with _quiet():
        quantize_dynamic(path, quantized, weight_type=QuantType.QInt8, per_channel=True)
    quantized.replace(path)


def share_weights(paths: list[Path], shared: Path) -> None:
    """Moves the weights of ONNX files into one file, equal ones once."""
    require("onnx")
    import onnx
    from onnx.external_data_helper import set_external_data

    places: dict[bytes, int] = {}
    with shared.open("wb") as file:
        for path in paths:
            model = onnx.load(path)
            path.with_name(f"{path.name}.data").unlink(missing_ok=True)  # where a graph was too large for one file
            for tensor in model.graph.initializer:
                data = onnx.numpy_helper.to_array(tensor).tobytes()
                if len(data) < SMALLEST_SHARED:
                    continue
                digest = hashlib.sha256(data).digest()
                if digest not in places:
                    file.seek(-file.tell() % ALIGNMENT, 1)
                    places[digest] = file.tell()
                    file.write(data)
                tensor.raw_data = data
                set_external_data(tensor, shared.name, places[digest], len(data))
                for field in ("raw_data", "float_data", "int32_data", "int64_data"):
                    tensor.ClearField(field)
            onnx.save(model, path)
    if not places:
        shared.unlink()
