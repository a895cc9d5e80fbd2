#!/usr/bin/env bash
# Train on several machines that ssh reaches without a password: one launcher a machine, started from here.
#
#   HOSTS="gpu0 gpu1" DATA="142 /data/zh_text_document 128 /data/en_text_document" TOKENIZER=/data/tokenizer.model \
#       OUT=/shared/runs/my_1b4 bash examples/ssh/launch.sh [group.field=value ...]
#
#   HOSTS                     names for ssh; the first is node 0
#   MASTER_ADDR, MASTER_PORT  where the others reach node 0 (default: the first of HOSTS, 29500)
#   HAMMER_ROOT               this repository on the machines (default: where it is here)
#   SSH                       the command, with options (default: ssh -o BatchMode=yes)
#
# Everything else is what examples/pretrain_1b4.sh reads. The repository, the data and OUT must be seen by all machines
# under the same paths. Every line of a machine's output begins with its name. Ctrl-C or TERM here is passed on to all
# launchers: the run saves and ends with code 75, and the same command goes on. The exit code is that of node 0.
set -euo pipefail

fail() {
    printf 'error[E2%s]: %s\n' "$1" "$2" >&2
    exit 2
}

read -ra hosts <<<"${HOSTS:-}"
((${#hosts[@]})) || fail 55 'HOSTS is not set; give the names of the machines, as in HOSTS="gpu0 gpu1"'
read -ra ssh <<<"${SSH:-ssh -o BatchMode=yes}"
root=${HAMMER_ROOT:-$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)}
export NNODES=${#hosts[@]} MASTER_ADDR=${MASTER_ADDR:-${hosts[0]}} MASTER_PORT=${MASTER_PORT:-29500}

# Quoted for the shell of the other machine.
given='' arguments=''
for name in NNODES MASTER_ADDR MASTER_PORT CONFIG DATA VALID TOKENIZER OUT GPUS PYTHON TORCH_INDEX_URL; do
    if [[ -n ${!name:-} ]]; then given+=" $name=$(printf '%q' "${!name}")"; fi
done
for argument in "$@"; do arguments+=" $(printf '%q' "$argument")"; done
there="cd $(printf '%q' "$root")"
pid="/tmp/hammer-$(hostname)-$$" # on each machine: the process that a signal is for

"${ssh[@]}" "${hosts[0]}" "$there && bash tools/make_venv.sh" </dev/null >&2 # once, before all machines look at it

stopped=0
# shellcheck disable=SC2329  # called by the trap
stop() {
    local i
    stopped=1
    for i in "${!hosts[@]}"; do
        "${ssh[@]}" "${hosts[i]}" "kill -TERM \$(cat $pid.$i)" </dev/null 2>/dev/null || true
    done
}
trap stop INT TERM HUP

nodes=()
for i in "${!hosts[@]}"; do
    # The shell there becomes the script, which passes TERM on to its launcher.
    run="echo \$\$ >$pid.$i && $there && export NODE_RANK=$i$given && exec bash examples/pretrain_1b4.sh$arguments"
    "${ssh[@]}" "${hosts[i]}" "exec bash -c $(printf '%q' "$run")" </dev/null \
        > >(sed -u "s/^/[${hosts[i]}] /") 2> >(sed -u "s/^/[${hosts[i]}] /" >&2) &
    nodes+=($!)
done

code=0
for i in "${!nodes[@]}"; do
    while :; do # a signal here ends the wait, not the node
        stopped=0 node=0
        wait "${nodes[i]}" || node=$?
        ((stopped)) || break
    done
    if ((i == 0)); then code=$node; fi
    if ((node != 0 && node != code)); then echo "${hosts[i]} ended with exit code $node" >&2; fi
done
for i in "${!hosts[@]}"; do "${ssh[@]}" "${hosts[i]}" "rm -f $pid.$i" </dev/null 2>/dev/null || true; done
exit "$code"
