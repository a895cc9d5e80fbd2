"""Loss and perplexity of models on named sets: checkpoints, finished runs, any Hugging Face folder, side by side.

    python tools/evaluate.py runs/mine
    python tools/evaluate.py runs/mine --step 500 --set new=data/new_text_document
    python tools/evaluate.py ours=runs/mine/hf theirs=/models/qwen3 --set zh=zh.valid.jsonl --reference TOKENIZER

A model is a run (its newest checkpoint, or --step), a checkpoint, or a folder with config.json; NAME= before it names
its rows. A set is an indexed dataset of the model's tokenizer, or a text (jsonl, txt, parquet; also .gz, .zst), which
each model's own tokenizer encodes. Without --set: data.valid of the run's config.

Windows of --seq-length tokens follow each other; each token is predicted once, from those before it in its window.
For a run's sets --samples of train.eval_samples gives the figures of its metrics.jsonl; without it whole sets count.
Loss and perplexity are per token and compare models of one tokenizer. Bits per byte and per character compare all;
"by reference" is the perplexity per token of --reference's tokenizer, as tables of models with different tokenizers
state it: e^(sum of -ln p / tokens of the same documents by the reference, one more for the end of each).

Exit code 0: done; 9: a loss is not finite (the table is printed all the same); others: docs/errors.md.
"""

from __future__ import annotations

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, print_json, report_error, run
from megatron_hammer.base.errors import ConfigError, NonFiniteError
from megatron_hammer.base.progress import Activity
from megatron_hammer.base.streams import only_list


def parser() -> ArgumentParser:
    parser = ArgumentParser(prog="evaluate.py", description=__doc__)
    add = parser.add_argument
    add("models", nargs="+", metavar="[NAME=]MODEL", help="run, checkpoint or Hugging Face folder")
    add("--set", action="append", default=[], metavar="NAME=PATH", help="indexed dataset or text; may be repeated")
    add("--step", type=int, metavar="N", help="a run's checkpoint of step N, not its newest")
    add("--samples", type=int, metavar="N", help="only the first N windows of each set (default: all)")
    add("--seq-length", type=int, metavar="S", help="tokens of a window (default: the run's; 2048 for a folder)")
    add("--reference", metavar="TOKENIZER", help="state perplexities per token of this tokenizer, too")
    add("--around", choices=("auto", "both", "bos", "eos", "none"), default="auto",
        help="ids around each document of a text (default: eos, and bos if the model was trained with it)")  # fmt: skip
    add("--attention-mask", choices=("causal", "document"), help="as data.attention_mask (default: the run's)")
    add("--key", default="text", metavar="KEY", help="field of the documents' text (default: text)")
    add("--micro-batch-size", type=int, metavar="B", help="windows computed at once (default: the run's, or 1)")
    add("--device", default="auto", metavar="D", help="cpu, cuda, cuda:N (default: a GPU where there is one)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="type of the weights (default: the model's own)")
    add("--backend", choices=("auto", "ours", "transformers"), default="auto",
        help="implementation for a Hugging Face folder (default: ours, transformers for other families)")  # fmt: skip
    add("--json", action="store_true", help="one JSON document instead of a table")
    return parser


def main() -> int:
    arguments = parser().parse_args()
    only_list()
    from megatron_hammer.evaluation.measure import EvaluationOptions, check_options, measure, results_table, sets_of
    from megatron_hammer.evaluation.sets import parse_sets
    from megatron_hammer.evaluation.subjects import check_model_names, describe_subject, device_of_argument
    from megatron_hammer.tokenizer.load import load_tokenizer

    if arguments.step is not None and len(arguments.models) > 1:
        remedy = "name the checkpoints: RUN/checkpoints/step-NNNNNNNN"
        raise ConfigError(33, f"--step {arguments.step}", "is for one run, and several models are named", remedy)
    sets = parse_sets(arguments.set)
    reference = None if arguments.reference is None else load_tokenizer(arguments.reference)
    subjects = [describe_subject(model, arguments.step, arguments.backend) for model in arguments.models]
    check_model_names(subjects)
    mask = None if arguments.attention_mask is None else arguments.attention_mask == "document"
    options = EvaluationOptions(
        arguments.seq_length, arguments.micro_batch_size, arguments.samples, arguments.around, arguments.key,
        arguments.dtype, device_of_argument(arguments.device), mask,
    )  # fmt: skip
    check_options(subjects, options)
    with Activity("reading the models") as note:
        figures = list(measure(subjects, sets or sets_of(subjects), options, reference, note))
    if arguments.json:
        models = [{"name": s.name, "path": s.path, "kind": s.kind, "step": s.step} for s in subjects]
        print_json({"models": models, "results": [f.to_tree() for f in figures]})
    else:
        print(*results_table(figures), sep="\n")
    bad = next((f for f in figures if not f.is_finite), None)
    if bad is None:
        return 0
    rule = "is not finite: the weights, or activations in this type, have overflowed"
    return report_error(NonFiniteError(4, f"{bad.model} on {bad.set}: loss={bad.loss}", rule, "try --dtype float32"))


if __name__ == "__main__":
    run(main)
