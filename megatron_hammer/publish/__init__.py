"""A run goes to where others find it: what it says of itself, the model card, the hubs, what must not leave."""
