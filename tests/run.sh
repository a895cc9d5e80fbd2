#!/usr/bin/env bash
# Lint, types and tests, in the .venv that it makes when there is none. Arguments go to pytest:
#
#   bash tests/run.sh                                      all
#   bash tests/run.sh tests/supervise/test_start.py -k signal       these tests only (lint and types run all the same)
[ -n "${BASH_VERSION:-}" ] && [ "${BASH_SOURCE:-$0}" = "$0" ] || { # every shell reads this, and stops here
    echo "error[E283]: ${BASH_SOURCE:-$0} is a program for bash; run: bash ${BASH_SOURCE:-$0}" >&2
    return 2 2>/dev/null || exit 2
}
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
bash tools/make_venv.sh
readonly bin=.venv/bin

# The outside judge of the data formats. Without its dependencies, of which the tests need none. Where it cannot be had
# its tests are skipped, and pytest's summary says so.
if ! "$bin/python" -m pip show --quiet megatron-core 2>/dev/null; then
    echo "megatron-core 0.16.1 (for the tests of the data formats)"
    "$bin/python" -m pip install --quiet --disable-pip-version-check --no-input --no-deps --only-binary :all: \
        megatron-core==0.16.1 || echo "megatron-core could not be installed: the tests that read and write with it are skipped"
fi

export HF_HUB_OFFLINE=1                          # no test may depend on the network
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"   # tests start several ranks: more threads than cores only wait
export TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg

summary=''
code=0
check() {
    local name=$1 began=$SECONDS result=ok
    shift
    printf '\n== %s\n' "$name"
    "$@" || { result="FAILED ($?)" code=1; }
    summary+=$(printf '%-12s %s, %d s' "$name" "$result" $((SECONDS - began)))$'\n'
}

# Two files of tests at a time; with a GPU, whose memory some tests measure, one. More would starve the eight ranks that
# tests start. An argument -n 0 takes precedence: one process, for a debugger.
at_once=2
if [ -e /dev/nvidia0 ]; then at_once=0; fi

# Types beside the tests, most of which use one core: without its cache mypy takes half a minute.
said=$(mktemp)
trap 'rm -f "$said"' EXIT
"$bin/mypy" >"$said" 2>&1 &
mypy=$!
types() {
    local code=0
    wait "$mypy" || code=$?
    cat "$said"
    return "$code"
}

check lint "$bin/ruff" check .
check format "$bin/ruff" format --check .
check clang-format "$bin/clang-format" --dry-run --Werror csrc/*/*.cpp csrc/*/*.hpp csrc/*/*.cu csrc/*/*.cuh
check tests "$bin/python" -m pytest --numprocesses="$at_once" --dist=loadfile --no-loadscope-reorder "$@"
check types types

printf '\n%s' "$summary"
exit "$code"
