"""The Python interface's own code: a training run as an object for notebooks (``run.py``), datasets (``data.py``).

All other names of the interface are functions and classes of the packages below. ``megatron_hammer/__init__.py`` lists
them all, with the module of each, and ``docs/python.md`` describes them. Nothing is computed here: a run is opened,
trained, asked and closed by calls to the packages below.
"""
