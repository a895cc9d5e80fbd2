"""Tokenizers, which turn text into ids and ids into text: loading, training, merging, converting to Hugging Face.

``load.py`` gives any of them as one ``Tokenizer`` (``interface.py``), whose backends are ``sentencepiece_backend.py``
(with ``encode.py``), ``huggingface_backend.py`` and ``tiktoken_backend.py``; files are read by ``tokenizer_files.py``.
What an id stands for: ``pieces.py``, ``spelling.py``, ``scripts.py``. Making one: ``train.py`` (``sentences.py``,
``required_characters.py``, ``symbols.py``), ``merge.py``. Converting one: ``convert.py`` with ``definition.py``,
``model_folder.py``, ``reader_settings.py``, and its proof, ``conversion_proof.py``, on ``hard_texts.py``. Judging them
is the business of ``lab/``.
"""
