"""Publish a finished run's export: on Hugging Face's Hub, on ModelScope, or as a folder, with a model card.

    python tools/checkpoint_to_hf.py --load runs/mine --output runs/mine/hf
    python tools/publish.py runs/mine --to hf --repo me/my-model --license apache-2.0 --dry-run
    python tools/publish.py runs/mine --to hf --repo me/my-model --license apache-2.0

The card (README.md, in English and Chinese) has the run's own figures: sizes, settings, the data mix as it was read,
losses, evaluations, and the certificate that the export is the trained model. --dry-run shows the files and the card,
and sends nothing. Paths, the machine's name and values of secrets are looked for and refused. Tokens: hf auth login or
HF_TOKEN; MODELSCOPE_API_TOKEN. A mirror of the Hub: HF_ENDPOINT.
"""

from __future__ import annotations

from pathlib import Path

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, run
from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.base.progress import Activity, say


def parser() -> ArgumentParser:
    parser = ArgumentParser(prog="publish.py", description=__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a run, or a checkpoint")
    add("--to", required=True, choices=("hf", "modelscope", "folder"), help="where to publish")
    add("--repo", metavar="OWNER/NAME", help="the model's name on the hub")
    add("--output", type=Path, metavar="DIR", help="with --to folder: the new folder")
    add("--export", type=Path, metavar="DIR", help="the run's Hugging Face folder (default: RUN/hf)")
    add("--step", type=int, metavar="N", help="the run's checkpoint of step N, not its newest")
    add("--license", metavar="ID", help="license of the weights: apache-2.0, mit, cc-by-4.0, ... or another name")
    add(
        "--language",
        nargs="+",
        default=["zh", "en"],
        metavar="CODE",
        help="languages of the training text (default: zh en)",
    )
    add("--name", metavar="TEXT", help="title of the card (default: NAME of --repo, or that of the folder)")
    add("--description", type=Path, metavar="FILE", help="file with text for the beginning of the card")
    add("--private", action="store_true", help="make a new repository private")
    add("--unfinished", action="store_true", help="publish a run that has steps left")
    add("--dry-run", action="store_true", help="show what would be sent; send nothing, use no network")
    return parser


def main() -> None:
    words = parser()
    arguments = words.parse_args()
    from megatron_hammer.base.reading import read_regular
    from megatron_hammer.publish.card import Wishes
    from megatron_hammer.publish.hubs import FolderHub, Hub, HuggingFaceHub, ModelScopeHub, check_repository
    from megatron_hammer.publish.publish import prepare_upload, upload

    to, repository, output = arguments.to, arguments.repo, arguments.output
    if to == "folder":
        words.refuse_idle("with --to folder", "--private")
    else:
        words.refuse_idle(f"with --to {to}: it names the folder of --to folder", "--output")
    missing = "--output DIR" if to == "folder" and output is None else "--repo OWNER/NAME"
    if (output if to == "folder" else repository) is None:
        raise ConfigError(90, f"--to {to}", f"needs {missing}", f"add {missing}")
    if repository is not None:
        check_repository(repository)
    name = arguments.name or (repository or "").rpartition("/")[2] or output.resolve().name
    try:
        description = "" if arguments.description is None else read_regular(arguments.description).decode("utf-8")
    except UnicodeDecodeError as error:
        rule = f"is not valid UTF-8 at byte {error.start}"
        raise DataError(3, str(arguments.description), rule, "save it as UTF-8") from None
    wishes = Wishes(name, repository, arguments.license, tuple(arguments.language), description)
    hub: Hub | None = None
    if not arguments.dry_run and to == "folder":
        hub = FolderHub(output)
    elif not arguments.dry_run:
        hub = (HuggingFaceHub if to == "hf" else ModelScopeHub)(repository, arguments.private)
    with Activity("reading the run"):
        found = prepare_upload(arguments.run, wishes, arguments.export, arguments.step, arguments.unfinished)
    if arguments.license is None:
        say("note: no --license: without one nobody else may use the weights")
    if hub is None:
        where = output if to == "folder" else repository
        print(*found.listing(), "", f"would go to {where}; the card:", "", found.card, sep="\n")
    else:
        print(f"{'wrote' if to == 'folder' else 'published'} {upload(found, hub)}")


if __name__ == "__main__":
    run(main)
