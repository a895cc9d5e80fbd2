#!/usr/bin/env bash
# Pretrain a Llama of 8 billion parameters with TP 2, CP 2 and sharded weights, on 8 GPUs of 80 GB or more of them.
#
#   DATA="142 /p/zh 128 /p/en" TOKENIZER=M.model OUT=runs/my_8b bash examples/pretrain_8b.sh [group.field=value ...]
#   bash examples/pretrain_8b.sh plan N GPU [option of tools/plan.py ...]
#   bash examples/pretrain_8b.sh plan 64 h100 --tokens 1e12 --price 2 --write my_layout.yaml
#
#   plan       which layouts fit on N such GPUs, with memory, speed, days and cost; needs no GPU. What --write writes is
#              trained with CONFIG=my_layout.yaml
#   CONFIG     default examples/configs/llama_8b.yaml
#   OUT        default runs/pretrain_8b
#
# Everything else, several nodes and Slurm included, is as for examples/pretrain_1b4.sh, which this calls.
[ -n "${BASH_VERSION:-}" ] && [ "${BASH_SOURCE:-$0}" = "$0" ] || { # every shell reads this, and stops here
    echo "error[E283]: ${BASH_SOURCE:-$0} is a program for bash; run: bash ${BASH_SOURCE:-$0}" >&2
    return 2 2>/dev/null || exit 2
}
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
export CONFIG=${CONFIG:-$root/examples/configs/llama_8b.yaml} OUT=${OUT:-runs/pretrain_8b}
if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    sed -n '2,/^\[ -n /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit 0
elif [[ ${1:-} == plan ]]; then
    if (($# < 3)); then
        printf 'error[E201]: pretrain_8b.sh plan needs the number of GPUs and their name; write plan 8 h100\n' >&2
        exit 2
    fi
    vocabulary=(model.vocab_size=128256) # Llama 3's; a tokenizer says its own
    if [[ -n ${TOKENIZER:-} ]]; then vocabulary=("tokenizer.path=$TOKENIZER"); fi
    exec "${PYTHON:-$root/.venv/bin/python}" "$root/tools/plan.py" "$CONFIG" --gpus "$2" --gpu "$3" "${@:4}" "${vocabulary[@]}"
elif [[ -z ${DATA:-} ]]; then
    printf 'error[E256]: DATA is not set; name the datasets, DATA="142 /p/zh 128 /p/en", and their TOKENIZER\n' >&2
    exit 2
fi
exec bash "$root/examples/pretrain_1b4.sh" "$@"
