"""Indexed datasets on disk (``.bin`` and ``.idx``).

The format read and written; ``make/`` makes them, ``look/`` looks into them..
"""
