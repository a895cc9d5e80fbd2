"""Our own compiled kernels (``csrc/``) as functions of torch tensors, and their backward passes.

``cpu.py`` and ``cuda.py`` call what was compiled for the device, ``devices.py`` makes the two one backend, and
``autograd.py`` has the backward passes. Where nvcc built nothing, Triton's twins run on a GPU: ``layers_triton.py``,
``linear_cross_entropy_triton.py`` and ``adamw_triton.py``, with ``triton_rows.py`` for what they need.
"""
