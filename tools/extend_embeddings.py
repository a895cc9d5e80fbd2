#!/usr/bin/env python3
"""Give a Llama another vocabulary, so that its pretraining can continue with a new (merged, say) tokenizer.

    python tools/extend_embeddings.py internlm-7b/ --new-tokenizer merged/tokenizer.model --output extended/

MODEL is a Hugging Face folder, or one of our checkpoints (a run, its checkpoints folder, a step); DIR becomes the same
kind. Ids are matched by content: a token that both tokenizers have keeps its row bit for bit, whatever its numbers; a
new one gets the mean of the rows of the pieces that the old tokenizer spells it with; control tokens without namesake
or role get the mean of all rows. Rows of MODEL beyond the old tokenizer are dropped. All other weights stay as they
are. DIR/extension.json says where every row that is not a copy came from.

A checkpoint of ours becomes a weights-only one of step 0, to start a new run from: the moments of the optimizer and the
place in the data belong to the old run.
"""

from __future__ import annotations

import shlex

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, as_commands, run
from megatron_hammer.base.progress import Activity


def main() -> None:
    parser = ArgumentParser(prog="extend_embeddings.py", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="Hugging Face folder, checkpoint or run")
    parser.add_argument("--step", type=int, metavar="N", help="a run's checkpoint of step N, not its newest")
    parser.add_argument("--old-tokenizer", metavar="TOKENIZER", help="tokenizer of MODEL (default: the one in it)")
    parser.add_argument("--new-tokenizer", required=True, metavar="TOKENIZER",
                        help="sentencepiece .model, tokenizer.json or a Hugging Face folder")  # fmt: skip
    parser.add_argument("--output", required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--ignore", action="append", default=[], metavar="KEY",
                        help="an unknown key of MODEL's config.json that does not change what it computes")  # fmt: skip
    args = parser.parse_args()

    from megatron_hammer.checkpoint.folder import checkpoint_of_step
    from megatron_hammer.huggingface.extend import REPORT, extend_model, extension_summary

    model = args.model if args.step is None else checkpoint_of_step(args.model, args.step)
    with Activity("making the rows of the new pieces"):
        report = extend_model(model, args.new_tokenizer, args.output, args.old_tokenizer, ignore=args.ignore)
    print(extension_summary(report))
    print(f"wrote {args.output}, and {args.output}/{REPORT}")
    if report["model"]["kind"] == "checkpoint":
        folder = shlex.quote(str(args.output))
        preset = f"{folder}/model.yaml checkpoint.init_from={folder}"
        again = f"python -m megatron_hammer.train {preset} data.train=PREFIX train.output=RUN"
    else:
        again = f"python tools/hf_to_checkpoint.py --hf {shlex.quote(str(args.output))} --save DIR"
    print(as_commands(f"continue from it: {again}"))


if __name__ == "__main__":
    run(main)
