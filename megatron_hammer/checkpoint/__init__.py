"""Saving, loading and converting the logical state of a run.

::

    optimizer shards --save.py--> step-N/ (format.py, tensorfile.py) --load.py--> optimizer shards of any layout
                                     |  ^
                                     v  |
                              hf.py (both directions), proved by certificate.py in a process of its own

Stored are logical tensors, with Hugging Face's names and true global shapes: no reader need know who wrote them.
"""
