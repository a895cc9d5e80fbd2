"""megatron_hammer: from raw text to a published Hugging Face Llama.

Data flows one way, and so do the imports (the arrow reads "imports")::

    raw text -> tokenizer -> indexed dataset -> samples -> model -> optimizer -> checkpoint -> Hugging Face
    corpus/     tokenizer/   data/             data/      model/   optim/       checkpoint/   checkpoint/hf.py

    launch > train > checkpoint > data, model, optim > kernels > corpus, tokenizer, parallel
           > config, errors, cli, files, compiled

This module imports nothing; ``docs/architecture.md`` is the map.
"""

__version__ = "0.1.0"
