"""What a run says of its steps while it trains, and to whom: files, the terminal, TensorBoard, trackers, monitoring.

``reporter.py`` takes the line of each step and hands it on: to metrics.jsonl (``metrics_file.py``), to the terminal
(``view.py``), and to trackers (``trackers.py``), each of which runs in a process of its own (``tracker_process.py``,
``monitoring.py``) on what ``tracked_run.py`` describes. ``starts.py`` has a line for each start, ``generations.py`` one
for each text that a checkpoint has written; ``plot.py`` draws the loss from metrics.jsonl alone. Pages and cards of a
run are made in ``report/`` and ``publish/``.
"""
