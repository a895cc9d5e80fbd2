"""Converts models to and from Hugging Face's format; averages, extends and runs models in it.

``export.py`` makes a folder that transformers loads from a checkpoint, and ``certificate.py`` proves that it is the
same model; ``importing.py`` goes the other way. ``config.py`` and ``weights.py`` know the two halves of such a folder.
``extend.py`` gives a model another vocabulary; ``generate.py`` continues texts with an exported model.
"""
