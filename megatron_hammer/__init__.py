"""megatron_hammer: from raw text to a published Hugging Face Llama.

Data flows one way, and so do imports (read ``>`` as "imports"; packages between two ``>`` do not import each other)::

    raw text -> tokenizer -> indexed dataset -> samples  -> model -> optimizer -> checkpoint -> Hugging Face
    corpus/     tokenizer/   dataset/           sampling/   model/   optim/       checkpoint/   huggingface/

    api, command, launch, verify > supervise, profile, evaluation, publish, report > train, megatron
           > metrics > huggingface, costs > checkpoint > sampling, model, optim > dataset, kernels
           > corpus, tokenizer > config > parallel > base

The names of ``__all__`` are the Python interface (``docs/python.md``): the functions and classes that the programs use,
each loaded from its module when it is first asked for. So ``import megatron_hammer`` loads none of it;
``docs/architecture.md`` is the map. The modules are written in the syntax of Python 3.11 and call POSIX, so an older
Python and Windows are refused here: with one line where a program is started, else with an ``ImportError``.
"""

import sys

__version__ = "0.2.0"

_refused = ""
if sys.platform == "win32":
    _refused = (
        "error[E292]: megatron_hammer cannot run on Windows itself: it needs POSIX (fcntl, resource, signals, flock), "
        "which Windows lacks; use WSL2, where it is Linux: wsl --install, then the README's commands in its shell"
    )
elif sys.version_info < (3, 11):  # noqa: UP036
    _refused = (
        f"error[E250]: Python {sys.version_info[0]}.{sys.version_info[1]} ({sys.executable}) is older than 3.11, the "
        "first that runs megatron_hammer; use the Python that has all: source .venv/bin/activate "
        "(bash tools/make_venv.sh makes it, or names the Python to install)"
    )
if _refused:
    # Of a program: "-m" while Python looks for it, or the command itself.
    if sys.argv[:1] == ["-m"] or "".join(sys.argv[:1]).endswith(("/hammer", "\\hammer", "\\hammer.exe")):
        sys.stderr.write(_refused + "\n")
        sys.exit(2)
    raise ImportError(_refused)

TYPE_CHECKING = False  # ``typing`` would cost milliseconds; type checkers know the name
if TYPE_CHECKING:
    from megatron_hammer.api.data import make_dataset
    from megatron_hammer.api.run import Interrupted, Run, open_run
    from megatron_hammer.base.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        DiskError,
        DriftError,
        HammerError,
        MemoryShortage,
        NonFiniteError,
        RefusedError,
    )
    from megatron_hammer.config import Config, change_config, load_config, preset_names, to_yaml
    from megatron_hammer.corpus.documents import TextCorpus
    from megatron_hammer.dataset.reader import IndexedDataset
    from megatron_hammer.huggingface.export import export_hf
    from megatron_hammer.huggingface.generate import Continuation, Sampling, continue_texts
    from megatron_hammer.huggingface.importing import import_hf
    from megatron_hammer.huggingface.text_model import TextModel, open_text_model
    from megatron_hammer.sampling.batch import Batch
    from megatron_hammer.tokenizer.interface import Tokenizer
    from megatron_hammer.tokenizer.load import load_tokenizer
    from megatron_hammer.tokenizer.train import train_tokenizer
    from megatron_hammer.train.evaluate import ValidResult
    from megatron_hammer.train.run import dry_run

__all__ = [
    "Batch",
    "CheckpointError",
    "Config",
    "ConfigError",
    "Continuation",
    "DataError",
    "DiskError",
    "DriftError",
    "HammerError",
    "IndexedDataset",
    "Interrupted",
    "MemoryShortage",
    "NonFiniteError",
    "RefusedError",
    "Run",
    "Sampling",
    "TextCorpus",
    "TextModel",
    "Tokenizer",
    "ValidResult",
    "change_config",
    "continue_texts",
    "dry_run",
    "export_hf",
    "import_hf",
    "load_config",
    "load_tokenizer",
    "make_dataset",
    "open_run",
    "open_text_model",
    "preset_names",
    "to_yaml",
    "train_tokenizer",
]

_ERRORS = (
    "CheckpointError ConfigError DataError DiskError DriftError HammerError MemoryShortage NonFiniteError RefusedError"
)
_MODULES = {  # module -> those of its names that are the interface's
    "api.data": "make_dataset",
    "api.run": "Interrupted Run open_run",
    "base.errors": _ERRORS,
    "config": "Config change_config load_config preset_names to_yaml",
    "corpus.documents": "TextCorpus",
    "dataset.reader": "IndexedDataset",
    "huggingface.export": "export_hf",
    "huggingface.generate": "Continuation Sampling continue_texts",
    "huggingface.importing": "import_hf",
    "huggingface.text_model": "TextModel open_text_model",
    "sampling.batch": "Batch",
    "tokenizer.interface": "Tokenizer",
    "tokenizer.load": "load_tokenizer",
    "tokenizer.train": "train_tokenizer",
    "train.evaluate": "ValidResult",
    "train.run": "dry_run",
}


def __getattr__(name: str) -> object:
    """A name of the interface, from its module (PEP 562)."""
    for module, names in _MODULES.items():
        if name in names.split():
            from importlib import import_module

            value = globals()[name] = getattr(import_module(__name__ + "." + module), name)
            return value
    import difflib

    meant = difflib.get_close_matches(name, __all__, n=1)
    remedy = ". Did you mean " + repr(meant[0]) + "?" if meant else ""
    raise AttributeError("module " + repr(__name__) + " has no attribute " + repr(name) + remedy)


def __dir__() -> "list[str]":
    """With the interface's names, for completion."""
    return sorted(set(globals()) | set(__all__))
