"""What a run will take, by formulas and published figures: memory, communication, time, disk; and what it then took.

Of one rank of a layout: ``rank_costs.py`` has the bytes of its state and activations and what it communicates,
``rank_buffers.py`` and ``rank_peak.py`` the worst moment of a step, ``budget.py`` the operations and bytes of each
part, ``rank_speed.py`` the time of a step. ``flops.py`` and ``gpus.py`` are the figures under them. Above them
``layouts.py`` searches, ``planner.py`` ranks what it finds for the user (``plan_report.py``), ``forecast.py`` and
``comparison.py`` speak at the start of a run and after some steps, and ``shortage.py`` explains why memory ran out.
"""
