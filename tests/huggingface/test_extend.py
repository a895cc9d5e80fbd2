"""A model with another vocabulary: which rows are copied and which averaged, all else bit for bit, training goes on."""

from __future__ import annotations

import dataclasses
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from megatron_hammer.base.errors import CheckpointError, ConfigError, HammerError, RefusedError
from megatron_hammer.checkpoint.folder import open_checkpoint
from megatron_hammer.checkpoint.inspect import verify_checkpoint
from megatron_hammer.checkpoint.manifest import saved_model
from megatron_hammer.checkpoint.read import read_logical
from megatron_hammer.config import load_config
from megatron_hammer.dataset.writer import IndexedWriter
from megatron_hammer.huggingface import extend, extension_plan, extension_rows
from megatron_hammer.huggingface.certificate import prove
from megatron_hammer.huggingface.export import export_hf
from megatron_hammer.huggingface.extend import extend_model
from megatron_hammer.huggingface.extension_plan import plan_extension
from megatron_hammer.huggingface.extension_rows import grown_rows, mean_row
from megatron_hammer.huggingface.importing import import_hf
from megatron_hammer.model.parameters import EMBEDDING, HEAD, logical_shapes
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.load import load_tokenizer
from tests.checkpoint.layouts import random_logical, tiny_model, write_layout
from tests.huggingface.test_convert import assert_same_bits, make_hf, weights_of
from tests.tokenizer.texts import handmade_model, model_proto, real_model, write_model
from tests.train.runs import metrics, train_here

ROOT = Path(__file__).parents[2]
SPACE = "\u2581"
OLD_PIECES = [(f"{SPACE}a", -1.0), ("ab", -2.0), ("a", -3.0), ("b", -4.0), (SPACE, -5.0), ("中", -6.0), ("c", -7.0)]
# In another order and without "c": ab 259, two new words, 国, and the old pieces.
NEW_PIECES = [("ab", -2.0), ("abba", -2.5), (f"{SPACE}ba", -2.6), ("国", -8.0), ("中国", -2.7), ("b", -4.0),
              ("a", -3.0), ("中", -6.0), (SPACE, -5.0), (f"{SPACE}a", -1.0)]  # fmt: skip


def save_model(path: Path, pieces: list[tuple[str, float]], *symbols: str, **changes: Any) -> Path:
    return write_model(handmade_model(pieces, symbols, **changes), path)


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(save_model(tmp_path_factory.mktemp("old") / "tokenizer.model", OLD_PIECES))


@pytest.fixture(scope="module")
def new(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(save_model(tmp_path_factory.mktemp("new") / "tokenizer.model", NEW_PIECES, "<br>"))


def ids_of(tokenizer: Tokenizer) -> dict[str, int]:
    return {token.name: i for i, token in enumerate(extension_plan.read_vocabulary(tokenizer))}


def origins(old: Tokenizer, new: Tokenizer) -> dict[str, tuple[str, list[str]]]:
    """Name of each new token -> the rule, and the names of the old tokens."""
    plan, names = plan_extension(old, new), [token.name for token in extension_plan.read_vocabulary(old)]
    return {t.name: (plan.origins[i], [names[s] for s in plan.sources_of(i)]) for i, t in enumerate(plan.tokens)}


def reference_rows(weight: torch.Tensor, old: Tokenizer, new: Tokenizer) -> torch.Tensor:
    """The rule for two of the handmade models, spelt out with sentencepiece and one addition after the other."""
    ours, encode = ids_of(old), extension_plan.inner_encoder(old)
    rows = []
    for name in ids_of(new):
        if name in ours:
            rows.append(weight[ours[name]])
            continue
        ids = encode([name.replace(SPACE, " ")])[0]
        total = np.zeros(weight.shape[1], np.float32)
        for i in ids:
            total += weight[i].float().numpy()
        rows.append(torch.from_numpy(total / np.float32(len(ids))).to(weight.dtype))
    return torch.stack(rows)


# ---- the rules ----


def test_ids_are_matched_by_content_and_new_ones_are_spelt(old: Tokenizer, new: Tokenizer) -> None:
    found = origins(old, new)
    assert found["abba"] == ("pieces", ["ab", "b", "a"])
    assert found[f"{SPACE}ba"] == ("pieces", [SPACE, "b", "a"])
    assert found["国"] == ("bytes", ["<0xE5>", "<0x9B>", "<0xBD>"])
    assert found["中国"] == ("bytes", ["中", "<0xE5>", "<0x9B>", "<0xBD>"])
    assert found["<br>"] == ("bytes", ["<0x3C>", "b", "<0x72>", "<0x3E>"])
    copied = {"<unk>", "<s>", "</s>", "<0x00>", "<0xFF>", "ab", "a", "b", "中", SPACE, f"{SPACE}a"}
    assert all(found[name] == ("copied", [name]) for name in copied)
    numbers, others = ids_of(old), ids_of(new)
    assert any(numbers[name] != others[name] for name in copied), "the order must differ for this to say anything"


def test_a_dummy_prefix_and_removed_spaces_do_not_reach_the_rows(tmp_path: Path, new: Tokenizer) -> None:
    proto = handmade_model(OLD_PIECES, dummy_prefix=True)
    proto.normalizer_spec.remove_extra_whitespaces = True
    old = load_tokenizer(write_model(proto, tmp_path / "m.model"))
    assert len(old.encode("ba")) == 3  # with the prefix
    found = origins(old, new)
    assert found["abba"] == ("pieces", ["ab", "b", "a"]) and found[f"{SPACE}ba"] == ("pieces", [SPACE, "b", "a"])


def test_control_tokens_go_by_name_then_by_role_then_to_the_mean(tmp_path: Path) -> None:
    def controls(path: Path, *names: str, pad: str = "") -> Tokenizer:
        proto = handmade_model([("a", -1.0)])
        for name in names:
            proto.pieces.add(piece=name, score=0, type=proto.SentencePiece.CONTROL)
        proto.pieces[1].piece = proto.trainer_spec.bos_piece = f"{names[0][:2]}bos>"
        if pad:
            proto.trainer_spec.pad_piece, proto.trainer_spec.pad_id = pad, ids(proto)[pad]
        return load_tokenizer(write_model(proto, path))

    def ids(proto: Any) -> dict[str, int]:
        return {piece.piece: i for i, piece in enumerate(proto.pieces)}

    old = controls(tmp_path / "old.model", "<x>", "<y>")
    new = controls(tmp_path / "new.model", "<z>", "<y>", "<filler>", pad="<filler>")
    found = origins(old, new)
    assert found["<zbos>"] == ("role", ["<xbos>"]) and found["<y>"] == ("copied", ["<y>"])
    assert found["<z>"] == ("mean", []) == found["<filler>"], "no old pad to copy from"


def test_a_mark_that_is_control_on_one_side_and_a_symbol_on_the_other_is_one_token(tmp_path: Path) -> None:
    proto = handmade_model([("a", -1.0)])
    proto.pieces.add(piece="<|end|>", score=0, type=proto.SentencePiece.CONTROL)
    control = load_tokenizer(write_model(proto, tmp_path / "c.model"))
    symbol = load_tokenizer(save_model(tmp_path / "s.model", [("a", -1.0)], "<|end|>"))
    assert origins(control, symbol)["<|end|>"] == ("copied", ["<|end|>"]) == origins(symbol, control)["<|end|>"]


def test_of_several_tokens_with_one_text_the_same_spelling_or_the_lowest_id_is_taken(tmp_path: Path) -> None:
    """A symbol with a raw space stands for the text of the piece with U+2581."""
    old = load_tokenizer(save_model(tmp_path / "o.model", [(f"a{SPACE}b", -1.0), ("a", -2.0)], "a b"))
    both = load_tokenizer(save_model(tmp_path / "n.model", [("a", -2.0), (f"a{SPACE}b", -1.0)], "x", "a b"))
    found = origins(old, both)
    assert found["a b"] == ("copied", ["a b"]) and found[f"a{SPACE}b"] == ("copied", [f"a{SPACE}b"])
    one = load_tokenizer(save_model(tmp_path / "1.model", [(f"a{SPACE}b", -1.0), ("a", -2.0)]))
    assert origins(one, both)["a b"] == ("copied", [f"a{SPACE}b"])
    third = byte_level(tmp_path / "third", b"a b")  # spelt in a third way: the symbol has the lower id
    assert origins(old, third)["a\u0120b"] == ("copied", ["a b"])


def test_without_byte_fallback_unknown_parts_are_left_out(tmp_path: Path, new: Tokenizer) -> None:
    proto = handmade_model(OLD_PIECES)
    kept = [p for p in proto.pieces if p.type != p.BYTE]
    del proto.pieces[:]
    proto.pieces.extend(kept)
    proto.trainer_spec.byte_fallback = False
    found = origins(load_tokenizer(write_model(proto, tmp_path / "m.model")), new)
    assert found["中国"] == ("pieces", ["中"]) and found["国"] == ("mean", [])
    assert found["<0x61>"] == ("pieces", ["a"]) and found["<0xE5>"] == ("mean", [])


def byte_level(folder: Path, *tokens: bytes, specials: tuple[str, ...] = ("<|begin_of_text|>", "<|end_of_text|>")):
    """A byte-level BPE as Llama 3 has one, with ``tokens`` merged byte by byte from the left."""
    from megatron_hammer.tokenizer.pieces import BYTE_LEVEL_ALPHABET

    spelling = {byte: character for character, byte in BYTE_LEVEL_ALPHABET.items()}
    vocabulary, merges = {spelling[b]: b for b in range(256)}, []
    for token in tokens:
        for end in range(2, len(token) + 1):
            left, right = "".join(spelling[b] for b in token[: end - 1]), spelling[token[end - 1]]
            if left + right not in vocabulary:
                vocabulary[left + right] = len(vocabulary)
                merges.append((left, right))
    backend = Backend(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(specials))
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": specials[0], "eos_token": specials[1]}))
    return load_tokenizer(folder)


def test_between_sentencepiece_and_byte_level_models(tmp_path: Path, old: Tokenizer) -> None:
    llama3 = byte_level(tmp_path / "l3", b" ab", b"\xe4\xb8\xad", b"\xe5\x9b", b"abba")
    found = {
        t.content: (o, s) for t, (o, s) in zip(extension_plan.read_vocabulary(llama3), origins(old, llama3).values())
    }
    assert found[b"ab"] == ("copied", ["ab"]) and found["中".encode()] == ("copied", ["中"])
    assert found[b" ab"] == ("pieces", [f"{SPACE}a", "b"])
    assert found[b"\xe4\xb8"] == ("bytes", ["<0xE4>", "<0xB8>"]) and found[b"\xff"] == ("bytes", ["<0xFF>"])
    assert found[b"\n"] == ("bytes", ["<0x0A>"]) and found[b"a"] == ("copied", ["a"])
    assert found[b"<|begin_of_text|>"] == ("role", ["<s>"]) and found[b"<|end_of_text|>"] == ("role", ["</s>"])
    back = origins(llama3, old)
    assert back["中"][0] == "copied" and back["<0xE4>"] == ("bytes", ["ä"]) and back["<0x0A>"] == ("pieces", ["Ċ"])
    assert back["<unk>"] == ("mean", []) and back["<s>"] == ("role", ["<|begin_of_text|>"])
    assert back[f"{SPACE}a"][0] == "copied" and back[SPACE] == ("copied", ["Ġ"])
    inner = extension_plan.inner_encoder(llama3)(["ab"])[0]
    assert llama3.encode("ab") != inner and llama3.decode(inner) == "ab"


def test_a_converted_model_is_the_same_vocabulary(tmp_path: Path, old: Tokenizer, new: Tokenizer) -> None:
    """Llama's tokenizer.json with ``Prepend``: the same rows from the JSON as from the model it was made from."""
    from megatron_hammer.tokenizer.convert import convert_tokenizer

    prefixed = load_tokenizer(save_model(tmp_path / "m.model", OLD_PIECES, dummy_prefix=True))
    (tmp_path / "hf").mkdir()
    convert_tokenizer(prefixed, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.model").unlink()
    converted = load_tokenizer(tmp_path / "hf")
    assert converted.kind == "tokenizers" and origins(converted, new) == origins(old, new)


def test_a_metaspace_prefix_is_left_out_too(tmp_path: Path, new: Tokenizer) -> None:
    backend = Backend(models.BPE({"<unk>": 0, SPACE: 1, "a": 2, "b": 3, "ab": 5}, [("a", "b")], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Prepend(SPACE)])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    gaps = load_tokenizer(tmp_path)
    found = origins(gaps, new)
    assert found["abba"] == ("pieces", ["ab", "b", "a"]) and found[f"{SPACE}ba"] == ("pieces", [SPACE, "b", "a"])
    assert plan_extension(gaps, new).old_ids.tolist() == [0, 1, 2, 3, 5], "nobody has the number 4"
    assert plan_extension(new, gaps).origins[4] == "mean"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_the_mean_in_fp32(old: Tokenizer, new: Tokenizer, dtype: torch.dtype) -> None:
    plan = plan_extension(old, new)
    weight = torch.randn(old.vocab_size, 24).to(dtype)
    weight[5] = torch.nan  # a copied row keeps its bits, whatever they mean
    mean = mean_row(weight, plan.old_ids)
    rows = torch.cat([grown_rows(weight, plan, i, min(i + 7, plan.size), mean) for i in range(0, plan.size, 7)])
    expected = reference_rows(weight, old, new)
    assert torch.equal(rows.view(torch.uint8), expected.view(torch.uint8))


def test_the_mean_of_all_rows_is_of_tokens_only() -> None:
    weight = torch.randn(1000, 3)
    weight[7] = torch.inf  # padding
    ids = np.array([i for i in range(1000) if i != 7])
    assert torch.allclose(mean_row(weight, ids), weight[torch.from_numpy(ids)].mean(0), atol=1e-6)


# ---- Hugging Face folders ----


@pytest.mark.parametrize("tied, padding, dtype, shard", [
    (False, 0, torch.float32, "5GB"), (True, 6, torch.bfloat16, "20KB"), (False, 54, torch.float16, "20KB"),
])  # fmt: skip
def test_a_hugging_face_folder_gets_the_new_vocabulary(tmp_path, old, new, tied, padding, dtype, shard):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = make_hf(tmp_path / "hf", dtype, shard, vocab_size=old.vocab_size + padding, tie_word_embeddings=tied,
                    bos_token_id=1, eos_token_id=[2, 263], pad_token_id=0)  # fmt: skip
    shutil.copy(old.path, model)
    told: list[str] = []
    report = extend_model(model, new.path, tmp_path / "out", note=told.append)
    assert len(told) == (1 if padding == 0 else 2)
    assert report["origins"] == {"copied": 265, "role": 0, "pieces": 2, "bytes": 3, "mean": 0}
    before, after = weights_of(model), weights_of(tmp_path / "out")
    assert before.keys() == after.keys() and (HEAD in after) != tied
    for name in {EMBEDDING, HEAD} & after.keys():
        before[name] = reference_rows(before[name], old, new)
        assert before[name].shape == (270, 16)
    assert_same_bits(before, after)

    a, b = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (model, tmp_path / "out"))
    ours, theirs = ids_of(old), ids_of(new)
    shared = [name for name in theirs if name in ours]
    text = ["<s>", "ab", SPACE, "中", "b", f"{SPACE}a", "<0x0A>"]
    with torch.no_grad():
        x = a(torch.tensor([[ours[name] for name in text]])).logits[0][:, [ours[name] for name in shared]]
        y = b(torch.tensor([[theirs[name] for name in text]])).logits[0][:, [theirs[name] for name in shared]]
    assert torch.allclose(x, y, rtol=0, atol=1e-5)  # another width of the last product: rounding only
    assert b.config.vocab_size == new.vocab_size == b.lm_head.weight.shape[0]
    # id 263 was <SPACE>, which the new vocabulary has at another place
    assert b.config.eos_token_id == b.generation_config.eos_token_id == [2, theirs[SPACE]]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab 中国")["input_ids"] == [1, *new.encode("ab 中国")]
    import_hf(tmp_path / "out", tmp_path / "run")  # and further into our own


def test_the_report_names_every_row_that_is_no_copy(tmp_path, old, new):
    model = make_hf(tmp_path / "hf", vocab_size=old.vocab_size)
    report = extend_model(model, new.path, tmp_path / "out", old.path)
    written = json.loads((tmp_path / "out" / extend.REPORT).read_text(encoding="utf-8"))
    rows = written.pop("rows")
    assert written == report
    assert [row[0] for row in rows] == [i for i, n in enumerate(ids_of(new)) if n not in ids_of(old)]
    assert [ids_of(new)["国"], "国", "bytes", old.encode("国")] in rows
    assert report["pieces_per_averaged_id"] == {"3": 3, "4": 2} and report["old_ids_without_successor"] == 1
    assert "c" not in ids_of(new)


def test_new_rows_that_are_equal_are_counted(tmp_path):
    """Two characters of the same bytes in another order start from one row: people should know."""
    swapped = b"\xe4\xad\xb8".decode()  # 中 is e4 b8 ad
    old = load_tokenizer(save_model(tmp_path / "old.model", [("a", -1.0)]))
    new = save_model(tmp_path / "new.model", [("a", -1.0), (swapped, -2.0), ("中", -3.0), ("国", -4.0)])
    model = tiny_model(vocab_size=old.vocab_size)
    write_layout(tmp_path / "run", model, random_logical(model), tokenizer=old)
    report = extend_model(tmp_path / "run", new, tmp_path / "out")
    assert report["averaged_ids_equal_to_another"] == 2 and report["pieces_per_averaged_id"] == {"3": 3}
    embedding = read_logical(open_checkpoint(tmp_path / "out"), EMBEDDING)
    assert torch.allclose(embedding[260], embedding[261]) and not torch.allclose(embedding[260], embedding[262])


def test_a_llama_3_kind_of_vocabulary_and_back(tmp_path, old):
    """The ends of a text move to the marks of the new tokenizer, and copies come back as they were."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llama3 = byte_level(tmp_path / "l3", b" ab", "中".encode(), b"abba")
    model = make_hf(tmp_path / "hf", vocab_size=old.vocab_size, bos_token_id=1, eos_token_id=2)
    shutil.copy(old.path, model)
    extend_model(model, llama3.path, tmp_path / "out", note=lambda text: None)
    loaded, tokenizer = (c.from_pretrained(tmp_path / "out") for c in (AutoModelForCausalLM, AutoTokenizer))
    assert loaded.config.vocab_size == llama3.vocab_size == len(tokenizer)
    assert [loaded.config.bos_token_id, loaded.generation_config.eos_token_id] == [llama3.bos_id, llama3.eos_id]
    assert tokenizer("ab 中", add_special_tokens=False)["input_ids"] == llama3.encode("ab 中")
    extend_model(tmp_path / "out", old.path, tmp_path / "back", note=lambda text: None)
    before, after = weights_of(model)[EMBEDDING], weights_of(tmp_path / "back")[EMBEDDING]
    ids = [ids_of(old)[name] for name in ("<s>", "</s>", "a", "ab", "中", SPACE, "<0xE4>")]
    assert torch.equal(before[ids], after[ids])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").config.eos_token_id == 2


def test_rows_beyond_the_model_file_may_have_tokens_in_the_json_beside_it(tmp_path, old, new):
    """As of Llama 2 with a pad token: tokenizer.model lacks it, tokenizer.json has it."""
    from megatron_hammer.tokenizer.convert import convert_tokenizer

    model = make_hf(tmp_path / "hf", vocab_size=old.vocab_size + 1)
    convert_tokenizer(old, model)
    added = Backend.from_file(str(model / "tokenizer.json"))
    added.add_special_tokens(["<pad>"])
    added.save(str(model / "tokenizer.json"))
    padded = model_proto(new.path)
    padded.pieces.add(piece="<pad>", score=0, type=padded.SentencePiece.CONTROL)
    wider = write_model(padded, tmp_path / "wider.model")
    import_hf(model, tmp_path / "run")
    told: list[str] = []
    report = extend_model(tmp_path / "run", wider, tmp_path / "1", note=told.append)
    assert report["origins"]["mean"] == 1 and len(told) == 1  # the checkpoint kept no tokenizer.json
    report = extend_model(model, wider, tmp_path / "2", note=told.append)
    assert report["origins"]["mean"] == 1 and "name it with --old-tokenizer" in told[2]
    report = extend_model(model, wider, tmp_path / "3", model / "tokenizer.json", note=told.append)
    assert report["origins"]["mean"] == 0 and report["old"]["rows"] == report["old"]["ids"]
    assert torch.equal(weights_of(tmp_path / "3")[HEAD][-1], weights_of(model)[HEAD][-1])


# ---- checkpoints of ours ----


@pytest.mark.parametrize("tp, dp, tied, name", [(1, 1, True, "run"), (4, 2, False, "run/checkpoints/step-00000007")])
def test_a_checkpoint_becomes_a_start_for_a_run(tmp_path, old, new, tp, dp, tied, name):
    model = tiny_model(vocab_size=old.vocab_size + 5, tie_word_embeddings=tied)
    tensors = random_logical(model)
    write_layout(tmp_path / "run" / "checkpoints", model, tensors, tp, dp, tokenizer=old)
    extend_model(tmp_path / name, new.path, tmp_path / "out", note=lambda text: None)
    manifest = open_checkpoint(tmp_path / "out")
    verify_checkpoint(manifest)
    assert manifest.step == 0 and manifest.kinds == {"weight"} and manifest.weights_dtype == "bfloat16"
    assert load_tokenizer(manifest.folder / "tokenizer").fingerprint == new.fingerprint
    extended = dataclasses.replace(model, vocab_size=new.vocab_size)
    assert saved_model(manifest) == extended
    for tensor in logical_shapes(extended):
        expected = tensors[tensor, "weight"]
        expected = reference_rows(expected, old, new) if tensor in (EMBEDDING, HEAD) else expected
        assert torch.equal(read_logical(manifest, tensor), expected), tensor
    start = [f"checkpoint.init_from={tmp_path}/out", "data.train=x"]
    config = load_config(tmp_path / "out" / "model.yaml", start)
    assert config.model == extended and config.tokenizer.path == str(manifest.folder / "tokenizer")
    certificate = export_hf(tmp_path / "out", tmp_path / "hf", prove=prove, note=lambda text: None)
    assert certificate["verdict"] == "passed"


def test_large_matrices_are_written_in_blocks(tmp_path, old, new, monkeypatch):
    monkeypatch.setattr(extension_rows, "BLOCK_BYTES", 4 * 16 * 100)  # 100 rows
    model = tiny_model(vocab_size=old.vocab_size)
    tensors = random_logical(model, kinds=("weight",))
    write_layout(tmp_path / "run", model, tensors, tokenizer=old)
    extend_model(tmp_path / "run", new.path, tmp_path / "out")
    manifest = open_checkpoint(tmp_path / "out")
    ranges = [s.rows for s in manifest.files[0].slices if manifest.tensors[s.tensor].name == HEAD]
    assert ranges == [(0, 100), (100, 200), (200, 270)]
    assert torch.equal(read_logical(manifest, HEAD), reference_rows(tensors[HEAD, "weight"], old, new))


def test_training_continues_with_the_new_vocabulary(tmp_path, old, new):
    """From an extended checkpoint and from an extended folder: the same losses, and they fall."""
    rng = np.random.default_rng(0)
    words = ["ab", "abba", " ba", "中国", "国", " a", "<br>", "b"]
    with IndexedWriter(tmp_path / "d", vocab_size=new.vocab_size, tokenizer=_record(new)) as writer:
        for _ in range(60):
            tokens = [1, *new.encode("".join(words[i] for i in rng.integers(0, len(words), 40))), 2]
            writer.add(np.array(tokens), [len(tokens)])
    model = make_hf(tmp_path / "hf", hidden_size=64, intermediate_size=192, num_attention_heads=8,
                    vocab_size=old.vocab_size, max_position_embeddings=64, initializer_range=0.02)  # fmt: skip
    shutil.copy(old.path, model)
    import_hf(model, tmp_path / "imported")
    extend_model(tmp_path / "imported", new.path, tmp_path / "ours")
    extend_model(model, new.path, tmp_path / "theirs")
    import_hf(tmp_path / "theirs", tmp_path / "again")
    for start, output in (("ours", "a"), ("again", "b")):
        train_here(0, [
            f"checkpoint.init_from={tmp_path / start}",
            f"tokenizer.path={tmp_path}/ours/checkpoints/step-00000000/tokenizer",
            f"data.train={tmp_path}/d", "data.seq_length=32", "train.num_steps=6", "train.global_batch_size=8",
            "model.norm_eps=1.0e-6", "model.max_position_embeddings=64", "schedule.warmup_steps=1",
            "log.tensorboard=false", f"train.output={tmp_path / output}",
        ])  # fmt: skip
    ours, theirs = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    assert [line["loss"] for line in ours] == [line["loss"] for line in theirs] and len(ours) == 6
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.1
    trained = open_checkpoint(tmp_path / "a")
    assert trained.step == 6 and saved_model(trained).vocab_size == new.vocab_size


def _record(tokenizer: Tokenizer) -> Any:
    from megatron_hammer.dataset.format import TokenizerRecord

    return TokenizerRecord(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, None, None)


# ---- what is refused ----


def test_what_does_not_belong_together_is_refused_and_leaves_nothing(tmp_path, old, new):
    model = make_hf(tmp_path / "hf", vocab_size=old.vocab_size)
    out = tmp_path / "made" / "out"

    def refused(error: type[HammerError], match: str, *arguments: Any, output: Path = out) -> None:
        with pytest.raises(error, match=match):
            extend_model(arguments[0], arguments[1], output, *arguments[2:], note=lambda text: None)
        assert not out.parent.exists() or not any(out.parent.iterdir())

    refused(ConfigError, "E281.*holds no tokenizer", model, new.path)
    refused(RefusedError, "E530.*270 ids.*266 rows", model, old.path, new.path)
    refused(RefusedError, "E531", model, old.path, old.path)
    retrained = model_proto(old.path)
    retrained.pieces[-1].score -= 1  # another fingerprint, but no row would be another
    refused(RefusedError, "E531", model, write_model(retrained, tmp_path / "same.model"), old.path)
    refused(CheckpointError, "E401", tmp_path / "nowhere", new.path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    refused(RefusedError, "E532", model, new.path, old.path, output=tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["notes.txt"]
    ours = tiny_model(vocab_size=old.vocab_size)
    write_layout(tmp_path / "run", ours, random_logical(ours), tokenizer=old)
    other = save_model(tmp_path / "other.model", OLD_PIECES[:-1])
    refused(RefusedError, "E533", tmp_path / "run", new.path, other)


def test_a_crash_leaves_nothing_and_is_cleaned_up(tmp_path, old, new, monkeypatch):
    model = tiny_model(vocab_size=old.vocab_size)
    write_layout(tmp_path / "run", model, random_logical(model), tokenizer=old)
    (tmp_path / "o").mkdir()
    monkeypatch.setattr(extension_rows, "grown_rows", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        extend_model(tmp_path / "run", new.path, tmp_path / "o" / "out")
    assert not any((tmp_path / "o").iterdir())
    monkeypatch.undo()
    (tmp_path / "o" / f"out.tmp-{'0' * 16}").mkdir()  # a killed one
    (tmp_path / "o" / "out").mkdir()  # empty is as good as absent
    extend_model(tmp_path / "run", new.path, tmp_path / "o" / "out")
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["out"]


def test_weights_that_read_back_differently_are_refused(tmp_path, old, new, monkeypatch):
    model = make_hf(tmp_path / "hf", vocab_size=old.vocab_size)
    monkeypatch.setattr(extend.HfWeights, "hash_of", lambda self, name: "0" * 32)
    with pytest.raises(CheckpointError, match="E416"):
        extend_model(model, new.path, tmp_path / "out", old.path)
    assert not (tmp_path / "out").exists()


# ---- the program, the real tokenizers, memory ----


def run_here(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["extend_embeddings.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "tools" / "extend_embeddings.py"), run_name="__main__")
    return int(caught.value.code or 0)


def test_the_program_says_what_it_did(tmp_path, old, new, monkeypatch, capsys):
    model = make_hf(tmp_path / "hf", vocab_size=old.vocab_size)
    capsys.readouterr()
    arguments = [model, "--old-tokenizer", old.path, "--new-tokenizer", new.path, "--output", tmp_path / "out"]
    assert run_here(monkeypatch, *arguments) == 0
    assert capsys.readouterr().out.splitlines() == [
        "266 rows -> 270: 265 copied by content",
        "5 averaged over 3.40 old pieces (3 to 4), 3 of them from bytes, 0 of them equal to another new row",
        "1 of the old ids have no token in the new vocabulary",
        f"wrote {tmp_path}/out, and {tmp_path}/out/extension.json",
        f"continue from it: python tools/hf_to_checkpoint.py --hf {tmp_path}/out --save DIR",
    ]
    assert run_here(monkeypatch, *arguments) == 5
    assert capsys.readouterr().err.startswith("error[E532]")


def test_internlm_grows_to_hammerllm(tmp_path):
    """The published step: 103,168 ids keep their rows and their numbers, 2,621 are new."""
    old, new = (load_tokenizer(real_model(f"{name}.model")) for name in ("internlm-7b", "hammerllm"))
    model = make_hf(tmp_path / "hf", torch.bfloat16, vocab_size=old.vocab_size)
    shutil.copy(old.path, model / "tokenizer.model")
    import_hf(model, tmp_path / "run")  # as a checkpoint: the conversion of hammerllm.model is test_convert's
    report = extend_model(tmp_path / "run", new.path, tmp_path / "out")
    assert report["origins"] == {"copied": 103168, "role": 0, "pieces": 85, "bytes": 2536, "mean": 0}
    before, manifest = weights_of(model), open_checkpoint(tmp_path / "out")
    contents = [token.content.decode() for token in extension_plan.read_vocabulary(new)[103168:]]
    spelt = extension_plan.inner_encoder(old)(contents)
    for name in (EMBEDDING, HEAD):
        after = read_logical(manifest, name)
        assert torch.equal(after[:103168], before[name]) and after.shape == (105789, 16)
        for row, ids in zip(after[103168:], spelt):
            rows = before[name][ids].float()
            total = rows[0].clone()
            for other in rows[1:]:
                total += other
            assert torch.equal(row, (total / len(ids)).bfloat16()), ids


CHILD = """
import resource, sys
import torch, numpy, tqdm, transformers, sentencepiece, megatron_hammer.huggingface.extend as extend

def peak():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))

model, new, output = sys.argv[1:]
before = peak()
extend.extend_model(model, new, output)
print(peak() - before)
"""


def test_peak_memory_is_one_tensor_and_a_little(tmp_path):
    """Two matrices of 149 MB become two of 161 MB."""
    words = [(f"w{i}x", -float(i)) for i in range(30_000)]
    letters = [(letter, -1e6) for letter in "wx0123456789"]
    old = load_tokenizer(save_model(tmp_path / "old.model", [*words[:24_000], *letters]))
    new = save_model(tmp_path / "new.model", [*words[4_000:], *letters])
    model = tiny_model(hidden_size=1536, head_dim=192, vocab_size=old.vocab_size)
    largest = old.vocab_size * 1536 * 4
    tensors = {(n, "weight"): torch.full(s, 0.5) for n, s in logical_shapes(model).items()}
    write_layout(tmp_path / "run", model, tensors, tokenizer=old)
    command = [sys.executable, "-c", CHILD, str(tmp_path / "run"), str(new), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    little = 125 * 2**20  # seen: 90, for vocabularies and plan, blocks of rows, first use of libraries
    assert int(done.stdout) < largest + little < 2 * largest, f"grew by {int(done.stdout) / 2**20:.0f} MB"
