"""Decides which tokens sample number i of a run consists of, and reads them as a batch.

``order.py`` gives the samples of one source in their order, ``blend.py`` mixes sources, ``phases.py`` lets the mix
change during a run, ``ledger.py`` leaves samples out, ``rest.py`` goes on where the length of samples changes.
``samples.py`` reads the tokens, ``batch.py`` is what it returns, ``loader.py`` cuts a step's samples into micro-batches
for a rank. ``plan.py`` and ``reads.py`` answer questions beforehand: how much is drawn from each source, and when a
document is read.
"""
