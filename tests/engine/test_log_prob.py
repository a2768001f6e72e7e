"""The log-probability of given transitions."""

import pytest
import torch

from gardo.flow import COLUMNS, Transitions, transitions

SIGMAS = torch.tensor([1.0, 0.96, 0.9, 0.8, 0.3], dtype=torch.float64)


@pytest.mark.parametrize("variant", ["flow", "dance", "cps"])
def test_log_prob_of_given_transitions(variant):
    """The Gaussian's own, as a mean over elements; CPS: -mean of the squared error."""
    table = transitions(SIGMAS, variant, 0.7)
    draw = torch.Generator().manual_seed(0)
    x, x_next, v = (torch.randn(3, 4, 5, generator=draw, dtype=torch.float64) for _ in range(3))
    v.requires_grad_()
    step_R = torch.tensor([2, 0, 1])
    A, B, std = (table.rows(step_R, n).double()[:, None, None] for n in ("A", "B", "std"))
    normal = torch.distributions.Normal(A * x + B * v, std)
    wanted_R = normal.log_prob(x_next).mean((1, 2))
    if variant == "cps":
        wanted_R = -(x_next - normal.mean).square().mean((1, 2))
    seen_R = table.log_prob(x_next, x, v, step_R)
    torch.testing.assert_close(seen_R, wanted_R, rtol=1e-6, atol=1e-6)
    ours, theirs = (
        torch.autograd.grad(r.sum(), v, retain_graph=True)[0] for r in (seen_R, wanted_R)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    single_R = table.log_prob(x_next.float(), x.float(), v.bfloat16(), step_R)
    assert single_R.dtype == torch.float32
    torch.testing.assert_close(single_R.double(), wanted_R, rtol=2e-2, atol=2e-2)


def test_log_prob_with_a_memory_and_without_noise():
    table = transitions(SIGMAS, ["dpm2"] * (len(SIGMAS) - 1))
    x = torch.ones(2, 3)
    assert table.log_prob(x, x, x, torch.tensor([0, 1])).isnan().all()
    rows = table.table_TK.clone()
    rows[:, COLUMNS.index("std")], rows[:, COLUMNS.index("h")] = 1.0, 1.0
    noisy, m_prev, step_R = Transitions(rows), torch.full((2, 3), 0.5), torch.tensor([1, 2])
    A, B, C = (noisy.rows(step_R, n)[:, None] for n in ("A", "B", "C"))
    assert (C != 0).any()
    wanted_R = -(x - (A * x + B * x + C * m_prev)).square().mean(1)
    torch.testing.assert_close(noisy.log_prob(x, x, x, step_R, m_prev_RX=m_prev), wanted_R)
