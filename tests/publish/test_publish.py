"""A run goes to a hub by stand-ins: what the card says, what goes, what is refused before anything is sent."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from megatron_hammer.base.errors import CheckpointError, ConfigError, DataError, DiskError, RefusedError
from megatron_hammer.base.files import hash_file
from megatron_hammer.checkpoint.manifest import read_manifest
from megatron_hammer.dataset.writer import IndexedWriter
from megatron_hammer.publish import publish as publishing
from megatron_hammer.publish.card import Wishes
from megatron_hammer.publish.facts import gather_facts
from megatron_hammer.publish.hubs import FolderHub, HuggingFaceHub, ModelScopeHub, check_repository
from megatron_hammer.publish.publish import prepare_upload, upload

WISHES = Wishes("锤子 1M", "me/hammer-1m", "apache-2.0", ("zh", "en"))


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "runs" / "mine"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What a hub's library was asked for."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield []


class FakeHub:
    """huggingface_hub and modelscope in one; ``trouble`` is raised by the call of that name."""

    endpoint = "https://hub"

    def __init__(self, asked: list[Any], token: str | None = "secret-token", **trouble: Exception) -> None:
        self.asked, self.token, self.trouble = asked, token, trouble

    def HfApi(self) -> FakeHub:
        return self

    HubApi = HfApi

    def get_token(self) -> str | None:
        return self.token

    def _call(self, name: str, *words: Any, **options: Any) -> None:
        if name in self.trouble:
            raise self.trouble[name]
        if "folder_path" in options:
            options["files"] = sorted(
                str(p.relative_to(options["folder_path"])) for p in Path(options["folder_path"]).rglob("*")
            )
            options["card"] = (Path(options["folder_path"]) / "README.md").read_text(encoding="utf-8")
        self.asked.append((name, words, options))

    def __getattr__(self, name: str) -> Any:
        return lambda *words, **options: self._call(name, *words, **options)


def test_the_card_has_the_run_s_own_figures_in_both_languages(run: Path) -> None:
    card = prepare_upload(run, replace(WISHES, languages=("zh", "no")), unfinished=True).card
    _, header, text = card.split("---\n", 2)
    fields = yaml.safe_load(header)
    assert fields["license"] == "apache-2.0" and fields["language"] == ["zh", "no"], "Norwegian"
    assert fields["pipeline_tag"] == "text-generation" and fields["library_name"] == "transformers"
    english, chinese = text.split("# 中文")
    proof = json.loads((run / "hf" / "certificate.json").read_text())
    for part in (english, chinese):
        for figure in ("4.6000", "4.2500", "70.1000", "1.5000", "0.2600", "14,336", "me/hammer-1m",
                       proof["checkpoint_digest"], "LlamaForCausalLM", "bfloat16"):  # fmt: skip
            assert figure in part, figure
    assert "## Validation" in english and "## 验证" in chinese and "at step 5" in english
    assert english.count("\n## ") == chinese.count("\n## ") and english.count("|") == chinese.count("|")
    assert "1.0000" not in card, "what came after the checkpoint is not its"


def test_the_data_mix_is_told_by_names_without_folders(run: Path, tmp_path: Path) -> None:
    for name in ("alice/zh", "en"):
        with IndexedWriter(tmp_path / name.replace("/", "_"), vocab_size=700) as writer:
            writer.add([1] * 500, [500])
    data = {"train": {str(tmp_path / "alice_zh"): 3.0, str(tmp_path / "en_text_document"): 1.0, "/secret/bob/en": 4.0}}
    manifest = read_manifest(run / "checkpoints" / "step-00000007")
    facts = gather_facts(replace(manifest, config=manifest.config | {"data": data}), run, {})
    (mix,) = facts.phases
    assert [source.name for source in mix.sources] == ["alice_zh", "en (1)", "en (2)"]
    phases = {"phases": [{"tokens": 4096, "train": {"/x/zh": 1.0}}, {"train": {"/x/en": 1.0}}]}
    facts = gather_facts(replace(manifest, config=manifest.config | {"data": phases}), run, {})
    assert [mix.length for mix in facts.phases] == ["4,096 tokens", ""]
    assert [source.tokens_read for mix in facts.phases for source in mix.sources] == [9000, 5336]


@pytest.mark.parametrize(
    ("license", "words"),
    [("mit", "license: mit\n"), ("My Own", 'license: other\nlicense_name: "My Own"\n'), (None, "license: unknown\n")],
)
def test_the_licence_field(run: Path, license: str | None, words: str) -> None:
    card = prepare_upload(run, replace(WISHES, license=license), unfinished=True).card
    assert words in card and ("No licence was stated" in card) == (license is None)


def test_what_goes_is_the_proved_export_and_the_card(run: Path, asked: list[Any]) -> None:
    (run / "hf" / "notes.txt").write_text("mine")
    found = prepare_upload(run, WISHES, unfinished=True)
    before = {path.name for path in (run / "hf").iterdir()}
    address = upload(found, HuggingFaceHub("me/hammer-1m", True, FakeHub(asked)))
    assert address == "https://hub/me/hammer-1m"
    (_, _, _), (made, words, made_options), (_, _, sent) = asked
    assert made == "create_repo" and words == ("me/hammer-1m",) and made_options == {"private": True, "exist_ok": True}
    assert set(sent["files"]) == {*json.loads((run / "hf" / "certificate.json").read_text())["files"],
                                  "certificate.json", "README.md"}  # fmt: skip
    assert "generation_config.json" in sent["files"] and "model.safetensors" in sent["files"]
    assert sent["card"] == found.card and "step 7" in sent["commit_message"]
    assert {path.name for path in (run / "hf").iterdir()} == before, "the export stays as it was proved"
    assert not list(run.glob(".publish-*"))
    listing = found.listing()
    assert len(listing) == len(sent["files"]) and any(line.startswith("README.md ") for line in listing)


def test_modelscope(run: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = prepare_upload(run, WISHES, unfinished=True)
    hub = ModelScopeHub("me/hammer-1m", False, FakeHub(asked))
    monkeypatch.delenv("MODELSCOPE_API_TOKEN", raising=False)
    with pytest.raises(ConfigError, match=r"E291.*set MODELSCOPE_API_TOKEN"):
        upload(found, hub)
    assert asked == []
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-0123456789")
    assert upload(found, hub) == "https://www.modelscope.cn/models/me/hammer-1m"
    assert [name for name, *_ in asked] == ["login", "create_repo", "upload_folder"]
    assert asked[1][2]["visibility"] == "public"


def test_a_folder(run: Path, tmp_path: Path) -> None:
    found = prepare_upload(run, WISHES, unfinished=True)
    target = tmp_path / "out"
    for _ in range(2):  # an earlier one is replaced
        assert upload(found, FolderHub(target)) == str(target)
        assert {path.name for path in target.iterdir()} == {*found.files, "README.md"}
    (target / ".git").mkdir()
    (target / ".git" / "HEAD").write_text("mine")
    with pytest.raises(RefusedError, match=r"E525.*holds .git/HEAD, which no earlier export wrote"):
        upload(found, FolderHub(target))
    assert (target / ".git" / "HEAD").read_text() == "mine"
    with pytest.raises(RefusedError, match=r"E525.*hf is an export, which stays as it was proved"):
        upload(found, FolderHub(run / "hf"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(RefusedError, match=r"E525"):
        upload(found, FolderHub(tmp_path / "other"))


def test_files_in_folders_and_a_card_that_were_proved(run: Path, tmp_path: Path) -> None:
    """A proof that was repeated lists what was put into the folder meanwhile; a card of the export stays as it is."""
    export = run / "hf"
    certificate = json.loads((export / "certificate.json").read_text())
    (export / "a" / "b").mkdir(parents=True)
    for name, content in {"a/b/c.jinja": "{{ x }}", "README.md": "my notes"}.items():
        (export / name).write_text(content)
        certificate["files"][name] = {"size": len(content), "xxh3_128": hash_file(export / name)}
    (export / "certificate.json").write_text(json.dumps(certificate))
    for _ in range(2):
        found = prepare_upload(run, WISHES, unfinished=True)
        upload(found, FolderHub(tmp_path / "out"))
    assert (tmp_path / "out" / "a" / "b" / "c.jinja").read_text() == "{{ x }}"
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") == found.card
    assert (export / "README.md").read_text() == "my notes"


@pytest.mark.parametrize("change", [
    {"files": None}, {"files": {}}, {"files": {"config.json": {"size": 3}}},
    {"files": {"../x": {"size": 1, "xxh3_128": ""}}}, {"texts": {}}, {"versions": None}, {"step": "7"},
], ids=str)  # fmt: skip
def test_a_certificate_that_does_not_say_what_was_proved_is_no_proof(run: Path, change: dict[str, Any]) -> None:
    path = run / "hf" / "certificate.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=r"E493.*certificate.json does not say what was proved.*export it anew"):
        prepare_upload(run, WISHES, unfinished=True)


def test_what_is_not_ready_is_refused_with_the_cure(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"E539.*step 7 of .*--unfinished"):
        prepare_upload(run, WISHES)
    with pytest.raises(
        CheckpointError, match=r"E493.*export first: python tools/checkpoint_to_hf.py --load .*step-00000007"
    ):
        prepare_upload(run, WISHES, tmp_path / "absent", unfinished=True)
    weights = run / "hf" / "generation_config.json"
    weights.write_text(weights.read_text() + " ")
    with pytest.raises(RefusedError, match=r"E540.*generation_config.json is not what the certificate proved"):
        prepare_upload(run, WISHES, unfinished=True)
    certificate = json.loads((run / "hf" / "certificate.json").read_text())
    (run / "hf" / "certificate.json").write_text(json.dumps(certificate | {"checkpoint_digest": "0" * 32}))
    with pytest.raises(RefusedError, match=r"E540.*not of step-00000007; export that one first"):
        prepare_upload(run, WISHES, unfinished=True)
    (run / "hf" / "certificate.json").unlink()
    with pytest.raises(CheckpointError, match=r"E493.*has no certificate"):
        prepare_upload(run, WISHES, unfinished=True)
    with pytest.raises(ConfigError, match=r"E290.*is not OWNER/NAME"):
        check_repository("model")


@pytest.mark.parametrize("place", ["path", "host", "secret", "home"])
def test_nothing_private_goes(run: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setattr(publishing.platform, "node", lambda: "gpu-node-17")
    text = {"path": f"see {run}/loss.png", "host": "made on gpu-node-17.", "secret": "key=0123456789abcdef",
            "home": f"{Path.home()}/x"}[place]  # fmt: skip
    prepare_upload(run, replace(WISHES, description="made on gpu-node-170"), unfinished=True)
    with pytest.raises(RefusedError, match=r"E541\]: README.md of hf holds") as refused:
        prepare_upload(run, replace(WISHES, description=text), unfinished=True)
    assert "0123456789abcdef" not in str(refused.value)


def test_what_a_hub_refuses_is_one_line_without_the_token(
    run: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = prepare_upload(run, WISHES, unfinished=True)
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")

    def hub(**options: Any) -> HuggingFaceHub:
        return HuggingFaceHub("me/m", False, FakeHub(asked, **options))

    with pytest.raises(ConfigError, match=r"E291.*finds no token; run hf auth login"):
        upload(found, hub(token=None))
    refused = Exception("401 Client Error: bad hf_0123456789")
    with pytest.raises(ConfigError, match=r"E291.*refused by the hub.*\$HF_TOKEN"):
        upload(found, hub(whoami=refused))
    forbidden = Exception("no")
    forbidden.response = SimpleNamespace(status_code=403)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"E291\]: me/m is refused.*that me/m is yours"):
        upload(found, hub(create_repo=forbidden))
    with pytest.raises(DiskError, match=r"E604\]: me/m could not be reached, or failed .ConnectionError: no route"):
        upload(found, hub(upload_folder=ConnectionError("no route")))
    monkeypatch.setenv("HUB_PASSWORD", "open sesame")
    with pytest.raises(DiskError, match=r"E604.*for .HUB_PASSWORD"):
        upload(found, hub(upload_folder=ConnectionError("no route for open sesame")))
    failed = Exception("500 Server Error (Request ID: Root=1-6401f)")
    with pytest.raises(DiskError, match=r"E604"):
        upload(found, hub(upload_folder=failed))
    assert not any(name == "upload_folder" for name, *_ in asked)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"E291\]: HF_HUB_OFFLINE is set"):
        upload(found, hub())


def test_the_program(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
    import publish as program  # type: ignore[import-not-found]

    def call(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["publish.py", str(run), "--unfinished", *words])
        program.main()
        return capsys.readouterr().out

    said = call("--to", "hf", "--repo", "me/m", "--dry-run")
    assert "model.safetensors" in said and "would go to me/m; the card:" in said and "# 中文" in said
    assert os.environ.get("HF_TOKEN") is None or os.environ["HF_TOKEN"] not in said
    assert (
        call("--to", "folder", "--output", str(tmp_path / "out"), "--license", "mit") == f"wrote {tmp_path / 'out'}\n"
    )
    said = call("--to", "folder", "--output", str(tmp_path / "new"), "--repo", "me/m", "--dry-run")
    assert f"would go to {tmp_path / 'new'}; the card:" in said and "me/m" in said
    (tmp_path / "words.md").write_bytes("你好".encode("gb18030"))
    with pytest.raises(DataError, match=r"E303.*words.md is not valid UTF-8 at byte 0"):
        call("--to", "hf", "--repo", "me/m", "--dry-run", "--description", str(tmp_path / "words.md"))
    for words in (("folder", "--output", "x", "--private"), ("hf", "--repo", "me/m", "--output", "x")):
        with pytest.raises(ConfigError, match=rf"E201.*does nothing with --to {words[0]}"):
            call("--dry-run", "--to", *words)
    for words in (("--to", "folder"), ("--to", "hf"), ("--to", "hf", "--repo", "m")):
        with pytest.raises(ConfigError, match=r"E290"):
            call(*words)
