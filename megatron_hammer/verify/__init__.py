"""Proofs that users run on their own configs and machines.

``parallel.py`` proves that a parallel layout computes what one process and ``transformers`` (``reference.py``) compute:
of a config that ``shrink.py`` makes small, ranks take two steps (``steps.py``), say what they have (``outcome.py``,
``points.py``), and ``compare.py`` and ``tokens.py`` find what differs. Why it differs is asked in ``diagnosis.py`` and
``forward_diagnosis.py``, with ``patterns.py``, ``token_inputs.py`` and ``what_if.py``.

``one_rank.py`` counts what one rank of a large layout would need (on the kernels of ``shapes.py``). ``drill.py`` proves
that a run under faults (``faults.py``) ends like an undisturbed one. ``doctor.py`` (``nvidia.py``) looks at machine,
data and checkpoints before a run. ``selftest.py`` checks an installation part by part (``selftest_parts.py``,
``golden.py``), and ``bug_report.py`` writes down what came of it, without names (``anonymous.py``).
"""
