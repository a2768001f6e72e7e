"""No two uses of the random generator share a stream."""

from itertools import pairwise

import pytest
import torch

from gardo.streams import Stream
from gardo_kernels import random_normal, random_uniform

STEPS = 1 << 20  # more denoise steps, or times of an image, than any sampler has


def test_no_two_uses_share_a_stream():
    uses = [range(STEPS)]  # a denoise step t uses stream t
    for first in Stream.__members__.values():
        uses.append(range(first, first + (STEPS if first is Stream.FRESH else 1)))
    for use, after in pairwise(sorted(uses, key=lambda use: use.start)):
        assert use.stop <= after.start, (use, after)
    assert max(Stream) < 1 << 32, "the generator takes 32 bits"


@pytest.mark.parametrize("draw", [random_normal, random_uniform])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_stream_is_its_number(draw, backend):
    sample_B, count = torch.arange(3), (5,) if draw is random_normal else 5
    for stream in Stream:
        drawn = draw(7, sample_B, stream, count, backend=backend)
        assert torch.equal(drawn, draw(7, sample_B, stream.value, count, backend=backend))
