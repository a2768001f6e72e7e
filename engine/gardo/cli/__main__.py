"""`python -m gardo.cli`."""

from gardo.cli import main

main()
