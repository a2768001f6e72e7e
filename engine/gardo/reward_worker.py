"""A worker of a run: serves some of its rewards until its standard input ends.

    python -m gardo.reward_worker     its orders are a line of JSON on standard input

It says `port N` on standard output when its rewards are loaded. Who starts it, and again where it
dies: gardo/rewards/serving/workers.py.
"""

from __future__ import annotations

import json
import os
import sys
import threading

import torch

from gardo.config import reward_sections
from gardo.recipe_errors import RecipeError
from gardo.rewards._files import find_files
from gardo.rewards._loading import quiet_transformers
from gardo.rewards.assembly import load_rewards
from gardo.rewards.serving.server import ServeSettings, bound, make_app, serve


def main() -> int:
    orders = json.loads(sys.stdin.readline())
    quiet_transformers()
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
    threading.Thread(target=_end_with_input, daemon=True).start()
    print(f"port {listening.getsockname()[1]}", flush=True)
    serve(make_app(rewards, settings), listening)
    return 0


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
