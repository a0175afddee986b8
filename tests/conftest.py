"""
Settings for all tests: no network, and one thread, as tiny tensors gain nothing from more.

With the environment variable `HF_RNN_TEST_DEVICE=cuda` all that a test makes lies on that device, and comes back where
it is compared with NumPy. That is for tests of models and layers by themselves (the laws, states, attention, losses);
Trainer and the scripts find a GPU without it, and do not expect other tensors there.
"""

import functools
import os

import torch


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)


def _put_everything_on(device: str) -> None:
    torch.set_default_device(device)
    generator = torch.Generator

    class Generator:
        def __new__(cls, device=device):
            return generator(device)

    torch.Generator = Generator
    for name in ("numpy", "__array__"):
        on_the_cpu = getattr(torch.Tensor, name)
        setattr(torch.Tensor, name, functools.partialmethod(_from_the_cpu, on_the_cpu))


def _from_the_cpu(tensor: torch.Tensor, method, *arguments, **keywords):
    return method(tensor.cpu(), *arguments, **keywords)


if "HF_RNN_TEST_DEVICE" in os.environ:
    _put_everything_on(os.environ["HF_RNN_TEST_DEVICE"])
