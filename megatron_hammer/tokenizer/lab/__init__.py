"""Measurements of tokenizers: compression, coverage, cost in FLOPs, and whether two give the same ids.

``analyze.py`` measures what there is; ``price.py`` finds the best size of a vocabulary, from ``cost.py``, ``curve.py``
and ``prefixes.py``; ``verify.py`` compares two (``forms.py``) on texts and on those of ``fuzz.py``. ``arguments.py``,
``report.py`` and ``plots.py`` are the two ends of ``tools/analyze_tokenizer.py``.
"""
