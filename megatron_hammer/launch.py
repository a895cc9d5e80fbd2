"""``python -m megatron_hammer.launch``: the launcher's command line; what it does is in ``supervise/start.py``.

Needs no torch.
"""

from megatron_hammer.base.cli import run
from megatron_hammer.base.streams import Output
from megatron_hammer.supervise.start import main

if __name__ == "__main__":
    run(main, Output.LOG)
