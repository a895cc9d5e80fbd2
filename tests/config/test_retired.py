"""Settings of earlier versions: read where they change nothing, refused where they would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config import Config, config_from_tree, config_to_tree, describe_fields, load_config
from megatron_hammer.config.retired import RETIRED

MODEL = {"hidden_size": 64, "ffn_hidden_size": 96, "num_layers": 2, "num_attention_heads": 4}
NAME = "parallel.pipeline_model_parallel_size"


def tree(value: Any) -> dict[str, Any]:
    return {"model": MODEL, "parallel": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": value}}


def expected() -> Config:
    return config_from_tree({"model": MODEL, "parallel": {"tensor_model_parallel_size": 2}})


def test_a_stored_config_is_read_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    stored = tree(1)
    assert config_from_tree(stored) == expected()
    assert stored == tree(1), "the caller's tree is left as it is"
    assert "pipeline_model_parallel_size" not in config_to_tree(expected())["parallel"]
    assert capsys.readouterr() == ("", "")


def test_a_written_config_is_remarked_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(f"model: {MODEL}\nparallel: {{tensor_model_parallel_size: 2}}\n")
    assert load_config(path) == expected()
    assert capsys.readouterr().err == ""
    assert load_config(path, [f"{NAME}=1"]) == expected()
    assert capsys.readouterr().err == (
        f"note: {NAME} is not a setting any more and may be left out; 1 changes nothing\n"
    )
    notes: list[str] = []
    load_config(path, [f"{NAME}=1"], note=notes.append)
    assert len(notes) == 1 and capsys.readouterr().err == ""


@pytest.mark.parametrize("value", [0, 2, -1, "two", None, True])
def test_any_other_value_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_tree(tree(value))
    assert (
        str(caught.value) == f"error[E204]: {NAME}={value} must be 1 in this version; use tensor and data parallelism"
    )


def test_what_is_retired_is_not_a_setting() -> None:
    for name in RETIRED:
        group, field = name.split(".")
        assert field not in describe_fields()[group]
