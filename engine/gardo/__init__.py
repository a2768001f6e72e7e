"""RL fine-tuning of flow models: sample, score, credit, step (arXiv:2512.24138 and its neighbours).

Importing this package loads nothing heavy. The loop is `gardo.train`; what a user types is
`gardo.cli`.
"""

__version__ = "0.1.0"
