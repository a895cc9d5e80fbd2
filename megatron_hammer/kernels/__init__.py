"""The operations of a training step, each with a plain torch reference and faster backends.

``backend.py``, ``selection.py`` and ``report.py`` say what a backend is, choose one for each operation and print the
choice; ``operations.py`` is the set of functions that a model is built with, ``argument_types.py`` has types that they
share, ``packed_sequences.py`` and ``context_parallel.py`` what attention is told of documents and of other ranks, and
``ranges.py`` the names of a step's parts. Then there is a file for each operation: ``attention.py``, ``norm.py``,
``rope.py``, ``swiglu.py``, ``linear.py`` (other products: ``fp8.py`` in 8 bits, ``wide_products.py`` in fp32 where a
processor has no bf16), ``embedding.py``, ``linear_cross_entropy.py``, ``adamw.py``, ``newton_schulz.py``,
``bit_hash.py``. ``native/`` has our own compiled kernels for CPUs and GPUs, ``libraries/`` those of other projects,
each imported only where it is used.
This file itself imports no torch.
"""
