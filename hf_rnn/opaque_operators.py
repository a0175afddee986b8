"""What operators that hide a loop from a compiler have in common: what a graph knows of the module that they stand for,
random numbers, and a backward, which runs the loop again or finds what the forward has kept. Imports the derivatives of
higher order.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .fast_paths import may_take, saved_tensors_are_watched, transforms_are_active
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


@torch.compiler.assume_constant_result
def _exports() -> bool:
    return torch.compiler.is_exporting()  # which an older compiler takes for true in every graph


def is_compiled() -> bool:
    """Whether `torch.compile` makes a graph, and not an exporter."""
    return torch.compiler.is_dynamo_compiling() and not _exports()


def is_trained(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether `torch.compile` makes a graph that will have a backward, of which `tensors` take part."""
    return is_compiled() and torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors])  # noqa: C419


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


def register_gradient(
    operator,
    name: str,
    schema: str,
    run: Callable[..., list[torch.Tensor]],
    shapes: Callable[..., list[torch.Tensor]],
    number: int,
) -> Callable[..., list[torch.Tensor]]:
    """
    Gives an operator its gradient, for which `run` computes again what it returned.

    Args:
        operator: What `torch.library.custom_op` made.
        name (`str`): What it is called.
        schema (`str`): The arguments of the operator, in the language of schemas.
        run: A function of these arguments, in operations that autograd knows.
        shapes: A function of these arguments, which returns tensors of the shapes and types of the results.
        number (`int`): How many of them, at the beginning, have gradients: tensors and lists of tensors.

    Returns:
        The same operator for graphs that are trained: its forward keeps for the backward what autograd saves of it,
        where [`_may_keep`] says so, so that nothing is computed again.
    """

    def results_of(leaves: list[torch.Tensor], arguments: tuple) -> list[torch.Tensor]:
        with torch.enable_grad():
            return run(*_with_leaves(arguments[:number], leaves), *arguments[number:])

    def run_forward(*arguments) -> list[torch.Tensor]:
        leaves = _leaves(arguments[:number])
        carrier = leaves[0].new_zeros(1)
        if not _may_keep(leaves):
            return [*operator(*arguments), carrier]
        # A graph may use the memory of its arguments for something else before their backward.
        arguments = tree_map(lambda value: value.clone() if isinstance(value, torch.Tensor) else value, arguments)
        leaves = [leaf.detach().requires_grad_() for leaf in _leaves(arguments[:number])]
        results = results_of(leaves, arguments)
        # Autograd is out of reach within a mode that looks at what is called, as in the first run of every graph.
        if any(result.requires_grad for result in results):
            carrier.kept = results, leaves
        return [*(result.detach().clone(memory_format=torch.contiguous_format) for result in results), carrier]

    def fake_forward(*arguments) -> list[torch.Tensor]:
        return [*shapes(*arguments), _leaves(arguments[:number])[0].new_empty(1)]

    def run_backward(grad_outputs, carrier, *arguments) -> list[torch.Tensor]:
        results, leaves = vars(carrier).pop("kept", (None, None)) if carrier is not None else (None, None)
        if results is None:
            leaves = [leaf.detach().requires_grad_() for leaf in _leaves(arguments[:number])]
            results = results_of(leaves, arguments)
        reached = [(result, gradient) for result, gradient in zip(results, grad_outputs) if result.requires_grad]
        if not reached:  # by a cell that computes without gradients
            return [torch.zeros_like(leaf, memory_format=torch.contiguous_format) for leaf in leaves]
        results, grad_outputs = zip(*reached)
        gradients = torch.autograd.grad(results, leaves, grad_outputs, materialize_grads=True)
        return [gradient.clone(memory_format=torch.contiguous_format) for gradient in gradients]

    def fake_backward(grad_outputs, carrier, *arguments) -> list[torch.Tensor]:
        return [leaf.new_empty(leaf.shape) for leaf in _leaves(arguments[:number])]

    forward_operator = _define(f"{name}_forward", schema, run_forward, fake_forward)
    backward_operator = _define(
        f"{name}_backward", f"Tensor[] grad_outputs, Tensor? carrier, {schema}", run_backward, fake_backward
    )

    def keep_for_backward(ctx, inputs, output, carrier=None):
        values, ctx.structure = tree_flatten((carrier, *inputs))
        ctx.others = [None if isinstance(value, torch.Tensor) else value for value in values]
        ctx.save_for_backward(*(value if isinstance(value, torch.Tensor) else None for value in values))

    def backward(ctx, grad_outputs):
        values = [other if saved is None else saved for saved, other in zip(ctx.saved_tensors, ctx.others)]
        carrier, *arguments = tree_unflatten(values, ctx.structure)
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
            gradients = backward_operator(list(grad_outputs), carrier, *arguments)
        of_rest = ([None] * len(value) if isinstance(value, list | tuple) else None for value in rest)
        return *_with_leaves(given, gradients, others=lambda value: None), *of_rest

    operator.register_autograd(backward, setup_context=keep_for_backward)

    class Trained(torch.autograd.Function):
        @staticmethod
        def forward(ctx, structure, *values):
            arguments = tree_unflatten(values, structure)
            *results, carrier = forward_operator(*arguments)
            keep_for_backward(ctx, arguments, results, carrier)
            return tuple(results)

        @staticmethod
        def backward(ctx, *grad_outputs):
            return None, *tree_flatten(backward(ctx, grad_outputs))[0]

    def run_trained(*arguments) -> list[torch.Tensor]:
        values, structure = tree_flatten(arguments)
        return list(Trained.apply(structure, *values))

    trained = f"{name}_for_training"
    if not hasattr(getattr(torch.ops, NAMESPACE), trained):
        _library.define(f"{trained}({schema}) -> Tensor[]")
        _library.impl(trained, run_trained, "CompositeImplicitAutograd")
    return getattr(getattr(torch.ops, NAMESPACE), trained)


def _define(name: str, schema: str, run: Callable, fake: Callable):
    """An operator that autograd does not see, but may be used in: a `custom_op` would have it out of reach."""
    if not hasattr(getattr(torch.ops, NAMESPACE), name):  # where this file is imported once more
        _library.define(f"{name}({schema}) -> Tensor[]")
        _library.impl(name, run, "CompositeExplicitAutograd")
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name)


def _may_keep(leaves: list[torch.Tensor]) -> bool:
    """
    Whether what autograd keeps of a forward may lie aside: not on a GPU, where a graph may count what is in its memory,
    and not where somebody else decides what is kept, as in a checkpoint around a compiled model.
    """
    return (
        may_take("kept_for_backward")
        and all(leaf.device.type == "cpu" for leaf in leaves)
        and not saved_tensors_are_watched()
    )


_library = torch.library.Library(NAMESPACE, "FRAGMENT")
