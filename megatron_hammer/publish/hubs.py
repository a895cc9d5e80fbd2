"""The targets of publishing behind one small interface: Hugging Face's Hub, ModelScope, a folder.

Each hub is reached through its own client library, an extra of this package (``pip install "megatron_hammer[hub]"``,
``[modelscope]``), which knows its addresses, mirrors and tokens (``HF_ENDPOINT``, ``HF_TOKEN``; ``MODELSCOPE_DOMAIN``,
``MODELSCOPE_API_TOKEN``). A token is never printed. Needs no torch.
"""

from __future__ import annotations

import os
import re
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from megatron_hammer.base.errors import ConfigError, DiskError, RefusedError
from megatron_hammer.base.files import copy_folder, staged_folder
from megatron_hammer.huggingface.certified import CERTIFICATE, check_output

CARD = "README.md"
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


class Hub(Protocol):
    """A place that a model's folder can be published to."""

    def check(self) -> None:
        """Raise ``ConfigError`` where the upload cannot work: no library, no token, no such account."""

    def upload(self, folder: Path, message: str) -> str:
        """Send all files of the folder; the address of the model."""


class HuggingFaceHub:
    """Hugging Face's Hub, or a mirror that HF_ENDPOINT names.

    Args:
        library: ``huggingface_hub``; a stand-in in tests.
    """

    def __init__(self, repository: str, private: bool, library: Any = None) -> None:
        self.repository, self._private = check_repository(repository), private
        self._library = library or import_client("huggingface_hub", "hub")

    def check(self) -> None:
        """A token is there, and the Hub knows it."""
        if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
            raise ConfigError(91, "HF_HUB_OFFLINE", "is set, so nothing can be uploaded", "unset HF_HUB_OFFLINE")
        if self._library.get_token() is None:
            remedy = "run hf auth login, or set HF_TOKEN to a token that may write (huggingface.co/settings/tokens)"
            raise ConfigError(91, "--to hf", "finds no token", remedy)
        _answer(lambda: self._library.HfApi().whoami(), "--to hf", "run hf auth login again, or set another HF_TOKEN")

    def upload(self, folder: Path, message: str) -> str:
        """One commit, in a repository that is made where it is not there."""
        api = self._library.HfApi()
        remedy = f"see that {self.repository} is yours and that the token may write there, then run the same again"

        def send() -> str:
            api.create_repo(self.repository, private=self._private, exist_ok=True)
            api.upload_folder(repo_id=self.repository, folder_path=str(folder), commit_message=message)
            return str(getattr(api, "endpoint", "https://huggingface.co"))

        return f"{_answer(send, self.repository, remedy)}/{self.repository}"


class ModelScopeHub:
    """ModelScope.

    Args:
        library: ``modelscope``; a stand-in in tests.
    """

    def __init__(self, repository: str, private: bool, library: Any = None) -> None:
        self.repository, self._private = check_repository(repository), private
        self._api = (library or import_client("modelscope.hub.api", "modelscope")).HubApi()

    def check(self) -> None:
        """A token is there, and the hub knows it."""
        token = os.environ.get("MODELSCOPE_API_TOKEN")
        if not token:
            remedy = "set MODELSCOPE_API_TOKEN to an SDK token (modelscope.cn/my/myaccesstoken)"
            raise ConfigError(91, "--to modelscope", "finds no token", remedy)
        _answer(lambda: self._api.login(token), "--to modelscope", "set another MODELSCOPE_API_TOKEN")

    def upload(self, folder: Path, message: str) -> str:
        """One commit, in a repository that is made where it is not there."""
        remedy = f"see that {self.repository} is yours and that the token may write there, then run the same again"

        def send() -> None:
            self._api.create_repo(
                self.repository, visibility="private" if self._private else "public", repo_type="model", exist_ok=True
            )
            self._api.upload_folder(
                repo_id=self.repository, folder_path=str(folder), commit_message=message, repo_type="model"
            )

        _answer(send, self.repository, remedy)
        return f"https://www.modelscope.cn/models/{self.repository}"


class FolderHub:
    """A folder on this machine: to look at, to hand on, to serve.

    Args:
        output: does not exist, is empty, or is what an earlier publication made.
    """

    def __init__(self, output: Path) -> None:
        self._output = output.resolve()

    def check(self) -> None:
        """Only a published model is replaced."""
        if self._output.exists():
            check_output(self._output, beside=(CARD,))
        if (self._output / CERTIFICATE).is_file() and not (self._output / CARD).is_file():
            rule = "is an export, which stays as it was proved"
            raise RefusedError(25, f"--output {self._output}", rule, "name another folder")

    def upload(self, folder: Path, message: str) -> str:
        """Copy all files; the folder appears when it is complete."""
        with staged_folder(self._output, replace=True) as staging:
            copy_folder(folder, staging)
        return str(self._output)


def secrets() -> list[tuple[str, str]]:
    """(variable, value) of what this environment keeps secret, as far as names tell; shorter values are no secrets."""
    names = re.compile(r"TOKEN|SECRET|PASSWORD|KEY", re.IGNORECASE)
    return [(name, value) for name, value in os.environ.items() if names.search(name) and len(value) > 7]


def check_repository(name: str) -> str:
    """OWNER/NAME.

    Raises:
        ConfigError: E290 another form.
    """
    if not REPOSITORY.fullmatch(name):
        remedy = "write it as your account (or organisation), a slash and the model: --repo me/my-model"
        raise ConfigError(90, f"--repo {name}", "is not OWNER/NAME of letters, digits and - _ .", remedy)
    return name


def import_client(module: str, extra: str) -> Any:
    """A hub's client library.

    Raises:
        ConfigError: E291 it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        why = "is not installed here" if getattr(error, "name", "") == name else f"cannot be imported ({error})"
        raise ConfigError(
            91, f"the library {name}", why, f'pip install {name} (or pip install -e ".[{extra}]")'
        ) from None


def _answer(ask: Any, what: str, remedy: str) -> Any:
    """The answer of a hub; what it refuses becomes one line, without the token.

    Raises:
        ConfigError: E291 it does not know the token, or the token may not do this.
        DiskError: E604 it could not be reached, or failed.
    """
    try:
        return ask()
    except Exception as error:  # each client has exceptions of its own, and of the library that it connects with
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        for name, value in secrets():
            text = text.replace(value, f"${name}")
        status = getattr(getattr(error, "response", None), "status_code", None)
        words = re.search(r"\b40[13]\b|unauthori|forbidden", text, re.IGNORECASE) if status is None else None
        refused = status in (401, 403) or words is not None
        if refused:
            raise ConfigError(91, what, f"is refused by the hub ({text})", remedy) from None
        rule = f"could not be reached, or failed ({text})"
        raise DiskError(
            4, what, rule, "see to the connection (HTTPS_PROXY, HF_ENDPOINT), then run the same again"
        ) from None
