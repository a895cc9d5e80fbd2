"""The model that is trained: a Llama or one of its relatives, whole or one pipeline stage of it, on one rank.

``llama.py`` is the model and reads from the tokens to the loss; ``layers.py`` has its parts in plain torch and
``layers_te.py`` the same parts on Transformer Engine, behind one interface (``layer_interface.py``). ``head_loss.py``
is the output head with the loss, ``rope.py`` the angles of the positions. ``parameters.py`` is the table of all weights
with their names, shapes and shares; ``initialise.py`` draws their first values. ``recompute.py`` saves memory by
computing again in backward, ``residence.py`` by holding sharded weights only while they are used.
"""
