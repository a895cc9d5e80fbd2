"""Training: one step, the loop around it, and everything that a run does before, between and after its steps.

A step is ``step.py`` with ``schedules.py`` (or ``pipeline.py``) for forward and backward. ``loop.py`` runs steps and
calls what comes between them: ``evaluate.py``, ``saver.py``, ``metrics.py``, ``health.py``, ``rewind.py``,
``drift.py``. Before the first step ``prepare.py`` finds every mistake that can be found, ``start.py`` and ``begin.py``
have the ranks agree on where to go on, and ``build.py`` makes model and optimizer. ``state.py`` is what a checkpoint
keeps; ``rank_costs.py`` and ``forecast.py`` predict memory, communication and time.
"""
