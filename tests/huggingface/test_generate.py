"""Checkpoint and export continue prompts as transformers does; batches, streaming, penalties, beginnings, the chat."""

from __future__ import annotations

import json
import os
import pty
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_hammer.base.errors import CheckpointError, ConfigError, DataError
from megatron_hammer.checkpoint.manifest import Manifest
from megatron_hammer.dataset.look.document_marks import documents_begin_with, documents_end_with
from megatron_hammer.dataset.writer import IndexedWriter
from megatron_hammer.huggingface.certificate import prove
from megatron_hammer.huggingface.chat import Chat, converse
from megatron_hammer.huggingface.export import export_hf
from megatron_hammer.huggingface.generate import Sampling, continue_rows, continue_texts, read_prompts
from megatron_hammer.huggingface.text_model import (
    TextModel,
    open_folder,
    open_saved,
    open_text_model,
    start_of,
)
from tests.checkpoint.layouts import LLAMA3_ROPE, tiny_model, write_layout
from tests.huggingface.test_certificate import realistic

MODEL = tiny_model(hidden_size=32, ffn_hidden_size=40, num_layers=2, vocab_size=700, rope_scaling=LLAMA3_ROPE,
                   max_position_embeddings=96)  # fmt: skip
GREEDY = Sampling(max_new_tokens=12, temperature=0.0)
PROMPTS = ["清晨的渡口", "def f(", "The light", ""]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer_model) -> Manifest:
    from megatron_hammer.tokenizer.load import load_tokenizer

    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    return write_layout(folder, MODEL, realistic(MODEL), 2, 1, tokenizer=load_tokenizer(tokenizer_model))


@pytest.fixture(scope="module")
def folder(saved, tmp_path_factory) -> Path:
    hf = tmp_path_factory.mktemp("export") / "hf"
    export_hf(saved.folder, hf, "float32", prove=prove, note=lambda text: None)
    return hf


@pytest.fixture(scope="module")
def exported(folder) -> TextModel:
    return open_folder(folder)


@pytest.fixture(scope="module")
def from_checkpoint(saved) -> TextModel:
    return open_text_model(saved.folder.parents[1], dtype="float32")


def by_hand(folder: Path, prompts: list[str]) -> list[list[int]]:
    """transformers without any of our code, the whole text computed anew for each token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for prompt in prompts:
        ids = list(tokenizer(prompt)["input_ids"])
        before = len(ids)
        while len(ids) < before + GREEDY.max_new_tokens and (len(ids) == before or ids[-1] != tokenizer.eos_token_id):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        rows.append(ids[before:])
    return rows


def test_checkpoint_and_export_give_the_tokens_of_transformers(folder, exported, from_checkpoint) -> None:
    wanted = by_hand(folder, PROMPTS)
    for model in (exported, from_checkpoint):
        found = list(continue_texts(model, PROMPTS, GREEDY))
        assert [list(one.ids) for one in found] == wanted
        assert all(one.whole == one.prompt + one.text for one in found)
        assert [one.prompt_ids[0] for one in found] == [1] * 4, "bos, as the tokenizer begins a text"
    weights = dict(exported.model.state_dict())
    assert all(torch.equal(value, weights[name]) for name, value in from_checkpoint.model.state_dict().items())


def test_batches_give_what_single_prompts_give(exported) -> None:
    """Padding is neither attended to nor counted as a repetition, also where it is the id that ends texts."""
    padded = replace(exported)
    padded.model.generation_config.pad_token_id = exported.end_ids[0]
    for sampling in (GREEDY, replace(GREEDY, repetition_penalty=5.0)):
        one_by_one = [one.ids for one in continue_texts(padded, PROMPTS, sampling)]
        for size in (2, 4):
            assert [one.ids for one in continue_texts(padded, PROMPTS, sampling, size)] == one_by_one
    plain = [one.ids for one in continue_texts(padded, PROMPTS, GREEDY)]
    assert one_by_one != plain, "the penalty does something"


def test_sampling(exported) -> None:
    def ids(**changes):
        return [one.ids for one in continue_texts(exported, PROMPTS[:2], replace(GREEDY, temperature=2.0, **changes))]

    assert ids(seed=1) == ids(seed=1) != ids(seed=2)
    plain = [one.ids for one in continue_texts(exported, PROMPTS[:2], GREEDY)]
    assert ids(top_p=1e-6, top_k=0) == ids(top_k=1) == plain, "only the likeliest is left"
    assert ids(top_k=0, top_p=1.0) != plain


def test_the_model_s_own_generation_config_holds_where_nothing_is_said(exported) -> None:
    own = exported.model.generation_config
    own.repetition_penalty = 5.0
    try:
        penalised = [one.ids for one in continue_texts(exported, PROMPTS, GREEDY, 2)]
    finally:
        own.repetition_penalty = 1.0
    assert penalised == [one.ids for one in continue_texts(exported, PROMPTS, replace(GREEDY, repetition_penalty=5.0))]


def test_streaming_shows_whole_characters_in_order(exported, tokenizer_model) -> None:
    """Of a character that the tokenizer spells as bytes nothing is shown before its last byte."""
    from megatron_hammer.huggingface.generate import _Streamer
    from megatron_hammer.tokenizer.load import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_model)
    row, new = [1, *tokenizer.encode("The ")], tokenizer.encode("船𠮷龘 x")
    assert len(new) > 8, "bytes"
    pieces: list[str] = []
    streamer = _Streamer(replace(exported, decode=tokenizer.decode), row, pieces.append)
    streamer.put(torch.tensor([row]))
    for token in new:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(pieces) == "船𠮷龘 x" and not any("\ufffd" in piece for piece in pieces)
    pieces.clear()
    numbers = replace(exported, decode=lambda ids: "".join(f"{token} " for token in ids))
    new = continue_rows(numbers, [row], GREEDY, pieces.append)[0]
    assert pieces == [f"{token} " for token in new] and len(new) == GREEDY.max_new_tokens


@pytest.mark.parametrize(
    ("bos", "eos", "phases", "start", "words"),
    [(True, True, False, (1,), "bos"), (False, True, False, (2,), "eos"), (False, False, False, (), "no special"),
     (False, True, True, (2,), "eos")],
)  # fmt: skip
def test_prompts_begin_as_documents_did(saved, tmp_path, bos, eos, phases, start, words) -> None:
    with IndexedWriter(tmp_path / "d", vocab_size=700) as writer:
        writer.add([*([1] if bos else []), 40, 41, *([2] if eos else [])], [2 + bos + eos])
    mix = {str(tmp_path / "d"): 1.0}
    data = {"phases": [{"train": mix}]} if phases else {"train": mix}
    run = replace(saved, config=saved.config | {"data": data})
    assert (documents_begin_with(run.config, 1), documents_end_with(run.config, 2)) == (bos, eos)
    model = open_saved(run)
    assert model.start == start and words in model.start_words
    # The export records it, so that it holds after the data have gone.
    certificate = {"documents": {"begin_with_bos": bos, "end_with_eos": eos}}
    from megatron_hammer.huggingface.text_model import _began_in_folder

    (tmp_path / "certificate.json").write_text(json.dumps(certificate))
    used, _ = _began_in_folder(tmp_path, None)
    assert start_of("auto", used, "", {"bos": 1, "eos": 2})[0] == start


def test_the_certificate_says_how_documents_began(saved, folder) -> None:
    found = json.loads((folder / "certificate.json").read_text())["documents"]
    assert found == {"begin_with_bos": None, "end_with_eos": None}, "the checkpoint names no dataset"
    assert open_saved(saved, "none").start == () and open_saved(saved, "eos").start == (2,)
    with pytest.raises(ConfigError, match=r"E245.*--begin eos names a token that the tokenizer does not have"):
        start_of("eos", "bos", "", {"bos": 1, "eos": None})
    assert start_of("auto", "bos", "", {"bos": None, "eos": None})[0] == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"top_p": 0.0}, "--top-p=0.0 must be above 0"), ({"top_p": 1.1}, "--top-p"), ({"top_k": -1}, "--top-k=-1"),
     ({"repetition_penalty": 0.0}, "--repetition-penalty"), ({"temperature": float("nan")}, "--temperature"),
     ({"temperature": float("inf")}, "--temperature"), ({"max_new_tokens": 0}, "--max-new-tokens=0"),
     ({"repetition_penalty": float("inf")}, "--repetition-penalty")],
)  # fmt: skip
def test_values_out_of_range_are_refused(exported, changes, words) -> None:
    with pytest.raises(ConfigError, match=f"E245.*{words}"):
        next(continue_texts(exported, ["x"], replace(GREEDY, **changes)))


def test_what_cannot_be_continued_is_named(saved, exported, folder, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"E246.*empty"):
        next(continue_texts(replace(exported, start=(), boundary=()), [""], GREEDY))
    with pytest.raises(ConfigError, match=r"E245.*--batch-size=0"):
        next(continue_texts(exported, ["x"], GREEDY, 0))
    with pytest.raises(ConfigError, match=r"E245.*--device tpu is no device"):
        open_folder(folder, device="tpu")
    with pytest.raises(CheckpointError, match=r"E492.*has no tokenizer"):
        open_saved(replace(saved, tokenizer=None))
    with pytest.raises(CheckpointError, match=r"E490"):
        open_folder(tmp_path / "absent")


@pytest.mark.parametrize(
    "content", ["[]", '{"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": ["a b"]}}']
)
def test_a_tokenizer_that_cannot_be_loaded_is_named(folder, tmp_path, content) -> None:
    shutil.copytree(folder, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"E491.*hf could not be loaded by transformers"):
        open_folder(tmp_path / "hf")


def test_prompts_of_a_file(tmp_path) -> None:
    (tmp_path / "p.txt").write_text("今天 天气\n\n  two\n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt", "prompt") == ["今天 天气", "  two"]
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\\nb"}\n{"prompt": "c"}\n')
    assert read_prompts(tmp_path / "p.jsonl", "prompt") == ["a\nb", "c"]
    with pytest.raises(DataError, match=r"E307"):
        read_prompts(tmp_path / "p.jsonl", "text")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match=r"E302"):
        read_prompts(tmp_path / "empty.txt", "prompt")


# ---- chat ----


def talk(chat: Chat, *lines: str | type[BaseException]) -> tuple[str, list[str]]:
    """What the chat writes, and what it notes, for these lines."""
    left, written, notes = list(lines), [], []  # type: ignore[var-annotated]

    def read(prompt: str) -> str:
        line = left.pop(0) if left else EOFError
        if isinstance(line, str):
            return line
        raise line

    converse(chat, read, written.append, notes.append)
    return "".join(written), notes


def test_a_base_model_goes_on_with_the_text_and_says_so(exported) -> None:
    chat = Chat(exported, replace(GREEDY, max_new_tokens=5))
    written, notes = talk(chat, "清晨", "", "def f", "/show")
    assert "base model" in notes[0] and "no chat template" in notes[0]
    first, second, third = (chat.turns[i]["content"] for i in (1, 3, 5))
    assert written == f"{first}\n{second}\n{third}\n"
    assert notes[-1] == chat.text() == f"清晨{first}{second}\ndef f{third}", "an empty line lets it write on"
    expected = continue_rows(exported, [[1, *exported.encode(f"清晨{first}{second}\ndef f")]], chat.sampling)
    assert exported.decode([1, *exported.encode(f"清晨{first}{second}\ndef f"), *expected[0]]).endswith(third)


def test_commands(exported) -> None:
    chat = Chat(exported, replace(GREEDY, max_new_tokens=3, temperature=2.0))
    _, notes = talk(chat, "/again", "/undo", "a", "//b", "/undo", "/bad", "/help", KeyboardInterrupt, "/new", "/show")
    assert notes.count("nothing was said yet") == 3 and "taken back: /b" in notes and not chat.turns
    assert any(note.startswith("/bad is no command") for note in notes) and "/quit or Ctrl-D ends" in notes
    assert any(note.startswith("/again ") for note in notes)
    _, notes = talk(chat, "／help", "、new", "／ａｇａｉｎ", "、")
    assert any(note.startswith("/again ") for note in notes) and notes.count("nothing was said yet") == 1
    assert [turn["content"] for turn in chat.turns][::2] == ["、"], "any other line is said as it stands"
    chat.turns.clear()
    _, notes = talk(chat, "a", "/again", "\ud800", "/quit", "never read")
    assert [turn["content"] for turn in chat.turns][::2] == ["a"], "said once; the bad line is named and left out"
    assert "E314" in notes[-1]


def test_ctrl_c_ends_an_answer_and_the_chat_goes_on(exported) -> None:
    chat = Chat(exported, replace(GREEDY, max_new_tokens=8))
    shown: list[str] = []

    def write(piece: str) -> None:
        shown.append(piece)
        if len(shown) == 2:
            raise KeyboardInterrupt

    chat.answer("x", write, print)
    assert chat.turns[1]["content"] == "".join(shown[:2])
    chat.answer("y", lambda piece: None, print)
    assert len(chat.turns) == 4


def test_what_no_longer_fits_is_left_out_from_the_front(exported) -> None:
    chat = Chat(exported, replace(GREEDY, max_new_tokens=10))
    _, notes = talk(chat, "长" * 60, "y " * 30)
    assert any("no longer fit" in note for note in notes)
    with pytest.raises(ConfigError, match=r"E245.*no room"):
        Chat(exported, replace(GREEDY, max_new_tokens=96))
    asked: list[list[dict[str, str]]] = []

    def template(messages):
        asked.append(messages)
        return [1, *exported.encode("".join(m["role"] + m["content"] for m in messages))]

    chat = Chat(replace(exported, template=template), replace(GREEDY, max_new_tokens=10), "sys")
    _, notes = talk(chat, "a " * 12, "b " * 12, "c " * 12)
    assert "chat template" in notes[0] and any("lines and their answers no longer fit" in note for note in notes)
    assert [m["role"] for m in asked[0]] == ["system", "user"] and asked[-1][1]["content"][0] in "bc"


def test_chinese_typed_on_a_terminal_is_edited_by_characters() -> None:
    """Through a real terminal: a wrong character is taken back by one backspace."""
    code = "from megatron_hammer.base.line_input import line_reader; r, n = line_reader(); print(ascii([n, r('> ')]))"
    environment = os.environ | {"LC_ALL": "C.UTF-8", "TERM": "xterm", "PYTHONPATH": str(Path(__file__).parents[2])}
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-c", code], environment)
    said = b""
    while b"> " not in said:
        said += os.read(terminal, 1000)
    os.write(terminal, "你好嗎\x7f吗\r".encode())
    try:
        while piece := os.read(terminal, 1000):
            said += piece
    except OSError:  # the other end has gone
        pass
    os.waitpid(pid, 0)
    os.close(terminal)
    assert ascii("你好吗").encode() in said, said
