"""Large products as an operator, for graphs of `torch.compile` that are trained on a CPU: a compiler would take the
library that torch takes. Imports the products and what is known of graphs.
"""

import torch

from .fast_paths import are_plain
from .large_products import large_linear, linear_gradients
from .opaque_operators import NAMESPACE, is_trained, is_transformed


@torch.library.custom_op(f"{NAMESPACE}::large_linear", mutates_args=())
def large_linear_operator(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """[`large_linear`] of inputs `(..., in)`, a weight `[out, in]` and a bias `[out]` or None."""
    return large_linear(inputs, weight, bias)


@large_linear_operator.register_fake
def _shape(inputs, weight, bias):
    return inputs.new_empty(*inputs.shape[:-1], weight.shape[0])


def _keep_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx, gradient):
    return linear_gradients(gradient, *ctx.saved_tensors, ctx.needs_input_grad, linear_in_graph)


large_linear_operator.register_autograd(_backward, setup_context=_keep_for_backward)


def linear_in_graph(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` as the operator, with gradients of any order."""
    return large_linear_operator(inputs, weight, bias)


def takes_operator(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether a product goes into the graph that is made as the operator."""
    tensors = [inputs, weight] if bias is None else [inputs, weight, bias]
    return (
        inputs.device.type == "cpu"
        and are_plain(*tensors)
        and all([tensor.dtype == torch.float32 for tensor in tensors])  # noqa: C419
        and not torch.is_autocast_enabled("cpu")
        and is_trained(tensors)
        and not is_transformed()
    )
