"""Adds the characters of another sentencepiece model, and symbols, to a sentencepiece model, as HammerLLM's was made.

    base  ---+--> calibrate --> append characters --> set symbols --> tokenizer.model
    donor --'     (the ratio)   (donor x ratio)       (score 0)       tokenizer.merge.json, tokenizer.calibration.png

A merge score of BPE is minus the rank at which training made the piece; characters come after all merges, in the order
of their counts. So the scores of one model mean nothing in another with more or fewer merges. They are made comparable
by one factor: over the characters that both know, the mean of base score / donor score.

The rules, in their order:

1. Ratio: over the calibration characters (of the Table of General Standard Chinese Characters those of level 1) that
   are normal pieces with a score in both. Plain left-to-right addition in double precision: the published figure is
   this sum, and a compensated one (``math.fsum``, and ``sum`` itself since Python 3.12) ends in another digit.
2. Each required character that the base lacks is appended, in order, type NORMAL, with score = donor score x ratio,
   rounded once, to the float32 that a model file holds.
3. Each symbol that is a piece by now keeps its id and gets score 0 and type USER_DEFINED; any other is appended so.

Symbols are literal: ``\\357\\274\\220`` is a symbol of twelve characters, not a full-width zero. A space in one is
written as in every piece (U+2581), so that it matches a space in text.

Everything else of the base (its settings, its vocab_size of training too) stays as it is. Bytes of the result depend on
the three inputs alone. Source: the published HammerLLM tokenizer, which ``test_merge.py`` reproduces to the byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import ConfigError, DataError, RefusedError
from megatron_hammer.base.files import dump_json, replace_file
from megatron_hammer.base.language import Language
from megatron_hammer.base.pictures import COLOURS, new_figure, picture_sayer, png_of, tidy
from megatron_hammer.tokenizer.load import load_tokenizer
from megatron_hammer.tokenizer.required_characters import TABLE_NAME, RequiredCharacters, load_table
from megatron_hammer.tokenizer.sentencepiece_backend import SentencePieceTokenizer, load_processor, parse_model
from megatron_hammer.tokenizer.symbols import check_symbols, read_symbols

MODEL_NAME = "tokenizer.model"
REPORT_NAME = "tokenizer.merge.json"
PICTURE_NAME = "tokenizer.calibration.png"

_NAMED_CHARACTERS = 200  # of a longer list in an error line: more means another list than was meant
_HISTOGRAM_BINS = 60  # chosen by eye


@dataclass(frozen=True)
class Calibration:
    """Base score / donor score of each character that both models know.

    Attributes:
        characters: those characters; ``ratios[i]`` is of ``characters[i]``.
    """

    characters: str
    ratios: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The ratio by which donor scores are multiplied."""
        total = 0.0
        for ratio in self.ratios:  # not sum(): see the module, rule 1
            total += ratio
        return total / len(self.ratios)


@dataclass(frozen=True)
class MergedModel:
    """A merged model and what was done to the base.

    Attributes:
        model: content of the model file.
        calibration: where the ratio comes from.
        base_size: pieces of the base; those appended have the ids from here on, characters first.
        characters: appended characters.
        appended_symbols: symbols (as pieces) that the base lacked.
        changed_symbols: symbols that were pieces before, with their ids and their scores before.
    """

    model: bytes
    calibration: Calibration
    base_size: int
    characters: str
    appended_symbols: tuple[str, ...]
    changed_symbols: tuple[tuple[str, int, float], ...]

    @property
    def size(self) -> int:
        """Pieces of the merged model."""
        return self.base_size + len(self.characters) + len(self.appended_symbols)


def merge_files(
    base: str | Path,
    donor: str | Path,
    required: RequiredCharacters,
    symbols_file: str | Path | None,
    output: Path,
    language: Language = "en",
) -> MergedModel:
    """Merge and write the model, the report of what was added and the histogram of the ratios into a folder.

    All is computed before the first file is written, and the model is written last.

    Args:
        language: of the histogram's texts, where an installed font has it.

    Raises:
        ConfigError: E261 bad symbol or symbol file, E265 no symbol in it, E267 a symbol that is a control piece.
        DataError: E310-E312 no whole model, E317 no sentencepiece model, E318 a character that the base never uses.
        RefusedError: E503 the donor lacks characters, E504 nothing to calibrate on, E505 not both BPE.
    """
    output = Path(output)
    base_tokenizer, donor_tokenizer = _load_model(base), _load_model(donor)
    symbols = read_symbols(symbols_file) if symbols_file is not None else []
    if symbols_file is not None and not symbols:
        raise ConfigError(65, str(symbols_file), "holds no symbol", "fill it, or leave --user-defined-symbols out")
    merge = merge_models(base_tokenizer, donor_tokenizer, required, symbols)
    title = f"{base_tokenizer.path.name} / {donor_tokenizer.path.name}"
    picture = draw_calibration(merge.calibration, title, language)
    report = _describe(merge, base_tokenizer, donor_tokenizer, required)

    output.mkdir(parents=True, exist_ok=True)
    replace_file(output / PICTURE_NAME, picture)
    replace_file(output / REPORT_NAME, dump_json(report))
    replace_file(output / MODEL_NAME, merge.model)
    return merge


def _load_model(path: str | Path) -> SentencePieceTokenizer:
    tokenizer = load_tokenizer(path)
    if not isinstance(tokenizer, SentencePieceTokenizer):
        raise DataError(17, str(tokenizer.path), "is no sentencepiece model", "only those can be merged: name a .model")
    return tokenizer


# ---- the rules ----


def merge_models(
    base: SentencePieceTokenizer, donor: SentencePieceTokenizer, required: RequiredCharacters, symbols: Sequence[str]
) -> MergedModel:
    """The merged model, by the module's three rules; writes nothing.

    Raises:
        ConfigError, DataError, RefusedError: as ``merge_files``, but for the files' own.
    """
    proto, donor_proto = parse_model(base.model_bytes, base.path), parse_model(donor.model_bytes, donor.path)
    if proto.trainer_spec.model_type != donor_proto.trainer_spec.model_type:
        names = [p.trainer_spec.ModelType.Name(p.trainer_spec.model_type) for p in (proto, donor_proto)]
        raise RefusedError(
            5, str(donor.path), f"is a {names[1]} model and the base a {names[0]} one, so their scores have no ratio",
            "merge models of one algorithm",
        )  # fmt: skip
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise RefusedError(
            5, f"{base.path} and {donor.path}", "are no BPE models: their scores are not ranks but log probabilities, "
            "which differ by a sum and not by the ratio of this merge", "merge BPE models (--model-type bpe)",
        )  # fmt: skip
    pieces = {piece.piece: (index, piece) for index, piece in enumerate(proto.pieces)}
    donor_scores = {piece.piece: piece.score for piece in donor_proto.pieces if piece.type == piece.NORMAL}
    base_size = len(proto.pieces)

    def append(text: str, score: float, **kind: int) -> None:
        pieces[text] = len(proto.pieces), proto.pieces.add(piece=text, score=score, **kind)

    # 1. the ratio
    scores = {text: piece.score for text, (_, piece) in pieces.items() if piece.type == piece.NORMAL}
    calibration = calibrate(scores, donor_scores, required.common)
    if not calibration.ratios:
        raise RefusedError(
            4, f"{base.path} and {donor.path}", f"have none of the {len(required.common)} calibration characters of "
            f"{required.name} in common", "use models that both know Chinese, or another list of characters",
        )  # fmt: skip

    # 2. characters
    missing = _missing_characters(pieces, required, base.path)
    if absent := [character for character in missing if character not in donor_scores]:
        raise _lacking(absent, len(missing), donor.path, required.name, pieces.keys() | donor_scores.keys())
    for character in missing:
        # NORMAL is the format's default; left unsaid, the file equals the published one byte for byte.
        append(character, donor_scores[character] * calibration.mean)

    # 3. symbols
    appended, changed = [], []
    for symbol in check_symbols(symbols):
        if symbol not in pieces:
            append(symbol, 0.0, type=proto.SentencePiece.USER_DEFINED)
            appended.append(symbol)
            continue
        index, piece = pieces[symbol]
        if piece.type in (piece.CONTROL, piece.UNKNOWN, piece.BYTE):
            raise ConfigError(
                67, f"user-defined symbol {symbol!r}", f"is a control or byte piece of {base.path}",
                "remove it from the list",
            )  # fmt: skip
        changed.append((symbol, index, piece.score))
        piece.score, piece.type = 0.0, piece.USER_DEFINED

    model = proto.SerializeToString(deterministic=True)
    load_processor(model, base.path)  # sentencepiece's own checks (a piece twice, say), before anything is written
    return MergedModel(model, calibration, base_size, "".join(missing), tuple(appended), tuple(changed))


def calibrate(base_scores: dict[str, float], donor_scores: dict[str, float], characters: str) -> Calibration:
    """The ratios of the characters that have a score in both: trained ones are below 0, and 0 is that of none."""
    both = "".join(c for c in characters if base_scores.get(c, 0.0) < 0.0 and donor_scores.get(c, 0.0) < 0.0)
    return Calibration(both, tuple(base_scores[c] / donor_scores[c] for c in both))


def _missing_characters(pieces: dict[str, tuple[int, Any]], required: RequiredCharacters, path: Path) -> list[str]:
    missing = []
    for character in required.characters:
        if character not in pieces:
            missing.append(character)
            continue
        _, piece = pieces[character]
        if piece.type not in (piece.NORMAL, piece.USER_DEFINED):
            raise DataError(
                18, str(path), f"holds the required character {character!r} as a piece that no text gets (control or "
                "unused)", "take another base, or remove the character from the list",
            )  # fmt: skip
    return missing


def _lacking(absent: list[str], missing: int, donor: Path, name: str, known: Set[str]) -> RefusedError:
    """The donor lacks characters; where it has those of the standard table, that is the list to take."""
    shown = "".join(absent[:_NAMED_CHARACTERS])
    if len(absent) > _NAMED_CHARACTERS:
        shown += f" and {len(absent) - _NAMED_CHARACTERS} more"
    remedy = "train the donor with these as --required-characters, or leave them out of the list"
    if name != TABLE_NAME and all(character in known for character, _ in load_table()):
        remedy = (
            f"take --required-chars {TABLE_NAME}, the table of 8,105 standard characters, which base and donor know "
            f"(HammerLLM's list and ratio), or {remedy}"
        )
    rule = f"lacks {len(absent)} of the {missing} required characters of {name} that the base lacks ({shown})"
    return RefusedError(3, str(donor), rule, remedy)


# ---- what is written beside the model ----


def draw_calibration(calibration: Calibration, title: str, language: Language = "en") -> bytes:
    """A histogram of the ratios as PNG; the same bytes for the same input, fonts and matplotlib."""
    say, count = picture_sayer(language), len(calibration.ratios)
    figure = new_figure(
        4.8,
        say("Calibration: ", "校准：") + title,
        say(f"Source: the {count:,} common characters that are one piece in both models",
            f"来源：在两个模型中都自成一个词的 {count:,} 个常用字"),
    )  # fmt: skip
    axes = figure.subplots()
    axes.hist(calibration.ratios, bins=_HISTOGRAM_BINS, color="0.7")
    axes.axvline(
        calibration.mean, color=COLOURS[1], linewidth=1.6, label=say("mean: ", "平均：") + f"{calibration.mean:.5f}"
    )
    lowest, highest = (f"{found(calibration.ratios):.5f}" for found in (min, max))
    axes.plot([], [], " ", label=say(f"smallest: {lowest}, largest: {highest}", f"最小：{lowest}，最大：{highest}"))
    axes.set_xlabel(say("base score / donor score", "base 的分数 / donor 的分数"))
    axes.set_ylabel(say("characters", "字数"))
    axes.legend(frameon=False, loc="upper left")
    axes.margins(y=0.25)  # room for the legend above the bars
    tidy(axes)
    return png_of(figure)


def _describe(
    merge: MergedModel, base: SentencePieceTokenizer, donor: SentencePieceTokenizer, required: RequiredCharacters
) -> dict[str, Any]:
    """The report; it names files without their folders, so that equal inputs give equal reports anywhere."""
    calibration = merge.calibration
    first_symbol = merge.base_size + len(merge.characters)
    return {
        "base": _describe_model(base),
        "donor": _describe_model(donor),
        "pieces": merge.size,
        "sha256": hashlib.sha256(merge.model).hexdigest(),
        "calibration": {
            "characters": len(calibration.characters),
            "ratio_mean": calibration.mean,
            "ratio_min": min(calibration.ratios),
            "ratio_max": max(calibration.ratios),
        },
        "required_characters": {"name": required.name, "count": len(required.characters)},
        "appended_characters": {
            "first_id": merge.base_size,
            "count": len(merge.characters),
            "characters": merge.characters,
        },
        "appended_symbols": [{"id": first_symbol + i, "piece": p} for i, p in enumerate(merge.appended_symbols)],
        "changed_symbols": [{"id": i, "piece": p, "score_before": s} for p, i, s in merge.changed_symbols],
    }


def _describe_model(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    return {
        "file": tokenizer.path.name,
        "sha256": hashlib.sha256(tokenizer.model_bytes).hexdigest(),
        "pieces": tokenizer.vocab_size,
    }
