"""Publishes a finished model: its model card, the hubs that it is sent to, and checks for what must stay private."""
