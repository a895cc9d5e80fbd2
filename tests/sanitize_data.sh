#!/usr/bin/env bash
# Runs the data tests on a build of csrc/data with the address and undefined-behaviour sanitizers, in a copy of the tree.
#   tests/sanitize_data.sh [PYTHON]      needs g++ with libasan and libubsan
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${1:-.venv/bin/python}")
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r megatron_hammer tests tools benchmarks pyproject.toml "$copy"
read -r include_pybind include_python suffix < <("$python" -c '
import pybind11, sysconfig
print(pybind11.get_include(), sysconfig.get_paths()["include"], sysconfig.get_config_var("EXT_SUFFIX"))')
g++ -shared -std=c++17 -fvisibility=hidden -fPIC -O1 -g -ffp-contract=off -DHAMMER_ONE_VERSION \
    -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer \
    -I"$include_pybind" -I"$include_python" csrc/data/*.cpp -o "$copy/megatron_hammer/sampling/_index$suffix"
cd "$copy"
# Leaks: Python itself keeps memory until it ends. The C++ library comes along, lest exceptions pass the sanitizer by.
ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc PYTHONPATH=$copy OMP_NUM_THREADS=1 \
    LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so) $(gcc -print-file-name=libstdc++.so.6)" \
    "$python" -m pytest -q -p no:cacheprovider --rootdir="$copy" tests/sampling/test_index_builder.py tests/sampling/test_blend.py \
    tests/sampling/test_order.py tests/sampling/test_reading.py tests/sampling/test_samples.py tests/dataset/make/test_merge.py \
    -k "not program and not 32_bits"
