"""The stages: what each command does to a store, as ``plan`` (state → tasks) and ``open`` (task → files, staged).

``base`` holds the contract; ``retrotool.engine`` runs it. Stages read committed files and write new ones; they
share nothing.
"""
