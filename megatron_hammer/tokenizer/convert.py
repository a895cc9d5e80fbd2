"""Give a tokenizer to Hugging Face: a folder whose ids equal ours on every text, proved before it is handed over.

The stock conversion of a sentencepiece model goes wrong for merged vocabularies (HammerLLM's is one): it ranks merges
by piece id, where id order is not score order, and it prepends a space that the model does not ask for. Here the
``tokenizer.json`` is derived from what sentencepiece's BPE does, step by step:

sentencepiece                                           tokenizer.json
------------------------------------------------------  ---------------------------------------------------------------
space becomes U+2581; perhaps one is put in front       normalizer: [Prepend,] Replace
user-defined symbols: longest match, never merged       added tokens, not special, matched after the normalizer
merge the adjacent pair whose piece scores best;        one merge a piece, ranked by score; among equal scores in an
of equal scores the leftmost                            order that keeps "leftmost" (below)
a character without a piece becomes bytes               byte_fallback
a NUL piece, or a single character declared unused,     its entry has a name that no text can spell
is never emitted
``<s>`` in a text is text                               ``split_special_tokens`` in tokenizer_config.json

*One merge a piece.* While a stretch of text is merged into piece p, nothing outside takes part, so the steps are those
of encoding p alone, and the last of them is always the same pair. All other ways to split p never win a merge and can
be left out; so can every p that encoding p alone does not reach.

*Equal scores.* tokenizers gives each merge a rank of its own, so one of two equal merges always goes first, wherever it
stands. That makes a difference only where performing one can prevent or precede the other:
(a) they share a symbol: X = (x, y), Y = (y, z) on x y z; (b) Y = (xy, x) grows what X = (x, y) made, as in runs of
spaces; (c) X's piece is a part of an equal or better piece that takes a symbol which Y needs too. Each demands one
order; a topological sort meets all demands. Should they contradict each other, the final proof decides.

*Unigram models are refused.* The tokenizers library has that algorithm too, but adds up scores in float64 where
sentencepiece does in float32, and of splits that are equal but for rounding (``oc|ation`` against ``oca|tion``; a long
run of spaces in two pieces) it finds another one. Tried with a 6,000-piece model, byte and control pieces put out of
the reach of text and user-defined symbols scored as sentencepiece does: 1 % of 100,000 fuzz strings, 0.6 % of Chinese,
2 % of English and 7 % of code documents still differed.

*The proof.* The folder is loaded with ``AutoTokenizer`` and compared with the source on fixed texts, on every piece, on
random joins of pieces, on noise, and on the texts that the equal scores call for.

A default call adds no special tokens (no post-processor, ``add_bos_token: false``): ``tokenizer(text)`` equals
sentencepiece's ``encode``. Documents were trained as ``<s> ... </s>``, so a prompt for a model should begin with
``tokenizer.bos_token_id``. Who wants that by default loads with ``add_bos_token=True`` (transformers 5; older ones
ignore it for this class), and who wants ``<s>`` in a text to be a control token passes ``split_special_tokens=False``.

The class named in the folder is ``PreTrainedTokenizerFast`` (an alias of ``TokenizersBackend`` in transformers 5): it
takes tokenizer.json as it is. ``LlamaTokenizer`` would rebuild normalizer and merges by its own rules. Ids were equal
in transformers 4.50, 4.57 and 5.23, with and without a Llama ``config.json`` beside them.
"""

from __future__ import annotations

import heapq
import json
import math
import os
import random
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_hammer.base.errors import RefusedError
from megatron_hammer.base.files import dump_json, replace_file, sync_folder
from megatron_hammer.tokenizer.huggingface_backend import HuggingFaceTokenizer
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.lab.fuzz import FIXED_TEXTS, join_pieces, noise
from megatron_hammer.tokenizer.load import load_tokenizer
from megatron_hammer.tokenizer.pieces import SPACE
from megatron_hammer.tokenizer.sentencepiece_backend import SentencePieceTokenizer, load_processor, parse_model

TOKENIZER_CLASS = "PreTrainedTokenizerFast"

Pair = tuple[str, str]


def convert_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write a Hugging Face tokenizer folder and prove that its ids and its decoding equal the tokenizer's.

    Writes ``tokenizer.json`` and ``tokenizer_config.json``; for sentencepiece also ``tokenizer.model`` (unchanged) and
    ``special_tokens_map.json``. A ``tokenizer.json`` that is given is copied, not rebuilt. The folder must exist, and
    what is in it after an error is the caller's to remove.

    Raises:
        RefusedError: E501 the model uses something that tokenizer.json cannot express; E502 the proof found a text with
            other ids or another decoding.
    """
    directory = Path(directory)
    directed: list[str] = []
    pieces: list[str] = []
    if isinstance(tokenizer, SentencePieceTokenizer):
        proto = parse_model(tokenizer.model_bytes, tokenizer.path)
        _refuse_what_cannot_be_expressed(proto, tokenizer.path)
        merges, directed = derive_merges(proto, tokenizer.path)
        pieces = [piece.piece.replace(SPACE, " ") for piece in proto.pieces]
        tokenizer.save_files(directory)
        definition = _build_definition(proto, merges)
        replace_file(directory / "tokenizer.json", json.dumps(definition, ensure_ascii=False).encode())
        special = {
            name: proto.pieces[token_id].piece
            for name, token_id in (
                ("bos_token", tokenizer.bos_id),
                ("eos_token", tokenizer.eos_id),
                ("unk_token", tokenizer.unk_id),
                ("pad_token", tokenizer.pad_id),
            )
            if token_id is not None
        }
        config = {
            "tokenizer_class": TOKENIZER_CLASS,
            **special,
            "add_bos_token": False,
            "add_eos_token": False,
            "split_special_tokens": True,
            "model_input_names": ["input_ids", "attention_mask"],  # a Llama takes no token_type_ids
            "clean_up_tokenization_spaces": False,
        }
        replace_file(directory / "tokenizer_config.json", dump_json(config))
        replace_file(directory / "special_tokens_map.json", dump_json(special))
    else:
        assert isinstance(tokenizer, HuggingFaceTokenizer), f"no conversion for {tokenizer!r}"
        tokenizer.save_files(directory)
        config_path = directory / "tokenizer_config.json"
        config = json.loads(config_path.read_bytes())
        config["tokenizer_class"] = TOKENIZER_CLASS
        config.pop("auto_map", None)  # would run code from elsewhere instead of tokenizer.json
        replace_file(config_path, dump_json(config))
    _prove(tokenizer, directory, pieces, directed)


def publish_tokenizer(source: str | Path, output: str | Path) -> Tokenizer:
    """Convert into a folder that appears at ``output`` only when it is proved.

    It is put together beside ``output`` and renamed; after an error nothing is left there.

    Returns:
        the source, loaded.

    Raises:
        RefusedError: E506 there is something at ``output``; and what ``convert_tokenizer`` raises.
        DataError: what ``load_tokenizer`` raises.
    """
    target = Path(output).resolve()  # a link to an empty folder is that folder
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        rule = "is not empty" if target.is_dir() else "is a file"
        raise RefusedError(6, str(output), rule, "name a new folder, or move that away")
    tokenizer = load_tokenizer(source)
    staging = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    staging.mkdir(parents=True)
    try:
        convert_tokenizer(tokenizer, staging)
        sync_folder(staging)
        os.rename(staging, target)  # over an empty folder, but never over one that was filled meanwhile
        sync_folder(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # gone already after the rename
    return tokenizer


# ---- what tokenizer.json can express ----


def _refuse_what_cannot_be_expressed(proto: Any, path: Path) -> None:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    symbols = any(piece.type == piece.USER_DEFINED for piece in proto.pieces)
    if trainer.model_type == trainer.UNIGRAM:
        raise RefusedError(
            1, str(path), "is a unigram model, and the tokenizers library rounds sums of scores otherwise, so that a "
            "tokenizer.json would differ on some texts",
            "use the .model itself: --tokenizer-model, tokenizer.path and all tools here take it; to export a model to "
            "Hugging Face, train its tokenizer with --model-type bpe",
        )  # fmt: skip
    reasons = (
        (trainer.model_type != trainer.BPE, "is not a BPE model"),
        (not trainer.byte_fallback, "has no byte fallback"),
        (bool(normalizer.precompiled_charsmap), f"normalises characters ({normalizer.name or 'a rule of its own'})"),
        (normalizer.remove_extra_whitespaces, "removes extra spaces"),
        (not normalizer.escape_whitespaces, "does not escape spaces"),
        (trainer.treat_whitespace_as_suffix, "puts spaces at the end of pieces"),
        (bool(proto.denormalizer_spec.precompiled_charsmap), "changes characters when decoding"),
        (normalizer.add_dummy_prefix and symbols, "has both a dummy prefix and user-defined symbols"),
    )
    for found, rule in reasons:
        if found:
            raise _cannot(path, rule)


def _cannot(path: Path, rule: str) -> RefusedError:
    return RefusedError(
        1, str(path), f"{rule}, which a tokenizer.json cannot reproduce exactly",
        "train or choose a BPE model with byte fallback, identity normalisation and whitespace kept",
    )  # fmt: skip


def _is_never_emitted(piece: Any) -> bool:
    """Single characters that sentencepiece has a piece for and yet spells in bytes."""
    return len(piece.piece) == 1 and (piece.type == piece.UNUSED or piece.piece == "\0")


# ---- merges ----


def derive_merges(proto: Any, path: Path) -> tuple[list[Pair], list[str]]:
    """The merges of a sentencepiece BPE model in tokenizers' order, and texts on which that order matters.

    Raises:
        RefusedError: E501 where a merge cannot be written down.
    """
    mergeable = [p for p in proto.pieces if p.type in (p.NORMAL, p.USER_DEFINED, p.UNUSED) and p.piece != "\0"]
    scores = {piece.piece: piece.score for piece in mergeable}
    ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    emitted = {piece.piece for piece in mergeable if not _is_never_emitted(piece)}
    symbols = [p.piece for p in mergeable if p.type == p.USER_DEFINED and " " not in p.piece]
    has_symbol = re.compile("|".join(map(re.escape, symbols)) if symbols else "(?!)").search

    last_pairs: dict[str, Pair] = {}  # piece: the pair that always makes it
    for piece in mergeable:
        text = piece.piece
        # A symbol in the text is cut out before merging: no merge can span it.
        if len(text) < 2 or has_symbol(text) or (pair := _last_merge(text, scores)) is None:
            continue
        if piece.type == piece.UNUSED:
            raise _cannot(path, f"merges into the unused piece {text!r} and takes it apart again")
        if missing := [part for part in pair if part not in emitted]:
            raise _cannot(path, f"merges the character {missing[0]!r}, which has no piece, into {text!r}")
        last_pairs[text] = pair

    by_score = defaultdict(list)
    for text in last_pairs:
        by_score[scores[text]].append(text)
    demands, directed = _order_demands(last_pairs, scores)
    merges = []
    for score in sorted(by_score, reverse=True):
        for text in _sort_equals(by_score[score], ids, demands):
            merges.append(last_pairs[text])
    return merges, directed


def _last_merge(text: str, scores: Mapping[str, float]) -> Pair | None:
    """The last of the merges that make ``text`` one piece; None where merging ends earlier.

    Quadratic in the length, which is a few dozen characters at most.
    """
    parts = list(text)
    while len(parts) > 2:
        best, at = None, -1
        for index in range(len(parts) - 1):
            score = scores.get(parts[index] + parts[index + 1])
            if score is not None and (best is None or score > best):  # ">": of equals the leftmost
                best, at = score, index
        if best is None:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _order_demands(
    last_pairs: Mapping[str, Pair], scores: Mapping[str, float]
) -> tuple[dict[str, set[str]], list[str]]:
    """For each piece the equal-scored pieces that must be ranked after it, by the module's rules (a), (b), (c)."""
    by_left, by_right = defaultdict(list), defaultdict(list)  # (symbol, score): pieces that have it as that part
    for text, (left, right) in last_pairs.items():
        by_left[left, scores[text]].append(text)
        by_right[right, scores[text]].append(text)
    # The worst score among the merges inside a piece: merging gets to it after everything better is done.
    levels: dict[str, float] = {}
    for text in sorted(last_pairs, key=len):
        left, right = last_pairs[text]
        levels[text] = min(scores[text], levels.get(left, math.inf), levels.get(right, math.inf))
    demands: dict[str, set[str]] = defaultdict(set)
    directed: list[str] = []

    def level(*parts: str) -> float:
        return min((levels.get(part, math.inf) for part in parts), default=math.inf)

    def demand(first: str, second: str, left: Sequence[str], shared: Sequence[str], right: Sequence[str]) -> None:
        """Rank ``first`` before ``second``, if the symbols left + shared + right can wait side by side for both.

        They cannot where one side comes to be only when the other pair is long merged, or where the right side holds
        what ``first`` makes: of the same merge, the one on the left happens first anyway.
        """
        if first == second:
            return
        late_right = level(*right) < min(level(*left, *shared), scores[first])
        late_left = level(*left) < min(level(*shared, *right), scores[first])
        directed.append("".join((*left, *shared, *right)).replace(SPACE, " "))
        if not late_right and not late_left and first not in right:
            demands[first].add(second)

    for text, pair in last_pairs.items():
        left, right = pair
        for other in by_left[right, scores[text]]:  # (a)
            demand(text, other, (left,), (right,), (last_pairs[other][1],))
        if left in last_pairs and scores[left] == scores[text] and last_pairs[left][0] == right:  # (b)
            demands[text].add(left)
        if left in last_pairs and scores[left] <= scores[text]:  # (c), on the right side: left is made, then taken
            for other in by_left[right, scores[left]]:
                if other != text:
                    demand(left, other, last_pairs[left], (), last_pairs[other])
        if right in last_pairs and scores[right] < scores[text]:  # (c), on the left side; equal scores are (a)
            for other in by_right[left, scores[right]]:
                demand(other, right, last_pairs[other], (), last_pairs[right])
    return demands, directed


def _sort_equals(texts: list[str], ids: Mapping[str, int], demands: Mapping[str, set[str]]) -> Iterator[str]:
    """Pieces of one score in an order that meets the demands; otherwise by id (Kahn's algorithm)."""
    waiting_for = dict.fromkeys(texts, 0)
    for text in texts:
        for later in demands.get(text, ()):
            if later in waiting_for:
                waiting_for[later] += 1
    ready = [(ids[text], text) for text in texts if waiting_for[text] == 0]
    heapq.heapify(ready)
    while waiting_for:
        if ready:
            text = heapq.heappop(ready)[1]
        else:  # the demands contradict each other: go on somewhere, and leave the verdict to the proof
            text = min(waiting_for, key=lambda t: (waiting_for[t], ids[t]))
        del waiting_for[text]
        yield text
        for later in demands.get(text, ()):
            if later in waiting_for:
                waiting_for[later] -= 1
                if waiting_for[later] == 0:
                    heapq.heappush(ready, (ids[later], later))


# ---- tokenizer.json ----


def _build_definition(proto: Any, merges: list[Pair]) -> dict[str, Any]:
    names = _vocabulary_names(proto)
    added = []
    for index, piece in enumerate(proto.pieces):
        control = piece.type in (piece.CONTROL, piece.UNKNOWN)
        # A symbol with a raw space never matches: the space of the text is escaped before symbols are looked for.
        if control or (piece.type == piece.USER_DEFINED and " " not in piece.piece):
            added.append(
                {
                    "id": index,
                    "content": names[index],
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": not control,
                    "special": control,
                }
            )
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    undo: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    normalizer: dict[str, Any] = spaces
    if proto.normalizer_spec.add_dummy_prefix:
        normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, spaces]}
        undo.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": undo},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next(names[i] for i, piece in enumerate(proto.pieces) if piece.type == piece.UNKNOWN),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {name: index for index, name in enumerate(names)},
            "merges": [list(pair) for pair in merges],
        },
    }


def _vocabulary_names(proto: Any) -> list[str]:
    """The pieces by id; those that are never emitted under a name that is too long to be met as a character."""
    taken = {piece.piece for piece in proto.pieces}
    names = []
    for index, piece in enumerate(proto.pieces):
        name = piece.piece
        if _is_never_emitted(piece):
            name = f"<unused_{index}>"
            while name in taken:
                name = f"<{name}>"
            taken.add(name)
        names.append(name)
    return names


# ---- the proof ----

_RANDOM_JOINS = 20_000  # of pieces; with all pieces and the noise, some 10 s for 105,789 pieces on one EPYC core
_RANDOM_NOISE = 2_000


class Difference(NamedTuple):
    text: str
    expected: Any
    found: Any


def _prove(tokenizer: Tokenizer, directory: Path, pieces: list[str], directed: list[str]) -> None:
    """Load the folder as users will, and compare ids and decoding on all texts of the proof."""
    from transformers import AutoTokenizer

    try:
        converted = AutoTokenizer.from_pretrained(str(directory))
    except (ValueError, OSError, TypeError) as error:
        raise RefusedError(
            2, str(tokenizer.path), f"is refused by transformers: {error}", "choose another tokenizer"
        ) from None
    if difference := _find_difference(tokenizer, converted, pieces, directed):
        text, expected, found = difference
        raise RefusedError(
            2, str(tokenizer.path),
            f"and its Hugging Face form differ on the text {text[:60]!r}: {expected} against {found}",
            "this tokenizer cannot be exported exactly; report it with the file",
        )  # fmt: skip


def _find_difference(tokenizer: Tokenizer, converted: Any, pieces: list[str], directed: list[str]) -> Difference | None:
    exact_call = isinstance(tokenizer, SentencePieceTokenizer)
    # The library itself, not our encoder: the proof is about its ids.
    encode: Callable[[list[str]], list[list[int]]] = tokenizer.encode_batch
    if isinstance(tokenizer, SentencePieceTokenizer):
        encode = load_processor(tokenizer.model_bytes, tokenizer.path).encode
    # A sentencepiece export needs no arguments to be equal; a given tokenizer.json keeps its owner's defaults.
    arguments = {} if exact_call else {"add_special_tokens": False, "split_special_tokens": True}
    marks = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
    for text in FIXED_TEXTS:
        expected = encode([text])[0]
        found = converted(text, **arguments)["input_ids"]
        if found != expected:
            return Difference(text, *_first_difference(expected, found))
        if exact_call and converted(text, add_special_tokens=False)["input_ids"] != expected:
            return Difference(text, "ids as by default", "others with add_special_tokens=False")
        decoded = converted.decode(
            [*marks, *found, *marks], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if decoded != (wanted := tokenizer.decode(found)):
            return Difference(text, wanted, decoded)

    # The calls above have set the backend's switches; from here on it is asked directly, in batches.
    backend = converted.backend_tokenizer
    texts = list(_random_texts(pieces)) + directed + pieces
    for start in range(0, len(texts), 4096):
        batch = texts[start : start + 4096]
        expected_ids = encode(batch)
        found_ids = [e.ids for e in backend.encode_batch_fast(batch, add_special_tokens=exact_call)]
        found_texts = backend.decode_batch(found_ids, skip_special_tokens=True)
        for text, expected, found, decoded in zip(batch, expected_ids, found_ids, found_texts):
            if found != expected:
                return Difference(text, *_first_difference(expected, found))
            if decoded != (wanted := tokenizer.decode(expected)):
                return Difference(text, wanted, decoded)
    return None


def _random_texts(pieces: list[str]) -> Iterator[str]:
    generator = random.Random(3407)  # the same proof every time
    for _ in range(_RANDOM_NOISE):
        yield noise(generator)
    if not pieces:
        return
    for _ in range(_RANDOM_JOINS):
        yield join_pieces(generator, pieces)


def _first_difference(expected: list[int], found: list[int]) -> tuple[str, str]:
    """Both lists from the first place where they differ, shortened."""
    at = next((i for i, (a, b) in enumerate(zip(expected, found)) if a != b), min(len(expected), len(found)))
    return f"id {at} on {_shorten(expected[at:])}", f"{_shorten(found[at:])}"


def _shorten(ids: Iterable[int]) -> str:
    ids = list(ids)
    return str(ids[:6])[:-1] + (", ...]" if len(ids) > 6 else "]")
