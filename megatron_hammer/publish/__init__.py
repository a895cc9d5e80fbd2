"""Publishes a finished model: its model card, the hubs that it is sent to, and checks for what must stay private.

``publish.py`` checks a proved export and sends it, ``facts.py`` gathers what is said of its run, ``card.py`` writes
that as a README in two languages, ``hubs.py`` has the places that it can go to.
"""
