"""Indexed datasets: documents as token ids on disk, in the files ``P.bin`` and ``P.idx`` of Megatron-LM's format.

``format.py`` describes the files, ``reader.py`` and ``writer.py`` read and write them, ``make/`` makes datasets from
text and joins them, and ``look/`` answers questions about an existing dataset. Which tokens of it training reads, and
when, is decided in ``sampling/``.
"""
