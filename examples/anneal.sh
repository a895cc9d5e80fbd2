#!/usr/bin/env bash
# Anneal a run: a child from one of its checkpoints, on a mix of its own, whose learning rate descends to the floor.
#
#   bash examples/anneal.sh RUN STEP NEW TOKENS MIX [group.field=value ...]
#   bash examples/anneal.sh runs/my_1b4 40000 runs/annealed 20e9 '{data/zh: 1, data/en: 1, data/books: 2}'
#
#   RUN and STEP name the parent's checkpoint, which stays as it is; NEW is the folder of the child. The same command
#   resumes it. PYTHON is the interpreter (default .venv/bin/python), NPROC the ranks (default 1).
[ -n "${BASH_VERSION:-}" ] && [ "${BASH_SOURCE:-$0}" = "$0" ] || { # every shell reads this, and stops here
    echo "error[E283]: ${BASH_SOURCE:-$0} is a program for bash; run: bash ${BASH_SOURCE:-$0}" >&2
    return 2 2>/dev/null || exit 2
}
set -euo pipefail

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    sed -n '2,/^\[ -n /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit 0
fi
if (($# < 5)); then
    printf 'error[E201]: anneal.sh needs RUN STEP NEW TOKENS MIX; see its first lines\n' >&2
    exit 2
fi
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHON=${PYTHON:-$root/.venv/bin/python}
run=$1 step=$2 new=$3 tokens=$4 mix=$5
shift 5
if [[ ! -f $new/branch.sh ]]; then
    "$PYTHON" "$root/tools/branch.py" "$run" --step "$step" --output "$new" --tokens "$tokens" "data.train=$mix" "$@"
fi
exec bash "$new/branch.sh"
