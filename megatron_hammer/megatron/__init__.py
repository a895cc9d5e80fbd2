"""Checkpoints of Megatron-LM, read without Megatron-LM: guarded pickles, the two layouts on disk, names and shapes.

``importing.py`` makes one of our checkpoints from ``distributed.py`` (``metadata.py``) or ``legacy.py``, and
``resuming.py`` reads what a run needs beside the weights to go on; ``translation.py`` has the names and the order of
rows. All pickles go through ``pickles.py``, torch's own files through ``torch_files.py``.
"""
