"""
Settings for all tests: no network, and one thread, as tiny tensors gain nothing from more.

With the environment variable `HF_RNN_TEST_DEVICE=cuda` all that a test makes lies on that device, and comes back where
it is compared with NumPy. That is for tests of models and layers by themselves (the laws, states, attention, losses);
Trainer and the scripts find a GPU without it, and do not expect other tensors there.
"""

import functools
import gc
import os

import pytest
import torch
from torch.utils._device import DeviceContext


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)

RANDOM = {torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal}
RANDOM_LIKE = {torch.rand_like, torch.randn_like, torch.randint_like}
RANDOM_IN_PLACE = {torch.Tensor.normal_, torch.Tensor.uniform_}


class EverythingOnADevice(DeviceContext):
    """What is made lies on a device, with the random numbers that it would have on a CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in RANDOM and kwargs.get("device") is None:
            wanted = kwargs.pop("requires_grad", False)
            return function(*args, **kwargs, device="cpu").to(self.device).requires_grad_(wanted)
        if function in RANDOM_LIKE and kwargs.get("device") is None:
            return function(args[0].cpu(), *args[1:], **kwargs).to(args[0].device)
        if function in RANDOM_IN_PLACE and args[0].device.type == self.device.type:
            numbers = torch.empty(args[0].shape, dtype=args[0].dtype, device="cpu")
            return args[0].copy_(function(numbers, *args[1:], **kwargs))
        if function is torch.from_numpy:
            return function(*args, **kwargs).to(self.device)
        return super().__torch_function__(function, types, args, kwargs)


def _from_the_cpu(tensor: torch.Tensor, method, *arguments, **keywords):
    return method(tensor.cpu(), *arguments, **keywords)


if "HF_RNN_TEST_DEVICE" in os.environ:
    torch.backends.cudnn.allow_tf32 = False  # ten bits of a number are too few to compare
    EverythingOnADevice(torch.device(os.environ["HF_RNN_TEST_DEVICE"])).__enter__()
    for name in ("numpy", "__array__"):
        setattr(torch.Tensor, name, functools.partialmethod(_from_the_cpu, getattr(torch.Tensor, name)))


# Compilers leave millions of objects behind: to go through them takes seconds each time.
gc.set_threshold(100_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def nothing_to_collect():
    """What a file of tests leaves behind is not looked at any more when garbage is collected."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["transposed", "onednn"])
def everything_is_packed(monkeypatch, request):
    """Small products too take weights in one of the layouts, by oneDNN if it is there."""
    from hf_rnn import large_products, weight_layouts

    takes_onednn = request.param == weight_layouts.ONEDNN
    if takes_onednn and not weight_layouts.has_onednn(torch.float32):
        pytest.skip("Torch has no operators of oneDNN here.")
    monkeypatch.setattr(weight_layouts, "LARGE", 1)
    monkeypatch.setattr(weight_layouts, "_layouts", {})
    monkeypatch.setattr(
        weight_layouts, "fastest", lambda layouts: request.param if request.param in layouts else "plain"
    )
    monkeypatch.setattr(large_products, "is_large", lambda inputs, weight: True)
    monkeypatch.setattr(large_products, "onednn_pays", lambda num_threads: takes_onednn)
