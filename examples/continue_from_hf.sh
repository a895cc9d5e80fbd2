#!/usr/bin/env bash
# Pretraining goes on: a Llama, Qwen2, Qwen3 or Mistral of Hugging Face in, new text, a Hugging Face folder out.
#
#   bash examples/continue_from_hf.sh HF TEXT OUT [group.field=value ...]
#   bash examples/continue_from_hf.sh models/Qwen3-1.7B my_texts runs/my_qwen train.num_steps=2000
#
#   HF         folder with config.json, safetensors and the tokenizer; it stays as it is
#   TEXT       .txt, .md, .jsonl, .parquet (also .gz, .zst) or a folder of them; or a dataset's prefix (P of P.idx) that
#              was made with this tokenizer
#   OUT        imported/ the checkpoint, data/ the dataset, run/ the training, hf/ the result
#   NPROC      ranks (default 1), PYTHON the interpreter (default .venv/bin/python), WORKERS threads that encode
#
# Documents begin and end as the model's tokenizer has it. The settings below are for a few billion tokens of new text;
# arguments replace them, such as parallel.tensor_model_parallel_size=2. Mix old text into the new (several datasets:
# data.train='{new: 1, old: 1}'), or the model forgets. Running it again goes on where it stopped.
[ -n "${BASH_VERSION:-}" ] && [ "${BASH_SOURCE:-$0}" = "$0" ] || { # every shell reads this, and stops here
    echo "error[E283]: ${BASH_SOURCE:-$0} is a program for bash; run: bash ${BASH_SOURCE:-$0}" >&2
    return 2 2>/dev/null || exit 2
}
set -euo pipefail

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    sed -n '2,/^\[ -n /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit 0
fi
if (($# < 3)); then
    printf 'error[E201]: continue_from_hf.sh needs HF TEXT OUT; see its first lines\n' >&2
    exit 2
fi
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python} hf=$1 text=$2 out=$3
shift 3
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false # everything is local

# A value as a quoted YAML string, whatever characters it has.
quote() {
    local value=${1//\\/\\\\}
    printf '"%s"' "${value//\"/\\\"}"
}

if [[ ! -d $out/imported ]]; then "$python" "$root/tools/hf_to_checkpoint.py" --hf "$hf" --save "$out/imported"; fi

if [[ -f $text.idx ]]; then
    data=$text
else
    data=$out/data/text_text_document
    if [[ ! -f $data.idx ]]; then
        # bos and eos where the tokenizer has them: a prompt begins in the same way.
        marks=$("$python" -c '
import sys
from megatron_hammer.tokenizer.load import load_tokenizer
tokenizer = load_tokenizer(sys.argv[1])
as_llama_2 = tokenizer.path.suffix == ".model"  # a bare sentencepiece model does not say it
begins = tokenizer.bos_id is not None and (as_llama_2 or tokenizer.bos_id in tokenizer.template_ids())
print(*["--prepend-bos"] * begins, *["--append-eod"] * (tokenizer.eos_id is not None))' "$hf")
        mkdir -p "$out/data"
        # shellcheck disable=SC2086  # no option, or two
        "$python" "$root/tools/preprocess_data.py" --input "$text" --tokenizer-model "$hf" \
            --output-prefix "$out/data/text" $marks --workers "${WORKERS:-$(nproc)}"
    fi
fi

"$python" -m megatron_hammer.launch --nproc "${NPROC:-1}" "$out/imported/model.yaml" \
    "checkpoint.init_from=$(quote "$out/imported")" "data.train=$(quote "$data")" "tokenizer.path=$(quote "$hf")" \
    "train.output=$(quote "$out/run")" data.seq_length=4096 data.attention_mask=document train.num_steps=1000 \
    train.global_batch_size=64 optimizer.lr=2e-5 optimizer.min_lr=2e-6 optimizer.beta2=0.95 \
    optimizer.weight_decay=0.1 schedule.style=wsd schedule.warmup_steps=100 checkpoint.save_interval_steps=200 "$@"
"$python" "$root/tools/checkpoint_to_hf.py" --load "$out/run" --output "$out/hf"
