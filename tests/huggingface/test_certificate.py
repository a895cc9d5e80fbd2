"""The proof is green for an honest export and red for every fault planted between writing and proving."""

from __future__ import annotations

import gc
import json
import os
import shutil
import stat
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_hammer.base.errors import CheckpointError, RefusedError
from megatron_hammer.checkpoint.manifest import read_manifest
from megatron_hammer.config import ModelConfig, RopeScaling
from megatron_hammer.huggingface import certificate, export
from megatron_hammer.huggingface.certificate import TEXTS, prove
from megatron_hammer.huggingface.certified import certificate_line
from megatron_hammer.huggingface.export import export_hf
from megatron_hammer.model import llama
from megatron_hammer.model.parameters import logical_shapes
from tests.checkpoint.layouts import LLAMA3_ROPE, tiny_model, write_layout
from tests.warm_python import warm_python

MODEL = tiny_model(hidden_size=32, ffn_hidden_size=40, num_layers=2, vocab_size=700, rope_scaling=LLAMA3_ROPE)
UNGROUPED = tiny_model(hidden_size=32, ffn_hidden_size=40, num_layers=2, num_query_groups=8, vocab_size=131)
LAYER = "model.layers.0."


def realistic(model, seed=0):
    """Weights of a size that makes every part of the model matter; norms near one, as after some training."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in logical_shapes(model).items():
        noise = torch.randn(shape, generator=generator)
        tensors[name, "weight"] = 1 + 0.05 * noise if len(shape) == 1 else noise * shape[1] ** -0.5
    return tensors


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer_model):
    from megatron_hammer.tokenizer.load import load_tokenizer

    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = load_tokenizer(tokenizer_model)
    return write_layout(folder, MODEL, realistic(MODEL), 2, 1, tokenizer=tokenizer).folder


def export_unproved(checkpoint, folder):
    export_hf(checkpoint, folder, prove=lambda c, f, d: (f / "certificate.json").write_text("{}"))  # type: ignore[arg-type, return-value]
    return folder


@pytest.fixture(scope="module")
def honest(checkpoint, tmp_path_factory):
    """An export without its proof, to be copied and tampered with."""
    folder = export_unproved(checkpoint, tmp_path_factory.mktemp("honest") / "hf")
    (folder / "certificate.json").unlink()
    return folder


@pytest.fixture
def folder(honest, tmp_path):
    return Path(shutil.copytree(honest, tmp_path / "hf"))


def edit(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    weights = {k: v.contiguous() for k, v in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, change) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def test_an_honest_export_is_proved(checkpoint, folder, monkeypatch, capsys):
    proof = prove(checkpoint, folder, "bfloat16")
    assert proof["verdict"] == "passed" and set(proof["texts"]) == {"zh", "en", "code"}
    assert proof["checkpoint_digest"] == read_manifest(checkpoint).digest
    for result in proof["texts"].values():
        # fp32 rounding is 1e-6; a bound that such a difference fills would be no bound
        assert 0 <= result["max_difference"] < 1e-5 * result["max_logit"] and result["max_logit"] > 1
        assert result["num_tokens"] >= 64
    assert json.loads((folder / "certificate.json").read_text()) == proof
    monkeypatch.setattr(sys, "argv", ["certificate", str(checkpoint), str(folder), "--dtype", "bfloat16"])
    certificate.main()
    assert capsys.readouterr().out == f"{certificate_line(proof)}\n"
    again = json.loads((folder / "certificate.json").read_text())
    assert again == proof, "repeating a proof must not change it"


def test_the_texts_are_worth_comparing():
    for text in TEXTS.values():
        assert len(text) > 200 and any(c.isdigit() for c in text) and any(ord(c) > 0xFFFF for c in text)
    assert "\n        " in TEXTS["code"] and "\t" in TEXTS["code"] and "  " in TEXTS["en"]


def test_our_model_is_gone_before_theirs_comes(checkpoint, folder, monkeypatch):
    from megatron_hammer.model.llama import Stage

    original, ours = certificate.load_transformers_model, []

    def load(path: Path):
        ours.extend(o for o in gc.get_objects() if isinstance(o, Stage))
        return original(path)

    monkeypatch.setattr(certificate, "load_transformers_model", load)
    prove(checkpoint, folder, "bfloat16")
    assert ours == []


# ---- faults in the weights ----


def heads_of(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    return weight.view(-1, head_dim, weight.shape[1])


def swap(w, a, b):
    w[a], w[b] = w[b].clone(), w[a].clone()


def swap_query_and_key(w, head_dim):
    q, k = (LAYER + f"self_attn.{x}_proj.weight" for x in "qk")
    rows = w[k].shape[0]  # with fewer groups than heads only a part can be swapped
    first = w[q][:rows].clone()
    w[q][:rows], w[k] = w[k].clone(), first


def reorder_groups(w, head_dim):
    for x in "kv":
        name = LAYER + f"self_attn.{x}_proj.weight"
        w[name] = heads_of(w[name], head_dim).flip(0).reshape(w[name].shape)


def reorder_query_heads(w, head_dim):
    name = LAYER + "self_attn.q_proj.weight"
    heads = heads_of(w[name], head_dim)
    w[name] = heads.view(2, -1, *heads.shape[1:]).transpose(0, 1).reshape(w[name].shape)


def interleave_rope(w, head_dim):
    for x in "qk":
        name = LAYER + f"self_attn.{x}_proj.weight"
        heads = heads_of(w[name], head_dim)
        w[name] = heads.view(len(heads), 2, head_dim // 2, -1).transpose(1, 2).reshape(w[name].shape)


def swap_gate_and_up(w, head_dim):
    swap(w, LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight")


def neutral_norm(w, head_dim):
    w[LAYER + "post_attention_layernorm.weight"].fill_(1)


def swap_norms(w, head_dim):
    swap(w, LAYER + "input_layernorm.weight", LAYER + "post_attention_layernorm.weight")


def transpose_output(w, head_dim):
    name = LAYER + "self_attn.o_proj.weight"
    w[name] = w[name].flip(1)


FUNCTION_FAULTS = [swap_query_and_key, reorder_groups, reorder_query_heads, interleave_rope, swap_gate_and_up,
                   neutral_norm, swap_norms, transpose_output]  # fmt: skip


@pytest.mark.parametrize("logits_only", [False, True], ids=["whole proof", "logits alone"])
@pytest.mark.parametrize("fault", FUNCTION_FAULTS, ids=lambda f: f.__name__)
def test_a_fault_in_the_weights_turns_it_red(checkpoint, folder, monkeypatch, fault, logits_only):
    config = json.loads((folder / "config.json").read_text())
    edit(folder, lambda w: fault(w, config["head_dim"]))
    if logits_only:  # the comparison of functions must not lean on that of bits
        monkeypatch.setattr(certificate, "check_weights", lambda *_: None)
    with pytest.raises(RefusedError, match=r"E520.*differ by" if logits_only else "E523.*differs from the checkpoint"):
        prove(checkpoint, folder, "bfloat16")
    assert not (folder / "certificate.json").exists()


# ---- faults of the parts that Qwen has ----

YARN = RopeScaling(4.0, original_max_position_embeddings=16, rope_type="yarn")
QWEN = tiny_model(hidden_size=32, ffn_hidden_size=40, num_layers=2, vocab_size=131, qk_norm=True, qkv_bias=True,
                  attention_output_bias=True, rope_scaling=YARN)  # fmt: skip
QK_NORMS = tuple(LAYER + f"self_attn.{x}_norm.weight" for x in "qk")


def drop_query_norm(w, config):
    w[QK_NORMS[0]].fill_(1)


def swap_query_and_key_norm(w, config):
    swap(w, *QK_NORMS)


def lose_bias(w, config):
    w[LAYER + "self_attn.v_proj.bias"].zero_()


def bias_of_other_heads(w, config):
    name = LAYER + "self_attn.q_proj.bias"
    w[name] = w[name].view(-1, config["head_dim"]).flip(0).flatten()


def other_yarn_factor(w, config):
    config["rope_parameters"]["attention_factor"] = config["rope_scaling"]["attention_factor"] = 1.0


QWEN_FAULTS = [drop_query_norm, swap_query_and_key_norm, lose_bias, bias_of_other_heads, other_yarn_factor]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A checkpoint, and its export without a proof."""
    folder = tmp_path_factory.mktemp("qwen")
    tensors = realistic(QWEN)
    for (name, kind), tensor in tensors.items():
        if name.endswith(".bias"):
            tensors[name, kind] = 0.5 * (tensor - 1) / 0.05
        elif name in QK_NORMS:
            tensors[name, kind] = 1 + 10 * (tensor - 1)
    source = write_layout(folder / "run", QWEN, tensors, 2, 1).folder
    return source, export_unproved(source, folder / "hf")


def test_an_honest_qwen_is_proved(qwen, tmp_path):
    folder = Path(shutil.copytree(qwen[1], tmp_path / "hf"))
    assert prove(qwen[0], folder, "bfloat16")["verdict"] == "passed"
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]


@pytest.mark.parametrize("logits_only", [False, True], ids=["whole proof", "logits alone"])
@pytest.mark.parametrize("fault", QWEN_FAULTS, ids=lambda f: f.__name__)
def test_a_fault_in_what_qwen_has_turns_it_red(qwen, tmp_path, monkeypatch, fault, logits_only):
    folder = Path(shutil.copytree(qwen[1], tmp_path / "hf"))
    config = json.loads((folder / "config.json").read_text())
    edit(folder, lambda w: fault(w, config))
    (folder / "config.json").write_text(json.dumps(config))
    if logits_only:
        monkeypatch.setattr(certificate, "check_weights", lambda *_: None)
        monkeypatch.setattr(certificate, "check_config", lambda *_: None)
    with pytest.raises(RefusedError, match=r"E520.*differ by" if logits_only else "E523|E524"):
        prove(qwen[0], folder, "bfloat16")


def test_a_norm_after_rope_turns_it_red(qwen, tmp_path, monkeypatch):
    def forward(self, x, rope, documents):
        q, k, v = self.rope(self.qkv(x), *rope, self.heads_local, self.groups_local)
        q, k = self.q_norm(q.contiguous())[0], self.k_norm(k.contiguous())[0]
        return self.output(self.attend(q, k, v, documents).flatten(2))

    monkeypatch.setattr(llama.Attention, "forward", forward)
    with pytest.raises(RefusedError, match=r"E520.*differ by"):
        prove(qwen[0], Path(shutil.copytree(qwen[1], tmp_path / "hf")), "bfloat16")


@pytest.mark.parametrize("logits_only", [False, True], ids=["whole proof", "logits alone"])
def test_queries_and_keys_swapped_as_a_whole_turn_it_red(tmp_path, monkeypatch, logits_only):
    write_layout(tmp_path / "run", UNGROUPED, realistic(UNGROUPED))
    if logits_only:
        monkeypatch.setattr(certificate, "check_weights", lambda *_: None)

    def tamper_and_prove(source: Path, staging: Path, dtype: str) -> None:
        prove(source, staging, dtype)  # honest: green
        edit(staging, lambda w: swap_query_and_key(w, 4))
        prove(source, staging, dtype)

    with pytest.raises(RefusedError, match=r"E520.*differ by" if logits_only else "E523.*differs from the checkpoint"):
        export_hf(tmp_path / "run", tmp_path / "hf", prove=tamper_and_prove, note=lambda text: None)
    assert not (tmp_path / "hf").exists()


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A Qwen2 with a tied embedding, and its export, which is proved as it is."""
    folder = tmp_path_factory.mktemp("tied")
    model = tiny_model(hidden_size=32, ffn_hidden_size=40, num_layers=2, vocab_size=131, qkv_bias=True,
                       tie_word_embeddings=True)  # fmt: skip
    source = write_layout(folder / "run", model, realistic(model)).folder
    exported = export_unproved(source, folder / "hf")
    assert prove(source, exported, "bfloat16")["verdict"] == "passed"
    return source, exported


@pytest.mark.parametrize("logits_only", [False, True], ids=["whole proof", "logits alone"])
def test_a_head_beside_a_tied_embedding_turns_it_red(tied, tmp_path, monkeypatch, logits_only):
    """A Qwen2 whose export has a wrong copy of the embedding as head, be it said to be tied or not."""
    source, exported = tied
    if logits_only:
        monkeypatch.setattr(certificate, "check_weights", lambda *_: None)
        monkeypatch.setattr(certificate, "check_config", lambda *_: None)
    for is_said in (True, False):
        folder = Path(shutil.copytree(exported, tmp_path / f"said-{is_said}"))
        edit(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].roll(1, 0)}))
        edit_json(folder / "config.json", lambda c, is_said=is_said: c.update(tie_word_embeddings=is_said))
        with pytest.raises(RefusedError, match=r"E520.*differ by" if logits_only else "E523|E524"):
            prove(source, folder, "bfloat16")


def test_one_wrong_bit_turns_it_red(checkpoint, folder):
    def flip(w):
        w["lm_head.weight"].view(torch.int16)[699, 31] ^= 1

    edit(folder, flip)
    with pytest.raises(RefusedError, match=r"E523.*lm_head\.weight"):
        prove(checkpoint, folder, "bfloat16")


@pytest.mark.parametrize("keys_only", [False, True], ids=["whole proof", "transformers alone"])
@pytest.mark.parametrize("change", [
    lambda w: w.pop(LAYER + "input_layernorm.weight"),
    lambda w: w.pop("model.norm.weight"),
    lambda w: w.pop("lm_head.weight"),
    lambda w: w.update({LAYER + "self_attn.q_norm.weight": torch.ones(8)}),
    lambda w: w.update({"model.norm.weight": torch.ones(33)}),
], ids=["norm dropped", "final norm dropped", "head dropped", "tensor added", "shape changed"])  # fmt: skip
def test_other_keys_turn_it_red(checkpoint, folder, monkeypatch, change, keys_only):
    edit(folder, change)
    if keys_only:
        monkeypatch.setattr(certificate, "check_weights", lambda *_: None)
    with pytest.raises(RefusedError, match=r"E521" if keys_only else "E523"):
        prove(checkpoint, folder, "bfloat16")


def pad_vocabulary(folder: Path) -> None:
    def pad(w):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            w[name] = torch.cat([w[name], torch.zeros(68, 32, dtype=w[name].dtype)])

    edit(folder, pad)
    edit_json(folder / "config.json", lambda c: c.update(vocab_size=768))


@pytest.mark.parametrize("disabled, expected", [
    ([], "E524.*vocab_size=768 must be 700"), (["check_config"], "E523"),
    (["check_config", "check_weights"], "E520.*768"),
], ids=["config", "weights", "logits"])  # fmt: skip
def test_a_padded_vocabulary_turns_it_red(checkpoint, folder, monkeypatch, disabled, expected):
    pad_vocabulary(folder)
    for name in disabled:
        monkeypatch.setattr(certificate, name, lambda *_: None)
    with pytest.raises(RefusedError, match=expected):
        prove(checkpoint, folder, "bfloat16")


@pytest.mark.parametrize("change", [
    {"rope_theta": 50000.0, "rope_parameters": None}, {"rms_norm_eps": 1e-3}, {"max_position_embeddings": 2048},
    {"tie_word_embeddings": True}, {"head_dim": 4, "num_attention_heads": 16}, {"attention_bias": True},
    {"mlp_bias": True},
], ids=str)  # fmt: skip
def test_another_config_turns_it_red(checkpoint, folder, change):
    edit_json(folder / "config.json", lambda c: c.update({k: v for k, v in change.items() if c[k] != v}))
    with pytest.raises((RefusedError, CheckpointError), match=r"E524|E421|E422"):
        prove(checkpoint, folder, "bfloat16")


def test_weights_of_another_type_turn_it_red(checkpoint, folder):
    edit(folder, lambda w: w.update({k: v.float() for k, v in w.items()}))
    with pytest.raises(RefusedError, match=r"E523.*float32"):
        prove(checkpoint, folder, "bfloat16")


def test_weights_that_the_type_cannot_hold_are_named(tmp_path):
    model = tiny_model()
    tensors = realistic(model)
    tensors["lm_head.weight", "weight"][3, 3] = 1e6  # infinite in float16
    write_layout(tmp_path / "run", model, tensors)
    with pytest.raises(RefusedError, match=r"E529.*not finite.*bfloat16"):
        export_hf(tmp_path / "run", tmp_path / "hf", "float16", prove=prove, note=lambda text: None)
    assert not (tmp_path / "hf").exists()


# ---- faults in the tokenizer ----


@pytest.fixture(scope="session")
def foreign_tokenizer(tmp_path_factory) -> Path:
    """Of the same size and with the same special ids, but trained on other text."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("foreign")
    words = [w[::-1] for w in TEXTS["en"].lower().split()]
    lines = [" ".join(f"{a}{b[::-1]} {i}" for i, b in enumerate(words)) for a in words]
    (folder / "text.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=700, model_type="bpe",
        byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity",
        minloglevel=2,
    )  # fmt: skip
    return folder / "tokenizer.model"


def test_a_foreign_tokenizer_turns_it_red(checkpoint, folder, foreign_tokenizer):
    from megatron_hammer.tokenizer.convert import convert_tokenizer
    from megatron_hammer.tokenizer.load import load_tokenizer

    for path in (*folder.glob("tokenizer*"), *folder.glob("special_tokens*")):
        path.unlink()
    convert_tokenizer(load_tokenizer(foreign_tokenizer), folder)
    with pytest.raises(RefusedError, match=r"E522.*gives another id"):
        prove(checkpoint, folder, "bfloat16")


def test_a_foreign_tokenizer_in_the_checkpoint_is_noticed(checkpoint, folder, foreign_tokenizer, tmp_path):
    copy = Path(shutil.copytree(checkpoint, tmp_path / checkpoint.name))
    shutil.copy(foreign_tokenizer, copy / "tokenizer" / "tokenizer.model")
    with pytest.raises(CheckpointError, match=r"E415.*tokenizer\.model"):
        prove(copy, folder, "bfloat16")
    with pytest.raises(CheckpointError, match=r"E415.*tokenizer\.model"):
        export_hf(copy, tmp_path / "out", prove=prove)


def drop_last_token(folder: Path) -> None:
    def drop(tree):
        vocabulary = tree["model"]["vocab"]
        last = next(t for t, i in vocabulary.items() if i == 699)
        del vocabulary[last]
        tree["model"]["merges"] = [m for m in tree["model"]["merges"] if "".join(m) != last and last not in m]

    edit_json(folder / "tokenizer.json", drop)


def change_eos(folder: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        edit_json(folder / name, lambda c: c.update(eos_token="<s>"))


@pytest.mark.parametrize("change, expected", [
    (drop_last_token, "E522.*vocab_size=699 must be 700"),
    (change_eos, "E522.*eos_token_id=1 must be 2"),
    (lambda f: edit_json(f / "generation_config.json", lambda c: c.update(eos_token_id=0)), "E522.*eos_token_id=0"),
    (lambda f: edit_json(f / "config.json", lambda c: c.update(bos_token_id=None)), "E522.*bos_token_id=None"),
    (lambda f: (f / "tokenizer.json").write_text("{}"), "E522.*cannot be loaded"),
    (lambda f: edit_json(f / "tokenizer.json", lambda t: t.update(normalizer={"type": "NFKC"})), "E522"),
], ids=["token dropped", "other eos", "generation", "config", "no tokenizer", "normalizer"])  # fmt: skip
def test_a_changed_tokenizer_turns_it_red(checkpoint, folder, change, expected):
    change(folder)
    with pytest.raises(RefusedError, match=expected):
        prove(checkpoint, folder, "bfloat16")


# ---- the child process ----


def test_a_fault_found_by_the_child_comes_back_and_nothing_is_left(checkpoint, tmp_path, monkeypatch):
    write_configs = export.write_configs

    def write_and_tamper(model: ModelConfig, token_ids: dict, staging: Path, dtype: str) -> None:
        write_configs(model, token_ids, staging, dtype)
        edit(staging, lambda w: swap_gate_and_up(w, 8))

    monkeypatch.setattr(sys, "executable", warm_python())
    monkeypatch.setattr(export, "write_configs", write_and_tamper)
    with pytest.raises(RefusedError, match=r"E523.*model\.layers\.0\.mlp\.gate_proj\.weight"):
        export_hf(checkpoint, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "script, cause", [("kill -9 $$", "signal 9"), ("exit 3", "exit status 3"), ("echo {; exit 1", "exit status 1")]
)
def test_a_child_that_dies_is_no_proof(tmp_path, monkeypatch, script, cause):
    write_layout(tmp_path / "run", UNGROUPED, realistic(UNGROUPED))
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(RefusedError, match=f"E526.*{cause}"):
        export_hf(tmp_path / "run", tmp_path / "hf", note=lambda text: None)
    assert sorted(os.listdir(tmp_path)) == ["python", "run"]
