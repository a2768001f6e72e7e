"""`gardo doctor`: what a machine can run, and what a recipe needs of it.

finding.py    a line of the report
machine.py    versions, driver, GPUs, compiler, caches, attention, kernels
models.py     where a recipe's models are, how large, how they are got
recipe.py     the rest of a recipe: prompts, packages, batch, memory, disk

Nothing of it loads weights, and what a recipe needs is found without a network.
"""
