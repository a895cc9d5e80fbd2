"""Indexed datasets: documents as token ids on disk, in the files ``P.bin`` and ``P.idx`` of Megatron-LM's format.

``format.py`` describes the files, ``reader.py`` and ``writer.py`` read and write them, ``make/`` makes datasets from
text and joins them, and ``look/`` answers questions about a dataset that is there. What training draws from datasets
is the business of ``sampling/``.
"""
