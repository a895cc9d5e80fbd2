#!/usr/bin/env bash
# From raw text to a Hugging Face model: the 1.4B recipe on GPUs, or the same chain at a size for this machine.
#
#   bash examples/pretrain_1b4.sh [group.field=value ...]          arguments go to the training program
#   bash examples/pretrain_1b4.sh optimizer.lr=1e-3 --accept optimizer.lr      go on with another setting
#
#   TEXT       a folder (or file) of your own .txt, .md or .jsonl: tokenizer, datasets and a small model are made of it, on a
#              CPU too
#   VOCAB_SIZE pieces of the tokenizer of TEXT or of the sample corpus, 4096 where absent; less where the text has less
#   DATA       indexed datasets with their weights, "142 /p/zh_text_document 128 /p/en_text_document", or one prefix
#   VALID      validation sets by name, "zh=/p/zv_text_document en=/p/ev_text_document"; absent: no evaluation
#   TOKENIZER  what made the data: a sentencepiece .model, a tokenizer.json or a Hugging Face folder
#   CONFIG     preset of the run with DATA on GPUs; default examples/configs/hammerllm_1b4_faithful.yaml
#   OUT        folder of the run (train.output); default runs/pretrain_1b4, with TEXT runs/my_text
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT    for more than one node: start it on each, or let Slurm do so:
#              srun --ntasks-per-node=1 --cpus-per-task=64 bash examples/pretrain_1b4.sh    (more: examples/slurm/)
#   PYTHON, TORCH_INDEX_URL    see tools/make_venv.sh, which makes .venv on first use
#
# With GPUs, DATA and TOKENIZER this is CONFIG on all GPUs. Otherwise the first line says why not, and the same programs
# train the small model of examples/configs/quick_start.yaml: on DATA, on TEXT, or on a sample corpus.
#
# Running it again continues where it stopped: stages whose result is complete are skipped, training resumes.
# Exit codes: those of the programs (docs/errors.md); 75: stopped by a signal and saved, run it again.
[ -n "${BASH_VERSION:-}" ] && [ "${BASH_SOURCE:-$0}" = "$0" ] || { # every shell reads this, and stops here
    echo "error[E283]: ${BASH_SOURCE:-$0} is a program for bash; run: bash ${BASH_SOURCE:-$0}" >&2
    return 2 2>/dev/null || exit 2
}
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
text_out=${TEXT:+runs/my_text}
readonly root python=$root/.venv/bin/python out=${OUT:-${text_out:-runs/pretrain_1b4}}
readonly languages=(zh en code)

fail() {
    printf 'error[E2%s]: %s\n' "$1" "$2" >&2
    exit 2
}

# --------------------------------------------------------------------------------------------------------------------
# What was asked for
# --------------------------------------------------------------------------------------------------------------------

# GPUs that a program may use, counted without torch: this runs before anything is installed.
count_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        local visible=()
        if [[ ${CUDA_VISIBLE_DEVICES:--1} != -1 ]]; then IFS=, read -r -a visible <<<"$CUDA_VISIBLE_DEVICES"; fi
        echo "${#visible[@]}"
    else
        { nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU' || true
    fi
}

# A value as a quoted YAML string, whatever characters it has.
quote() {
    local value=${1//\\/\\\\}
    printf '"%s"' "${value//\"/\\\"}"
}

# DATA -> the value of data.train.
train_sources() {
    local words=() pairs='' i
    read -r -a words <<<"$DATA"
    if [[ ! ${words[0]} =~ ^[0-9.]+([eE][-+]?[0-9]+)?$ || ${#words[@]} -eq 1 ]]; then
        quote "$DATA" # one prefix, blanks in it or not
        return
    fi
    ((${#words[@]} % 2 == 0)) || fail 53 "DATA=$DATA must be pairs of weight and prefix; give one weight before each prefix"
    for ((i = 0; i < ${#words[@]}; i += 2)); do
        [[ ${words[i]} =~ ^[0-9.]+([eE][-+]?[0-9]+)?$ ]] ||
            fail 53 "DATA: ${words[i]} must be a number, the weight of ${words[i + 1]}; give one weight before each prefix"
        pairs+="${pairs:+, }$(quote "${words[i + 1]}"): ${words[i]}"
    done
    printf '{%s}' "$pairs"
}

# VALID -> the value of data.valid.
valid_sets() {
    local words=() pairs='' word
    read -r -a words <<<"$VALID"
    for word in "${words[@]}"; do
        [[ $word == ?*=?* ]] || fail 54 "VALID: $word must be name=prefix; write VALID=\"zh=PREFIX en=PREFIX\""
        pairs+="${pairs:+, }$(quote "${word%%=*}"): $(quote "${word#*=}")"
    done
    printf '{%s}' "$pairs"
}

# Slurm's variables, where ours are not set: the step's before the job's, which may have more nodes.
find_nodes() {
    nnodes=${NNODES:-${SLURM_STEP_NUM_NODES:-${SLURM_NNODES:-1}}}
    node_rank=${NODE_RANK:-${SLURM_NODEID:-0}}
    master_addr=${MASTER_ADDR:-}
    master_port=${MASTER_PORT:-29500} # the port that torch programs use by custom
    local name
    for name in nnodes node_rank master_port; do
        [[ ${!name} =~ ^[0-9]+$ ]] || fail 55 "${name^^}=${!name} must be a whole number; write digits, or unset it"
    done
    local tasks=${SLURM_STEP_TASKS_PER_NODE:-1} nodes=${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST:-}} hosts
    if [[ ! $tasks =~ ^1(\(x[0-9]+\))?$ ]]; then # such as 8, or 8(x4)
        fail 59 "SLURM_STEP_TASKS_PER_NODE=$tasks starts this script several times on a node, each with all its ranks; use\
 srun --ntasks-per-node=1, or examples/slurm/one_task_a_rank.sbatch"
    fi
    if ((nnodes > 1)) && [[ -z $master_addr && -n $nodes ]]; then
        command -v scontrol >/dev/null ||
            fail 55 "NNODES=$nnodes needs MASTER_ADDR: Slurm's nodes are $nodes, but scontrol, which tells the first of\
 them, was not found; set MASTER_ADDR to the first"
        hosts=$(scontrol show hostnames "$nodes")
        master_addr=${hosts%%$'\n'*}
    fi
    if ((nnodes > 1)) && [[ -z $master_addr ]]; then
        fail 55 "NNODES=$nnodes needs MASTER_ADDR; give the address of node 0"
    fi
}

# --------------------------------------------------------------------------------------------------------------------
# Stages
# --------------------------------------------------------------------------------------------------------------------

# Run a program and pass stop signals on to it: bash alone would die of them and leave it running.
run() {
    local code stopped
    "$@" &
    local child=$!
    trap 'stopped=true; kill -s TERM "$child" 2>/dev/null || true' TERM INT HUP USR1
    while :; do # a signal ends wait early, with a code of its own, and the program goes on
        stopped=false code=0
        wait "$child" || code=$?
        $stopped || break
    done
    trap - TERM INT HUP USR1
    return "$code"
}

tool() { run "$python" "$root/tools/$1" "${@:2}"; }

stage() { printf '\n== %s\n' "$*"; }

done_already() { printf '   done already: %s\n' "$*"; }

make_corpus() {
    stage "sample corpus of Chinese, English and code"
    if [[ -e $out/corpus/manifest.json ]]; then
        done_already "$out/corpus"
    else
        tool make_sample_corpus.py --out "$out/corpus"
    fi
    present=() # of the languages: one whose source could not be had has no file
    local language
    for language in "${languages[@]}"; do
        if [[ -s $out/corpus/$language.jsonl ]]; then present+=("$language"); fi
    done
}

# The first file of one kind, txt (.md too) or jsonl, plain or compressed, in or below TEXT; nothing where there is none.
text_files() {
    find -H "$TEXT" -regextype posix-extended -xtype f \
        -iregex ".*\.(${1/#txt/txt|text|md|markdown})(\.gz|\.zst)?" 2>/dev/null | head -n 1
}

# TEXT -> corpus/txt.jsonl and corpus/jsonl.jsonl, with held-out documents (a twentieth) beside where there are enough.
make_corpus_of_text() {
    stage "corpus of $TEXT"
    if [[ -e $out/corpus/manifest.json ]]; then
        fail 19 "OUT=$out holds a run on the sample corpus; set OUT to another folder for TEXT=$TEXT"
    elif [[ -e $out/corpus/source ]]; then
        [[ $(<"$out/corpus/source") == "$TEXT" ]] ||
            fail 19 "OUT=$out holds a run on TEXT=$(<"$out/corpus/source"); set OUT to another folder for TEXT=$TEXT"
        done_already "$out/corpus"
    else
        local ending kind documents
        for ending in txt jsonl; do
            if [[ -z $(text_files "$ending") ]]; then continue; fi
            kind=${ending/txt/text}
            tool reformat_corpus.py "$kind" "$TEXT" --output "$out/corpus/$ending.all.jsonl"
            documents=$(wc -l <"$out/corpus/$ending.all.jsonl")
            if ((documents < 20)); then
                echo "$documents documents are too few to hold some out: no validation set of .$ending"
                mv "$out/corpus/$ending.all.jsonl" "$out/corpus/$ending.jsonl"
            else
                tool split_corpus.py "$out/corpus/$ending.all.jsonl" --output-prefix "$out/corpus/$ending" \
                    --valid-documents "$((documents / 20))" --seed 3407
                mv "$out/corpus/$ending.train.jsonl" "$out/corpus/$ending.jsonl"
                rm "$out/corpus/$ending.all.jsonl"
            fi
        done
        printf '%s\n' "$TEXT" >"$out/corpus/source"
    fi
    present=()
    for ending in txt jsonl; do
        if [[ -s $out/corpus/$ending.jsonl ]]; then present+=("$ending"); fi
    done
}

make_tokenizer() {
    stage "tokenizer"
    if [[ -e $out/tokenizer/tokenizer.model ]]; then
        done_already "$out/tokenizer"
    else
        local language texts=()
        for language in "${present[@]}"; do texts+=("$out/corpus/$language.jsonl"); done
        tool train_tokenizer.py --input "${texts[@]}" --output "$out/tokenizer" --allow-fewer \
            --vocab-size "${VOCAB_SIZE:-4096}"
    fi
}

make_datasets() {
    stage "indexed datasets"
    local language part
    mkdir -p "$out/data"
    for language in "${present[@]}"; do
        for part in "$language" "$language.valid"; do
            if [[ ! -s $out/corpus/$part.jsonl ]]; then continue; fi
            if [[ -e $out/data/${part/./_}_text_document.idx ]]; then
                done_already "$out/data/${part/./_}_text_document"
            else
                tool preprocess_data.py --input "$out/corpus/$part.jsonl" --json-keys text \
                    --tokenizer-model "$out/tokenizer" --output-prefix "$out/data/${part/./_}" \
                    --prepend-bos --append-eod --workers "$(nproc)"
            fi
        done
    done
}

# The command that was given, its variables included; with --longer without its number of steps.
same_command() {
    local name argument
    for name in TEXT VOCAB_SIZE CONFIG DATA VALID TOKENIZER OUT; do
        if [[ -n ${!name:-} ]]; then printf '%s=%q ' "$name" "${!name}"; fi
    done
    printf 'bash examples/pretrain_1b4.sh'
    for argument in ${given[@]+"${given[@]}"}; do
        if [[ ${1:-} != --longer || $argument != train.num_steps=* ]]; then printf ' %q' "$argument"; fi
    done
}

train() {
    stage "training"
    local code=0
    run "$python" -m megatron_hammer.launch "$@" || code=$?
    if ((code == 75)); then echo "Stopped and saved. The same command goes on from there: $(same_command)"; fi
    return "$code"
}

newest_checkpoint() {
    local folder newest=''
    for folder in "$out"/checkpoints/step-????????; do
        if [[ -d $folder ]]; then newest=$folder; fi # names sort by step
    done
    echo "$newest"
}

export_model() {
    stage "Hugging Face model, proved against the checkpoint"
    if [[ $out/hf/certificate.json -nt $1 ]]; then
        done_already "$out/hf"
    else
        tool checkpoint_to_hf.py --load "$out" --output "$out/hf"
    fi
}

show_model() {
    stage "a sample in each language"
    tool generate.py --hf "$out/hf" --temperature 0.5 --top-k 20 \
        --prompt "如果" --prompt "The function returns" --prompt "def main("
    stage "loss curve"
    tool plot_loss.py "$out" --output "$out/loss.png"
}

summary() {
    local quoted page=docs/quick_start.md
    quoted=$(printf '%q' "$out") # in commands: a folder's name may have blanks
    if [[ ${LC_ALL:-${LC_MESSAGES:-${LANG:-}}} == zh* ]]; then page=docs/quick_start.zh-CN.md; fi
    cat <<END

Done. Everything is in $out:
  checkpoints/   the newest is $(basename "$1")
  hf/            the model for transformers: AutoModelForCausalLM.from_pretrained("$out/hf")
  metrics.jsonl  one JSON object a step
  tensorboard/   $root/.venv/bin/tensorboard --logdir $quoted/tensorboard
  loss.png       the loss curve
What to run next:
  $python $root/tools/generate.py --hf $quoted/hf --prompt "import numpy"
  $python $root/tools/report.py $quoted --prompt "import numpy"   # the run as one page of HTML
END
    if $quick; then
        cat <<END
  $(same_command --longer) train.num_steps=800      # the same run, on to step 800, at the learning rate where it ended
  DATA="142 P_zh_text_document 128 P_en_text_document" TOKENIZER=M.model OUT=runs/my_1b4 \\
      bash examples/pretrain_1b4.sh                      # the 1.4B recipe, on GPUs; data: $page
END
    fi
}

# --------------------------------------------------------------------------------------------------------------------

# The datasets and the tokenizer of the small run, as settings: those given, or made of TEXT or the sample corpus.
small_run_data() {
    local language train='' valid=''
    if [[ -n ${DATA:-} ]]; then
        settings+=("tokenizer.path=$(quote "$TOKENIZER")" "data.train=$(train_sources)")
        if [[ -n ${VALID:-} ]]; then settings+=("data.valid=$(valid_sets)"); fi
        return
    fi
    if [[ -n ${TEXT:-} ]]; then make_corpus_of_text; else make_corpus; fi
    make_tokenizer
    make_datasets
    for language in "${present[@]}"; do
        train+="${train:+, }$(quote "$out/data/${language}_text_document"): 1"
        if [[ -e $out/data/${language}_valid_text_document.idx ]]; then
            valid+="${valid:+, }$(quote "$language"): $(quote "$out/data/${language}_valid_text_document")"
        fi
    done
    settings+=("tokenizer.path=$(quote "$out/tokenizer")" "data.train={$train}")
    if [[ -n $valid ]]; then settings+=("data.valid={$valid}"); fi
}

quick_start() {
    local gpus=$1 nproc=2 layout=() settings=()
    shift
    bash "$root/tools/make_venv.sh"
    if ((gpus == 1)); then
        nproc=1 layout=(parallel.tensor_model_parallel_size=1 parallel.sequence_parallel=false)
    fi
    # A misspelt setting is refused before anything is made.
    if (($#)); then "$python" -m megatron_hammer.config "$root/examples/configs/quick_start.yaml" "$@"; fi
    small_run_data
    train --nproc "$nproc" "$root/examples/configs/quick_start.yaml" "${layout[@]}" "train.output=$(quote "$out")" \
        "${settings[@]}" "$@"
}

show_help() { sed -n '2,/^\[ -n /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

main() {
    local gpus quick=true argument newest
    given=("$@")
    for argument in "$@"; do
        if [[ $argument == --help || $argument == -h ]]; then show_help && exit 0; fi
    done
    gpus=$(count_gpus)
    if [[ -n ${TEXT:-} && -n ${DATA:-} ]]; then
        fail 18 "TEXT and DATA are both set; TEXT is raw text that a dataset is made of, DATA names datasets: unset one"
    fi
    if [[ -n ${TEXT:-} && ! -e $TEXT ]]; then fail 18 "TEXT=$TEXT is not there; name a folder of .txt, .md or .jsonl files"; fi
    if [[ -n ${TEXT:-} && -z $(text_files txt)$(text_files jsonl) ]]; then
        fail 18 "TEXT=$TEXT holds no .txt, .md or .jsonl file (nor .gz or .zst of them); name a folder that does"
    fi
    if [[ -n ${DATA:-} && -z ${TOKENIZER:-} ]]; then
        fail 56 "TOKENIZER is not set but DATA is; set TOKENIZER to the tokenizer that made the data"
    fi
    for argument in TOKENIZER VALID; do
        [[ -z ${!argument:-} || -n ${DATA:-} ]] ||
            fail 56 "$argument is set but DATA is not, and it belongs to DATA; set DATA, or unset $argument"
    done
    for argument in "$@"; do
        if [[ $argument == train.output=* ]]; then fail 57 "$argument must be given as OUT; set OUT=${argument#*=}"; fi
    done
    find_nodes
    if [[ -n ${TEXT:-} ]]; then
        echo "TEXT=$TEXT: a tokenizer and a small model are made of your text, at a size for this machine."
    elif ((gpus == 0)) && [[ -n ${DATA:-} ]]; then
        echo "No NVIDIA GPU found. The quick start's small model is trained on DATA, at a size for this machine."
    elif ((gpus == 0)); then
        echo "No NVIDIA GPU found. The same chain runs on a sample corpus, at a size for this machine."
    elif [[ -z ${DATA:-} ]]; then
        echo "DATA is not set. The same chain runs on a sample corpus, at a size for minutes."
    else
        quick=false
    fi
    export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false # everything is local
    if $quick && [[ -n ${CONFIG:-} ]]; then
        fail 58 "CONFIG=$CONFIG needs GPUs and DATA; unset it for the sample run, or give it to megatron_hammer.launch"
    fi
    if $quick; then
        if ((nnodes > 1)); then fail 58 "NNODES=$nnodes needs GPUs and DATA; unset it for the sample run"; fi
        quick_start "$gpus" "$@"
    else
        local layout=(--nproc "$gpus") settings=("train.output=$(quote "$out")" "tokenizer.path=$(quote "$TOKENIZER")")
        settings+=("data.train=$(train_sources)")
        if [[ -n ${VALID:-} ]]; then
            settings+=("data.valid=$(valid_sets)")
        else
            echo "VALID is not set: no evaluation."
        fi
        if ((nnodes > 1)); then
            layout+=(--nnodes "$nnodes" --node-rank "$node_rank" --master-addr "$master_addr" --master-port "$master_port")
        fi
        bash "$root/tools/make_venv.sh"
        train "${layout[@]}" "${CONFIG:-$root/examples/configs/hammerllm_1b4_faithful.yaml}" "${settings[@]}" "$@"
        if ((node_rank > 0)); then exit 0; fi # node 0 does the rest
    fi
    newest=$(newest_checkpoint)
    if [[ -z $newest ]]; then exit 0; fi # train.dry_run=true
    export_model "$newest"
    show_model
    summary "$newest"
}

main "$@"
