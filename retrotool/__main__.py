"""``python -m retrotool``."""

from retrotool.cli import main

main()
