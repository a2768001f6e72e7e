"""What a pair's verdict costs a reward: minus the log-probability that it gave the verdict.

    d = r_i - r_j;  a verdict is p in [0, 1]: 1 the first is better, 0 the second, between: how sure
    Bradley-Terry   P(i > j) = sigmoid(d)
    ties            P(i > j) = sigmoid(d - eta),  P(j > i) = sigmoid(-d - eta),  eta > 0
                    P(tie)   = (exp(2 eta) - 1) sigmoid(d - eta) sigmoid(-d - eta)
    margin          P(i > j) = sigmoid(d - m),  of a winner i;  m >= 0 is the pair's own
    uncertainty     P(i > j) = Phi(z),  z = (mu_i - mu_j) / sqrt(sigma_i^2 + sigma_j^2)

each with the loss -[p log P(i > j) + (1 - p) log P(j > i)], and -log P(tie) of a tie.

Bradley and Terry, Biometrika 39, 1952. The ties are Rao and Kupper's (J. Am. Stat. Assoc. 62,
1967), with eta = log theta: differences that are small beside eta look like ties. The margin
is that of Llama 2 (arXiv 2307.09288, eq. 2): no probability, since P(j > i) of it is
sigmoid(-d - m) and a share of the whole is missing, but a wish that winners are ahead by more. The
uncertainty is Thurstone's (1927): rewards are independent Gaussians and P is the probability that
one drawn is above the other. HPSv3 (arXiv 2508.03789) learns such Gaussians as well; its released
code takes the mean of -log sigmoid over drawn differences instead, which is another, larger loss.

Verified in float64 against values by hand, by gradcheck, and by what must hold: an exchange of the
two with p -> 1 - p changes nothing, probabilities sum to 1, convex in d, far from 0 finite.

Shapes: N pairs, fp32 or fp64; what is returned has the rewards' dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry(first_N: Tensor, second_N: Tensor, preferred_N: Tensor) -> Tensor:
    """[N]. `preferred_N`: p; a half is a tie."""
    return _expected(*_log_sigmoids(first_N - second_N, 0.0), preferred_N)


def ties(
    first_N: Tensor,
    second_N: Tensor,
    preferred_N: Tensor,
    tied_N: Tensor,
    eta: Tensor | float,
) -> Tensor:
    """[N]. `tied_N`, bool: the verdict is a tie, whatever p says. `eta` is above 0, in rewards."""
    eta = torch.as_tensor(eta, dtype=first_N.dtype, device=first_N.device)
    log_first_N, log_second_N = _log_sigmoids(first_N - second_N, eta)
    log_tie_N = torch.expm1(2 * eta).log() + log_first_N + log_second_N
    return torch.where(tied_N, -log_tie_N, _expected(log_first_N, log_second_N, preferred_N))


def margin(first_N: Tensor, second_N: Tensor, preferred_N: Tensor, margin_N: Tensor) -> Tensor:
    """[N]. `margin_N`: by how much the winner should be ahead, at least 0."""
    return _expected(*_log_sigmoids(first_N - second_N, margin_N), preferred_N)


def uncertainty(
    first_N: Tensor,
    second_N: Tensor,
    preferred_N: Tensor,
    first_sigma_N: Tensor,
    second_sigma_N: Tensor,
) -> Tensor:
    """[N]. `first_N` and `second_N` are means, the sigmas standard deviations, above 0."""
    z_N = (first_N - second_N) / torch.hypot(first_sigma_N, second_sigma_N)
    # log_ndtr is log Phi without its underflow: Phi(-40) is 0 in float64, its log is -804.6
    return _expected(torch.special.log_ndtr(z_N), torch.special.log_ndtr(-z_N), preferred_N)


def _log_sigmoids(ahead_N: Tensor, by: Tensor | float) -> tuple[Tensor, Tensor]:
    """log P(i > j) and log P(j > i), of winners that are ahead by more than `by`."""
    return F.logsigmoid(ahead_N - by), F.logsigmoid(-ahead_N - by)


def _expected(log_first_N: Tensor, log_second_N: Tensor, preferred_N: Tensor) -> Tensor:
    return -(preferred_N * log_first_N + (1 - preferred_N) * log_second_N)
