"""Checkpoints: the state of a run on disk, written and read by any number of ranks.

::

    optimizer shards --write.py--> step-N/ (folder.py, manifest.py, tensor_files.py) --read.py--> shards of any layout

A checkpoint holds logical tensors, with Hugging Face's names and their whole shapes, and says which file has which part
of each. A reader therefore need not know how many ranks wrote it, nor how they shared the model. ``fit.py`` compares a
checkpoint with the model that is to be trained; ``background.py`` saves while training goes on; ``direct.py`` moves the
bytes without the page cache.
"""
