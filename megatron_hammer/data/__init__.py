"""From text to training samples: indexed datasets on disk, the order of samples, and what one step reads.

::

    build.py -> indexed.py (.bin/.idx) -> order.py, blend.py (which window is sample i) -> samples.py -> loader.py
                                          on index.py (C++ or NumPy)                       tokens      one step

``indexed.py`` has the format and reads it, ``indexed_writer.py`` writes it. ``inspect.py``, ``find.py`` and
``verify.py`` (with ``held_out.py``) look into a dataset; ``count.py`` and ``plan.py`` say what a run draws.

Everything here is torch-free: samples are NumPy arrays, the training loop makes tensors of them.
"""
