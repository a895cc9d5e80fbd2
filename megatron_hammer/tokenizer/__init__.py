"""Tokenizers, which turn text into ids and ids into text: loading, training, merging, converting to Hugging Face."""
