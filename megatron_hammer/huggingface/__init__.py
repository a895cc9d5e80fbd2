"""Converts models to and from Hugging Face's format; extends and runs models in it.

``export.py`` makes a folder that transformers loads from a checkpoint, and ``certificate.py`` proves that it is the
same model, in a process beside it (``prover.py``); ``importing.py`` goes the other way. ``config.py``, ``weights.py``
and ``exported_tokenizer.py`` know the three parts of such a folder.
``extend.py`` (``extension_plan.py``, ``extension_rows.py``) gives a model another vocabulary. ``generate.py`` and
``chat.py`` continue texts with a model of any form (``text_model.py``, loaded by ``transformers_model.py``).
``extra_keys.py`` judges keys of a foreign config, ``certified.py`` reads what was proved of an export.
"""
