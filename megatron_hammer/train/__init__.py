"""Training: one step, the loop around it, and everything that a run does before, between and after its steps.

*A step* is ``step.py`` with ``schedules.py`` (or ``pipeline.py``) for forward and backward, of which ``cuda_graph.py``
records a micro-batch and ``source_sums.py`` sums the losses.

*The loop*, ``loop.py``, runs steps and calls what comes between them: ``evaluate.py``, ``evaluator.py`` (in a process
beside it), ``saver.py``, ``health.py`` and ``incidents.py``, ``drift.py`` and ``corruption.py``, ``incident_file.py``,
``stopping.py``, ``late_numbers.py``, ``garbage.py``. ``training.py`` drives it, back over a ``rewind.py`` too, and
``state.py`` is what a checkpoint keeps of how far it is, of which ``course.py`` says which samples its steps held.

*Before the first step*, in ``run.py``, ``prepare.py`` finds every mistake that can be found: ``changes.py`` compares
settings with the checkpoint's, ``identity.py``, ``past.py`` and ``past_sources.py`` the data. ``start.py`` and
``begin.py`` have the ranks agree on where to go on, ``output.py`` holds the folder, and ``build.py`` makes model and
optimizer. ``branch.py`` begins a run from another one's checkpoint.

What a run will take is computed in ``costs/``, and what it says of its steps goes through ``metrics/``.
"""
