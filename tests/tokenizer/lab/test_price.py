"""Price: the counts against the published figures, smaller vocabularies against training, the curve, the program."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.config import Config, DataConfig, ModelConfig, TrainConfig, load_config
from megatron_hammer.tokenizer.convert import convert_tokenizer
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.lab import price
from megatron_hammer.tokenizer.lab.analyze import count_usage
from megatron_hammer.tokenizer.lab.cost import check_priced_config, count_cost, token_flops
from megatron_hammer.tokenizer.lab.curve import (
    GRID_SIZES,
    CompressionCurve,
    find_best,
    interpolate_monotone,
    sample_texts,
)
from megatron_hammer.tokenizer.lab.prefixes import Prefixes, find_prefixes
from megatron_hammer.tokenizer.load import load_tokenizer
from megatron_hammer.tokenizer.sentencepiece_backend import SentencePieceTokenizer
from megatron_hammer.tokenizer.train import train_tokenizer
from tests.progress_lines import run_quietly
from tests.tokenizer.texts import REPOSITORY, Texts, handmade_model, real_model, training_texts
from tests.tokenizer.texts import write_model as write

PROGRAM = REPOSITORY / "tools" / "analyze_tokenizer.py"
HAMMER = REPOSITORY / "examples" / "configs" / "hammerllm_1b4.yaml"
SMALL = ModelConfig(hidden_size=64, ffn_hidden_size=160, num_layers=2, num_attention_heads=4, num_query_groups=2)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(training_texts(), trainer)
    path = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    backend.save(str(path))
    return load_tokenizer(path)


def count(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    return [len(ids) for ids in tokenizer.encode_batch(texts)]


# ---- what it costs ----


def test_the_published_counts() -> None:
    """HammerLLM 1.4B at s = 2048 in GFLOP a token, forward and backward; parameters; logits."""
    cost = count_cost(load_config(HAMMER), 105_789)
    flops = [cost.layer_flops, cost.head_flops, cost.attention_flops, cost.flops]
    assert [f"{of / 1e9:.4f}" for of in flops] == ["5.8133", "1.2999", "0.5536", "7.6669"]
    assert cost.parameters == 1_402_288_128 and cost.vocabulary_parameters == 433_311_744
    assert cost.layer_flops + cost.head_flops == 6 * 1_185_540_096
    assert f"{100 * cost.head_share:.1f} {100 * cost.parameter_share:.1f}" == "17.0 30.9"
    assert cost.logits_bytes == 8 * 2048 * 105_856 * 2 and f"{cost.logits_bytes / 2**30:.2f}" == "3.23"


@pytest.mark.parametrize("tied", [False, True])
def test_counts_equal_a_model_of_transformers(tied: bool) -> None:
    """Parameters of the module, and FLOPs of every matrix that its forward multiplies by."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = dataclasses.replace(SMALL, head_dim=24, tie_word_embeddings=tied)
    config = Config(model=model, data=DataConfig(seq_length=32), train=TrainConfig(precision="fp32"))
    cost = count_cost(config, 300)
    peer = LlamaForCausalLM(LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, tie_word_embeddings=tied,
    ))  # fmt: skip
    assert cost.parameters == sum(p.numel() for p in peer.parameters())
    weights = sum(p.numel() for name, p in peer.named_parameters() if name.endswith("proj.weight"))
    assert cost.layer_flops == 6 * weights and cost.head_flops == 6 * peer.lm_head.weight.numel()
    assert cost.vocabulary_parameters == 300 * 64 * (1 if tied else 2)
    # Causal: token i of s attends to i + 1 of them; the formula's s / 2 is that without the half token.
    pairs = 2 * 4 * sum(i + 1 for i in range(32)) / 32  # layers x heads x mean
    assert cost.attention_flops == pytest.approx(3 * 2 * 2 * 24 * pairs, rel=1 / 32)
    assert cost.logits_bytes == 32 * 384 * 4  # padded to 128
    sizes = np.array([1, 300, 105_789])
    assert token_flops(config, sizes).tolist() == [count_cost(config, size).flops for size in sizes]


# ---- texts ----


def test_small_texts_are_taken_whole() -> None:
    texts = {"zh": ["中文。" * 500, "短"], "en": ["a"]}
    sample = sample_texts(texts, 10_000)
    assert sample.texts == texts and sample.kept_bytes == sample.seen_bytes == {"zh": 4503 + 0, "en": 1}


def test_samples_are_a_choice_by_hash() -> None:
    documents = [f"{i} " + "word\n" * (i % 7) for i in range(2000)] + ["".join(f"line {i}\n" for i in range(6000))]
    sample = sample_texts({"a": documents, "b": ["x"]}, 8000)
    assert sample == sample_texts({"a": documents, "b": ["x"]}, 8000)
    assert sample.seen_bytes["a"] == len("".join(documents)) and 7000 < sample.kept_bytes["a"] <= 8000
    assert sample.kept_bytes["a"] == len("".join(sample.texts["a"]).encode())
    stretches = {text for text in sample.texts["a"] if text not in documents}
    assert stretches and all(text.endswith("\n") and len(text) <= 500 for text in stretches)


def test_domains_count_by_what_was_seen(plain: Tokenizer) -> None:
    texts = {"zh": ["模型的大小。" * 20] * 200, "en": ["Hello, world! "] * 3}
    sample = sample_texts(texts, 4000)
    usage = count_usage({"plain": plain}, sample.texts)["plain"]
    found = sample.tokens_per_byte(usage)
    total = sum(sample.seen_bytes.values())
    expected = sum(sample.seen_bytes[d] * usage[d].tokens / usage[d].bytes for d in texts) / total
    assert found["overall"] == pytest.approx(expected)
    assert found["overall"] == pytest.approx(found["zh"], rel=0.01)  # 99.9 % of the bytes


# ---- smaller vocabularies ----


def test_a_smaller_vocabulary_is_the_one_that_training_makes(plain: SentencePieceTokenizer, tmp_path: Path) -> None:
    """The claim behind the curve, where the trainer's set of characters is the same: here, always."""
    smaller = train_tokenizer(Texts(training_texts()), tmp_path / "trained", 2200)
    prefixes = find_prefixes(plain)
    assert isinstance(prefixes, Prefixes)
    cut = prefixes.cut(2200, tmp_path)
    assert cut.vocab_size == 2200
    texts = training_texts()
    assert cut.encode_batch(texts) == smaller.encode_batch(texts)
    assert count(cut, texts) != count(plain, texts)


@pytest.mark.parametrize("kind", ["plain", "with_symbols", "converted", "byte_level"])
def test_cutting(kind: str, plain: Any, with_symbols: Any, byte_level: Any, tmp_path: Path) -> None:
    if kind == "converted":
        convert_tokenizer(with_symbols, tmp_path)
        tokenizer: Tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    else:
        tokenizer = {"plain": plain, "with_symbols": with_symbols, "byte_level": byte_level}[kind]
    prefixes = find_prefixes(tokenizer)
    assert isinstance(prefixes, Prefixes) and prefixes.full == tokenizer.vocab_size
    texts = [text[:3000] for text in training_texts()]
    counts = []
    for size in np.geomspace(prefixes.fixed, prefixes.full, 5).round().astype(int):
        folder = tmp_path / str(size)
        folder.mkdir()
        smaller = prefixes.cut(int(size), folder)
        removed = np.count_nonzero(tokenizer.piece_bytes()) - np.count_nonzero(smaller.piece_bytes())
        assert removed == prefixes.full - size
        assert [smaller.decode(ids) for ids in smaller.encode_batch(texts[:3])] == texts[:3]
        counts.append(sum(count(smaller, texts)))
    assert counts == sorted(counts, reverse=True) and counts[0] > 1.5 * counts[-1]
    assert count(smaller, texts) == count(tokenizer, texts)  # all of it: the tokenizer itself
    if kind != "byte_level":  # symbols are whole at every size
        smallest = prefixes.cut(prefixes.fixed, tmp_path / str(prefixes.fixed))
        assert len(smallest.encode("<br>")) == len(tokenizer.encode("<br>"))


def test_model_and_its_conversion_are_cut_alike(with_symbols: SentencePieceTokenizer, tmp_path: Path) -> None:
    convert_tokenizer(with_symbols, tmp_path)
    both = [find_prefixes(with_symbols), find_prefixes(load_tokenizer(tmp_path / "tokenizer.json"))]
    (tmp_path / "cut").mkdir()
    texts = training_texts()[:20]
    for size in (1400, 2000):
        found = [prefixes.cut(size, tmp_path / "cut") for prefixes in both if isinstance(prefixes, Prefixes)]
        (tmp_path / "cut" / "tokenizer.model").unlink()
        assert len(found) == 2 and count(found[0], texts) == count(found[1], texts)


def test_runs_of_spaces_behind_all_merges_stay(tmp_path: Path) -> None:
    """Llama-2 scores them -1e9, below every merge."""
    characters = [(character, -9.0) for character in "\u2581abc"]
    pieces = [("\u2581\u2581", -1e9), ("ab", -1.0), ("abc", -2.0), *characters]
    tokenizer = load_tokenizer(write(handmade_model(pieces), tmp_path / "m.model"))
    prefixes = find_prefixes(tokenizer)
    assert isinstance(prefixes, Prefixes) and prefixes.full - prefixes.fixed == 2
    assert count(prefixes.cut(prefixes.full - 1, tmp_path), ["abc", "  ", "ab"]) == [2, 1, 1]


def test_what_has_no_curve_says_why(unigram: SentencePieceTokenizer, tmp_path: Path) -> None:
    why = find_prefixes(unigram)
    assert isinstance(why, str) and why.startswith("is a unigram model")
    words = Backend(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.save(str(tmp_path / "tokenizer.json"))
    why = find_prefixes(load_tokenizer(tmp_path / "tokenizer.json"))
    assert isinstance(why, str) and "WordLevel" in why
    single = load_tokenizer(write(handmade_model([("中", -1.0)]), tmp_path / "single.model"))
    assert find_prefixes(single) == "has no piece that can be left out"


# ---- the curve and the best size ----


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_interpolation_is_monotone_between_points(y: list[float], seed: int) -> None:
    x = np.cumsum(np.random.default_rng(seed).uniform(0.1, 2, len(y)))
    at = np.linspace(x[0], x[-1], 500)
    found = interpolate_monotone(x, np.array(y), at)
    assert interpolate_monotone(x, np.array(y), x) == pytest.approx(y, abs=1e-12)
    for i in range(len(x) - 1):
        between = found[(at >= x[i]) & (at <= x[i + 1])]
        steps = np.diff(between) * (1 if y[i + 1] >= y[i] else -1)
        assert (steps >= -1e-9).all()


def test_best_size_of_a_known_curve() -> None:
    """tokens = (V - 300)^-0.1 and FLOPs = 1000 + V: by calculus the best V is 0.1 x 1000 / 0.9 + 300 / 0.9."""
    sizes = tuple(int(size) for size in 300 + np.geomspace(10, 20_000, 14))
    tokens = tuple({"overall": (size - 300) ** -0.1, "zh": 1.0} for size in sizes)
    curve = CompressionCurve(300, sizes, tokens)
    best = find_best(curve, lambda v: 1000.0 + v)
    exact = (0.1 * 1000 + 300) / 0.9
    assert best.size == pytest.approx(exact, abs=2) and best.edge == ""
    rate = lambda v: (v - 300) ** 0.1 / (1000 + v)  # noqa: E731
    assert best.gain == pytest.approx(rate(exact) / rate(sizes[-1]), rel=1e-3)
    for size in best.near:
        assert rate(size) == pytest.approx(0.99 * rate(exact), rel=1e-3)
    assert find_best(curve, lambda v: 1e9 + v).edge == "or more"
    assert find_best(curve, lambda v: v, "zh").edge == "or fewer"
    assert find_best(curve, lambda v: 1e9 + v).size == sizes[-1]


def test_prices(plain: Tokenizer, byte_level: Tokenizer, unigram: Tokenizer) -> None:
    texts = {"text": training_texts()[:30], "more": training_texts()[-2:]}
    config = Config(model=dataclasses.replace(SMALL, ffn_hidden_size=16, num_layers=1), data=DataConfig(seq_length=64))
    sample = sample_texts(texts, 100_000)
    tokenizers = {"plain": plain, "byte_level": byte_level, "unigram": unigram}
    seen: list[int] = []
    prices = price.price_tokenizers(tokenizers, config, sample, threads=2, progress=seen.append)
    for name, tokenizer in tokenizers.items():
        of = prices[name]
        assert of.cost == count_cost(config, tokenizer.vocab_size)
        tokens = sum(count(tokenizer, sample.texts["more"]))
        assert of.tokens_per_byte["more"] == pytest.approx(tokens / sample.kept_bytes["more"])
        assert of.flops_per_byte["more"] == pytest.approx(of.tokens_per_byte["more"] * of.cost.flops)
    assert prices["unigram"].best is None and prices["unigram"].curve == find_prefixes(unigram)
    for name in ("plain", "byte_level"):
        curve, best = prices[name].curve, prices[name].best
        assert isinstance(curve, CompressionCurve) and best is not None
        assert len(curve.sizes) > GRID_SIZES and curve.tokens_per_byte[-1] == prices[name].tokens_per_byte
        # A model as small as this pays for a large head: less than the full vocabulary is better.
        rates = [1 / (found["overall"] * count_cost(config, size).flops)
                 for size, found in zip(curve.sizes, curve.tokens_per_byte)]  # fmt: skip
        assert best["overall"].gain >= 0.9999 * max(rates) / rates[-1] and best["overall"].gain > 1
        assert best["overall"].size < curve.sizes[-1]
    described = price.describe_prices(prices, config, "byte_level")
    assert described["byte_level"]["domains"]["more"]["relative_time_per_byte"] == 1
    assert described["unigram"]["curve"] is None and "unigram" in described["unigram"]["no_curve_because"]
    assert described["plain"]["curve"][-1]["relative_bytes_per_second"] == pytest.approx(1)
    assert len(seen) > 3 * 2  # each size of each domain


def test_a_domain_without_text_is_refused(plain: Tokenizer) -> None:
    with pytest.raises(DataError, match="E322"):
        price.price_tokenizers({"plain": plain}, Config(model=SMALL), sample_texts({"zh": []}))
    with pytest.raises(ConfigError, match="E204"):
        check_priced_config(Config(model=dataclasses.replace(SMALL, num_query_groups=3)))


# ---- the program ----


def call(*arguments: Any) -> subprocess.CompletedProcess:
    command = [sys.executable, str(PROGRAM), "price", *map(str, arguments)]
    return run_quietly(command, timeout=60)


def test_the_program(
    plain: SentencePieceTokenizer, unigram: SentencePieceTokenizer, byte_level: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in training_texts()))
    write_to = ["--pictures", tmp_path / "pictures", "--report", tmp_path / "page.html"]
    models = [plain.path, byte_level.path.parent, unigram.path.parent]
    arguments = [*models, "--config", HAMMER, "--texts", f"all={tmp_path / 't.jsonl'}", "--sample-bytes", 100_000]
    done = call(*arguments, *write_to)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    tables = done.stdout.split("\n\n")
    assert [table.splitlines()[1].split()[0] for table in tables[:3]] == ["tokenizer"] * 3
    rows = [[line.split() for line in table.splitlines()[2:]] for table in tables[:3]]
    assert all(len(of_table) == 3 for of_table in rows)
    assert rows[0][0][:4] == ["tokenizer", "3,000", "0.58%", "6.4038"]
    assert rows[2][2][1:] == ["1,600", "-", "-", "-", "-", "-"] and "is a unigram model" in tables[3]
    assert price.FORMULA in done.stdout
    page = (tmp_path / "page.html").read_text()
    assert "<td>6.4038</td>" in page and price.FORMULA in page and "data:image/png;base64," in page
    assert (tmp_path / "pictures" / "price.png").read_bytes().startswith(b"\x89PNG")

    done = call(*arguments, "--json", "--reference", plain.path)
    facts = json.loads(done.stdout)
    assert facts["reference"] == "tokenizer" and facts["sampled_bytes"]["all"] <= 100_000 < facts["text_bytes"]["all"]
    first, _, last = facts["tokenizers"]
    assert first["domains"]["overall"]["relative_time_per_byte"] == 1
    assert f"{first['best']['overall']['vocab_size']:,}" in tables[2] and last["best"] is None
    assert first["curve"][-1]["vocab_size"] == 3000


@pytest.mark.parametrize("arguments, code", [
    (["{model}", "--texts", "a={dir}/t.jsonl"], "E201"),
    (["{model}", "--config", "{config}"], "E201"),
    (["{model}", "--config", "{dir}/none.yaml", "--texts", "a={dir}/t.jsonl"], "E206"),
    (["{model}", "--config", "{config}", "--texts", "a={dir}/t.jsonl", "--sample-bytes", "0"], "E201"),
    (["{model}", "--config", "{config}", "--texts", "a={dir}/none.jsonl"], "E301"),
])  # fmt: skip
def test_mistakes_are_one_line(arguments: list[str], code: str, plain: SentencePieceTokenizer, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n')
    done = call(*(argument.format(dir=tmp_path, model=plain.path, config=HAMMER) for argument in arguments))
    assert done.stderr.startswith(f"error[{code}]: ") and done.stderr.count("\n") == 1, done.stderr
    assert done.returncode == int(code[1]) and done.stdout == ""


# ---- the real tokenizers ----


def test_price_of_the_published_vocabulary() -> None:
    """The head's share as published; HammerLLM's merge keeps nearly all ranked pieces of InternLM-7B."""
    tokenizers = {n: load_tokenizer(real_model(f"{n}.model")) for n in ("hammerllm", "internlm-7b", "llama2-7b")}
    config = load_config(HAMMER)
    costs = {name: count_cost(config, of.vocab_size) for name, of in tokenizers.items()}
    assert [f"{100 * cost.head_share:.2f}" for cost in costs.values()] == ["16.96", "16.60", "5.82"]
    prefixes = {name: find_prefixes(of) for name, of in tokenizers.items()}
    fixed = {name: of.fixed for name, of in prefixes.items() if isinstance(of, Prefixes)}
    # HammerLLM is InternLM with 2,536 characters and some symbols more: as many pieces may go, less the new symbols.
    assert 0 <= (103_168 - fixed["internlm-7b"]) - (105_789 - fixed["hammerllm"]) <= 101
