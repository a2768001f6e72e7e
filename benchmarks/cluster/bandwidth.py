"""How fast all-gather and all-reduce are between the ranks that a launcher has started.

Bus bandwidth, as NCCL's own tests count it, with n ranks and S bytes that a rank ends up with:

    all-gather  S (n - 1) / n / seconds        all-reduce  2 S (n - 1) / n / seconds

Rank 0 prints the best of each over the sizes, on one line.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

SIZES = (64 << 20, 256 << 20, 1 << 30)  # bytes; a block of FLUX.1-dev in bf16 is 680 MB
QUICK = (1 << 20,)
REPETITIONS = 10


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """The mean of calls behind one another, after one that sets up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    call()
    wait()
    dist.barrier()
    start = time.perf_counter()
    for _ in range(REPETITIONS):
        call()
    wait()
    return (time.perf_counter() - start) / REPETITIONS


def bus_rates(size: int, device: torch.device) -> tuple[float, float]:
    """Bytes a second of all-gather and all-reduce, of `size` bytes in bf16."""
    ranks = dist.get_world_size()
    part = torch.ones(size // 2 // ranks, dtype=torch.bfloat16, device=device)
    whole: Tensor = part.new_zeros(len(part) * ranks)
    share = 2 * len(whole) * (ranks - 1) / ranks
    gather = seconds(lambda: dist.all_gather_into_tensor(whole, part), device)
    if not bool((whole == 1).all()):
        raise RuntimeError("all-gather gave something else than was sent")
    reduce = seconds(lambda: dist.all_reduce(whole), device)
    return share / gather, 2 * share / reduce


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rates = [bus_rates(size, device) for size in (QUICK if options.quick else SIZES)]
    gather, reduce = (max(column) / 1e9 for column in zip(*rates, strict=True))
    if dist.get_rank() == 0:
        nccl = f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if on_gpu else "gloo"
        print(f"all-gather {gather:.3g} GB/s, all-reduce {reduce:.3g} GB/s, {nccl}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
