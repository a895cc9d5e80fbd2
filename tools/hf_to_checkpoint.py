"""Convert a Llama, Qwen2, Qwen3 or Mistral of Hugging Face to a checkpoint, so that pretraining can continue from it.

The result is DIR/checkpoints/step-00000000 with the weights in their own type, and DIR/model.yaml with the model's
settings. Start a new run from it with checkpoint.init_from=DIR, or convert it back with checkpoint_to_hf.py --load DIR.
A feature of the model that ours does not have is refused by name. Keys of config.json that change nothing that the
model computes are passed over, and named; one that is unknown is refused until --ignore names it.
"""

from __future__ import annotations

import shlex

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, as_commands, run
from megatron_hammer.base.progress import Activity


def main() -> None:
    parser = ArgumentParser(prog="hf_to_checkpoint.py", description=__doc__)
    parser.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face folder with safetensors weights")
    parser.add_argument("--save", required=True, metavar="DIR", help="folder for the checkpoint")
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="KEY",
        help="an unknown key of config.json that does not change what the model computes; may be repeated",
    )
    arguments = parser.parse_args()

    from megatron_hammer.huggingface.importing import import_hf

    with Activity("converting"):
        checkpoint = import_hf(arguments.hf, arguments.save, ignore=arguments.ignore)
    print(f"wrote {checkpoint}")
    folder = shlex.quote(str(arguments.save))
    preset = f"{folder}/model.yaml checkpoint.init_from={folder}"
    print(as_commands(f"continue from it: python -m megatron_hammer.train {preset} data.train=PREFIX train.output=RUN"))


if __name__ == "__main__":
    run(main)
