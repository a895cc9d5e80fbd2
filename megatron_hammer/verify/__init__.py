"""Proofs that users run on their own configs and machines.

``parallel.py`` proves that a parallel layout computes what one process and ``transformers`` compute, ``one_rank.py``
counts what one rank of a large layout would need, ``drill.py`` proves that a run under faults ends like an undisturbed
one, ``doctor.py`` looks at machine, data and checkpoints before a run, and ``selftest.py`` checks an installation.
"""
