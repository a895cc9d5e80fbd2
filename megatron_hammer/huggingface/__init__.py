"""Checkpoints from and to the folders of Hugging Face transformers, with the proof that both compute the same."""
