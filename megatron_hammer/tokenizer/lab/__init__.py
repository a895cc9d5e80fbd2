"""Judging tokenizers: compression, coverage, price in FLOPs, equality."""
