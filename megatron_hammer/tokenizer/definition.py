"""The tokenizer.json of a sentencepiece model, derived from what sentencepiece does, step by step.

The stock conversion goes wrong for merged vocabularies (HammerLLM's is one): it ranks merges by piece id, where id
order is not score order, and it prepends a space that the model does not ask for.

sentencepiece                                           tokenizer.json
------------------------------------------------------  ---------------------------------------------------------------
extra spaces go, where the model says so                normalizer: Replace with an expression, before and after
space becomes U+2581; perhaps one is put in front       normalizer: [Prepend,] Replace
user-defined symbols: longest match, never merged       added tokens, not special, matched after the normalizer
BPE: merge the adjacent pair whose piece scores best;   one merge a piece, ranked by score; among equal scores in an
of equal scores the leftmost                            order that keeps "leftmost" (``bpe_merges.py``)
char: every character is a piece                        no merges
a character without a piece becomes bytes, or, without  byte_fallback, fuse_unk
byte fallback, one unk for all that stand together
a NUL piece, or a single character declared unused or   its entry has a name that no text can spell
a control piece, is never emitted
``<s>`` in a text is text                               ``split_special_tokens`` in tokenizer_config.json

What it cannot express, ``json_obstacle`` names:

- *Unigram.* The tokenizers library has that algorithm too, but adds up scores in float64 where sentencepiece does in
  float32, and of splits that are equal but for rounding (``oc|ation`` against ``oca|tion``; a long run of spaces in two
  pieces) it finds another one. Tried with a 6,000-piece model, byte and control pieces put out of the reach of text and
  user-defined symbols scored as sentencepiece does: 1 % of 100,000 fuzz strings, 0.6 % of Chinese, 2 % of English and
  7 % of code documents still differed.
- *word.* sentencepiece makes one unk of unknown words that follow each other, WordLevel one of each.
- *Normalisation of characters.* sentencepiece applies the longest rule at every place; ``Precompiled`` looks at one
  grapheme and takes its shortest rule (a decomposed Vietnamese vowel loses its tone), or at single characters.
- *A dummy prefix or removed spaces beside user-defined symbols*: the normalizer would change the symbols too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_hammer.tokenizer.bpe_merges import Pair, derive_merges, is_never_emitted
from megatron_hammer.tokenizer.pieces import SPACE


def json_obstacle(proto: Any) -> str:
    """Why no tokenizer.json gives the ids of a sentencepiece model, as far as its settings tell; or an empty string."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    symbols = any(piece.type == piece.USER_DEFINED for piece in proto.pieces)
    reasons = (
        (
            trainer.model_type == trainer.UNIGRAM,
            "is a unigram model, and the tokenizers library rounds sums of scores otherwise",
        ),
        (trainer.model_type == trainer.WORD, "is a word model"),
        (bool(normalizer.precompiled_charsmap), f"normalises characters ({normalizer.name or 'a rule of its own'})"),
        (normalizer.remove_extra_whitespaces and symbols, "has user-defined symbols and removes extra spaces"),
        (not normalizer.escape_whitespaces, "does not escape spaces"),
        (
            trainer.treat_whitespace_as_suffix and normalizer.add_dummy_prefix,
            "puts a space at the end of every text",
        ),
        (bool(proto.denormalizer_spec.precompiled_charsmap), "changes characters when decoding"),
        (normalizer.add_dummy_prefix and symbols, "has both a dummy prefix and user-defined symbols"),
    )
    return next((rule for found, rule in reasons if found), "")


def definition_of(proto: Any, path: Path) -> tuple[dict[str, Any], list[str]]:
    """The content of the tokenizer.json, and texts on which the order of its merges matters.

    Raises:
        RefusedError: E501 where a merge cannot be written down.
    """
    merges: list[Pair] = []
    directed: list[str] = []
    if proto.trainer_spec.model_type == proto.trainer_spec.BPE:
        merges, directed = derive_merges(proto, path)
    return build_definition(proto, merges), directed


def build_definition(proto: Any, merges: list[Pair]) -> dict[str, Any]:
    """The content of the tokenizer.json with these merges."""
    names = _vocabulary_names(proto)
    fallback = proto.trainer_spec.byte_fallback
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(proto, names),
        "normalizer": _normalizer(proto.normalizer_spec),
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": _decoder(proto.normalizer_spec, fallback),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next(names[i] for i, piece in enumerate(proto.pieces) if piece.type == piece.UNKNOWN),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": fallback,
            "ignore_merges": False,
            "vocab": {name: index for index, name in enumerate(names)},
            "merges": [list(pair) for pair in merges],
        },
    }


def _added_tokens(proto: Any, names: list[str]) -> list[dict[str, Any]]:
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
    return added


def _normalizer(spec: Any) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [_replace(" ", SPACE)]
    if spec.add_dummy_prefix:
        steps.insert(0, {"type": "Prepend", "prepend": SPACE})
    if spec.remove_extra_whitespaces:
        steps[:0] = [_replace({"Regex": r"\A +"}, ""), _replace({"Regex": " +"}, " ")]
        steps.append(_replace({"Regex": rf"{SPACE}+\z"}, ""))  # what the text itself writes as U+2581 goes too
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "normalizers": steps}


def _decoder(spec: Any, byte_fallback: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [_replace(SPACE, " "), {"type": "Fuse"}]
    if byte_fallback:
        steps.insert(1, {"type": "ByteFallback"})
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _replace(pattern: str | dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern} if isinstance(pattern, str) else pattern,
            "content": content}  # fmt: skip


def _vocabulary_names(proto: Any) -> list[str]:
    """The pieces by id; those that a text never emits under a name that is too long to be met as a character."""
    taken = {piece.piece for piece in proto.pieces}
    names = []
    for index, piece in enumerate(proto.pieces):
        name = piece.piece
        if is_never_emitted(piece) or (len(name) == 1 and piece.type in (piece.CONTROL, piece.UNKNOWN)):
            name = f"<unused_{index}>"
            while name in taken:
                name = f"<{name}>"
            taken.add(name)
        names.append(name)
    return names
