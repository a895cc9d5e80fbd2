"""Continue prompts with an exported model, loaded by transformers.

python tools/generate.py --hf runs/pretrain_1b4/hf --prompt "import numpy" --prompt "The weather"
"""

from __future__ import annotations

from pathlib import Path

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, run
from megatron_hammer.base.streams import only_list


def main() -> None:
    parser = ArgumentParser(prog="generate.py", description=__doc__)
    parser.add_argument(
        "--hf", required=True, metavar="DIR", type=Path, help="Hugging Face folder (checkpoint_to_hf.py)"
    )
    parser.add_argument(
        "--prompt", required=True, action="append", metavar="TEXT", help="text to continue; may be repeated"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=48, metavar="N", help="longest continuation (default: 48)"
    )
    parser.add_argument("--temperature", type=float, default=0.7, metavar="T",
                        help="0: always the likeliest token; 1: as the model says (default: 0.7)")  # fmt: skip
    parser.add_argument("--top-k", type=int, default=40, metavar="K", help="sample among the K likeliest (default: 40)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="same seed, same texts (default: 0)")
    args = parser.parse_args()
    only_list()
    from megatron_hammer.huggingface.generate import generate

    texts = generate(args.hf, args.prompt, args.max_new_tokens, args.temperature, args.top_k, args.seed)
    for number, text in enumerate(texts, start=1):
        print(f"--- {number} of {len(args.prompt)}\n{text}", flush=True)


if __name__ == "__main__":
    run(main)
