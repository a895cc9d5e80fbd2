"""Measures where the time and the memory of a training step go, and draws them; plans layouts for given GPUs."""
