"""Packages that some folders need and the models do not. Imports nothing of the package."""

import importlib.util


EXTRAS = {"onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx", "matplotlib": "plots"}


def require(*packages: str) -> None:
    """
    Raises:
        `ImportError`: One of the packages is not installed; the message names the extra that brings it.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"This needs the package {package}: pip install 'hf_rnn[{EXTRAS[package]}]'")
