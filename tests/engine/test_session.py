"""What a session sets for its whole process."""

import os

import torch

from gardo.session import use_deterministic_kernels


def test_deterministic_kernels_leave_unwritten_memory_alone(monkeypatch):
    """torch fills all of it with NaN by default, every new_empty a pass over memory."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    was = torch.are_deterministic_algorithms_enabled()
    try:
        use_deterministic_kernels()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.empty(4096).isnan().all()
        assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(was)
