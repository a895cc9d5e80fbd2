"""Convert a checkpoint of Megatron-LM (a GPT that is a Llama, Qwen2 or Qwen3) to one of ours, without Megatron-LM.

    python tools/megatron_to_checkpoint.py --load RUN --save runs/converted --tokenizer TOKENIZER [--twin HF]

RUN is a folder iter_NNNNNNN, or the one above it (its newest). Read are mp_rank_* files (model_optim_rng.pt,
checkpoint_version 3.0) and torch_dist, of any TP and PP, also interleaved. Nothing that their pickles name is run: what
is not on a short list is refused by its name. The result is DIR/checkpoints/step-00000000 with the weights in their own
types and DIR/model.yaml; start from it with checkpoint.init_from=DIR, or export it with checkpoint_to_hf.py.

The rows of the vocabulary that are padding are cut off: --vocab-size says how many are real, else the twin, the
tokenizer or the checkpoint's arguments do. --twin compares the logits with those of a Hugging Face folder of the same
weights (E520 where they differ; then nothing is left).

Optimizer state is not taken over unless --optimizer asks for it, and then of torch_dist in the format fully_reshardable
(--dist-ckpt-optim-fully-reshardable): DIR/checkpoints/step-N has masters and moments, DIR/model.yaml the settings of
optimizer, schedule and step, and a run with train.output=DIR and --accept data (it says nothing of the data) goes on
at step N + 1.
"""

from __future__ import annotations

import shlex

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, as_commands, run
from megatron_hammer.base.progress import Activity


def main() -> None:
    parser = ArgumentParser(prog="megatron_to_checkpoint.py", description=__doc__)
    parser.add_argument(
        "--load", required=True, metavar="DIR", help="checkpoint of Megatron-LM, or a run's folder of them"
    )
    parser.add_argument("--save", required=True, metavar="DIR", help="folder for the checkpoint")
    parser.add_argument("--tokenizer", metavar="PATH", help="the model's tokenizer, which goes into the checkpoint")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="rows of the vocabulary that are no padding")
    parser.add_argument("--twin", metavar="HF", help="Hugging Face folder of the same weights, to compare logits with")
    parser.add_argument("--optimizer", action="store_true", help="take the optimizer's state over, too")
    arguments = parser.parse_args()

    from megatron_hammer.megatron.importing import import_megatron

    with Activity("reading Megatron-LM's files"):
        checkpoint = import_megatron(
            arguments.load,
            arguments.save,
            arguments.tokenizer,
            arguments.vocab_size,
            arguments.twin,
            arguments.optimizer,
        )
    print(f"wrote {checkpoint}")
    folder = shlex.quote(str(arguments.save))
    rest = f"checkpoint.init_from={folder} data.train=PREFIX train.output=RUN"
    if arguments.optimizer:
        rest = f"data.train=PREFIX train.output={folder} --accept data"
    print(as_commands(f"continue from it: python -m megatron_hammer.train {folder}/model.yaml {rest}"))


if __name__ == "__main__":
    run(main)
