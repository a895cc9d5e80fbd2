"""Evaluation of finished models: what is measured, on which sets, how models are read, what the result looks like."""
