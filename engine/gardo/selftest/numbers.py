"""Numbers that are not finite: in a gradient, in a loss, in a reward, in a checkpoint."""

from __future__ import annotations

from gardo.selftest.case import Case, must
from gardo.selftest.trial import Trial, bits


def undisturbed(trial: Trial) -> None:
    recipe = trial.recipe()
    ended = trial.train(recipe)
    must(ended.code == 0, ended.said)
    again = trial.train(trial.recipe("again.yaml", run={"name": "again"}))
    must(again.code == 0 and bits(trial.run()) == bits(trial.run("again")), again.said)


CASES = [
    Case("undisturbed", "nothing", "two runs of a recipe end in the same bits", undisturbed),
]
