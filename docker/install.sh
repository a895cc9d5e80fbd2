#!/usr/bin/env bash
# The steps of the images, one argument each: the Dockerfiles call them, and they run without Docker as well.
#
#   bash docker/install.sh torch           .venv with torch alone
#   bash docker/install.sh accelerators    Transformer Engine, flash-attn, Liger: built against that torch
#   bash docker/install.sh environment     everything else, in the versions of constraints.txt
#   bash docker/install.sh kernels         our CUDA kernels, for the GPUs of CUDA_ARCHS (80;90)
#   bash docker/install.sh check           what is there; fails where the compiled modules are missing
#
# The CPU image: TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu bash docker/install.sh torch environment check
[ -n "${BASH_VERSION:-}" ] && [ "${BASH_SOURCE:-$0}" = "$0" ] || { # every shell reads this, and stops here
    echo "error[E283]: ${BASH_SOURCE:-$0} is a program for bash; run: bash ${BASH_SOURCE:-$0}" >&2
    return 2 2>/dev/null || exit 2
}
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
export PIP_CONSTRAINT=$PWD/docker/constraints.txt PIP_NO_CACHE_DIR=1
readonly python=.venv/bin/python

torch() {
    "${PYTHON:-python3.12}" -m venv .venv
    "$python" -m pip install --disable-pip-version-check ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch
}

environment() { HAMMER_CUDA_ARCHS=none bash tools/make_venv.sh; } # finds torch there; kernels is a step of its own

# Without build isolation: a build of its own would compile against another torch, or none.
accelerators() {
    "$python" -m pip install setuptools wheel ninja packaging
    "$python" -m pip install --no-build-isolation "transformer-engine[pytorch,core_cu13]" flash-attn liger-kernel
}

kernels() {
    "$python" -m pip install setuptools wheel pybind11
    HAMMER_CUDA_ARCHS=$(tr ';' ',' <<<"${CUDA_ARCHS:-80;90}") \
        "$python" -m pip install --no-build-isolation --no-deps --editable .
}

check() {
    "$python" -m pip check
    "$python" - <<'PYTHON'
import torch
from importlib.metadata import PackageNotFoundError, version

from megatron_hammer.kernels.native import cpu
from megatron_hammer.sampling import index_builder

assert index_builder.BACKEND == "C++", "the compiled modules are missing"
print("torch", torch.__version__, "CUDA", torch.version.cuda)
for name in ("transformers", "triton", "transformer-engine", "flash-attn", "liger-kernel"):
    try:
        print(name, version(name))
    except PackageNotFoundError:
        print(name, "absent")
PYTHON
    "$python" -m megatron_hammer.train --help >/dev/null
}

for step in "$@"; do
    case $step in
        torch | accelerators | environment | kernels | check) "$step" ;;
        *)
            echo "error: $step is no step; torch, accelerators, environment, kernels and check are" >&2
            exit 2
            ;;
    esac
done
