"""``python -m megatron_hammer.launch``: the launcher's command line; what it does is in ``supervise/start.py``.

Needs no torch.
"""

from megatron_hammer.base.signals import end_at_once


def _main() -> None:
    """Handlers first: everything else is loaded behind them, and what of it is missing becomes a line of ``run``."""
    end_at_once("before any rank started")
    from megatron_hammer.base.cli import run
    from megatron_hammer.base.streams import OutputKind

    def start() -> int:
        from megatron_hammer.supervise.start import main

        return main()

    run(start, OutputKind.LOG)


if __name__ == "__main__":
    _main()
