"""What can go wrong with a run, done to small real ones: `gardo selftest reliability`.

A case (case.py) says what is done and what must hold; a module has the cases of one subject.
trial.py starts the runs, forked.py their processes, faults.py has what a recipe can put into a run
from outside. The same cases are tests, and docs/reliability.md is what they print.
"""
