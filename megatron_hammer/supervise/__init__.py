"""Starting the ranks of a run and watching them: what ``python -m megatron_hammer.launch`` does.

``start.py`` reads and checks what the user asks for, ``attempt.py`` starts the ranks of one node once, ``rank.py`` is
what each of them runs first and last, ``watch.py`` finds the cause when one fails or hangs, ``restart.py`` decides
whether to start again, and ``nodes.py`` and ``several_nodes.py`` are for several nodes.
"""
