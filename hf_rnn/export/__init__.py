"""Exported models: [`export_model`] writes them, [`load`] runs them with NumPy and ONNX Runtime.

The runner is one file, `runner.py`, of which every exported folder holds a copy that needs nothing of this package.
Files of the format `"torch"` are read by `torch.export.load`, which knows their operators after `import hf_rnn`.
"""

from .package import export_model
from .runner import OnnxEncoder, OnnxLanguageModel, OnnxTranslator, load


__all__ = ["OnnxEncoder", "OnnxLanguageModel", "OnnxTranslator", "export_model", "load"]
