"""Streams of the random generator: what a number of (seed, sample, stream, element) is drawn for.

No two uses share one. Denoise step t uses stream t, noise at the k-th time FRESH + k.
"""

from __future__ import annotations

from enum import IntEnum, unique


@unique
class Stream(IntEnum):
    INITIAL = 1 << 20  # the first latents
    FRESH = 1 << 21  # plus the time's index: noise added to finished images (NFT, AWM)
    TIMES = 1 << 22  # which times, or recorded steps, a sample trains on
    SHARES = 1 << 23  # which update a sample belongs to
    LATE = 1 << 24  # ReFL's late step
    EVALUATION = 1 << 25  # the first latents of evaluation
    EPOCH = 1 << 26  # the order of the prompts
    OPPONENTS = 1 << 27  # whom an image meets (the reward `preference`)
    WINDOW = 1 << 28  # where a window of trained steps stands
    WEIGHTS = 1 << 29  # which prompts an epoch has, where they have weights
