"""megatron_hammer: from raw text to a published Hugging Face Llama.

Data flows one way, and so do the imports (the arrow reads "imports")::

    raw text -> tokenizer -> indexed dataset -> samples  -> model -> optimizer -> checkpoint -> Hugging Face
    corpus/     tokenizer/   dataset/           sampling/   model/   optim/       checkpoint/   huggingface/

    supervise, profile > train > huggingface > checkpoint > sampling, model, optim > dataset, kernels
                       > corpus, tokenizer > config > parallel > base

This module imports nothing; ``docs/architecture.md`` is the map.
"""

__version__ = "0.2.0"
