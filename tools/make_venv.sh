#!/usr/bin/env bash
# Make .venv in the repository root, complete, or do nothing when it is complete already.
#
#   bash tools/make_venv.sh
#   PYTHON=/opt/python3.12/bin/python3 bash tools/make_venv.sh         another interpreter (3.11 to 3.14)
#   TORCH_INDEX_URL=URL bash tools/make_venv.sh                        torch from another index, such as a CPU build
#   TORCH_VERSION='2.11.*' bash tools/make_venv.sh                     one version of torch within our range
#   HAMMER_NO_EXTENSIONS=1 bash tools/make_venv.sh                     without the C++ index builder (see setup.py)
#   HAMMER_CUDA_ARCHS=90 bash tools/make_venv.sh                       the CUDA kernels for these GPUs (see setup.py)
#
# What is missing on the machine is named before anything is downloaded (exit code 2). torch goes in first, in a step of
# its own: pip would otherwise be free to take a version outside our range, or a CUDA build of some gigabytes where the
# CPU build was asked for. The package is built without isolation, in the environment that it will run in, because the
# CUDA kernels are compiled against its torch: with nvcc and a torch for CUDA they are built, and otherwise the last
# lines say why not. The file .venv/.complete, written last, holds a hash of what was installed from: after an
# interruption the next call starts afresh, after a change of pyproject.toml, setup.py, csrc/ or nvcc it installs again.
[ -n "${BASH_VERSION:-}" ] && [ "${BASH_SOURCE:-$0}" = "$0" ] || { # every shell reads this, and stops here
    echo "error[E283]: ${BASH_SOURCE:-$0} is a program for bash; run: bash ${BASH_SOURCE:-$0}" >&2
    return 2 2>/dev/null || exit 2
}
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
readonly venv=.venv complete=.venv/.complete unfinished=.venv/.unfinished
readonly torch_range='torch>=2.11,<2.16' # as in pyproject.toml; tests/test_examples.py compares them

fail() {
    printf 'error[E2%s]: %s\n' "$1" "$2" >&2
    exit 2
}

# What an interpreter lacks, one word a line; "version X.Y" when it is not one that we support.
readonly probe='
import os, sys, sysconfig
if not (3, 11) <= sys.version_info[:2] <= (3, 14):
    print("version %d.%d" % sys.version_info[:2])
    sys.exit()
try:
    import ensurepip, venv
except ImportError:
    print("venv")
if os.environ.get("HAMMER_NO_EXTENSIONS") != "1" and not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
    print("headers")
'

# The first complete Python of the candidates goes to $python; else the nearest miss is named.
choose_python() {
    local candidate lacks nearest='' nearest_lacks='' seen=''
    for candidate in ${PYTHON:+"$PYTHON"} ${PYTHON:-python3.12 python3.11 python3.13 python3.14 python3 python}; do
        lacks=$("$candidate" -c "$probe" 2>/dev/null) || continue
        if [[ -z $lacks ]]; then
            python=$candidate
            return
        elif [[ $lacks == version* ]]; then
            seen+="${seen:+, }$candidate is ${lacks#version }"
        elif [[ -z $nearest ]]; then
            nearest=$candidate nearest_lacks=$lacks
        fi
    done
    if [[ -z $nearest ]]; then
        fail 50 "Python 3.11 to 3.14 was not found (${PYTHON:+PYTHON=$PYTHON; }${seen:-no Python at all}); install it\
 (Debian 12: apt-get install python3 python3-venv python3-dev) or set PYTHON to such an interpreter"
    fi
    local version what='' packages=''
    version=$("$nearest" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if [[ $nearest_lacks == *venv* ]]; then
        what+=" the module venv with ensurepip," packages+=" python$version-venv"
    fi
    if [[ $nearest_lacks == *headers* ]]; then
        what+=" the headers (Python.h)," packages+=" python$version-dev"
    fi
    fail 51 "$nearest (Python $version) lacks${what%,}; apt-get install$packages, or set PYTHON to another Python 3.11 to 3.14"
}

# A .venv that was moved or copied here with its clone: its programs, and the package in it, are those of the old place.
refuse_moved() {
    local key rest made=''
    [[ -f $venv/pyvenv.cfg ]] || return 0
    while read -r key rest; do
        if [[ $key == command ]]; then made=/${rest#*-m venv*/}; fi
    done <"$venv/pyvenv.cfg"
    [[ -z $made || $made -ef $venv ]] ||
        fail 51 "$venv was made as $made, and moved or copied to $PWD, where it does not work; rm -rf $PWD/$venv, then call\
 $0 again"
}

find_compiler() {
    if [[ ${HAMMER_NO_EXTENSIONS:-} == 1 ]]; then return; fi
    command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null ||
        fail 52 "a C++ compiler (${CXX:-c++, g++}) was not found; apt-get install g++, or set CXX"
}

# The compiler of the CUDA kernels, where setup.py looks for it.
find_nvcc() { type -P nvcc || PATH=${CUDA_HOME:-/usr/local/cuda}/bin type -P nvcc || true; }

# The tree and the compiler that the installation depends on, as one hash.
wanted() {
    {
        find pyproject.toml setup.py csrc -type f ! -name '*.so' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
        echo "torch ${TORCH_VERSION:-}"
        echo "nvcc $(find_nvcc)"
    } | sha256sum | cut -d' ' -f1
}

is_complete() {
    local made archs
    [[ -x $venv/bin/python && ! -e $unfinished && -f $complete ]] || return 1
    read -r made archs <"$complete"
    [[ $made == "$hash" && (-z ${HAMMER_CUDA_ARCHS:-} || $archs == "$HAMMER_CUDA_ARCHS") ]]
}

# What a user's settings of pip have it install elsewhere is for .venv here.
export PIP_USER=0
unset PIP_TARGET PIP_PREFIX PIP_ROOT

pip_install() {
    local quiet=(--quiet)
    if [[ -t 2 ]]; then quiet=(); fi # a terminal gets pip's progress bars
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input ${quiet[@]+"${quiet[@]}"} "$@"
}

# An index that a variable names is asked once for a package, so that one that cannot be reached ends the program here:
# pip itself would try for minutes, for each package anew. Folders and indices beside it do not answer for it.
check_index() {
    local url=${!1:-}
    if [[ -z $url ]]; then return; fi
    PIP_FIND_LINKS='' PIP_EXTRA_INDEX_URL='' "$venv/bin/python" -m pip index versions "$2" --index-url "$url" --retries 0 --timeout 20 --no-input \
        --disable-pip-version-check &>/dev/null ||
        fail 22 "$1=$url does not answer as a package index, or has no $2 for this Python; open the address from this\
 machine (a proxy goes into https_proxy), correct $1 or unset it"
}

# What builds the package, one requirement a line.
readonly build_requirements='
import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")
'

install_package() {
    local needed
    mapfile -t needed < <("$venv/bin/python" -c "$build_requirements")
    pip_install "${needed[@]}"
    pip_install --no-build-isolation --editable '.[dev]'
}

# Why the CUDA kernels were not built; nothing where they were, or where no GPU is meant.
readonly obstacle='
import runpy
setup = runpy.run_path("setup.py", run_name="setup")
torch = setup["find_torch"]()[1]
print(setup["cuda_obstacle"]() if torch.get("cuda") else "")
'

say_what_was_built() {
    local library=megatron_hammer/kernels/native/_cuda.so why
    why=$("$venv/bin/python" -c "$obstacle")
    if [[ ${HAMMER_NO_EXTENSIONS:-} == 1 ]]; then
        echo "no compiled kernels: HAMMER_NO_EXTENSIONS=1"
    elif [[ ${HAMMER_CUDA_ARCHS:-} == none ]]; then
        echo "no CUDA kernels: HAMMER_CUDA_ARCHS=none"
    elif [[ -n $why ]]; then
        echo "WARNING: the CUDA kernels are left out: $why. On a GPU runs take Triton's (kernels.norm=triton) instead."
        echo "         To build them: install nvcc (CUDA's toolkit), or set CUDA_HOME, and call $0 again."
    elif [[ -e $library ]]; then
        echo "the CUDA kernels are built: $library"
    fi
}

# One call at a time, until this one ends; where the file system has no locks (Lustre without its mount option flock)
# nobody sees to that.
lock() {
    local code=0
    flock --nonblock 9 || code=$?
    if ((code == 1)); then # another call has it; any other code is an error of the file system, which flock has told
        echo "waiting for another $0"
        code=0
        flock 9 || code=$?
    fi
    if ((code)); then
        echo "note: the file system of $PWD has no locks; until $venv is complete, call $0 on one machine alone"
    fi
}

main() {
    [[ -z ${PYTHONHOME:-} ]] ||
        fail 51 "PYTHONHOME=$PYTHONHOME has every Python look for its library there; unset PYTHONHOME, and call $0 again"
    refuse_moved
    hash=$(wanted)
    if is_complete; then return; fi
    if command -v flock >/dev/null; then
        mkdir -p "$venv"
        exec 9>"$venv/.lock" # a file, because a shared file system cannot lock a folder
        lock
        if is_complete; then return; fi
    fi
    choose_python
    find_compiler
    echo "[1/3] $venv with $("$python" --version)"
    if [[ -e $unfinished ]] || ! "$venv/bin/python" -c "import pip" 2>/dev/null; then
        if [[ -d $venv ]]; then find "$venv" -mindepth 1 -maxdepth 1 ! -name .lock -exec rm -rf {} +; fi
        "$python" -m venv "$venv"
    fi
    touch "$unfinished"
    check_index PIP_INDEX_URL pip
    check_index TORCH_INDEX_URL torch
    echo "[2/3] torch${TORCH_INDEX_URL:+ from $TORCH_INDEX_URL}"
    if [[ -z ${TORCH_INDEX_URL:-} ]] && ! command -v nvidia-smi >/dev/null; then
        echo "      (no NVIDIA GPU here: with TORCH_INDEX_URL set to PyTorch's CPU index the download is a tenth as large)"
    fi
    pip_install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$torch_range${TORCH_VERSION:+,==$TORCH_VERSION}"
    echo "[3/3] megatron_hammer and what it needs"
    install_package
    say_what_was_built
    echo "$hash ${HAMMER_CUDA_ARCHS:-}" >"$complete"
    rm "$unfinished" # last: until here the next call starts afresh
    echo "$venv is complete"
}

main
