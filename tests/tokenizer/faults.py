"""The mistakes of stock conversions, and some others, planted into a right tokenizer.json."""

from __future__ import annotations

from typing import Any


def plant(fault: str, definition: dict[str, Any]) -> None:
    """Spoil a converted sentencepiece model in place; a fault that lies in the settings beside it is left alone."""
    model, normalizer = definition["model"], definition["normalizer"]
    match fault:
        case "merges by id":
            model["merges"].sort(key=lambda pair: -model["vocab"][pair[0] + pair[1]])
        case "prefix":
            prepend = {"type": "Prepend", "prepend": "\u2581"}
            definition["normalizer"] = {"type": "Sequence", "normalizers": [prepend, normalizer]}
        case "symbols dropped":
            definition["added_tokens"] = [t for t in definition["added_tokens"] if t["special"]]
        case "NUL":
            name = next(iter(reversed(model["vocab"])))  # a single character, the last piece
            model["vocab"] = {("\0" if key == name else key): value for key, value in model["vocab"].items()}
        case "wrong decoder":
            definition["decoder"]["decoders"].pop(0)
        case "bos":
            definition["post_processor"] = {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * 2
                + [{"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
            }
        case "a space lost":
            strip = {"type": "Strip", "strip_left": False, "strip_right": True}
            definition["normalizer"] = {"type": "Sequence", "normalizers": [strip, normalizer]}
        case "specials match":
            pass
        case _:
            raise ValueError(fault)
