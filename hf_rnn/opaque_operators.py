"""What operators that hide a loop from a compiler have in common: what a graph knows of the module that they stand for,
random numbers, and a backward that runs the loop again. Imports the derivatives of higher order.
"""

import contextlib
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .fast_paths import transforms_are_active
from .higher_derivatives import gradients_with_graph


# A checkpoint that brings its own copy of this file brings its own operators.
NAMESPACE = "hf_rnn" if __package__ == "hf_rnn" else f"hf_rnn_{hashlib.sha256(__name__.encode()).hexdigest()[:16]}"


class Known(NamedTuple):
    """What a graph is made with; it must not change while the graph is in use."""

    description: str = ""  # empty where the loop is to run in the graph
    weight_names: tuple[str, ...] = ()
    draws: bool = False  # random numbers
    attributes: dict[str, Any] = {}  # on which the rest depends


def let_graphs_ask(module_class: type[nn.Module], what_is_known: Callable[[nn.Module], Known]) -> None:
    """Gives a class methods that a compiler calls while it makes a graph, and whose results are constants of it."""

    def _graph_description(module) -> str:
        return what_is_known(module).description

    def _graph_weight_names(module) -> list[str]:
        return list(what_is_known(module).weight_names)

    def _graph_draws(module) -> bool:
        return what_is_known(module).draws

    def _graph_numbers(module) -> list[tuple[str, float]]:
        return [(name, value) for name, value in what_is_known(module).attributes.items() if isinstance(value, float)]

    def _graph_others(module) -> list[str]:
        return [name for name, value in what_is_known(module).attributes.items() if not isinstance(value, float)]

    # A compiler looks for them by their own names.
    for function in (_graph_description, _graph_weight_names, _graph_draws, _graph_numbers, _graph_others):
        setattr(module_class, function.__name__, torch.compiler.assume_constant_result(function))


@torch.compiler.assume_constant_result
def is_transformed() -> bool:
    return transforms_are_active()


def draw_seed(draws: bool) -> torch.Tensor | None:
    """A seed for [`random_numbers_of`], where random numbers are drawn."""
    return torch.randint(2**63 - 1, (), device="cpu") if draws else None


@contextlib.contextmanager
def random_numbers_of(seed: torch.Tensor | None, device: torch.device):
    """Within this context random numbers are those of a seed, in the forward and again in the backward."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(seed))
        yield


def _has_gradient(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _leaves(arguments: tuple) -> list[torch.Tensor]:
    """The tensors among arguments, and in their lists, that have gradients."""
    return [value for value in tree_flatten(arguments)[0] if _has_gradient(value)]


def _with_leaves(arguments: tuple, leaves: list[Any], others: Callable = lambda value: value) -> tuple:
    """The arguments with `leaves` in the place of [`_leaves`], and `others(value)` in that of everything else."""
    leaves = iter(leaves)
    return tree_map(lambda value: next(leaves) if _has_gradient(value) else others(value), arguments)


def register_backward(operator, name: str, schema: str, run: Callable[..., list[torch.Tensor]], number: int) -> None:
    """
    Gives an operator its gradient, for which `run` computes again what it returned.

    Args:
        operator: What `torch.library.custom_op` made.
        name (`str`): What the operator of the gradient is called.
        schema (`str`): The arguments of the operator, in the language of schemas.
        run: A function of these arguments, in operations that autograd knows.
        number (`int`): How many of them, at the beginning, have gradients: tensors and lists of tensors.
    """

    def run_backward(grad_outputs, *arguments) -> list[torch.Tensor]:
        given, rest = arguments[:number], arguments[number:]
        leaves = [leaf.detach().requires_grad_() for leaf in _leaves(given)]
        with torch.enable_grad():
            results = run(*_with_leaves(given, leaves), *rest)
        reached = [(result, gradient) for result, gradient in zip(results, grad_outputs) if result.requires_grad]
        results, grad_outputs = zip(*reached)
        gradients = torch.autograd.grad(results, leaves, grad_outputs, materialize_grads=True)
        return [gradient.clone(memory_format=torch.contiguous_format) for gradient in gradients]

    def fake_backward(grad_outputs, *arguments) -> list[torch.Tensor]:
        return [leaf.new_empty(leaf.shape) for leaf in _leaves(arguments[:number])]

    # Not a `custom_op`, inside which autograd is out of reach.
    if not hasattr(getattr(torch.ops, NAMESPACE), name):  # where this file is imported once more
        _library.define(f"{name}(Tensor[] grad_outputs, {schema}) -> Tensor[]")
        _library.impl(name, run_backward, "CompositeExplicitAutograd")
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake_backward, lib=_library)
    backward_operator = getattr(getattr(torch.ops, NAMESPACE), name)

    def keep_for_backward(ctx, inputs, output):
        values, ctx.structure = tree_flatten(inputs)
        ctx.others = [None if isinstance(value, torch.Tensor) else value for value in values]
        ctx.save_for_backward(*(value if isinstance(value, torch.Tensor) else None for value in values))

    def backward(ctx, grad_outputs):
        values = [other if saved is None else saved for saved, other in zip(ctx.saved_tensors, ctx.others)]
        arguments = tree_unflatten(values, ctx.structure)
        given, rest = arguments[:number], arguments[number:]
        if torch.is_grad_enabled():  # derivatives of the second order, of which the operator knows nothing
            leaves = _leaves(given)
            gradients = gradients_with_graph(
                lambda *leaves: run(*_with_leaves(given, leaves), *rest),
                leaves,
                [leaf.requires_grad for leaf in leaves],
                list(grad_outputs),
            )
        else:
            gradients = backward_operator(list(grad_outputs), *arguments)
        of_rest = ([None] * len(value) if isinstance(value, list | tuple) else None for value in rest)
        return *_with_leaves(given, gradients, others=lambda value: None), *of_rest

    operator.register_autograd(backward, setup_context=keep_for_backward)


_library = torch.library.Library(NAMESPACE, "FRAGMENT")
