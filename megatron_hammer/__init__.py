"""megatron_hammer: from raw text to a published Hugging Face Llama.

Data flows one way, and so do the imports (the arrow reads "imports")::

    raw text -> tokenizer -> indexed dataset -> samples  -> model -> optimizer -> checkpoint -> Hugging Face
    corpus/     tokenizer/   dataset/           sampling/   model/   optim/       checkpoint/   huggingface/

    command, launch, verify > supervise, profile, evaluation, publish > train, megatron > huggingface > checkpoint
           > sampling, model, optim > dataset, kernels > corpus, tokenizer > config > parallel > base

This module imports nothing of it; ``docs/architecture.md`` is the map. An older Python could not read the others: it is
refused here, in one line where a program is started with ``-m``, else by an ``ImportError``.
"""

import sys

__version__ = "0.2.0"

if sys.version_info < (3, 11):  # noqa: UP036
    _too_old = (
        f"error[E250]: Python {sys.version_info[0]}.{sys.version_info[1]} ({sys.executable}) is older than 3.11, the "
        "first that runs megatron_hammer; use the Python that has all: source .venv/bin/activate "
        "(bash tools/make_venv.sh makes it, or names the Python to install)"
    )
    if sys.argv[:1] == ["-m"]:  # the program's name while Python looks for the program
        sys.stderr.write(_too_old + "\n")
        sys.exit(2)
    raise ImportError(_too_old)
