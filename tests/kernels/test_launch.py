"""Where the kernels run, and what is said where they do not."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gardo_kernels import kernels_run_on
from gardo_kernels._launch import choose_backend

GPU = torch.device("cuda")


def on_gpu():
    """A tensor that says it is on a GPU, on any machine."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.empty(2, device=GPU)


def test_a_gpu_of_nvidia_runs_the_kernels(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    assert kernels_run_on(GPU)
    for backend in ("auto", "triton"):
        assert choose_backend("op", backend, on_gpu()) == "triton"


def test_rocm_calls_its_devices_cuda_and_does_not_run_them(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4.0")
    assert not kernels_run_on(GPU)
    x = on_gpu()
    assert choose_backend("op", "auto", x) == choose_backend("op", "torch", x) == "torch"
    message = r"op: the triton backend needs tensors on an NVIDIA GPU, these are on cuda.* \(ROCm\)"
    with pytest.raises(RuntimeError, match=message):
        choose_backend("op", "triton", x)
