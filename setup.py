"""Builds the compiled part of the package; all metadata is in pyproject.toml.

``csrc/data`` -> ``megatron_hammer.data._index``: the sample index builder (pybind11, no torch, no CUDA). It has a NumPy
twin with identical results, so ``HAMMER_NO_EXTENSIONS=1`` may leave it out; without that wish a failing compiler fails
the installation, because a silent fall-back would only show as slow start-up on some machine later.
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
        ["csrc/data/bindings.cpp", "csrc/data/index_builder.cpp"],
        depends=["csrc/data/index_builder.hpp"],
        cxx_std=17,
        # No fused multiply-add: blending must round exactly as its NumPy twin does.
        extra_compile_args=["-O3", "-ffp-contract=off", "-Wall", "-Wextra"],
    )
]


class BuildExtensions(build_ext):
    """``build_ext`` whose failure says what is missing and what to do."""

    def run(self) -> None:
        headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
        if self.extensions and not headers.exists():
            raise SystemExit(
                f"megatron_hammer: Python's headers are missing ({headers}); install them (Debian and Ubuntu: "
                f"python3-dev), or set {NO_EXTENSIONS}=1 to use the slower NumPy index builder"
            )
        try:
            super().run()
        except Exception as error:  # distutils raises several unrelated classes
            reason = str(error) if len(str(error)) < 200 else "its messages are above"  # else a whole command line
            raise SystemExit(
                f"megatron_hammer: the C++ index builder could not be compiled ({reason}); a compiler for C++17 is "
                f"needed (Debian and Ubuntu: g++; another one: CXX=...), or set {NO_EXTENSIONS}=1 to use NumPy instead"
            ) from error


setup(
    ext_modules=[] if os.environ.get(NO_EXTENSIONS) == "1" else EXTENSIONS,
    cmdclass={"build_ext": BuildExtensions},
)
