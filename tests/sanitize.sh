#!/usr/bin/env bash
# Runs the tests of compiled parts on a build with the address and undefined-behaviour sanitizers, in a copy of the tree.
#   tests/sanitize.sh [PART ...]      of data, base, checkpoint, tokenizer, cpu; all of them without a name
# PYTHON: the interpreter (.venv/bin/python). Needs g++ with libasan and libubsan. Two tests of the saver are left out: they
# give a process half a second or one, in which it has not even started here.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r megatron_hammer tests tools benchmarks csrc setup.py pyproject.toml "$copy"
mkdir "$copy/examples" && cp -r examples/configs "$copy/examples"
read -r include_pybind include_python suffix < <("$python" -c '
import pybind11, sysconfig
print(pybind11.get_include(), sysconfig.get_paths()["include"], sysconfig.get_config_var("EXT_SUFFIX"))')

build() { # MODULE FLAG ... SOURCE ...
  local module=$1
  shift
  g++ -shared -std=c++17 -fvisibility=hidden -fPIC -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all \
      -fno-omit-frame-pointer -I"$include_pybind" -I"$include_python" "$@" -o "$copy/megatron_hammer/$module$suffix"
}

# Leaks: Python itself keeps memory until it ends. The C++ library comes along, lest exceptions pass the sanitizer by.
# A process that a test starts has both, too; one whose environment a test replaces has not, and could not load a part.
run() { # TEST ...
  (cd "$copy" && HAMMER_SANITIZED=1 ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc PYTHONPATH=$copy OMP_NUM_THREADS=1 \
      LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so) $(gcc -print-file-name=libstdc++.so.6)" \
      "$python" -m pytest -q -n 0 -p no:cacheprovider --rootdir="$copy" "$@")
}

for part in ${@:-data base checkpoint tokenizer cpu}; do
  echo "== $part"
  case $part in
    data)
      build sampling/_index -ffp-contract=off -DHAMMER_ONE_VERSION csrc/data/*.cpp
      run tests/sampling/test_{index_builder,blend,order,reading,samples}.py tests/dataset/make/test_merge.py \
          -k "not program and not 32_bits" ;;
    base)
      build base/_mapping csrc/base/mapping.cpp
      run tests/base/test_mapping.py ;;
    checkpoint)
      build checkpoint/_digest csrc/checkpoint/digest.cpp
      run tests/checkpoint/test_{digest,direct,layouts}.py tests/train/test_saver.py -k "not hangs and not outlives" ;;
    tokenizer)
      build tokenizer/_encoder -pthread csrc/tokenizer/*.cpp
      run tests/tokenizer/test_{encode,tiktoken}.py -k "not warnings and not memory and not do_without" ;;
    cpu)
      build kernels/native/_cpu -fno-math-errno -fno-trapping-math -fopenmp csrc/cpu/*.cpp
      run tests/kernels/native ;;
    *) echo "no part is called $part" >&2; exit 2 ;;
  esac
done
