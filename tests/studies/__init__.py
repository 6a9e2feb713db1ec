"""Experiments behind docs/scores.md: minutes to an hour each, run by hand in a clone whose `dvc repro` has ended."""
