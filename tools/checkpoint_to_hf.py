"""Convert a checkpoint to a Hugging Face folder that transformers loads, and prove that it is the same model.

The partitions are merged tensor by tensor; the folder appears at --output only after a separate process has compared
it with the checkpoint (logits of fixed Chinese, English and code text, weights, tokenizer). DIR/certificate.json says
what was compared. On a mismatch the exit code is 5 and nothing is left at --output.
"""

from __future__ import annotations

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, run
from megatron_hammer.base.progress import Activity


def main() -> None:
    parser = ArgumentParser(prog="checkpoint_to_hf.py", description=__doc__)
    parser.add_argument(
        "--load", required=True, metavar="CKPT_OR_RUN", help="checkpoint folder, or a run for its newest"
    )
    parser.add_argument("--step", type=int, metavar="N", help="a run's checkpoint of step N, not its newest")
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder, or an earlier export to replace")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="type of the weights (default: the training run's)"
    )
    parser.add_argument("--max-shard-size", metavar="SIZE", help="largest size of a weights file (default: 5GB)")
    parser.add_argument("--tokenizer", choices=("exact", "as-is", "none"), default="exact",
                        help="exact: one that transformers loads, proved to give the same ids (default): a "
                        "tokenizer.json, or the sentencepiece model where there is none. For a tokenizer that has "
                        "neither: as-is, its files unchanged, or none; the certificate then says why")  # fmt: skip
    arguments = parser.parse_args()

    from megatron_hammer.huggingface.certified import certificate_line
    from megatron_hammer.huggingface.export import export_hf, parse_size

    size = None if arguments.max_shard_size is None else parse_size(arguments.max_shard_size)
    with Activity("exporting, and comparing with the trained model", in_place=False):
        certificate = export_hf(
            arguments.load,
            arguments.output,
            arguments.dtype,
            size,
            step=arguments.step,
            tokenizer=arguments.tokenizer,
        )
    print(certificate_line(certificate))
    print(f"wrote {arguments.output}, for transformers.AutoModelForCausalLM.from_pretrained")


if __name__ == "__main__":
    run(main)
