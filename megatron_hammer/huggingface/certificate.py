"""The proof that an exported folder is the checkpoint's model, made before the folder is named (``prover.py``).

::

    checkpoint --load_model, rounded--> ours in fp32  --logits of fixed texts--+
                                        (then freed)                           |--> |difference| <= 1e-4 max |logit|
    folder ----transformers---------> theirs in fp32 --logits of the same-----+
       |
       '-- config.json means the same model; every tensor bit-equal; no key missing, unexpected or mismatched;
           the tokenizer gives the same ids and has the same size and special ids

Our side is rebuilt from the checkpoint and never looks at the exported files. Each check sees what another may miss:
a dropped norm is close to the ones that an initialised model has, equal weights say nothing of RoPE's form, equal
logits nothing of ids that the texts do not use.

Memory: one fp32 model and the logits of three texts. ``python -m megatron_hammer.huggingface.certificate CHECKPOINT
FOLDER`` repeats the proof of an export at any time.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hammer import __version__
from megatron_hammer.base.cli import ArgumentParser, run
from megatron_hammer.base.errors import CheckpointError, RefusedError
from megatron_hammer.base.files import hash_bytes, hash_file, write_durably
from megatron_hammer.base.progress import track
from megatron_hammer.checkpoint.dtypes import DTYPES
from megatron_hammer.checkpoint.fit import architecture
from megatron_hammer.checkpoint.folder import open_checkpoint
from megatron_hammer.checkpoint.manifest import Manifest, checked_tokenizer_folder, read_manifest, saved_model
from megatron_hammer.checkpoint.read import LogicalReader, load_model
from megatron_hammer.config import ModelConfig
from megatron_hammer.dataset.look.document_marks import documents_begin_with, documents_end_with
from megatron_hammer.huggingface.certified import CERTIFICATE, certificate_line
from megatron_hammer.huggingface.config import CONFIG, GENERATION_CONFIG, model_config_from_hf, read_json
from megatron_hammer.huggingface.transformers_model import load_causal
from megatron_hammer.huggingface.weights import HfWeights, check_tensors, one_thread
from megatron_hammer.tokenizer.convert import QWEN2_CURE, QWEN2_READS
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.load import load_tokenizer
from megatron_hammer.tokenizer.model_folder import form_of_folder

if TYPE_CHECKING:
    from torch import Tensor

RELATIVE_BOUND = 1e-4  # of max |logit|: fp32 sums in another order give 1e-6, the mildest real fault 1e-2
MAX_TOKENS = 256  # of each text: at a vocabulary of 105,789, 108 MB of logits a text

# Written for this purpose. Long and short words, digits, nested indentation, several blanks, emoji, characters outside
# the basic plane and ones that few vocabularies hold, so that byte fallback and every tokenizer rule has work to do.
TEXTS = {
    "zh": (
        "清晨六点三十分，江边的渡口还罩着一层薄雾。老船工把缆绳在木桩上绕了两圈，抬头看看天色，说今天的风大约三级，"
        "水位比昨天涨了12.5厘米。岸上等船的有四十多人：赶集的、上学的，还有两个背着䉤箩的采茶姑娘。"
        "“票价两元，老人半价。”他一边说一边数零钱，忽然想起《水经注》里写过这段河道，便指着对岸的石壁道：“那儿刻着𠮷字，"
        "下面还有个‘龘’，据说是嘉靖二十八年（1549年）留下的。”孩子们听得入神，🚢汽笛响了也没有人动。\n"
        "船到江心，雾散了，㐂鹊掠过水面；有人轻声念道：逝者如斯夫，不舍昼夜。\n"
    ),
    "en": (
        "The lighthouse keeper kept three notebooks: one for the weather, one for passing ships, and one - bound in "
        "green cloth - for everything else. On 17 March 1893 the first two say almost nothing (wind NNE, 4 knots; no "
        "sails), but the third runs to eleven pages.  He had found a bottle; inside it, a map drawn at a scale of "
        '1:25,000 and a recipe for rye bread that asks for 480 g of flour, 7.5 g of salt & "patience, twice". Was it '
        "naïve to follow it? Perhaps. Yet his daughter's coöperative bakery still sells that loaf, €3.20 apiece, and "
        'the café next door calls it "the Keeper" 🍞🌊. Nobody ever found the island: at 61°48′N there is only water, '
        "and antidisestablishmentarianism is easier to spell than to see.\n"
    ),
    "code": (
        "from collections import deque\n\n\n"
        "def shortest_path(grid: list[str], start=(0, 0), goal=None) -> int:\n"
        '    """Steps from start to goal, or -1; walls are \'#\'.  O(rows * cols)."""\n'
        "    rows, cols = len(grid), len(grid[0])\n"
        "    goal = goal or (rows - 1, cols - 1)\n"
        "    queue, seen = deque([(start, 0)]), {start}\n"
        "    while queue:\n"
        "        (y, x), steps = queue.popleft()\n"
        "        if (y, x) == goal:\n"
        "            return steps  # 找到终点 ✅\n"
        "        for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)):\n"
        "            ny, nx = y + dy, x + dx\n"
        "            if 0 <= ny < rows and 0 <= nx < cols and grid[ny][nx] != '#' and (ny, nx) not in seen:\n"
        "                seen.add((ny, nx))\n"
        "                queue.append(((ny, nx), steps + 1))\n"
        "    return -1\n\n\n"
        'if __name__ == "__main__":\n'
        "\tassert shortest_path(['..#', '.#.', '...']) == 4, \"0x1F != 31e0\"\r\n"
        "\tprint(f\"{shortest_path(['.' * 40] * 3):>8d} | {3.14159e-05:.2e} | {'𝔘𝔫𝔦':s}\")\n"
    ),
}


def prove(checkpoint: Path, folder: Path, dtype: str, unproved: str = "") -> dict[str, Any]:
    """Compare an exported folder with the checkpoint and write ``certificate.json`` into it.

    Args:
        unproved: why the folder has no tokenizer that could be compared; empty: it has, as far as the checkpoint does.

    Raises:
        RefusedError: they are not the same model or tokenizer; no certificate is written.
        CheckpointError: the checkpoint or an exported file is damaged.
    """
    import torch
    import transformers

    hide_progress_bar: Any = transformers.utils.logging.disable_progress_bar
    hide_progress_bar()
    manifest = read_manifest(checkpoint)
    model = saved_model(manifest)
    check_config(model, folder)
    check_weights(manifest, model, folder, dtype)
    tokenizer_folder = checked_tokenizer_folder(manifest)
    own = None if tokenizer_folder is None else load_tokenizer(tokenizer_folder)
    inputs, tokenizer = prepare_inputs(manifest, model, own, folder, unproved)
    ours = our_logits(manifest, model, dtype, list(inputs.values()))
    gc.collect()  # our model goes before theirs comes
    theirs = load_transformers_model(folder)
    results = {name: compare(name, ours[i], theirs, ids) for i, (name, ids) in enumerate(inputs.items())}
    certificate = {
        "verdict": "passed",
        "bound": RELATIVE_BOUND,
        "texts": results,
        "tokenizer": tokenizer,
        "documents": _documents(manifest, own),
        "dtype": dtype,
        "step": manifest.step,
        "checkpoint_digest": manifest.digest,
        "versions": {
            "megatron_hammer": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "files": {
            str(p.relative_to(folder)): {"size": p.stat().st_size, "xxh3_128": hash_file(p)}
            for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name != CERTIFICATE
        },
    }
    path = folder / CERTIFICATE
    path.unlink(missing_ok=True)  # of an earlier proof
    write_durably(path, (json.dumps(certificate, indent=2) + "\n").encode())
    return certificate


def _documents(manifest: Manifest, tokenizer: Tokenizer | None) -> dict[str, bool | None]:
    """How documents began and ended in training, so that prompts can begin so; None where no dataset is there now."""
    return {
        "begin_with_bos": None if tokenizer is None else documents_begin_with(manifest.config, tokenizer.bos_id),
        "end_with_eos": None if tokenizer is None else documents_end_with(manifest.config, tokenizer.eos_id),
    }


def check_config(model: ModelConfig, folder: Path) -> None:
    """``config.json``, read back, must describe the checkpoint's model."""
    ours = {**architecture(model), "max_position_embeddings": model.max_position_embeddings}
    found = model_config_from_hf(read_json(folder / CONFIG), CONFIG)
    theirs = {**architecture(found), "max_position_embeddings": found.max_position_embeddings}
    for name, value in ours.items():
        if value != theirs[name]:
            raise RefusedError(24, f"{CONFIG}: {name}={theirs[name]}", f"must be {value} as in the checkpoint", _REPORT)


def check_weights(manifest: Manifest, model: ModelConfig, folder: Path, dtype: str) -> None:
    """Every exported tensor must equal the checkpoint's, rounded, bit for bit; a few MiB in memory at a time."""
    try:
        with HfWeights(folder, model.tie_word_embeddings) as weights, LogicalReader(manifest) as reader, one_thread():
            check_tensors(weights, model)
            if extra := sorted(set(weights.where) - {t.name for t in manifest.tensors}):
                raise RefusedError(23, extra[0], "was exported but is not in the checkpoint", _REPORT)
            names = sorted(weights.where, key=weights.place)
            for name in track(names, "comparing weights", len(names), "tensors"):
                found = weights.entry(name).dtype
                if found != dtype or not _same_bits(reader.bands(name), dtype, weights, name):
                    raise RefusedError(
                        23,
                        f"{name} as exported ({found})",
                        f"differs from the checkpoint's tensor rounded to {dtype}",
                        _REPORT,
                    )
    except CheckpointError as error:
        if error.what.startswith(str(folder)):
            raise RefusedError(23, error.what, error.rule, _REPORT) from None
        raise


def _same_bits(bands: Iterable[Tensor], dtype: str, weights: HfWeights, name: str) -> bool:
    """Whether the exported tensor has the bytes of these bands, rounded; reads all of them, so all are verified."""
    import torch

    position, same = 0, True
    for band in bands:
        expected = band.to(DTYPES[dtype]).view(-1).view(torch.uint8)
        found = torch.empty_like(expected)
        weights.read_part(name, position, found.numpy())
        same = same and torch.equal(expected, found)
        position += expected.numel()
    return same


_REPORT = "this is a fault of the export: please report it"
_QWEN2 = (
    f"{QWEN2_READS}, whatever the folder says: train with a tokenizer of Qwen2's, or {QWEN2_CURE}; "
    "checkpoint_to_hf.py --tokenizer as-is exports the weights beside the tokenizer's own files"
)


def prepare_inputs(
    manifest: Manifest, model: ModelConfig, ours: Tokenizer | None, folder: Path, unproved: str = ""
) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """Token ids to compare logits on, and what the certificate says of the tokenizer.

    Without a tokenizer the ids are drawn by a fixed rule over the whole vocabulary.
    """
    assert model.vocab_size is not None and model.max_position_embeddings is not None
    length = min(MAX_TOKENS, model.max_position_embeddings)
    if ours is None:
        drawn = {f"ids-{k}": [(i * 2654435761 + k * 40503) % model.vocab_size for i in range(length)] for k in range(3)}
        return drawn, {"present": False, "inputs": "ids drawn by a fixed rule: the checkpoint has no tokenizer"}
    if unproved:
        present = any((folder / name).exists() for name in ("tokenizer.model", "tokenizer.json"))
        ids = {name: ours.encode(text)[:length] for name, text in TEXTS.items()}
        return ids, {"present": present, "proved": False, "reason": unproved, "fingerprint": ours.fingerprint}
    texts = prove_tokenizer(manifest, ours, folder)
    inputs = {name: ids[:length] for name, ids in texts.items()}
    facts = {n: {"xxh3_128": hash_bytes(text.encode()), "num_tokens": len(texts[n])} for n, text in TEXTS.items()}
    fingerprint = manifest.tokenizer.fingerprint if manifest.tokenizer else ""
    return inputs, {"present": True, **form_of_folder(folder), "fingerprint": fingerprint, "inputs": facts}


def prove_tokenizer(manifest: Manifest, ours: Tokenizer, folder: Path) -> dict[str, list[int]]:
    """The folder's tokenizer, as ``AutoTokenizer`` loads it, must be the checkpoint's; returns the texts' ids."""
    from transformers import AutoTokenizer

    assert manifest.tokenizer is not None
    if ours.fingerprint != manifest.tokenizer.fingerprint:
        raise RefusedError(
            22,
            f"the checkpoint's tokenizer of fingerprint {ours.fingerprint}",
            f"must have the recorded fingerprint {manifest.tokenizer.fingerprint}",
            "use the version of the program that wrote the checkpoint",
        )
    try:
        theirs = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:
        raise RefusedError(
            22, "the exported tokenizer", f"cannot be loaded by transformers ({error})", _REPORT
        ) from None
    remedy = _QWEN2 if type(theirs).__name__ == "Qwen2Tokenizer" else _REPORT
    checks: list[tuple[str, str, Any, Any]] = [("tokenizer", "vocab_size", ours.vocab_size, len(theirs))]
    for name in ("bos", "eos", "unk"):
        checks.append(
            ("tokenizer", f"{name}_token_id", getattr(ours, f"{name}_id"), getattr(theirs, f"{name}_token_id"))
        )
    for file in (CONFIG, GENERATION_CONFIG):  # what generation starts from and stops at
        tree = read_json(folder / file)
        checks += [(file, f"{n}_token_id", getattr(ours, f"{n}_id"), tree.get(f"{n}_token_id")) for n in ("bos", "eos")]
    for where, name, mine, found in checks:
        if mine != found:
            raise RefusedError(22, f"the exported {where}'s {name}={found}", f"must be {mine}", remedy)
    ids = {}
    for name, text in TEXTS.items():
        ids[name] = ours.encode(text)
        found = theirs(text, add_special_tokens=False, verbose=False)["input_ids"]
        if found != ids[name]:
            at = next((i for i, (a, b) in enumerate(zip(ids[name], found)) if a != b), min(len(found), len(ids[name])))
            raise RefusedError(
                22,
                f"the exported tokenizer, {name} text, token {at}",
                "gives another id than the checkpoint's",
                remedy,
            )
    return ids


def our_logits(manifest: Manifest, model: ModelConfig, dtype: str, inputs: Sequence[list[int]]) -> list[Any]:
    """[s, v] fp32 of each input by our model with the checkpoint's weights rounded to ``dtype``; the model is freed."""
    import torch

    from megatron_hammer.model.llama import build_stage
    from megatron_hammer.model.parameters import parameter_table
    from megatron_hammer.parallel.context import ParallelContext

    ctx = ParallelContext.single()
    llama = build_stage(model, ctx)
    load_model(llama, parameter_table(model), manifest, ctx, round_to=DTYPES[dtype])
    return [llama.logits(torch.tensor([ids]))[0].clone() for ids in inputs]


def load_transformers_model(folder: Path) -> Any:
    """``AutoModelForCausalLM`` of the folder in fp32; nothing may be missing, unexpected or of another shape."""
    import torch

    try:
        return load_causal(folder, torch.float32)
    except CheckpointError as error:  # whatever it is, the folder is not fit to be published
        raise RefusedError(21, error.what.replace(str(folder), folder.name), error.rule, _REPORT) from None


def compare(name: str, ours: Any, model: Any, ids: list[int], remedy: str = _REPORT) -> dict[str, float]:
    """Largest difference of the logits of one text, and the largest logit.

    Args:
        remedy: where they differ.

    Raises:
        RefusedError: above the bound, of another size, or not finite.
    """
    import torch

    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0]  # [s, v]
    if theirs.shape != ours.shape:
        raise RefusedError(
            20, f"logits of the {name} text, {list(theirs.shape)}", f"must be {list(ours.shape)}", remedy
        )
    largest, difference = float(ours.abs().max()), float((theirs - ours).abs().max())
    if not torch.isfinite(ours).all():
        raise RefusedError(
            29,
            f"logits of the {name} text",
            "are not finite",
            "export with --dtype bfloat16 or float32 if float16 is too narrow for these weights",
        )
    if not difference <= RELATIVE_BOUND * largest:  # also catches NaN
        raise RefusedError(
            20,
            f"logits of the {name} text",
            f"differ by {difference:.3g} from transformers, more than "
            f"{RELATIVE_BOUND:g} of max |logit| = {largest:.3g}",
            remedy,
        )
    return {"max_difference": difference, "max_logit": largest, "num_tokens": len(ids)}


def main() -> None:
    """The program that proves an export again."""
    parser = ArgumentParser(prog="python -m megatron_hammer.huggingface.certificate", description=__doc__)
    parser.add_argument("checkpoint", help="checkpoint folder or run")
    parser.add_argument("folder", type=Path, help="exported Hugging Face folder; its certificate.json is written anew")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), help="type of the exported weights (default: the checkpoint's)"
    )
    parser.add_argument(
        "--unproved-tokenizer", default="", metavar="WHY", help="compare the model alone, and write why (default: all)"
    )
    arguments = parser.parse_args()
    manifest = open_checkpoint(arguments.checkpoint)
    dtype, unproved = arguments.dtype or manifest.weights_dtype, arguments.unproved_tokenizer
    print(certificate_line(prove(manifest.folder, arguments.folder, dtype, unproved)))


if __name__ == "__main__":
    run(main)
