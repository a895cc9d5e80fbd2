#!/usr/bin/env python3
"""Merge characters of a donor, and symbols, into a sentencepiece model, as HammerLLM's tokenizer was made.

    python tools/merge_tokenizer.py --base internlm-7b.model --donor llama_zh_128k.model \\
        --required-characters tgh2013 --user-defined-symbols symbols.txt --output merged/

Each required character that the base lacks is appended with the donor's score times a ratio: the mean of base score /
donor score over the characters that both have (of the table tgh2013 its 3,500 common ones). Then the symbols become
user-defined pieces. DIR gets tokenizer.model, a report of what was added and a histogram of the ratios.
"""

from __future__ import annotations

from pathlib import Path

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, run
from megatron_hammer.base.progress import Activity, say
from megatron_hammer.tokenizer import merge
from megatron_hammer.tokenizer.required_characters import TABLE_NAME, read_required
from megatron_hammer.tokenizer.symbols import doubtful_symbols, read_symbols


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True, metavar="B.model", help="model whose pieces keep their ids")
    parser.add_argument("--donor", required=True, metavar="D.model", help="model that knows the required characters")
    parser.add_argument("--required-characters", "--required-chars", default=TABLE_NAME, metavar=f"FILE|{TABLE_NAME}",
                        help="characters that must have a piece: a file, or the table's 8,105 (default)")  # fmt: skip
    parser.add_argument("--user-defined-symbols", metavar="FILE", help="literal strings that stay whole, one a line")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the merged model")
    parser.add_language("the picture")
    args = parser.parse_args()

    required = read_required(args.required_characters)
    symbols = read_symbols(args.user_defined_symbols) if args.user_defined_symbols else []
    for symbol, meant in doubtful_symbols(symbols).items():
        say(f"note: {args.user_defined_symbols}: symbol {symbol!r} is taken as it stands; HammerLLM's published model "
            f"corrects such to {meant!r}: mend the file if that was meant")  # fmt: skip
    with Activity("merging"):
        result = merge.merge_files(
            args.base, args.donor, required, args.user_defined_symbols, args.output, args.language
        )
    mean, ratios = result.calibration.mean, result.calibration.ratios
    print(f"calibration: {len(ratios):,} of {len(required.common):,} characters, ratio mean {mean!r}, "
          f"min {min(ratios)!r}, max {max(ratios)!r}")  # fmt: skip
    print(f"{args.output / merge.MODEL_NAME}: {result.size:,} pieces = {result.base_size:,} of the base + "
          f"{len(result.characters):,} characters + {len(result.appended_symbols):,} symbols "
          f"({len(result.changed_symbols):,} more symbols were pieces)")  # fmt: skip
    print(f"{args.output / merge.REPORT_NAME}, {args.output / merge.PICTURE_NAME}")


if __name__ == "__main__":
    run(main)
