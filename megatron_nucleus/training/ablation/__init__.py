"""The ablation bench: suites of runs at equal training FLOPs, their rows, statistics and report.

It stands in training/ because a run's configuration and its FLOPs do; it trains nothing itself: every run, merge and
score is a program of tools/, called with a command that stands in the results.
"""
