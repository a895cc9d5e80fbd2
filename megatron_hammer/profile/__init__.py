"""Measures where the time and the memory of a training step go, part by part, beside what they could be at the limit.

``profile.py`` runs the steps of ``workload.py`` under torch's profiler, ``trace.py`` reads what it recorded, and
``plots.py`` draws it. The limits are formulas of ``costs/budget.py``.
"""
