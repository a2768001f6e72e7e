"""Jobs beside the loop: they overlap with it, in order, and their errors arrive."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch

from gardo.beside import Beside

CPU = torch.device("cpu")


def test_a_job_runs_while_its_thread_goes_on() -> None:
    beside, reached = Beside(CPU, on=True), threading.Event()
    wait = beside.begin(lambda: reached.wait(30))  # only this thread can let it go
    reached.set()
    assert wait() is True


def test_jobs_keep_their_order_and_their_results() -> None:
    beside, seen = Beside(CPU, on=True), []

    def job(number: int) -> Callable[[], int]:
        def run() -> int:
            time.sleep(0.02 * (3 - number))
            seen.append(number)
            return number

        return run

    waiting = [beside.begin(job(number)) for number in range(3)]
    assert [wait() for wait in reversed(waiting)] == [2, 1, 0] and seen == [0, 1, 2]


def test_off_a_job_runs_in_its_place() -> None:
    here = threading.get_ident()
    assert Beside(CPU, on=False).begin(threading.get_ident)() == here
    assert Beside(CPU, on=True).begin(threading.get_ident)() != here


def test_an_error_arrives_where_it_is_waited_for() -> None:
    def fails() -> None:
        raise KeyError("reward")

    wait = Beside(CPU, on=True).begin(fails)
    with pytest.raises(KeyError, match="reward"):
        wait()


def test_a_job_records_no_graph() -> None:
    x = torch.ones(2, requires_grad=True)
    assert not Beside(CPU, on=True).begin(lambda: x * 2, [x])().requires_grad


@pytest.mark.gpu
def test_a_stream_waits_for_its_inputs_and_is_waited_for() -> None:
    device = torch.device("cuda", 0)
    beside, x = Beside(device, on=True), torch.zeros(1 << 20, device=device)
    torch.cuda._sleep(50_000_000)
    x += 1  # after the sleep

    def job() -> torch.Tensor:
        torch.cuda._sleep(50_000_000)
        return x * 2

    wait = beside.begin(job, [x])
    assert float((wait() + 1).min()) == 3.0
