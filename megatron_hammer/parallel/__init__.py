"""How ranks share a run: how they are numbered, what each holds, and how they communicate.

No other package calls torch.distributed.

Pure arithmetic: ``grid.py`` numbers the ranks along the axes of parallelism, ``placement.py`` and ``sharding.py`` say
what each holds of the model and of the optimizer's state, ``pipeline.py`` and ``sequence_split.py`` divide layers and
tokens, ``sum_tree.py`` fixes the order of sums. Communication: ``context.py`` makes the groups, ``collectives.py`` has
every collective, ``in_chunks.py`` hides two of them behind products, ``fake_world.py`` stands in for ranks that are not
there. Starting and watching: ``rendezvous.py`` and ``torchrun.py`` bring ranks together, ``agreement.py`` has all of
them fail or none, ``board.py``, ``observe.py``, ``watchman.py`` and ``heartbeat.py`` find the one that hangs.
"""
