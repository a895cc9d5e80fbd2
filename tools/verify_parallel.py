"""Prove that a parallel layout computes what one process computes, on your own config, in a minute on two cores.

    python tools/verify_parallel.py CONFIG.yaml --nproc 8 [group.field=value ...]

The config is shrunk (widths, layers, vocabulary, length, batch; never what the ranks share: heads and groups, padding,
mask, tying, recompute, clipping), all ranks run two steps on CPUs, and loss, gradient norm, every parameter's gradient,
weights and moments after the steps and the checkpoint's tensors are compared with one process in fp64 and fp32, and
with transformers and a plain AdamW in fp64. The table shows the largest difference of each; below it stands what is
beyond its bound: the first tensor that differs, on which ranks, by how much, and what the pattern says of the cause.

With --gpu the ranks run on GPUs in the precision and with the kernels of the config, against one process in fp32 on the
CPU: the bound is then that of 16-bit rounding, and finds swapped rows, factors and missing sums, no last bits.

Exit code 0: equal within the bounds; 5: something differs.
"""

from __future__ import annotations

import os

from megatron_hammer.base.cli import ArgumentParser, run
from megatron_hammer.base.errors import ConfigError
from megatron_hammer.base.progress import say

SHOWN = 12


def main() -> int:
    parser = ArgumentParser(prog="verify_parallel.py", description=__doc__)
    parser.add_argument("config", metavar="CONFIG.yaml", help="the config of the run")
    parser.add_argument("overrides", metavar="group.field=value", nargs="*", help="settings that replace the file's")
    parser.add_argument(
        "--nproc", type=int, required=True, metavar="N", help="ranks of the layout (all nodes together)"
    )
    parser.add_argument(
        "--gpu",
        action="store_true",
        help="on the GPUs of this machine, with the config's precision and kernels; --nproc is then their number",
    )
    arguments = parser.parse_intermixed_args()
    if arguments.nproc < 1:
        raise ConfigError(40, f"--nproc={arguments.nproc}", "must be at least 1", "raise --nproc")
    from megatron_hammer.config import load_config
    from megatron_hammer.train.prepare import prepare

    asked = load_config(arguments.config, [*arguments.overrides, "train.dry_run=true"])
    config = prepare(asked, arguments.nproc).config  # checked, with the tokenizer's vocabulary
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from megatron_hammer.verify.parallel import Proof, prove_layout

    proof = prove_layout(config, arguments.nproc, say, real=arguments.gpu)
    if not isinstance(proof, Proof):
        return proof
    print(*proof.table(), sep="\n")
    if proof.left_out:
        print(f"not part of the proof: {', '.join(proof.left_out)}")
    if not proof.findings:
        print(f"equal: {arguments.nproc} ranks compute what one process computes")
        return 0
    print(f"DIFFERENT in {len(proof.findings)} places; the first:")
    for finding in proof.findings[:SHOWN]:
        ranks = f" on ranks {', '.join(map(str, finding.ranks))}" if finding.ranks else ""
        cause = f": {finding.cause}" if finding.cause else ""
        print(f"  {finding.what}{ranks} by {finding.difference:.1e}{cause}")
    return 5


if __name__ == "__main__":
    run(main)
