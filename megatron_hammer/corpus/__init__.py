"""Text corpora: files of documents, and the programs that read, convert, split, sample and shuffle them.

``readers.py`` cuts files into blocks of documents (``file_blocks.py``; from ``stream.py``, ``parquet.py``) and
``parse.py`` reads these (``jsonl.py``, ``long.py``, ``foreign.py``); ``documents.py`` joins the two to documents one
after the other. On these stand ``reformat.py``, ``split.py``, ``sample.py``; ``shuffle.py`` (with ``shuffle_input.py``,
``shuffle_partitions.py``) moves lines without reading them. ``quarantine.py`` keeps what was left out, ``arguments.py``
and ``seeds.py`` are shared; ``quick_start.py`` makes the small corpus of the quick start.
"""
