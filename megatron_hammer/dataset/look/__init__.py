"""Looking into an indexed dataset: what is in it, whether it is sound, where a text stands."""
