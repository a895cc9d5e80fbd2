"""The compiled encoder (``csrc/tokenizer``): sentencepiece-BPE ids, exactly sentencepiece's, several times faster.

``COMPILED`` is the module where the installation built it, else None: then sentencepiece does the work. It has:

- ``Model(content: bytes)``: a ``.model`` file, read without protobuf; ``ValueError`` says what is damaged.
  ``settings()``, ``charsmap()``, ``special_ids()``, ``packed_pieces()`` and ``piece_bytes()`` are its facts, and
  ``unsupported()`` says why the encoder is not for it ("" where it is): it must be BPE with byte fallback, without
  normalisation of characters and without whitespace suffixes.
- ``Encoder(model)``: ``encode_documents(texts, threads, first, last)`` and ``encode_batch(texts, threads)`` as in
  ``interface.Tokenizer``, without the GIL; ``UnicodeError`` for half of a surrogate pair. Calls from several Python
  threads at once are safe.

Ids are those of sentencepiece 0.2.3. Older releases differ in one thing: where a model has a NUL piece (a merged one
has), a NUL in a text becomes that piece there; since 0.2.3, and here, it becomes its byte.

105,789 pieces, a core of an Intel Xeon (Sapphire Rapids): loaded in 0.08 s; 5 MB of tables, and 9 MB a thread.
"""

from __future__ import annotations

from typing import Any

from megatron_hammer.base.compiled import find_compiled

INTERFACE = 2  # raised with every change of the compiled classes: an old build must not be called with new arguments

COMPILED: Any = find_compiled("megatron_hammer.tokenizer._encoder", INTERFACE)
NOT_COMPILED = "the compiled encoder is missing or outdated: reinstall"
