"""What a gate would see, whatever the arm's algorithm does: the gate's inputs and choices, logged.

An algorithm around the arm's own that changes nothing. It keeps two gates of GARDO's, one of either
sign, shows them every iteration's scores and logs whom they would have gated:

  SIGN_share             the share that the gate takes, which follows the disagreement
  SIGN_gated_MEASURE     mean of a measure over the gated samples; MEASURE over all is in `rewards`

Shapes: B samples of all ranks.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from gardo.algorithms.base import AlgorithmSettings, World
from gardo.algorithms.gardo import Gate, GateSettings
from gardo.algorithms.wrapper import Wrapper, WrapperSettings
from gardo.types import Credit, Scores
from study.protocol import SIGNS_TITLES


class WatchedSettings(WrapperSettings):
    name: str = "watched"
    gate: GateSettings = GateSettings()
    measures: list[str] = Field(["tiny_count", "tiny_fidelity"], description="rewards")


class Watched(Wrapper):
    Settings: ClassVar[type[AlgorithmSettings]] = WatchedSettings

    def __init__(self, settings: WatchedSettings, world: World) -> None:
        super().__init__(settings, world)
        self.gates = {
            sign: Gate(settings.gate.model_copy(update={"sign": sign})) for sign in SIGNS_TITLES
        }

    def credit(self, scores: Scores) -> Credit:
        credit = super().credit(scores)
        for sign, gate in self.gates.items():
            gate_B, _ = gate.select(scores)
            seen = {f"{sign}_share": gate.fraction}
            for measure in self.settings.measures:
                gated = scores.rewards[measure][gate_B & scores.masks[measure]]
                seen[f"{sign}_gated_{measure}"] = float(gated.double().mean())
            credit = credit.with_info(**seen)
        return credit

    def state_dict(self) -> dict[str, Any]:
        gates = {sign: gate.state_dict() for sign, gate in self.gates.items()}
        return {**super().state_dict(), "gates": gates}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        for sign, gate in self.gates.items():
            gate.load_state_dict(state["gates"][sign])


PLUGIN = Watched
