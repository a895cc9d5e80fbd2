"""Builds the compiled part of the package; all metadata is in pyproject.toml.

``csrc/data`` -> ``megatron_hammer.sampling._index``: the sample index builder; ``csrc/tokenizer`` ->
``megatron_hammer.tokenizer._encoder``: the encoder of sentencepiece models; ``csrc/cpu`` ->
``megatron_hammer.kernels.native._cpu``: the fused operations on a CPU (all pybind11, no torch, no CUDA). NumPy,
sentencepiece and torch do the same work, so ``HAMMER_NO_EXTENSIONS=1`` may leave them out; without that wish a failing
compiler fails the installation, because a silent fall-back would only show as slowness later. ``csrc/base`` ->
``megatron_hammer.base._mapping``: what happens when a mapped file is cut; without it that is seen a moment later, and a
process that reads in this moment dies. ``csrc/checkpoint`` -> ``megatron_hammer.checkpoint._digest``: copies past
the core's caches, and hash and sum of what a checkpoint copies, in the same pass. NumPy and the library xxhash are the
twins.

``csrc/kernels`` -> ``megatron_hammer/kernels/native/_cuda.so``: the fused operations on a GPU, a library of torch
operations on torch's stable C++ ABI. It is built where nvcc and a torch for CUDA are present (the latter is not under
build isolation: ``pip install --no-build-isolation``), and otherwise one line says why it is not. ``HAMMER_CUDA_ARCHS``
names the architectures, such as ``80,90``; ``none`` leaves it out.

``tools/`` -> ``megatron_hammer/tools/`` in a wheel: the programs that the command ``hammer`` finds there. An editable
installation and the repository itself use ``tools/`` where it is. ``examples/configs/`` ->
``megatron_hammer/configs/``: the presets, by their names (``config/presets.py``). ``examples/corpus/`` ->
``megatron_hammer/essays/``: our own text in the sample corpus (``corpus/quick_start.py``). ``docs/*.md`` ->
``megatron_hammer/docs/``: the pages that ``hammer help`` prints (``command.py``).

macOS: clang has no OpenMP of its own, and a second runtime beside torch's ends the process, so the kernels run in one
thread there; ``HAMMER_LIBOMP=PREFIX`` names the folder of the libomp that torch itself uses (``include/omp.h``,
``lib/libomp.dylib``). Windows is refused (E292).
"""

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import Extension, setup
from setuptools.command.build_py import build_py

NO_EXTENSIONS = "HAMMER_NO_EXTENSIONS"
CUDA_ARCHS = "HAMMER_CUDA_ARCHS"
DEFAULT_CUDA_ARCHS = "80,90"  # A100, H100 and H200; what comes after them takes the portable code of the last
CUDA_SOURCES = [
    *(f"csrc/kernels/{name}.cu" for name in ("adamw", "fp8", "rms_norm", "rope", "square_sum", "swiglu")),
    "csrc/kernels/bindings.cpp",
]
LIBOMP = "HAMMER_LIBOMP"
DATA = {"configs": "examples/configs/*.yaml", "essays": "examples/corpus/*.txt", "docs": "docs/*.md"}
"""Folder of the package in a wheel -> files of the repository."""
CUDA_HEADERS = ["csrc/kernels/common.cuh", "csrc/kernels/kernels.hpp"]


def openmp_flags(platform: str, libomp: str | None) -> tuple[list[str], list[str]]:
    """What compiler and linker are told for OpenMP.

    Args:
        libomp: of macOS, the folder of a runtime; None: without, in one thread.
    """
    if platform != "darwin":
        return ["-fopenmp"], ["-fopenmp"]
    if libomp is None:
        return ["-Wno-unknown-pragmas"], []
    compiled = ["-Xpreprocessor", "-fopenmp", f"-I{libomp}/include"]
    return compiled, [f"-L{libomp}/lib", "-lomp", f"-Wl,-rpath,{libomp}/lib"]


OPENMP = openmp_flags(sys.platform, os.environ.get(LIBOMP))
EXTENSIONS = [
    Pybind11Extension(
        "megatron_hammer.base._mapping",
        ["csrc/base/mapping.cpp"],
        cxx_std=17,
        extra_compile_args=["-O2", "-Wall", "-Wextra"],
    ),
    Pybind11Extension(
        "megatron_hammer.checkpoint._digest",
        ["csrc/checkpoint/digest.cpp"],
        depends=[f"csrc/checkpoint/{header}.hpp" for header in ("past_caches", "units", "xxh3")],
        cxx_std=17,
        extra_compile_args=["-O3", "-Wall", "-Wextra"],
    ),
    Pybind11Extension(
        "megatron_hammer.sampling._index",
        ["csrc/data/bindings.cpp", "csrc/data/index_builder.cpp", "csrc/data/reading.cpp"],
        depends=["csrc/data/index_builder.hpp", "csrc/data/reading.hpp"],
        cxx_std=17,
        # No fused multiply-add: blending must round exactly as its NumPy twin does.
        extra_compile_args=["-O3", "-ffp-contract=off", "-Wall", "-Wextra"],
    ),
    Pybind11Extension(
        "megatron_hammer.tokenizer._encoder",
        [f"csrc/tokenizer/{name}.cpp" for name in ("bindings", "encoder", "model", "vocabulary", "worker")],
        depends=[
            f"csrc/tokenizer/{name}.hpp" for name in ("encoder", "model", "table", "utf8", "vocabulary", "worker")
        ],
        cxx_std=17,
        extra_compile_args=["-O3", "-Wall", "-Wextra", "-pthread"],
        extra_link_args=["-pthread"],
    ),
    Pybind11Extension(
        "megatron_hammer.kernels.native._cpu",
        [f"csrc/cpu/{name}.cpp" for name in ("bindings", "attention", "attention_bindings")]
        + [f"csrc/cpu/version_{name}.cpp" for name in ("portable", "avx2", "avx512", "avx512_bf16", "amx")],
        depends=[
            f"csrc/cpu/{name}"
            for name in (
                *("kernels.hpp", "kernels.inl", "vectors.inl", "operations.hpp", "tensor.hpp"),
                *("arena.hpp", "attention.hpp", "attention.inl", "attention_bindings.hpp"),
            )
        ],
        cxx_std=17,
        # Nobody reads errno or traps floating-point exceptions, so square roots become vectors; values do not change.
        extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", *OPENMP[0]],
        extra_link_args=OPENMP[1],
    ),
]


# torch 2.11 and later serve what is compiled against the ABI of 2.11. With C++20 the library would need a younger
# libstdc++ besides.
CUDA_FLAGS = ["-std=c++17", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
CUDA_FLAGS += ["-Xcompiler=-fPIC,-fvisibility=hidden"]


def find_nvcc() -> str | None:
    """The compiler on PATH or under CUDA_HOME."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))


def find_torch() -> tuple[Path | None, dict[str, str | None]]:
    """The folder of the torch of this interpreter and the values in its version.py; torch itself is not imported."""
    found = importlib.util.find_spec("torch")
    folder = Path(found.origin).parent if found is not None and found.origin is not None else None
    if folder is None or not (folder / "version.py").exists():
        return None, {}
    return folder, runpy.run_path(str(folder / "version.py"))


def architecture_flags(archs: list[str]) -> list[str]:
    """Machine code of each architecture, and portable code of the last for GPUs that come after it."""
    real = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*real, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def cuda_obstacle() -> str:
    """Why the CUDA kernels are not built here, or an empty string."""
    folder, version = find_torch()
    if os.environ.get(CUDA_ARCHS) == "none":
        return f"{CUDA_ARCHS}=none"
    if find_nvcc() is None:
        return "nvcc was not found on PATH or under CUDA_HOME"
    if folder is None:
        return "this build sees no torch; with a CUDA torch installed, pip install --no-build-isolation builds them"
    if version.get("cuda") is None:
        return f"torch {version.get('__version__')} is not one for CUDA"
    return ""


class BuildExtensions(build_ext):
    """``build_ext`` whose failure says what is missing and what to do, and which knows nvcc."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.split(".")[-1] == "_cuda":  # no Python module: no tag of an interpreter
            return os.path.join(*fullname.split(".")) + ".so"
        return str(super().get_ext_filename(fullname))

    def build_extension(self, ext: Extension) -> None:
        if ext.name.split(".")[-1] != "_cuda":
            super().build_extension(ext)
            return
        target, (torch, _) = self.get_ext_fullpath(ext.name), find_torch()
        os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
        archs = os.environ.get(CUDA_ARCHS, DEFAULT_CUDA_ARCHS).split(",")
        command = [str(find_nvcc()), "-shared", "--threads=0", *CUDA_FLAGS, *architecture_flags(archs)]
        command += [f"-isystem={torch}/include", *ext.sources, "-o", target]
        command += [f"-L{torch}/lib", "-ltorch_cpu", "-ltorch_cuda"]
        print(" ".join(command))
        if subprocess.run(command).returncode:
            raise SystemExit(
                "megatron_hammer: nvcc could not compile the CUDA kernels (its messages are above); name architectures "
                f"that it knows ({CUDA_ARCHS}=80,90), or set {CUDA_ARCHS}=none to do without them"
            )

    def run(self) -> None:
        if sys.platform == "win32":
            raise SystemExit(
                "error[E292]: megatron_hammer cannot run on Windows itself: it needs POSIX, which Windows lacks; "
                "install it in WSL2, where it is Linux (wsl --install)"
            )
        headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
        if self.extensions and not headers.exists():
            raise SystemExit(
                f"megatron_hammer: Python's headers are missing ({headers}); install them (Debian and Ubuntu: "
                f"python3-dev), or set {NO_EXTENSIONS}=1 to use NumPy, sentencepiece and torch instead, slower"
            )
        try:
            super().run()
        except Exception as error:  # distutils raises several unrelated classes
            reason = str(error) if len(str(error)) < 200 else "its messages are above"  # else a whole command line
            raise SystemExit(
                f"megatron_hammer: the C++ modules could not be compiled ({reason}); a compiler for C++17 is needed "
                f"(Debian and Ubuntu: g++; another one: CXX=...), or set {NO_EXTENSIONS}=1 to do without them"
            ) from error


class BuildWithTools(build_py):
    """``build_py`` that puts the programs of tools/, presets and essays of examples/ and docs/ into the package."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        sources = [*Path("tools").glob("*.py"), *Path("tools/require_package").glob("*.py")]
        placed = [(source, source) for source in sources]
        for folder, of_it in DATA.items():
            placed += [(source, Path(folder, source.name)) for source in Path().glob(of_it)]
        for source, place in placed:
            target = Path(self.build_lib, "megatron_hammer", place)
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target))


def extensions() -> list[Extension]:
    """What this machine can build and the user wants."""
    if os.environ.get(NO_EXTENSIONS) == "1":
        return []
    if obstacle := cuda_obstacle():
        print(f"megatron_hammer: the CUDA kernels are left out: {obstacle}")
        return EXTENSIONS
    return [*EXTENSIONS, Extension("megatron_hammer.kernels.native._cuda", CUDA_SOURCES, depends=CUDA_HEADERS)]


if __name__ == "__main__":  # a test imports this file for its flags
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtensions, "build_py": BuildWithTools})
