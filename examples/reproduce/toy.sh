# shellcheck shell=bash disable=SC2034
# The toy size of docs/reproduce.md: source it, and the page's commands take a few minutes on two cores, without a GPU.
#
# The quick start's text stands for the published corpora, in their shapes and folders, and a tokenizer of 3,000 pieces
# for InternLM's. What the variables mean is said in full.sh.

WORK=${WORK:-lab/hammerllm}
SOURCES=$WORK/sources
MODELS=$WORK/models

declare -A GB=([zh]=1 [en]=1 [arxiv]=1 [wiki]=1 [github]=1)
declare -A WEIGHTS=([zh]=142 [en]=128 [arxiv]=38 [wiki]=12 [github]=30)
VALID_FRACTION=0.2
SAMPLE_MB=1
SAMPLE_VALID_MB=0.05
DONOR_PIECES=10000
SHUFFLE_MB=64
WORKERS=2
GPUS=2 # ranks, here on the CPU
SETTINGS=(
    model.hidden_size=64 model.ffn_hidden_size=192 model.num_layers=2 model.num_attention_heads=8 data.seq_length=128
    train.num_steps=8 train.micro_batch_size=2 train.global_batch_size=8 train.eval_interval_steps=4 train.eval_samples=8
    schedule.warmup_steps=2 schedule.decay_steps=8 checkpoint.save_interval_steps=4 train.precision=fp32
)
PROMPT=北京理工大学是
HUB_REPO=${HUB_REPO:-YOUR-NAME/hammerllm-toy}

# What is made once; base.model last, so that an interruption makes all again.
make_toy_sources() {
    if [[ ! -e tools/make_sample_corpus.py ]]; then
        echo "error: $PWD is not the root of the repository; cd there, then source examples/reproduce/toy.sh" >&2
        return 2
    elif ! python -c 'import megatron_hammer, pyarrow' 2>/dev/null; then
        echo "error: the python of this shell lacks megatron_hammer; bash tools/make_venv.sh, source .venv/bin/activate," \
            "then source examples/reproduce/toy.sh" >&2
        return 2
    fi
    mkdir -p "$SOURCES"/{chinesewebtext,refinedweb,pile} "$MODELS" || return
    python tools/make_sample_corpus.py --out "$WORK/sample" --bytes-per-domain 300000 || return
    python - "$WORK/sample" "$SOURCES" <<'PYTHON' || return
"""The sample corpus in the shapes in which the published ones come."""
import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet

sample, sources = map(Path, sys.argv[1:])
texts = {name: [json.loads(line)["text"] for line in (sample / f"{name}.jsonl").open(encoding="utf-8")]
         for name in ("zh", "en", "code")}  # fmt: skip
with (sources / "chinesewebtext" / "part.jsonl").open("w", encoding="utf-8") as file:
    for text in texts["zh"]:
        print(json.dumps({"title": "", "score": 0.9, "text": text}, ensure_ascii=False), file=file)
pyarrow.parquet.write_table(pyarrow.table({"content": texts["en"]}), sources / "refinedweb" / "part.parquet")
with (sources / "pile" / "part.jsonl").open("w", encoding="utf-8") as file:
    for i, text in enumerate(texts["en"]):
        name = ("ArXiv", "Wikipedia (en)")[i % 2]
        print(json.dumps({"text": f"{name}: {text}", "meta": {"pile_set_name": name}}), file=file)
    for text in texts["code"]:
        print(json.dumps({"text": text, "meta": {"pile_set_name": "Github"}}), file=file)
PYTHON
    printf '%s\n' '<CLS>' '<SEP>' '<br>' '</p>' 0 1 2 3 4 5 6 7 8 9 >"$MODELS/symbols.txt"
    python tools/train_tokenizer.py --input "$WORK"/sample/{zh,en,code}.jsonl --vocab-size 3000 \
        --output "$MODELS/base.model"
}

if [[ ! -e $MODELS/base.model ]]; then make_toy_sources; fi
