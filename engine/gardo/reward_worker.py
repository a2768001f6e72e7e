"""A worker of a run: serves some of its rewards until its standard input ends.

    python -m gardo.reward_worker     its orders are a line of JSON on standard input

It says `port N` on standard output when its rewards are loaded; what rewards print goes to standard
error. It heeds no signal that asks to end: a batch system sends those to all processes of a job,
and the run still has images to score before it saves. Who starts it, and again where it dies:
gardo/rewards/serving/workers.py.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from typing import Any, TextIO

import torch

from gardo.config import reward_sections
from gardo.machine import use_bf16_reductions
from gardo.recipe_errors import RecipeError
from gardo.rewards._files import find_files
from gardo.rewards._loading import quiet_transformers
from gardo.rewards.assembly import load_rewards
from gardo.rewards.serving.server import ServeSettings, bound, make_app, serve

IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> int:
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    orders = json.loads(sys.stdin.readline())
    ended: list[int] = []
    serving = threading.Thread(target=lambda: ended.append(_serve(orders, said)), daemon=True)
    serving.start()
    threading.Thread(target=_end_with_input, daemon=True).start()
    serving.join()  # not in this thread, where uvicorn would heed signals
    return ended[0] if ended else 1


def _serve(orders: dict[str, Any], said: TextIO) -> int:
    quiet_transformers()
    use_bf16_reductions(orders["bf16_reductions"])
    if orders["threads"]:
        torch.set_num_threads(orders["threads"])
    try:
        asked = reward_sections(orders["rewards"], "a worker")
        for name, its in asked.items():
            find_files(its, f"rewards.{name}")
        rewards = load_rewards(asked, torch.device(orders["device"]))
    except (OSError, ValueError, RecipeError) as error:
        print(error, file=sys.stderr, flush=True)
        return 2
    settings = ServeSettings(port=orders["port"], token=orders["token"])
    listening = bound(settings)
    print(f"port {listening.getsockname()[1]}", file=said, flush=True)
    serve(make_app(rewards, settings), listening)
    return 0


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
