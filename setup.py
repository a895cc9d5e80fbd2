"""Builds the compiled part of the package; all metadata is in pyproject.toml.

``csrc/data`` -> ``megatron_hammer.data._index``: the sample index builder; ``csrc/tokenizer`` ->
``megatron_hammer.tokenizer._encoder``: the encoder of sentencepiece models (both pybind11, no torch, no CUDA). NumPy
and sentencepiece do the same work with identical results, so ``HAMMER_NO_EXTENSIONS=1`` may leave them out; without
that wish a failing compiler fails the installation, because a silent fall-back would only show as slowness later.
"""

import os
import sysconfig
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

NO_EXTENSIONS = "HAMMER_NO_EXTENSIONS"

EXTENSIONS = [
    Pybind11Extension(
        "megatron_hammer.data._index",
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
]


class BuildExtensions(build_ext):
    """``build_ext`` whose failure says what is missing and what to do."""

    def run(self) -> None:
        headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
        if self.extensions and not headers.exists():
            raise SystemExit(
                f"megatron_hammer: Python's headers are missing ({headers}); install them (Debian and Ubuntu: "
                f"python3-dev), or set {NO_EXTENSIONS}=1 to use the slower NumPy index builder and sentencepiece itself"
            )
        try:
            super().run()
        except Exception as error:  # distutils raises several unrelated classes
            reason = str(error) if len(str(error)) < 200 else "its messages are above"  # else a whole command line
            raise SystemExit(
                f"megatron_hammer: the C++ modules could not be compiled ({reason}); a compiler for C++17 is needed "
                f"(Debian and Ubuntu: g++; another one: CXX=...), or set {NO_EXTENSIONS}=1 to do without them"
            ) from error


setup(
    ext_modules=[] if os.environ.get(NO_EXTENSIONS) == "1" else EXTENSIONS,
    cmdclass={"build_ext": BuildExtensions},
)
