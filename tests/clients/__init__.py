"""Programs of other people as clients of what we write and as writers of what we read: the nightly tier.

Each client runs in a virtual environment of its own, with this environment's torch, kept in ~/.cache. They are made
only where HAMMER_CLIENTS=1 asks for them (about a gigabyte from the network), and skipped visibly otherwise::

    HAMMER_CLIENTS=1 bash tests/run.sh tests/clients
"""
