"""``python -m retrotool``."""

from retrotool.app import main

main()
