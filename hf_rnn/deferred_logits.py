"""Logits that are computed where somebody asks for their values, which the loss of a model does not.

Training needs the cross-entropy of the logits, for which [`linear_cross_entropy`] does without them. Whoever reads
`outputs.logits` gets them none the less. Imports the loss.
"""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from .cuda_graphs import is_capturing
from .fast_paths import are_plain, autocast_dtype, is_watched, may_take, transforms_are_active
from .large_products import large_linear, weight_gradient
from .linear_modules import apply_linear
from .vocabulary_loss import linear_cross_entropy, pays


def vocabulary_logits(projection: nn.Module, hidden_states: torch.Tensor, for_loss: bool) -> torch.Tensor:
    """
    `projection(hidden_states)`, deferred where it can be.

    Args:
        projection (`nn.Module`): The projection to the vocabulary, `nn.Linear` or what stands in its place.
        hidden_states (`torch.Tensor` of shape `(..., size)`): What is projected.
        for_loss (`bool`): Whether the logits are there to train with, so that they may never be read.

    Returns:
        The logits `(..., vocab_size)`; a [`DeferredLogits`] if `for_loss`, if there are gradients to compute, and if
        nothing but a product happens in `projection`: no adapter, no hook, no sharded or quantised weight. Not where
        this saves neither time nor memory.
    """
    if for_loss and _may_defer(projection, hidden_states):
        return DeferredLogits.project(hidden_states, projection.weight, projection.bias)
    return apply_linear(projection, hidden_states)


def _may_defer(projection: nn.Module, hidden_states: torch.Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not torch.is_grad_enabled():
        return False
    if not may_take("chunked_loss"):
        return False
    if type(projection) is not nn.Linear or is_watched(projection):
        return False
    # What is played later would not know that it has to be computed anew.
    if transforms_are_active() or is_capturing(hidden_states.device.type):
        return False
    tensors = [hidden_states, projection.weight] + ([] if projection.bias is None else [projection.bias])
    if not are_plain(*tensors) or any(tensor.is_inference() for tensor in tensors):
        return False
    num_rows = hidden_states.numel() // max(1, hidden_states.shape[-1])
    if hidden_states.device.type == "meta" or not pays(num_rows, projection.weight, _product_dtype(hidden_states)):
        return False
    return any(tensor.requires_grad for tensor in tensors)


def _product_dtype(hidden_states: torch.Tensor) -> torch.dtype:
    """The type that autocast would choose for a product."""
    dtype = hidden_states.dtype
    return dtype if dtype == torch.float64 else autocast_dtype(hidden_states.device.type) or dtype


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """A few thousand numbers from all over a tensor."""
    return tensor.detach().reshape(-1)[:: tensor.numel() // 4096 | 1].clone()


class _Product:
    """
    A linear map that waits to be computed.

    Args:
        tensors: Hidden states `(..., size)`, weight `(vocab_size, size)` and bias or None.
        dtype (`torch.dtype`): What to multiply in.
        result_dtype (`torch.dtype`): The type of the result.
    """

    def __init__(self, tensors: Sequence[torch.Tensor | None], dtype: torch.dtype, result_dtype: torch.dtype):
        self.tensors = tuple(tensors)
        self.dtype = dtype
        self.result_dtype = result_dtype
        self.versions = [tensor._version for tensor in self.tensors if tensor is not None]
        # Fused optimizers, and whoever writes to `.data`, do not count their changes.
        self.samples = [_sample(tensor) for tensor in self.tensors[1:] if tensor is not None]
        self.result = None

    @property
    def requires_grad(self) -> bool:
        return any(tensor is not None and tensor.requires_grad for tensor in self.tensors)

    def copy(self, result_dtype: torch.dtype, detach: bool = False) -> "_Product":
        """The same numbers in memory of their own."""
        copied = copy.copy(self)
        if detach:
            copied.tensors = tuple(None if tensor is None else tensor.detach() for tensor in self.tensors)
        copied.result_dtype = result_dtype
        return copied

    def is_stale(self) -> bool:
        """Whether what is to be multiplied has changed."""
        tensors = [tensor for tensor in self.tensors if tensor is not None]
        if self.versions != [tensor._version for tensor in tensors]:
            return True
        return not all(torch.equal(_sample(tensor), sample) for tensor, sample in zip(tensors[1:], self.samples))

    def compute(self) -> torch.Tensor:
        """The result, without a graph; the same tensor at each call."""
        if self.result is None:
            if self.is_stale():
                raise RuntimeError(
                    "The logits of a model in training mode are computed where they are used, and the weights have "
                    "changed since the forward. Use `outputs.logits` before the step of the optimizer, or set "
                    "`HF_RNN_WITHOUT=chunked_loss` or the context `hf_rnn.without_fast_paths('chunked_loss')` to have "
                    "them computed at once."
                )
            with torch.no_grad(), torch.autocast(self.tensors[0].device.type, enabled=False):
                tensors = [None if tensor is None else tensor.detach().to(self.dtype) for tensor in self.tensors]
                self.result = large_linear(*tensors).to(self.result_dtype)
        return self.result


class _Defer(torch.autograd.Function):
    """From hidden states, weight and bias to logits that wait, with the gradient of a linear map."""

    @staticmethod
    def forward(ctx, hidden_states, weight, bias, product, shape):
        ctx.dtype = product.dtype
        ctx.has_bias = bias is not None
        ctx.save_for_backward(hidden_states, weight)
        return DeferredLogits(product, shape)

    @staticmethod
    def backward(ctx, grad_logits):
        hidden_states, weight = ctx.saved_tensors
        with torch.autocast(hidden_states.device.type, enabled=False):
            grad_logits = grad_logits.reshape(-1, len(weight)).to(ctx.dtype)
            grad_hidden = grad_weight = grad_bias = None
            if ctx.needs_input_grad[0]:
                grad_hidden = large_linear(grad_logits, weight.to(ctx.dtype).t())
                grad_hidden = grad_hidden.to(hidden_states.dtype).view_as(hidden_states)
            if ctx.needs_input_grad[1]:
                rows = hidden_states.reshape(-1, hidden_states.shape[-1]).to(ctx.dtype)
                grad_weight = weight_gradient(grad_logits, rows).to(weight.dtype)
            if ctx.has_bias and ctx.needs_input_grad[2]:
                grad_bias = grad_logits.sum(dim=0).to(weight.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None


class _Compute(torch.autograd.Function):
    """From logits that wait to their values; gradients pass unchanged."""

    @staticmethod
    def forward(ctx, logits):
        # Detached, or changes in place would be refused as those of a view.
        return logits.product.compute().view(logits.shape).detach()

    @staticmethod
    def backward(ctx, grad_logits):
        return grad_logits


class DeferredLogits(torch.Tensor):
    r"""
    Logits `(..., vocab_size)` that know their shape, type and device, but are computed at their first use. Every
    function of torch computes them and sees an ordinary tensor, through which gradients flow, except for

    - what only looks at shape, type, device or graph;
    - `contiguous`, `float`, `to(dtype)`, `view`, `reshape` and `flatten`, which give such logits again, and a `clone`
      within a function of autograd, as data parallelism makes one;
    - `register_hook`, whose hook sees the gradient of the values, if there is one;
    - `cross_entropy` for class indices without weights or smoothing, which is [`linear_cross_entropy`].

    Because the loss does not go through the values, it gives them no gradient: `torch.autograd.grad(loss, logits)`
    and `logits.retain_grad()` work without the fast path `chunked_loss`. So does reading them after the weights have
    changed, which raises a `RuntimeError`.
    """

    @staticmethod
    def __new__(cls, product: _Product, shape: Sequence[int]):
        device = product.tensors[0].device
        self = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=product.result_dtype, device=device)
        self.product = product
        self.viewed = None
        self.computed = None
        return self

    @classmethod
    def project(cls, hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> "DeferredLogits":
        """The logits `linear(hidden_states, weight, bias)`, in the type that autocast would choose."""
        dtype = _product_dtype(hidden_states)
        product = _Product((hidden_states, weight, bias), dtype, dtype)
        return cls._make(product, (*hidden_states.shape[:-1], len(weight)))

    @property
    def waits(self) -> bool:
        """
        Whether nobody has asked for the values yet. Logits that came out of some function of autograd do not wait:
        gradients have to go back through it.
        """
        return self.product.result is None and (self.product.requires_grad or not self.requires_grad)

    def compute(self) -> torch.Tensor:
        """The logits as an ordinary tensor with its graph; the same at each call."""
        if self.computed is None:
            with torch.enable_grad():
                if self.viewed is None:
                    self.computed = _Compute.apply(self)
                else:
                    computed = self.viewed.compute()
                    self.computed = (computed if self.requires_grad else computed.detach()).view(self.shape)
        return self.computed

    def view_of(self, shape: Sequence[int]) -> "DeferredLogits":
        """Logits with the same memory in another shape."""
        view = (
            DeferredLogits._make(self.product, shape)
            if self._tracks_gradients()
            else DeferredLogits(self.product, shape)
        )
        view.viewed = self
        return view

    def copy_of(self, dtype: torch.dtype) -> "DeferredLogits":
        """The same logits in memory of their own."""
        if self._tracks_gradients():
            return DeferredLogits._make(self.product.copy(dtype), self.shape)
        return DeferredLogits(self.product.copy(dtype, detach=True), self.shape)

    def _tracks_gradients(self) -> bool:
        return torch.is_grad_enabled() and self.requires_grad

    @classmethod
    def _make(cls, product: _Product, shape: Sequence[int]) -> "DeferredLogits":
        return _Defer.apply(*product.tensors, product, shape)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if function in _METADATA:
                return function(*args, **kwargs)
            result = NotImplemented
            if function in _DEFERRED and isinstance(args[0], DeferredLogits) and args[0].waits:
                result = _DEFERRED[function](*args, **kwargs)
            if result is NotImplemented:
                result = function(*_computed(args), **_computed(kwargs))
            return result

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        # What comes here did not pass `__torch_function__`, and its gradient is the business of autograd.
        return function(*_values(args), **_values(kwargs or {}))


def _replace(arguments, replacement):
    """Nested arguments with a replacement for each of the deferred logits."""
    if isinstance(arguments, DeferredLogits):
        return replacement(arguments)
    if isinstance(arguments, dict):
        return {key: _replace(value, replacement) for key, value in arguments.items()}
    if type(arguments) in (tuple, list):
        return type(arguments)(_replace(value, replacement) for value in arguments)
    return arguments


def _computed(arguments):
    return _replace(arguments, DeferredLogits.compute)


def _values(arguments):
    return _replace(arguments, lambda logits: logits.product.compute().view(logits.shape))


def _clone(logits, **kwargs):
    # Anybody else wants the values as they are now.
    within_function = logits.requires_grad and not torch.is_grad_enabled()
    return logits.copy_of(logits.dtype) if within_function and not kwargs else NotImplemented


def _contiguous(logits, **kwargs):
    return NotImplemented if kwargs else logits


def _to(logits, dtype=None, *others, **kwargs):
    if others or kwargs or not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return NotImplemented
    return logits if logits.dtype == dtype else logits.copy_of(dtype)


def _float(logits, **kwargs):
    return _to(logits, torch.float32, **kwargs)


def _register_hook(logits, hook):
    # Data parallelism watches for gradients that nothing but the values brings. Through a view they would not pass.
    return torch.Tensor.register_hook(logits, hook) if logits.viewed is None else NotImplemented


def _reshaping(function):
    def reshape(logits, *args, **kwargs):
        shape = function(torch.empty(logits.shape, dtype=logits.dtype, device="meta"), *args, **kwargs).shape
        return logits.view_of(shape) if len(shape) > 0 and shape[-1] == logits.shape[-1] else NotImplemented

    return reshape


def _cross_entropy(
    logits,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
):
    plain = weight is None and size_average is None and reduce is None and label_smoothing == 0.0
    plain = plain and reduction in ("mean", "sum") and type(target) is torch.Tensor and target.dtype == torch.long
    if not plain or logits.dim() != 2 or target.shape != logits.shape[:1] or target.device != logits.device:
        return NotImplemented
    hidden_states, *others = logits.product.tensors
    with torch.set_grad_enabled(torch.is_grad_enabled() and logits.requires_grad):
        loss = linear_cross_entropy(
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            *others,
            target,
            ignore_index=ignore_index,
            reduction=reduction,
            dtype=logits.product.dtype,
        )
    return loss.to(logits.dtype)


_DEFERRED = {
    torch.Tensor.clone: _clone,
    torch.Tensor.contiguous: _contiguous,
    torch.Tensor.float: _float,
    torch.Tensor.to: _to,
    torch.Tensor.register_hook: _register_hook,
    torch.Tensor.view: _reshaping(torch.Tensor.view),
    torch.Tensor.reshape: _reshaping(torch.Tensor.reshape),
    torch.Tensor.flatten: _reshaping(torch.Tensor.flatten),
    F.cross_entropy: _cross_entropy,
}

_METADATA = (
    {
        getattr(torch.Tensor, name).__get__
        for name in (
            *("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad_fn", "output_nr", "name"),
            *("is_cpu", "is_cuda", "is_mps", "is_meta", "is_sparse", "is_quantized", "is_nested", "itemsize", "nbytes"),
            "_base",
        )
    }
    | {
        getattr(torch.Tensor, name)
        for name in (
            *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size"),
            *("is_contiguous", "is_floating_point", "is_complex", "is_signed", "get_device"),
        )
    }
    | {getattr(torch, name) for name in ("numel", "is_floating_point", "is_complex", "is_signed", "get_device")}
)
