"""Hugging Face -> checkpoint -> any layout -> Hugging Face: the same bits; and what cannot be converted is named."""

from __future__ import annotations

import io
import json
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_hammer.base.errors import CheckpointError, ConfigError, RefusedError, from_fields
from megatron_hammer.checkpoint.folder import open_checkpoint
from megatron_hammer.checkpoint.manifest import read_manifest, saved_model
from megatron_hammer.checkpoint.read import read_logical
from megatron_hammer.config import load_config
from megatron_hammer.dataset.look.document_marks import documents_begin_with
from megatron_hammer.dataset.reader import IndexedDataset
from megatron_hammer.dataset.writer import IndexedWriter
from megatron_hammer.huggingface import prover
from megatron_hammer.huggingface import weights as weight_files
from megatron_hammer.huggingface.certificate import prove
from megatron_hammer.huggingface.export import Prover, export_hf
from megatron_hammer.huggingface.importing import import_hf
from megatron_hammer.huggingface.weights import HfWeights, check_tensors, export_weights, plan_files
from megatron_hammer.model.parameters import EMBEDDING, HEAD, logical_shapes
from megatron_hammer.tokenizer import conversion_proof
from megatron_hammer.tokenizer.convert import QWEN2_WORDS, export_note
from megatron_hammer.tokenizer.load import load_tokenizer
from tests.checkpoint.layouts import random_logical, tiny_model, write_layout
from tests.huggingface.unproved import write_unproved
from tests.page_blocks import blocks_of
from tests.warm_python import warm_python

ROOT = Path(__file__).parents[2]


def make_hf(folder: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes) -> Path:
    """A tiny random model as transformers writes it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 131, "max_position_embeddings": 48,
              "initializer_range": 0.2}  # fmt: skip
    torch.manual_seed(5)
    settings = AutoConfig.for_model(**{"model_type": "llama", **fields, **changes})
    model = AutoModelForCausalLM.from_config(settings).to(dtype)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.5, 1.5)
        elif name.endswith(".bias"):
            weight.data.uniform_(-0.5, 0.5)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), (
            name
        )


VARIANTS = [
    ({}, torch.float32, "5GB"),
    ({"tie_word_embeddings": True}, torch.bfloat16, "5GB"),
    ({"head_dim": 6, "rms_norm_eps": 1e-5}, torch.float16, "10KB"),
    ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
     torch.bfloat16, "10KB"),
    ({"num_key_value_heads": 4, "vocab_size": 128}, torch.bfloat16, "5GB"),
    ({"attention_bias": True, "mlp_bias": True}, torch.float32, "5GB"),
    ({"model_type": "qwen2", "tie_word_embeddings": True, "rope_theta": 1e6,
      "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12}},
     torch.bfloat16, "5GB"),
    ({"model_type": "qwen3", "head_dim": 6, "rope_theta": 1e6, "tie_word_embeddings": True}, torch.bfloat16, "10KB"),
    ({"model_type": "qwen3", "head_dim": 6, "attention_bias": True}, torch.float32, "5GB"),
]  # fmt: skip
NAMES = ["plain", "tied", "head_dim", "llama3", "mha", "biases", "qwen2 yarn", "qwen3", "qwen3 biases"]


@pytest.mark.parametrize("changes, dtype, shard", VARIANTS, ids=NAMES)
def test_the_round_trip_is_bit_equal(tmp_path, changes, dtype, shard):
    source = make_hf(tmp_path / "hf", dtype, shard, **changes)
    assert (len(list(source.glob("*.safetensors"))) > 1) == (shard != "5GB")
    target = import_hf(source, tmp_path / "run", note=lambda text: None)
    assert target == open_checkpoint(tmp_path / "run").folder == tmp_path / "run" / "checkpoints" / "step-00000000"
    certificate = export_hf(tmp_path / "run", tmp_path / "back", prove=prove, note=lambda text: None)
    assert certificate["verdict"] == "passed" and certificate["dtype"] == str(dtype).removeprefix("torch.")
    assert_same_bits(weights_of(source), weights_of(tmp_path / "back"))
    from transformers import AutoConfig

    a, b = (AutoConfig.from_pretrained(p).to_dict() for p in (source, tmp_path / "back"))
    ignored = {"transformers_version", "_name_or_path", "max_window_layers"}  # there is no window
    assert {k: v for k, v in a.items() if k not in ignored} == {k: b.get(k) for k in a if k not in ignored}


def test_a_mistral_without_window_becomes_a_llama_of_the_same_bits(tmp_path):
    source = make_hf(tmp_path / "hf", torch.bfloat16, model_type="mistral", sliding_window=None)
    import_hf(source, tmp_path / "run", note=lambda text: None)
    certificate = export_hf(tmp_path / "run", tmp_path / "back", prove=prove, note=lambda text: None)
    assert certificate["verdict"] == "passed"
    assert_same_bits(weights_of(source), weights_of(tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "llama"


def test_a_mixture_of_types_keeps_every_value(tmp_path):
    source = make_hf(tmp_path / "hf", torch.bfloat16)
    weights = weights_of(source)
    weights = {k: v.float() * 1.001 if "norm" in k else v for k, v in weights.items()}
    save_file(weights, source / "model.safetensors")
    import_hf(source, tmp_path / "run", note=lambda text: None)
    manifest = open_checkpoint(tmp_path / "run")
    assert manifest.weights_dtype == "float32"
    for name, weight in weights.items():
        assert torch.equal(read_logical(manifest, name), weight)


def test_the_import_is_a_start_for_a_run(tmp_path, tokenizer_model):
    source = make_hf(tmp_path / "hf", vocab_size=700)
    shutil.copy(tokenizer_model, source)
    target = import_hf(source, tmp_path / "run")
    config = load_config(
        tmp_path / "run" / "model.yaml", ["data.train=x", "checkpoint.init_from=" + str(tmp_path / "run")]
    )
    config.validate(world_size=1)
    assert config.model == saved_model(read_manifest(target))
    assert config.data.seq_length == 48 and config.tokenizer.path == str(target / "tokenizer")
    assert read_manifest(target).tokenizer is not None
    import_hf(source, tmp_path / "run")  # once more replaces it
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000000"]
    model = saved_model(read_manifest(target))
    write_layout(tmp_path / "run" / "checkpoints", model, random_logical(model, kinds=("weight",)), step=4)
    with pytest.raises(RefusedError, match=r"E527.*step-00000004"):
        import_hf(source, tmp_path / "run")
    with pytest.raises(RefusedError, match=r"E527.*is a Hugging Face model.*such as .*hf-checkpoint"):
        import_hf(source, source)
    assert not (source / "checkpoints").exists()


def test_a_qwen2_with_a_tokenizer_of_another_kind_says_what_can_be_done(tmp_path, tokenizer_model):
    """transformers reads it with Qwen2's own class, whose ids are others."""
    source = make_hf(tmp_path / "hf", model_type="qwen2", vocab_size=700)
    shutil.copy(tokenizer_model, source)
    import_hf(source, tmp_path / "run", note=lambda text: None)
    with pytest.raises(RefusedError, match=r"E522.*Qwen2's own class.*model.qk_norm=true.*--tokenizer as-is"):
        export_hf(tmp_path / "run", tmp_path / "back", prove=prove, note=lambda text: None)
    assert not (tmp_path / "back").exists()


def test_an_import_without_tokenizer_says_so_and_keeps_the_token_ids(tmp_path):
    source = make_hf(tmp_path / "hf", bos_token_id=5, eos_token_id=[6, 7])
    told: list[str] = []
    import_hf(source, tmp_path / "run", note=told.append)
    assert told == [f"{source} has no tokenizer: only the weights are converted"]
    export_hf(tmp_path / "run", tmp_path / "back", prove=prove, note=told.append)
    assert "exported without" in told[1]
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == {
        "bos_token_id": 5, "eos_token_id": [6, 7]}  # fmt: skip
    assert "no tokenizer" in json.loads((tmp_path / "back" / "certificate.json").read_text())["tokenizer"]["inputs"]


@pytest.mark.parametrize("tp, dp, dtype", [(1, 1, None), (2, 2, None), (8, 1, "float32"), (1, 3, "float16")])
def test_a_trained_checkpoint_exports_its_rounded_weights(tmp_path, tokenizer, tp, dp, dtype):
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    tensors = random_logical(model)
    write_layout(tmp_path / "run" / "checkpoints", model, tensors, tp, dp, tokenizer=tokenizer, precision="bf16")
    certificate = export_hf(tmp_path / "run", tmp_path / "out" / "hf", dtype, 30_000, prove=prove)
    wanted = getattr(torch, dtype or "bfloat16")
    assert_same_bits(
        weights_of(tmp_path / "out" / "hf"), {n: tensors[n, "weight"].to(wanted) for n in logical_shapes(model)}
    )
    assert certificate["step"] == 7 and set(certificate["texts"]) == {"zh", "en", "code"}
    files = {p.name for p in (tmp_path / "out" / "hf").iterdir()}
    assert set(certificate["files"]) == files - {"certificate.json"}
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"} <= files
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["hf"]


@pytest.mark.parametrize("bos, header", [(True, True), (False, True), (True, False), (False, False), (None, False)])
def test_prompts_of_the_export_begin_as_the_documents_of_the_run(tmp_path, tokenizer, bos, header):
    """As the header of the dataset says, which is not opened then; else as its first document begins; else with bos."""
    model, prefix = tiny_model(vocab_size=tokenizer.vocab_size), tmp_path / "d"
    manifest = write_layout(tmp_path / "run", model, random_logical(model), tokenizer=tokenizer)
    if bos is not None:
        with IndexedWriter(prefix, 700, options={"prepend_bos": bos} if header else None) as writer:
            tokens = np.array([*([1] if bos else []), 5, 6, 2], np.int32)
            writer.add(tokens, np.array([len(tokens)]))
        if not header:
            prefix.with_name("d.meta.json").unlink()
    manifest.config["data"] = {"train": {str(prefix): 1.0}}
    with patch("megatron_hammer.dataset.look.document_marks.IndexedDataset", wraps=IndexedDataset) as opened:
        assert documents_begin_with(manifest.config, 1) is bos
    assert opened.called is (bos is not None and not header)
    write_unproved(manifest, tmp_path / "hf", "float32")
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert settings["add_bos_token"] is (bos is not False)
    assert settings["model_max_length"] == model.max_position_embeddings
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["pad_token_id"] == 0 and "rope_parameters" not in config and config["rope_scaling"] is None


def test_shards_are_those_of_the_index_and_of_the_metadata(tmp_path):
    model = tiny_model()
    write_layout(tmp_path / "run", model, random_logical(model))
    export_hf(tmp_path / "run", tmp_path / "hf", "float32", 9000, prove=prove, note=lambda text: None)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "hf").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))] and len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == 4 * sum(torch.Size(s).numel() for s in logical_shapes(model).values())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "hf" / file, framework="pt") as reader:
            assert name in set(reader.keys()) and reader.metadata() == {"format": "pt"}


def test_the_plan_of_files_keeps_order_and_limit():
    sizes = {"a": 5, "b": 4, "c": 9, "d": 30, "e": 1}
    assert plan_files(sizes, 10) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert plan_files(sizes, 100) == [list(sizes)]


def test_an_output_of_somebody_else_is_left_alone(tmp_path):
    model = tiny_model()
    write_layout(tmp_path / "run", model, random_logical(model))

    def export(name: str) -> None:
        export_hf(tmp_path / "run", tmp_path / name, prove=prove, note=lambda text: None)

    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("x")
    with pytest.raises(RefusedError, match=r"E525.*thesis\.tex"):
        export("theirs")
    with pytest.raises(ConfigError, match=r"E288.*is not UTF-8.*convmv"):
        export("\udcce")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RefusedError, match=r"E525.*is a file"):
        export("file")
    (tmp_path / "empty").mkdir()
    export("empty")
    export("empty")  # an earlier export is replaced
    (tmp_path / "empty" / "README.md").write_text("my notes")
    with pytest.raises(RefusedError, match=r"E525.*README\.md"):
        export("empty")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "run", "theirs"]
    assert (tmp_path / "theirs" / "thesis.tex").read_text() == "x"


def test_a_failed_export_keeps_what_was_there_and_a_crashed_one_is_cleaned(tmp_path):
    model = tiny_model()
    write_layout(tmp_path / "run", model, random_logical(model))
    export_hf(tmp_path / "run", tmp_path / "hf", prove=prove, note=lambda text: None)
    before = weights_of(tmp_path / "hf")

    def refuse(checkpoint: Path, folder: Path, dtype: str) -> None:
        assert (folder / "model.safetensors").exists()
        raise RefusedError(20, "the proof", "failed", "see above")

    with pytest.raises(RefusedError, match=r"E520"):
        export_hf(tmp_path / "run", tmp_path / "hf", "float16", prove=refuse, note=lambda text: None)
    assert_same_bits(before, weights_of(tmp_path / "hf"))
    (tmp_path / ("hf.tmp-" + "0" * 16)).mkdir()  # a killed export
    (tmp_path / "hf").rename(tmp_path / ("hf.old-" + "0" * 16))  # killed between the two renames
    with pytest.raises(RefusedError, match=r"E520"):
        export_hf(tmp_path / "run", tmp_path / "hf", prove=refuse, note=lambda text: None)
    assert_same_bits(before, weights_of(tmp_path / "hf"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "run"]


def edit(folder: Path, change) -> None:
    weights = weights_of(folder)
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def rename_to_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def set_index(folder: Path, weight_map) -> None:
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


NORM = "model.norm.weight"


@pytest.mark.parametrize("damage, expected", [
    (lambda f: edit(f, lambda w: w.pop(NORM)), rf"E424.*{NORM} is missing"),
    (lambda f: edit(f, lambda w: w.update(extra=torch.ones(2))), "E425.*extra"),
    (lambda f: edit(f, lambda w: w.update({NORM: torch.ones(17)})), rf"E426.*{NORM} of shape \[17\] must have"),
    (lambda f: edit(f, lambda w: w.update({NORM: torch.ones(16, dtype=torch.float64)})), rf"E427.*{NORM} of type F64"),
    (rename_to_bin, r"E423.*pytorch_model\.bin is a pickle"),
    (lambda f: (f / "model.safetensors").unlink(), "E429"),
    (lambda f: (f / "config.json").unlink(), r"E408.*config\.json is missing"),
    (lambda f: (f / "config.json").write_text("["), r"E420.*config\.json"),
    (lambda f: (f / "config.json").write_text("[" * 10**5), r"E420.*config\.json"),
    (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04K\x01." * 9), r"E410.*model\.safetensors"),
    (lambda f: set_index(f, {"a": "../part.safetensors"}), r"E428.*\.\./part"),
    (lambda f: set_index(f, {"a": "part.bin"}), r"E428.*part\.bin"),
    (lambda f: set_index(f, ["a"]), "E428.*not a mapping"),
    (lambda f: set_index(f, {NORM: "part.safetensors"}), "E428.*is not where the index says"),
    (lambda f: set_index(f, {NORM: "other.safetensors"}), r"E408.*other\.safetensors is missing"),
])  # fmt: skip
def test_a_folder_that_cannot_be_imported_is_refused_by_name_and_leaves_nothing(tmp_path, damage, expected):
    source = make_hf(tmp_path / "hf")
    damage(source)
    with pytest.raises(CheckpointError, match=expected):
        import_hf(source, tmp_path / "run", note=lambda text: None)
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "model.yaml").exists()


def test_old_buffers_and_a_redundant_tied_head_are_passed_over(tmp_path):
    source = make_hf(tmp_path / "hf", tie_word_embeddings=True)
    embedding = weights_of(source)["model.embed_tokens.weight"]
    edit(
        source,
        lambda w: w.update(
            {"lm_head.weight": embedding.clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
        ),
    )
    import_hf(source, tmp_path / "run", note=lambda text: None)
    edit(source, lambda w: w.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(CheckpointError, match=r"E425.*lm_head\.weight"):
        import_hf(source, tmp_path / "run", note=lambda text: None)


def leave_of_a_tied_model(folder: Path, listed: tuple[str, ...], kept: tuple[str, ...]) -> None:
    """The index lists some names of the one matrix, and the file has some."""
    weights = weights_of(folder)
    matrix = weights.pop(EMBEDDING)
    (folder / "model.safetensors").unlink()
    save_file({**weights, **{name: matrix.clone() for name in kept}}, folder / "part.safetensors", {"format": "pt"})
    index = {"weight_map": dict.fromkeys([*weights, *listed], "part.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("listed, kept", [
    ((EMBEDDING, HEAD), (EMBEDDING,)), ((EMBEDDING,), (EMBEDDING, HEAD)), ((EMBEDDING, HEAD), (HEAD,)),
    ((HEAD,), (HEAD,)), ((HEAD,), (EMBEDDING,)), ((EMBEDDING,), (HEAD,)),
], ids=str)  # fmt: skip
def test_a_tied_matrix_is_found_under_either_name(tmp_path, listed, kept):
    source = make_hf(tmp_path / "hf", tie_word_embeddings=True)
    expected = weights_of(source)
    leave_of_a_tied_model(source, listed, kept)
    import_hf(source, tmp_path / "run", note=lambda text: None)
    manifest = open_checkpoint(tmp_path / "run")
    assert {t.name for t in manifest.tensors} == set(expected)
    for name, weight in expected.items():
        assert torch.equal(read_logical(manifest, name), weight)


def test_a_tied_folder_with_the_head_alone_is_imported_and_extended(tmp_path, tokenizer_model, tokenizer):
    source = make_hf(tmp_path / "hf", tie_word_embeddings=True, vocab_size=700)
    matrix = weights_of(source)[EMBEDDING]
    edit(source, lambda w: w.update({HEAD: w.pop(EMBEDDING)}))
    import_hf(source, tmp_path / "run", note=lambda text: None)
    assert torch.equal(read_logical(open_checkpoint(tmp_path / "run"), EMBEDDING), matrix)
    with HfWeights(source, tied=True) as weights:
        check_tensors(weights, saved_model(open_checkpoint(tmp_path / "run")))
        assert torch.equal(weights.read(EMBEDDING), matrix)
        assert weights.hash_of(EMBEDDING) and weights.entry(EMBEDDING).shape == (700, 16)


def test_a_model_that_is_not_tied_needs_both_matrices(tmp_path):
    for absent in (EMBEDDING, HEAD):
        source = make_hf(tmp_path / absent)
        edit(source, lambda w, name=absent: w.pop(name))
        with pytest.raises(CheckpointError, match=rf"E424.*{absent}"):
            import_hf(source, tmp_path / "run", note=lambda text: None)


def test_keys_without_effect_are_named_and_the_unknown_can_be_ignored(tmp_path):
    source = make_hf(tmp_path / "hf")
    tree = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**tree, "unsloth_fixed": True, "odd_scale": 2.0}))
    with pytest.raises(CheckpointError, match=r"E421.*odd_scale=2.0.*--ignore odd_scale"):
        import_hf(source, tmp_path / "run")
    told: list[str] = []
    import_hf(source, tmp_path / "run", told.append, ignore=["odd_scale"])
    assert "unsloth_fixed, odd_scale" in told[0]


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, tokenizer_model, tokenizer):
    source = make_hf(tmp_path / "hf")  # 131 rows
    shutil.copy(tokenizer_model, source)
    with pytest.raises(RefusedError, match=r"E528.*tokenizer of 700 ids"):
        import_hf(source, tmp_path / "run")
    model = tiny_model()
    write_layout(tmp_path / "other", model, random_logical(model), tokenizer=tokenizer)
    with pytest.raises(RefusedError, match=r"E528"):
        export_hf(tmp_path / "other", tmp_path / "out", prove=prove)
    assert not (tmp_path / "out").exists()


# ---- the programs, as a user runs them ----


def run_tool(name: str, *arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=folder)


def test_the_tools_convert_both_ways(tmp_path, tokenizer_model):
    """There with the command of docs/models.md, of a Qwen3 that is smaller than its name."""
    (block,) = blocks_of((ROOT / "docs" / "models.md").read_text(encoding="utf-8"))
    python, tool, *words = shlex.split(block, comments=True)
    assert (python, tool, words) == ("python", "tools/hf_to_checkpoint.py", ["--hf", "Qwen3-1.7B", *words[2:]])
    source = make_hf(tmp_path / words[1], torch.bfloat16, model_type="qwen3", head_dim=6, vocab_size=700)
    shutil.copy(tokenizer_model, source)
    done = run_tool("hf_to_checkpoint.py", *words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "checkpoint.init_from=" in done.stdout
    run = tmp_path / "runs" / "qwen3"
    assert load_config(str(run / "model.yaml"), []).model.qk_norm
    done = run_tool("checkpoint_to_hf.py", "--load", run, "--output", tmp_path / "back", "--max-shard-size", "20KB")
    assert done.returncode == 0, done.stderr
    assert "certificate passed" in done.stdout
    assert_same_bits(weights_of(source), weights_of(tmp_path / "back"))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    ids = tokenizer("晨雾 3", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[0] == 1


@pytest.mark.parametrize("tool, arguments, code, line", [
    ("checkpoint_to_hf.py", ["--load", "nowhere", "--output", "x"], 4, "error[E401]: nowhere"),
    ("checkpoint_to_hf.py", ["--load", "nowhere", "--output", "x", "--max-shard-size", "big"], 2, "error[E280]"),
    ("checkpoint_to_hf.py", ["--load", "x"], 2, "error[E201]"),
    ("checkpoint_to_hf.py", ["--load", "x", "--output", "y", "--dtype", "int8"], 2, "error[E201]"),
    ("hf_to_checkpoint.py", ["--hf", "nowhere", "--save", "x"], 4, "error[E420]: nowhere"),
])  # fmt: skip
def test_mistakes_are_one_line_and_a_documented_exit_code(tool, arguments, code, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [tool, *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "tools" / tool), run_name="__main__")
    said = capsys.readouterr().err
    assert caught.value.code == code and said.startswith(line) and said.count("\n") == 1, said


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Tokenizers without a tokenizer.json: unigram, sentencepiece's default, and one without any exact form."""
    import sentencepiece

    from megatron_hammer.huggingface.certificate import TEXTS

    folder, found = tmp_path_factory.mktemp("kinds"), {}
    (folder / "text.txt").write_text("\n".join(TEXTS.values()) * 3)
    for name, settings in (
        ("unigram", {"model_type": "unigram", "normalization_rule_name": "identity"}),
        ("nmt_nfkc", {"model_type": "bpe"}),
        ("word", {"model_type": "word", "byte_fallback": False, "add_dummy_prefix": False}),
    ):
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "text.txt"), model_prefix=str(folder / name), vocab_size=500, character_coverage=0.99,
            hard_vocab_limit=False, minloglevel=2, **{"byte_fallback": True, **settings},
        )  # fmt: skip
        found[name] = load_tokenizer(folder / f"{name}.model")
    return found


@pytest.fixture
def short_proof(monkeypatch):
    monkeypatch.setattr(conversion_proof, "_RANDOM_NOISE", 200)
    monkeypatch.setattr(conversion_proof, "_RANDOM_JOINS_OF_A_MODEL", 200)


@pytest.mark.parametrize("kind, why", [("unigram", "is a unigram model"), ("nmt_nfkc", "normalises characters")])
def test_a_tokenizer_without_a_tokenizer_json_is_exported_with_its_model(tmp_path, kinds, short_proof, kind, why):
    """Whole and proved; the certificate and a note say which form it has and why."""
    tokenizer, told = kinds[kind], []
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    write_layout(tmp_path / "run" / "checkpoints", model, random_logical(model), tokenizer=tokenizer)
    facts = export_hf(tmp_path / "run", tmp_path / "hf", prove=prove, note=told.append)["tokenizer"]
    assert (facts["form"], facts["class"]) == ("sentencepiece", "SentencePieceBackend") and why in facts["reason"]
    assert len(told) == 1 and why in told[0] and tokenizer.fingerprint == facts["fingerprint"]
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == tokenizer.path.read_bytes()
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("今天 x")["input_ids"] == [1, *tokenizer.encode("今天 x")]


@pytest.mark.parametrize("form", ["as-is", "none"])
def test_a_tokenizer_without_an_exact_form_costs_no_model(tmp_path, kinds, form):
    """The weights are proved all the same; the certificate says why the tokenizer is not."""
    tokenizer, why, told = kinds["word"], "has no piece for the characters of '<s>'", []
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    write_layout(tmp_path / "run" / "checkpoints", model, random_logical(model), tokenizer=tokenizer)
    with pytest.raises(RefusedError, match=rf"E501.*{why}.*or export the weights with --tokenizer as-is or none"):
        export_hf(tmp_path / "run", tmp_path / "hf", prove=prove)
    assert not (tmp_path / "hf").exists()
    certificate = export_hf(tmp_path / "run", tmp_path / "hf", prove=prove, note=told.append, tokenizer=form)
    assert certificate["verdict"] == "passed" and set(certificate["texts"]) == {"zh", "en", "code"}
    facts = certificate["tokenizer"]
    assert (facts["present"], facts["proved"]) == (form == "as-is", False) and why in facts["reason"]
    assert len(told) == 1 and why in told[0]
    files = {path.name for path in (tmp_path / "hf").iterdir()}
    assert ("tokenizer.model" in files) == (form == "as-is") and "tokenizer.json" not in files
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == tokenizer.eos_id
    if form == "as-is":
        assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == tokenizer.path.read_bytes()


def test_what_cannot_be_exported_is_said_beforehand(tmp_path, kinds, tokenizer):
    """By preprocessing and by the start of training, not after weeks; where there is an exact form, nothing is."""
    from megatron_hammer.dataset.make.job import prepare_job, remarks
    from megatron_hammer.train.prepare import prepare
    from tests.model.tiny import tiny_config

    assert export_note(tokenizer) == ""
    note = export_note(kinds["word"])
    assert "is a word model" in note and "--tokenizer as-is|none" in note
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    for kind, expected in (("word", [note]), ("unigram", []), ("nmt_nfkc", [])):
        job = prepare_job([tmp_path / "a.jsonl"], ["text"], kinds[kind].path, True, True)
        assert remarks(job) == expected
        config = tiny_config(tokenizer__path=str(kinds[kind].path), model__vocab_size=None, train__dry_run=True)
        assert [text for text in prepare(config, 1).notes if "exported" in text] == expected
    qwen2 = tiny_config(
        tokenizer__path=str(tokenizer.path), model__vocab_size=None, model__qkv_bias=True, train__dry_run=True
    )
    (note,) = (text for text in prepare(qwen2, 1).notes if "exported" in text)
    assert "Qwen2's own class" in note and "model.qk_norm=true" in note


def test_only_a_tokenizer_that_splits_as_qwen2_s_class_is_exported_with_a_qwen2(tmp_path):
    """Held against transformers: a text of all kinds, with the words' pattern and with one that keeps numbers whole."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend
    from transformers import AutoTokenizer

    text = "It's 12345 naïve e\u0301 cafés\r\n\n  def f(x):\t return x**2  今天的天气 ﬁ"
    for name, words, equal in (
        ("same", QWEN2_WORDS, True),
        ("other", QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}+|"), False),
    ):
        backend = Backend(models.BPE())
        backend.normalizer, backend.decoder = normalizers.NFC(), decoders.ByteLevel()
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(words), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                      special_tokens=["<|endoftext|>"], show_progress=False)  # fmt: skip
        backend.train_from_iterator([text, "12345"] * 3, trainer)
        (tmp_path / name).mkdir()
        backend.save(str(tmp_path / name / "tokenizer.json"))
        (tmp_path / name / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
        (tmp_path / name / "config.json").write_text('{"model_type": "qwen2"}')
        ours = load_tokenizer(tmp_path / name)
        assert (export_note(ours, "qwen2") == "") == equal and export_note(ours, "qwen3") == ""
        theirs = AutoTokenizer.from_pretrained(tmp_path / name)
        assert (theirs(text)["input_ids"] == ours.encode(text)) == equal


def test_the_other_process_refuses_a_tokenizer_and_proves_the_model_alone(tmp_path, kinds, monkeypatch):
    tokenizer = kinds["word"]
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    write_layout(tmp_path / "run" / "checkpoints", model, random_logical(model), tokenizer=tokenizer)
    monkeypatch.setattr(sys, "executable", warm_python())

    def write_for_ever(*given):  # a refusal is heard while weights are written
        while True:
            given[-1]()
            time.sleep(0.02)

    with monkeypatch.context() as patch:
        patch.setattr(weight_files, "export_weights", write_for_ever)
        with pytest.raises(RefusedError, match=r"E501.*is a word model.*or export the weights with --tokenizer as-is"):
            export_hf(tmp_path / "run", tmp_path / "hf")
    with pytest.raises(ZeroDivisionError):  # between two tensors
        export_weights(open_checkpoint(tmp_path / "run"), tmp_path, "float32", None, lambda: 1 // 0)
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    certificate = export_hf(tmp_path / "run", tmp_path / "hf", note=lambda text: None, tokenizer="none")
    assert certificate["tokenizer"]["present"] is False and "is a word model" in certificate["tokenizer"]["reason"]


@pytest.mark.parametrize(("error", "code"), [(ImportError("no module", name="regex"), "E251"), (MemoryError(), "E10")])
def test_what_befalls_the_other_process_comes_back_with_its_code(tmp_path, monkeypatch, error, code):
    """It was E526, of a proof, whatever had befallen the tokenizer."""
    model, answers = tiny_model(), io.StringIO()
    checkpoint = write_layout(tmp_path / "run", model, random_logical(model)).folder
    monkeypatch.setattr(sys, "argv", ["prover", str(checkpoint), str(tmp_path), "float32", "exact"])
    for name, value in (("dup", lambda number: number), ("dup2", lambda *_: None), ("fdopen", lambda *_: answers)):
        monkeypatch.setattr(prover.os, name, value)
    monkeypatch.setattr(prover, "_listen", lambda event: None)

    def fail(*_):
        raise error

    monkeypatch.setattr(prover, "write_tokenizer", fail)
    status = prover.main()
    raised = from_fields(json.loads(answers.getvalue())["error"])
    assert raised.code.startswith(code) and status == raised.exit_code


def test_the_other_process_ends_with_the_export(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", warm_python())
    model = tiny_model()
    checkpoint = write_layout(tmp_path / "run", model, random_logical(model)).folder
    (tmp_path / "hf").mkdir()
    with Prover(checkpoint, tmp_path / "hf", "float32", "exact") as prover:
        assert prover.token_ids() == {}
        assert prover._process.stdin is not None
        prover._process.stdin.close()
        assert prover._process.wait(30) == 1
    assert list((tmp_path / "hf").iterdir()) == []
