"""Checkpoints of Megatron-LM, read without Megatron-LM: guarded pickles, the two layouts on disk, names and shapes."""
