"""Decides which tokens sample number i of a run consists of, and reads them as a batch.

``order.py`` gives the samples of one source in their order, ``blend.py`` mixes sources, ``phases.py`` lets the mix
change during a run, ``ledger.py`` leaves samples out, ``rest.py`` goes on where the length of samples changes.
``samples.py`` reads the tokens, ``batch.py`` is what it returns, ``loader.py`` cuts a step's samples into micro-batches
for a rank. ``fill_in_the_middle.py`` rearranges tokens, ``absent.py`` stands in for sources that are gone,
``sources.py`` names those that are there. The loops over all documents and samples are ``index_builder.py`` (compiled,
else ``index_builder_numpy.py``); what they build is kept by ``cache.py``, and ahead of a run by ``prebuild.py``.
``plan.py``, ``mixes.py`` and ``reads.py`` answer questions: how much is drawn from each source, how much was, and when
a document is read.
"""
