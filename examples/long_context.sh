#!/usr/bin/env bash
# A longer context for a run that exists: a child from one of its checkpoints, trained on longer samples, then exported.
#
#   bash examples/long_context.sh RUN NEW TOKENS MIX [group.field=value ...]
#   bash examples/long_context.sh runs/my_1b4 runs/my_1b4_32k 5e9 '{data/zh: 1, data/en: 1, data/books: 3}'
#
#   RUN        the parent, of which the newest checkpoint is taken (STEP=N: that of step N); it stays as it is
#   NEW        the child's folder; NEW/hf is the model for transformers. The same command resumes it
#   LENGTH     targets of a sample (default 32768), THETA the base of RoPE from here on (default 1000000)
#   NPROC      ranks (default 1), PYTHON the interpreter (default .venv/bin/python)
#
# A step keeps its samples, so it has LENGTH / (the parent's length) times as many tokens: train.global_batch_size=32
# makes it smaller. Samples that do not fit on a rank are divided by parallel.context_parallel_size=2 and more. To have
# both lengths in one run from its beginning: examples/recipes/4k_to_32k.yaml, with the same numbers.
[ -n "${BASH_VERSION:-}" ] && [ "${BASH_SOURCE:-$0}" = "$0" ] || { # every shell reads this, and stops here
    echo "error[E283]: ${BASH_SOURCE:-$0} is a program for bash; run: bash ${BASH_SOURCE:-$0}" >&2
    return 2 2>/dev/null || exit 2
}
set -euo pipefail

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    sed -n '2,/^\[ -n /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit 0
fi
if (($# < 4)); then
    printf 'error[E201]: long_context.sh needs RUN NEW TOKENS MIX; see its first lines\n' >&2
    exit 2
fi
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHON=${PYTHON:-$root/.venv/bin/python}
run=$1 new=$2 tokens=$3 mix=$4 length=${LENGTH:-32768}
shift 4
if [[ ! -f $new/branch.sh ]]; then
    "$PYTHON" "$root/tools/branch.py" "$run" ${STEP:+--step "$STEP"} --output "$new" --tokens "$tokens" \
        "data.train=$mix" "data.seq_length=$length" "model.max_position_embeddings=$length" \
        "model.rope_theta=${THETA:-1000000}" data.attention_mask=document "$@"
fi
bash "$new/branch.sh"
"$PYTHON" "$root/tools/checkpoint_to_hf.py" --load "$new" --output "$new/hf"
