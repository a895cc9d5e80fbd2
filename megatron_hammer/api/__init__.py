"""The Python interface beyond what other rooms offer as they are: a run in the hands of a notebook.

``megatron_hammer/__init__.py`` lists all names of the interface and where they are; ``docs/python.md`` describes them.
What computes is in the rooms below: here a run is opened, asked and closed.
"""
