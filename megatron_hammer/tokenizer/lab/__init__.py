"""Measurements of tokenizers: compression, coverage, cost in FLOPs, and whether two give the same ids."""
