"""Operations of other libraries, each imported only where it is used.

Transformer Engine is in ``te.py``, flash-attn in ``flash.py``, apex in ``apex.py``, liger-kernel in ``liger.py``.
"""
