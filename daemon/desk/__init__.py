"""What people do before the line runs: learn good parts, calibrate, measure, compare.

What lives here: data sets and their layouts, trainings, evaluations, comparisons and their pages, and the commands for
them. What may not: anything that the running daemon needs, from `service` on.
"""
