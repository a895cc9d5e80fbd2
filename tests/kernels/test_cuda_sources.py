"""The CUDA kernels where there is no GPU: their sources compile for one, and compute on a CPU what torch computes.

The first half needs nvcc and is skipped, visibly, without it. The second emulates threads, warps and barriers
(``cuda_on_cpu/cuda_runtime.h``) and runs the kernels and their bindings as they are, at small and odd sizes. Only speed
and what a GPU rounds in another way are left to ``test_fused_gpu.py``.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_hammer.kernels import fp8
from megatron_hammer.kernels.native import cuda
from tests.kernels import cuda_checks as checks
from tests.kernels.test_fp8 import random

ROOT = Path(__file__).parents[2]
TORCH = Path(torch.__file__).parent
HERE = Path(__file__).parent / "cuda_on_cpu"
CPU = torch.device("cpu")
SEED = int(torch.randint(2**31, ()))  # fresh inputs in every run; a failure shows it

# What the library wants of torch, seen in torch 2.11.0 (cu130), which loads it: names of the stable ABI's functions.
STABLE = re.compile(
    "aoti_torch_(abi_version|(create|delete)_device_guard|delete_library_object|delete_tensor_object|device_type_[a-z0-9]+"
    "|dtype_[a-z0-9_]+|get_current_cuda_stream|get_(data_ptr|device_index|device_type|dim|dtype|numel|size|stride)"
    "|is_contiguous|layout_[a-z_]+|library_def|library_init_(def|impl)|new_tensor_handle)"
    "|torch_(call_dispatcher|delete_list|dtype_float4_e2m1fn_x2|dtype_float8_e8m0fnu|library_impl|list_push_back"
    "|new_list_reserve_size)"
)
ONLY_IN_CUDA = {"aoti_torch_get_current_cuda_stream"}


def build_script() -> ModuleType:
    """setup.py, for its compiler flags; it builds nothing when imported."""
    spec = importlib.util.spec_from_file_location("hammer_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


# ---- for a GPU: compiled, not run ----


def test_every_source_is_built() -> None:
    """setup.py names the files one by one."""
    script, folder = build_script(), ROOT / "csrc/kernels"
    assert {ROOT / name for name in script.CUDA_SOURCES} == {*folder.glob("*.cu"), *folder.glob("*.cpp")}
    assert {ROOT / name for name in script.CUDA_HEADERS} == {*folder.glob("*.cuh"), *folder.glob("*.hpp")}


def test_a_lent_gpu_does_not_build_again_what_is_there() -> None:
    """The calls of the suite's page, of ten minutes each: they look for the library where setup.py leaves it."""
    page = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    assert f"[ -e {cuda.LIBRARY.relative_to(ROOT)} ] || python3 setup.py build_ext --inplace" in page


def test_sources_compile_for_gpus(tmp_path: Path) -> None:
    """For sm_80 and sm_90, every warning an error; the library wants nothing of torch that 2.11 lacks."""
    script = build_script()
    nvcc = script.find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    flags = [*script.CUDA_FLAGS, *script.architecture_flags(script.DEFAULT_CUDA_ARCHS.split(","))]
    strict = ["--Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror", "-Xptxas=--warn-on-spills"]
    library = tmp_path / "_cuda.so"
    run(
        nvcc,
        "-shared",
        "--threads=2",
        *flags,
        *strict,
        f"-isystem={TORCH}/include",
        *script.CUDA_SOURCES,
        "-o",
        library,
    )

    code = library.read_bytes()
    assert all(arch in code for arch in (b"sm_80", b"sm_90"))
    if shutil.which("nm") is None:
        pytest.skip("compiled; needs nm to look at symbols")
    wanted = {line.split()[-1].split("@")[0] for line in run("nm", "-D", "--undefined-only", library).splitlines()}
    of_torch = {name for name in wanted if "torch" in name}
    assert len(of_torch) > 20, "the names are read wrongly"
    unknown = {name for name in of_torch if not STABLE.fullmatch(name)}
    assert not unknown, f"not known to be in torch 2.11: {sorted(unknown)}"
    here = {line.split()[-1] for line in run("nm", "-D", "--defined-only", TORCH / "lib/libtorch_cpu.so").splitlines()}
    assert of_torch - here <= ONLY_IN_CUDA, "this torch still has them"
    cuda_runtime = {name for name in wanted if name.startswith(("cuda", "cu_", "__cuda"))}
    assert not cuda_runtime, "CUDA's runtime is inside the library, whatever torch brings"


def test_where_the_library_is_missing_it_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "LIBRARY", tmp_path / "_cuda.so")
    device = torch.device("cuda", 17)  # of which nothing is remembered
    cuda.unavailable.cache_clear()
    assert cuda.unavailable(device).startswith("_cuda.so was not built: it takes nvcc")
    (tmp_path / "broken.so").write_bytes(b"no library")
    monkeypatch.setattr(cuda, "LIBRARY", tmp_path / "broken.so")
    cuda.unavailable.cache_clear()
    assert re.match("broken.so does not load: .*(too short|invalid ELF)", cuda.unavailable(device))
    cuda.unavailable.cache_clear()


@pytest.mark.parametrize(
    "words, remedy",
    [
        ("no kernel image is available for execution on the device", "; reinstall with HAMMER_CUDA_ARCHS=75"),
        ("the provided PTX was compiled with an unsupported toolchain.", "; reinstall with HAMMER_CUDA_ARCHS=75"),
        ("CUDA driver version is insufficient for CUDA runtime version", "; reinstall with the nvcc of CUDA 12.8, "),
        ("CUDA out of memory. Tried to allocate 2.00 MiB.", ""),
    ],
)
def test_another_build_is_advised_where_it_helps(words: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third: an nvcc of CUDA 13 beside a torch for 12.8 and its driver."""

    def ones(size: int, device: torch.device) -> None:
        raise RuntimeError(f"{words}\nand more")

    monkeypatch.setattr(cuda, "_load", lambda path: "")
    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(torch.ops.hammer_cuda, "amax", None, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    for name, value in {"is_available": True, "get_device_name": "Some GPU", "get_device_capability": (7, 5)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *device, value=value: value)
    cuda.unavailable.cache_clear()
    told = cuda.unavailable(torch.device("cuda", 0))
    cuda.unavailable.cache_clear()
    assert told.startswith(f"{words}, on Some GPU{remedy}") and bool(remedy) == ("reinstall" in told)


def test_the_build_says_why_it_leaves_the_kernels_out(monkeypatch: pytest.MonkeyPatch) -> None:
    script = build_script()
    for nvcc, torch_found, archs, why in (
        ("nvcc", (Path("torch"), {"cuda": "13.0"}), "80", ""),
        ("nvcc", (Path("torch"), {"cuda": "13.0"}), "none", "HAMMER_CUDA_ARCHS=none"),
        (None, (Path("torch"), {"cuda": "13.0"}), "80", "nvcc was not found"),
        ("nvcc", (None, {}), "80", "--no-build-isolation"),
        ("nvcc", (Path("torch"), {"__version__": "2.13.0+cpu", "cuda": None}), "80", "2.13.0.cpu is not one for CUDA"),
    ):
        monkeypatch.setattr(script, "find_nvcc", lambda nvcc=nvcc: nvcc)
        monkeypatch.setattr(script, "find_torch", lambda torch_found=torch_found: torch_found)
        monkeypatch.setenv("HAMMER_CUDA_ARCHS", archs)
        assert re.search(why, script.cuda_obstacle()) and bool(why) == bool(script.cuda_obstacle())
        names = [extension.name for extension in script.extensions()]
        assert ("megatron_hammer.kernels.native._cuda" in names) == (not why)
    monkeypatch.setenv("HAMMER_NO_EXTENSIONS", "1")
    assert script.extensions() == []


# ---- on a CPU: the same sources, emulated ----


@pytest.fixture(scope="module")
def k(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The operations of csrc/kernels for tensors on a CPU. Compiled once; a misaligned vector ends the process."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    script, folder = build_script(), tmp_path_factory.mktemp("cuda_on_cpu")
    flags = [flag for flag in script.CUDA_FLAGS if not flag.startswith(("-X", "-O"))]
    flags += ["-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{HERE}", "-isystem"]
    flags += [str(TORCH / "include"), "-DHAMMER_LIBRARY=hammer_cuda_on_cpu", "-DHAMMER_DISPATCH=CPU"]
    flags += ["-fsanitize=alignment,bounds,shift,signed-integer-overflow", "-fsanitize-undefined-trap-on-error"]
    sources = [ROOT / name for name in script.CUDA_SOURCES] + [HERE / "torch_cuda.cpp"]
    with ThreadPoolExecutor(2) as pool:
        commands = [(compiler, *flags, "-x", "c++", "-c", x, "-o", folder / f"{x.stem}.o") for x in sources]
        list(pool.map(lambda command: run(*command), commands))
    library = folder / "cuda_on_cpu.so"
    run(compiler, "-shared", *folder.glob("*.o"), "-o", library, f"-L{TORCH}/lib", "-ltorch_cpu")
    torch.ops.load_library(str(library))
    print(f"seed {SEED}", file=sys.stderr)
    return torch.ops.hammer_cuda_on_cpu


of_every_type = pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)


@of_every_type
@pytest.mark.parametrize(
    "rows, h, updated, offset",
    [
        (1, 8, True, 0),  # one vector of a 16-bit type
        (40, 64, True, 0),  # more rows than blocks in backward: the next row is asked for in advance
        (70, 24, False, 0),  # and in forward
        (9, 2048, True, 0),  # one vector a thread in 16 bits, two in fp32
        (9, 2056, False, 0),  # the last warps of a row are partly, or wholly, without work
        (2, 8200, True, 0),  # wider than the registers of a block
        (5, 7, True, 0),  # odd
        (33, 1, False, 0),
        (37, 64, True, 1),  # no vector is aligned
        (3, 1000, False, 3),
        (0, 64, True, 0),
    ],
)
def test_norm(k: Any, dtype: torch.dtype, rows: int, h: int, updated: bool, offset: int) -> None:
    if rows == 0:
        w, nothing, grad = torch.ones(h, dtype=dtype), torch.empty(0, h, dtype=dtype), torch.ones(h, dtype=dtype)
        k.add_rms_norm_forward(nothing, None, w, 1e-5, nothing.clone(), None, torch.empty(0))
        k.add_rms_norm_backward(nothing, None, nothing, w, torch.empty(0), nothing.clone(), grad)
        assert not grad.any()
        return
    checks.norm(k, CPU, dtype, rows, h, updated, offset, SEED)


@of_every_type
@pytest.mark.parametrize(
    "s, b, heads, groups, d, offset",
    [(3, 2, 4, 2, 16, 0), (2, 1, 40, 5, 64, 0), (5, 3, 3, 1, 6, 0), (4, 1, 2, 2, 2, 0), (3, 2, 2, 1, 16, 1)],
)
def test_rope(k: Any, dtype: torch.dtype, s: int, b: int, heads: int, groups: int, d: int, offset: int) -> None:
    checks.rope_forward(k, CPU, dtype, s, b, heads, groups, d, offset, SEED)
    for layout in ("contiguous", "transposed", "expanded", "parts", "gaps"):
        checks.rope_backward(k, CPU, dtype, s, b, heads, groups, d, offset, layout, SEED)


@of_every_type
@pytest.mark.parametrize("rows, f, offset", [(1, 8, 0), (40, 24, 0), (3, 2104, 0), (3, 7, 0), (2, 300, 1), (35, 1, 0)])
def test_swiglu(k: Any, dtype: torch.dtype, rows: int, f: int, offset: int) -> None:
    checks.swiglu_both(k, CPU, dtype, rows, f, offset, SEED)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "n, offsets",
    [
        (64, (0, 0, 0, 0, 0)),
        (20011, (0, 0, 0, 0, 0)),  # several vectors a thread, and a rest
        (1030, (3, 3, 3, 3, 3)),  # aligned after one element
        (1030, (0, 1, 2, 3, 0)),  # never all aligned
        (3, (1, 1, 1, 1, 1)),
        (0, (0, 0, 0, 0, 0)),
    ],
)
def test_adamw(k: Any, dtype: torch.dtype | None, n: int, offsets: tuple[int, ...]) -> None:
    checks.adamw(k, CPU, dtype, n, offsets, SEED)


@pytest.mark.parametrize("n, offset", [(0, 0), (1, 0), (3, 1), (64, 0), (20011, 0), (70003, 1), (4099, 3)])
def test_square_sum(k: Any, n: int, offset: int) -> None:
    checks.square_sum(k, CPU, n, offset, SEED)


@of_every_type
@pytest.mark.parametrize("n, offset", [(0, 0), (1, 0), (64, 0), (9001, 0), (9001, 1)])
def test_amax(k: Any, dtype: torch.dtype, n: int, offset: int) -> None:
    checks.amax(k, CPU, dtype, n, offset, SEED)


@of_every_type
@pytest.mark.parametrize("to", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize(
    "rows, columns, offset, both",
    [(64, 64, 0, True), (200, 136, 0, True), (80, 136, 0, True), (16, 8, 0, True), (67, 72, 0, True),
     (3, 7, 0, True), (80, 136, 1, True), (67, 72, 0, False)],
)  # fmt: skip
def test_cast_fp8(
    k: Any, dtype: torch.dtype, to: torch.dtype, rows: int, columns: int, offset: int, both: bool
) -> None:
    checks.cast_fp8(k, CPU, dtype, to, rows, columns, offset, both, SEED)


@of_every_type
def test_through_autograd(k: Any, dtype: torch.dtype) -> None:
    checks.through_autograd(k, CPU, dtype, SEED)


def test_wrong_arguments_are_refused(k: Any) -> None:
    checks.refuses(k, CPU)


def test_the_loader_knows_every_operation(k: Any) -> None:
    """And its arguments stand in the order of the contract of kernels/native/autograd.py."""
    assert all(hasattr(k, name) for name in cuda.OPERATIONS)
    arguments = [argument.name for argument in k.adamw.default._schema.arguments]
    assert arguments[:5] == ["master", "grad", "exp_avg", "exp_avg_sq", "param"]
    assert arguments[5:] == ["lr", "beta1", "beta2", "eps", "decay", "divisor", "skip", "updates"]


def test_fp8_uses_it_as_it_is(k: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """kernels/fp8.py over these sources: casts, and the largest values that norm and SwiGLU leave, bit for bit."""
    monkeypatch.setattr(cuda, "library", lambda: k)
    measured = fp8.MeasuringKernels(k)
    fast, plain = fp8.Fp8Products(fp8.fused_largest, fp8.fused_cast, measured=measured), fp8.Fp8Products()
    for shape in ((3, 16, 48), (5, 7)):
        x = random(1, *shape, spread=3.0)
        for dtype in (fp8.E4M3, fp8.E5M2):
            for a, b in zip(fast.quantise(x, dtype)[:3], plain.quantise(x, dtype)[:3], strict=True):
                assert a.shape == b.shape and torch.equal(a.float(), b.float())
    x = random(2, 4, 8, 64).requires_grad_()
    functions = fp8.measuring(fast)
    normed, summed = functions["norm"](x, random(3, 4, 8, 64), torch.ones(64).bfloat16(), 1e-5)
    product = functions["swiglu"](normed)
    for found in (normed, product):
        assert measured.largest_of(found) == found.abs().max()
        for a, b in zip(fast.input(found)[0][:3], plain.input(found)[0][:3], strict=True):
            assert torch.equal(a.float(), b.float())
    (product.float().sum() + summed.float().sum()).backward()
    assert x.grad is not None and x.grad.isfinite().all()
