"""Proofs that users run on their own configs: whether a parallel layout computes what one process computes."""
