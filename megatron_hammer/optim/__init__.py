"""The optimizer: where weights and the sums of their gradients lie, and how a step changes them.

``store.py`` holds weights and gradients of a rank in flat buffers and shares them with other ranks; ``buckets.py`` says
where each lies, ``buffers.py`` has the memory, ``tree_store.py`` sums in a fixed order, ``stage_stores.py`` joins the
stores of several pipeline stages. ``adamw.py`` and ``muon.py`` (with ``matrices.py``) are the rules of the update,
``loss_scaler.py`` is for fp16, ``schedule.py`` is the learning rate. ``optimizer.py`` is what a training step sees.
"""
