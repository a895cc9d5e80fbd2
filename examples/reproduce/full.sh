# shellcheck shell=bash disable=SC2034
# The published size of docs/reproduce.md: source it, or copy it and change what your machine wants otherwise.
#
# WORK      where everything goes: 6.2 TB at once, 4.9 TB once raw/ is removed
# SOURCES   the published corpora: chinesewebtext/*.jsonl, refinedweb/*.parquet, pile/*.jsonl(.zst)
# MODELS    base.model: tokenizer.model of internlm/internlm-7b; symbols.txt: the published user-defined symbols, with
#           CLS> mended to <CLS> and "</p >" to </p>

WORK=${WORK:-lab/hammerllm}
SOURCES=${SOURCES:-$WORK/sources}
MODELS=${MODELS:-$WORK/models}

declare -A GB=([zh]=563 [en]=504 [arxiv]=111 [wiki]=46 [github]=98) # text of each source, 10^9 bytes
declare -A WEIGHTS=([zh]=142 [en]=128 [arxiv]=38 [wiki]=12 [github]=30) # billions of tokens, the shares of the mix
VALID_FRACTION=0.0002       # of each source is held out: 28 M tokens of Chinese
SAMPLE_MB=1000 # text for the tokenizer: the published donor saw 1 GB
SAMPLE_VALID_MB=20
DONOR_PIECES=128000
SHUFFLE_MB=100000           # memory of the shuffle
WORKERS=$(nproc)
GPUS=8                      # of this machine
SETTINGS=()                 # the published recipe as it is
PROMPT=北京理工大学是
HUB_REPO=${HUB_REPO:-YOUR-NAME/hammerllm-1.4b}
