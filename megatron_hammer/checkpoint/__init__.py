"""Checkpoints: the state of a run on disk, written and read by any number of ranks.

::

    optimizer shards --write.py--> step-N/ (folder.py, manifest.py, tensor_files.py) --read.py--> shards of any layout

A checkpoint holds logical tensors, with Hugging Face's names and their whole shapes, and says which file has which part
of each (``kinds.py``, ``dtypes.py``). A reader therefore need not know how many ranks wrote it, nor how they shared the
model. ``commit.py`` makes a checkpoint of what ranks have written, ``retention.py`` removes older ones, ``space.py``
and ``fit.py`` look first whether disk and model have the size, ``inspect.py`` looks at what is there. ``first.py``
makes the first checkpoint of weights from elsewhere, and ``average.py`` one such of the mean of several.
``background.py`` saves while training goes on, from a copy (``snapshot.py``) in a process of its own
(``writer_process.py``); ``direct.py`` moves the bytes without the page cache, ``one_pass.py`` hashes them meanwhile.
``digest.py`` sums up a whole state, ``live_state.py`` compares it with that in memory, and ``live_weights.py`` gives
weights away without a save.
"""
