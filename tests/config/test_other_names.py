"""Settings under other names: read, remarked on in a config that somebody wrote, and refused where the two differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config import Config, config_from_tree, describe_fields, load_config
from megatron_hammer.config.reading import ALIASES

MODEL = {"hidden_size": 64, "ffn_hidden_size": 96, "num_layers": 2, "num_attention_heads": 4}
NAME, OTHER = "parallel.pipeline_model_parallel_size", "parallel.pipeline_parallel_size"


def tree(**parallel: Any) -> dict[str, Any]:
    return {"model": MODEL, "parallel": parallel}


def expected() -> Config:
    return config_from_tree(tree(pipeline_model_parallel_size=2))


def test_a_tree_is_read_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    given = tree(pipeline_parallel_size=2)
    assert config_from_tree(given) == expected()
    assert given == tree(pipeline_parallel_size=2), "the caller's tree is left as it is"
    assert config_from_tree(tree(pipeline_parallel_size=2, pipeline_model_parallel_size=2)) == expected()
    assert config_from_tree(tree(pipeline_model_parallel_size=1)) == config_from_tree({"model": MODEL}), "of old ones"
    assert capsys.readouterr() == ("", "")


def test_a_written_config_is_remarked_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(f"model: {MODEL}\n")
    assert load_config(path, [f"{NAME}=2"]) == expected()
    assert capsys.readouterr().err == ""
    assert load_config(path, [f"{OTHER}=2"]) == expected()
    assert capsys.readouterr().err == f"note: {OTHER} is read as {NAME}\n"


def test_two_values_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_tree(tree(pipeline_parallel_size=4, pipeline_model_parallel_size=2))
    assert str(caught.value) == (
        f"error[E204]: {OTHER}=4 is another name of {NAME}=2, with another value; leave {OTHER} out"
    )


def test_another_name_is_no_setting() -> None:
    for other, name in ALIASES.items():
        for full, is_there in ((other, False), (name, True)):
            group, field = full.split(".")
            assert (field in describe_fields()[group]) == is_there
