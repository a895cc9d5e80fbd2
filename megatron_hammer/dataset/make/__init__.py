"""Makes indexed datasets: from text and a tokenizer, on one machine or a Ray cluster, and from other datasets.

``job.py`` says what is to be made, ``encoding.py`` turns blocks of text into tokens, ``output.py`` writes them with a
journal (``journal.py``) and the documents that were left out (``corpus/quarantine.py``). ``local.py`` and ``ray.py``
carry a job out; ``parts.py`` is one task of a cluster. ``merge.py`` joins datasets. ``megatron.py`` understands the
command lines of Megatron-LM's and GPT-NeoX's programs.
"""
