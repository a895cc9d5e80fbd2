"""Continue prompts with a trained model: a checkpoint, a run, or a Hugging Face folder; or talk with it.

    python tools/generate.py --hf runs/pretrain_1b4/hf --prompt "import numpy" --prompt "The weather"
    python tools/generate.py --load runs/pretrain_1b4 --prompts prompts.jsonl --batch-size 8 --json > texts.jsonl
    python tools/generate.py --load runs/pretrain_1b4 --chat

transformers generates, with its cache of keys and values. A checkpoint is not exported for it: its weights go into
transformers' class as an export would write them, so both give the same tokens.

A prompt begins as documents began in training: with bos where they did (--prepend-bos), else with the eos that ended
the document before (--append-eod), else with nothing; a folder that is no export of ours: as its tokenizer begins a
text. --begin overrides this; stderr says what was done.

--chat keeps what was said and shows answers as they come. A base model has no chat template: it goes on with the text
so far. Lines are edited with prompt_toolkit where it is installed (pip install prompt_toolkit), else with readline.
"""

from __future__ import annotations

import sys
from pathlib import Path

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, print_json, run
from megatron_hammer.base.errors import ConfigError
from megatron_hammer.base.progress import Activity, say, track
from megatron_hammer.base.streams import only_list


def parser() -> ArgumentParser:
    parser = ArgumentParser(prog="generate.py", description=__doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--hf", metavar="DIR", type=Path, help="Hugging Face folder (checkpoint_to_hf.py)")
    model.add_argument("--load", metavar="CKPT_OR_RUN", help="checkpoint folder, or a run for its newest")
    add = parser.add_argument
    add("--step", type=int, metavar="N", help="a run's checkpoint of step N, not its newest")
    add("--prompt", action="append", default=[], metavar="TEXT", help="text to continue; may be repeated")
    add("--prompts", type=Path, metavar="FILE", help="prompts: .jsonl (--key), or text with one a line")
    add("--key", default="prompt", metavar="KEY", help="field of the prompts in a .jsonl (default: prompt)")
    add("--chat", action="store_true", help="talk with the model on the terminal")
    add("--system", default="", metavar="TEXT", help="system message that a chat begins with")
    add("--max-new-tokens", type=int, metavar="N", help="longest continuation (default: 48; 256 with --chat)")
    add("--temperature", type=float, default=0.7, metavar="T",
        help="0: always the likeliest token; 1: the model's own probabilities (default: 0.7)")  # fmt: skip
    add("--top-k", type=int, default=40, metavar="K", help="sample among the K likeliest, 0: among all (default: 40)")
    add("--top-p", type=float, metavar="P", help="sample among the likeliest that together have probability P "
        "(default: the model's generation_config, else 1)")  # fmt: skip
    add("--repetition-penalty", type=float, metavar="R", help="above 1: makes tokens that occurred before less likely "
        "(default: the model's generation_config, else 1)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="S", help="same seed, same texts (default: 0)")
    add("--batch-size", type=int, default=1, metavar="B", help="prompts that are continued at once (default: 1)")
    add("--begin", choices=("auto", "bos", "eos", "none"), default="auto",
        help="what prompts begin with (default: auto, as documents did in training)")  # fmt: skip
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="type of the weights (default: the model's own)")
    add("--device", default="auto", metavar="D", help="cpu, cuda, cuda:N (default: a GPU where there is one)")
    add("--json", action="store_true", help="a JSON object for each prompt, with ids and why it ended")
    return parser


def main() -> None:
    words = parser()
    args = words.parse_args()
    only_list()
    if args.chat == bool(args.prompt or args.prompts):
        remedy = "add --prompt TEXT, --prompts FILE or --chat" if not args.chat else "leave --chat or the prompts out"
        raise ConfigError(1, words.prog, "was called wrongly: it takes prompts, or talks with --chat", remedy)
    if args.step is not None and args.hf is not None:
        rule = "was called wrongly: --step is of a run"
        raise ConfigError(1, words.prog, rule, "name the run with --load, or leave --step out")
    if args.chat:
        words.refuse_idle("with --chat: it is for prompts", "--json", "--batch-size")
    else:
        words.refuse_idle("without --chat", "--system")
    if args.prompts is None:
        words.refuse_idle("without --prompts FILE.jsonl", "--key")
    from megatron_hammer.huggingface.generate import Sampling, continue_texts, read_prompts
    from megatron_hammer.huggingface.text_model import open_folder, open_text_model

    longest = args.max_new_tokens if args.max_new_tokens is not None else (256 if args.chat else 48)
    sampling = Sampling(longest, args.temperature, args.top_k, args.top_p, args.repetition_penalty, args.seed)
    sampling.check()
    prompts = [*args.prompt, *(read_prompts(args.prompts, args.key) if args.prompts is not None else ())]
    with Activity("reading the model"):
        if args.hf is not None:
            model = open_folder(args.hf, args.begin, args.dtype, args.device)
        else:
            model = open_text_model(args.load, args.step, args.begin, args.dtype, args.device)
    if args.chat:
        from megatron_hammer.base.line_input import line_reader
        from megatron_hammer.huggingface.chat import Chat, converse

        converse(Chat(model, sampling, args.system), line_reader()[0], _write, say)
        return
    say(model.start_words)
    found = continue_texts(model, prompts, sampling, args.batch_size)
    with Activity("continuing the prompts"):
        for number, one in enumerate(track(found, "continued", len(prompts), "prompts"), start=1):
            if args.json:
                print_json(one.to_tree())
            else:
                print(f"--- {number} of {len(prompts)}\n{one.whole}", flush=True)


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


if __name__ == "__main__":
    run(main)
