"""One thread a reward: takes what has been asked, computes it, answers.

One of all rewards computes at a time: in which precision a GPU multiplies is a switch of the whole
process. A question whose asker has cancelled its answer leaves the queue.

Questions that allow it and are alike (method, size of the pictures) are computed together, whatever
has queued up while the ones before were computed: nobody waits for company. A question that is
`exact` is computed alone, because the last bits of a matrix product depend on what stands beside.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gardo.rewards.base import Reward, provides
from gardo.rewards.serving.wire import Request, Scored

COMPUTING = threading.Lock()
CLOSE_SECONDS = 5.0  # that a closing reward is waited for


class QueueFull(Exception):
    """More images or bytes wait than may be held."""


class WrongMethod(ValueError):
    """The reward does not score, or does not compare."""


@dataclass(eq=False)
class _Waiting:
    request: Request
    answer: Future[Scored] = field(default_factory=Future)

    @property
    def images(self) -> int:
        return len(self.request.prompts)

    @property
    def company(self) -> object:
        """Equal for questions that may be computed together; its own where none may."""
        if self.request.exact:
            return id(self)
        return self.request.method, self.request.pictures[0].shape[1:]


class Scorer:
    """Answers questions to one reward, one batch at a time."""

    def __init__(
        self,
        name: str,
        reward: Reward,
        *,
        most_together: int,
        most_waiting: int,
        seen: Callable[[int], object] = lambda images: None,
    ) -> None:
        """Images at once, and in the queue; `seen` is told how many were computed at once."""
        self.name, self.reward = name, reward
        self._together, self._most, self._seen = most_together, most_waiting, seen
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"score-{name}", daemon=True)
        self._thread.start()

    def ask(self, request: Request) -> Future[Scored]:
        """The answer, on the CPU. QueueFull, WrongMethod."""
        if not provides(type(self.reward), request.method):
            raise WrongMethod(f"{self.name} has no {request.method}")
        waiting = _Waiting(request)
        with self._changed:
            if self._closed:
                raise QueueFull(f"{self.name} is shutting down")
            if self._queue and self.waiting + waiting.images > self._most:
                raise QueueFull(f"{self.waiting} images wait for {self.name}; {self._most} may")
            self._queue.append(waiting)
            self._changed.notify()
        waiting.answer.add_done_callback(lambda answer: self._forget(waiting))
        return waiting.answer

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return sum(waiting.images for waiting in tuple(self._queue))

    def close(self) -> None:
        """Ends the thread after the batch that it computes; what waits is cancelled.

        A reward that hangs is not waited for longer than CLOSE_SECONDS; it ends with the process.
        """
        with self._changed:
            self._closed = True
            left, self._queue = list(self._queue), deque()
            self._changed.notify()
        for waiting in left:
            waiting.answer.cancel()
        self._thread.join(CLOSE_SECONDS)

    def _forget(self, waiting: _Waiting) -> None:
        with self._changed:
            if waiting in self._queue:
                self._queue.remove(waiting)

    def _run(self) -> None:
        while batch := self._next():
            asked = [w for w in batch if w.answer.set_running_or_notify_cancel()]
            if asked:
                self._seen(sum(waiting.images for waiting in asked))
                self._answer(asked)

    def _next(self) -> list[_Waiting]:
        """What is computed next, the oldest question among it; nothing once closed."""
        with self._changed:
            while not self._queue and not self._closed:
                self._changed.wait()
            if self._closed:
                return []
            first = self._queue.popleft()
            batch, room = [first], self._together - first.images
            for other in list(self._queue):
                if other.company == first.company and other.images <= room:
                    self._queue.remove(other)
                    batch.append(other)
                    room -= other.images
            return batch

    def _answer(self, asked: Sequence[_Waiting]) -> None:
        try:
            values = self._values([waiting.request for waiting in asked])
        except Exception as error:  # whatever a reward does: its askers are told, others go on
            if len(asked) == 1:
                asked[0].answer.set_exception(error)
                return
            for waiting in asked:  # one of them may be to blame
                self._answer([waiting])
            return
        costs, trouble = self.reward.costs(), self.reward.trouble
        for waiting, value in zip(asked, values, strict=True):
            why = "" if value.isfinite().all() else trouble
            waiting.answer.set_result(Scored(value, costs, why))
            costs = None  # of all together: they are counted once

    def _values(self, requests: Sequence[Request]) -> tuple[Tensor, ...]:
        sizes = [len(request.prompts) for request in requests]
        prompts = [prompt for request in requests for prompt in request.prompts]
        columns = zip(*(request.pictures for request in requests), strict=True)
        pictures = [torch.cat(column).to(self.reward.device) for column in columns]
        with COMPUTING, torch.no_grad(), self.reward.precision():
            if len(pictures) == 1:
                values = self.reward.score(pictures[0], prompts)
            else:
                values = self.reward.compare(pictures[0], pictures[1], prompts)
        return values.float().cpu().split(sizes)
