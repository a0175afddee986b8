"""Settings for all tests: no network, and one thread, as tiny tensors gain nothing from more."""

import os

import torch


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)
