"""Evaluation of finished models on named sets of text: what ``tools/evaluate.py`` and ``train.evaluator`` do.

``sets.py`` makes the sets, ``subjects.py`` finds and loads the models (ours or Hugging Face's), ``measure.py`` computes
perplexities and bits per byte, and ``checkpoint_process.py`` does so for one checkpoint beside a run.
"""
