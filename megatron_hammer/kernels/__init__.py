"""The operations of a training step, each with a plain torch reference and faster backends.

backend.py, selection.py and report.py say what a backend is, choose one for each operation and print the choice;
operations.py is the set of functions that a model is built with. Then there is a file for each operation (attention,
norm, rope, swiglu, linear, linear_cross_entropy, adamw, and fp8, the products of linear in 8 bits). native/ has our own
compiled kernels for CPUs and GPUs, libraries/ those of other projects, each imported only where it is used.
This file itself imports no torch.
"""
