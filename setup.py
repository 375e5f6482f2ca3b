"""Package metadata and the optional C++ extension ``megatron_nucleus._C`` (csrc/README.md).

``python setup.py build_ext --inplace`` builds the extensions alone. Without a C++20 compiler or without torch
the package installs all the same: every operation also exists in plain torch (tools/doctor.py shows which run).
``megatron_nucleus._C_cuda`` is built where nvcc and a CUDA build of torch are; MN_BUILD_CUDA=1 builds it beside any
torch, MN_BUILD_CUDA=0 never. MN_CUDA_ARCHS="90 100" narrows the GPUs that it is for.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "megatron_nucleus" / "__init__.py").read_text())[1]

# Oldest torch the extension is built for through the stable C++ interface: 2.11 (major and minor as bytes).
TORCH_TARGET_VERSION = "0x020b000000000000"

REQUIRES = [
    "torch>=2.11,<2.15",
    "numpy>=2.0,<3",
    "pyyaml>=6",
    "pillow>=11",
    "pyarrow>=17",
    "safetensors>=0.5,<1",
    "tensorboard>=2.16",
    "tqdm>=4.66",
    "scipy>=1.11",
    "jinja2>=3.1",
    "matplotlib>=3.8",
]

HF = ["diffusers>=0.38,<1", "transformers>=5,<6", "accelerate>=1.10,<2"]

EXTRAS = {
    "hf": HF,
    "triton": ["triton>=3.6; platform_system == 'Linux'"],
    "ray": ["ray>=2.40"],
    "caption": ["urllib3>=2.2"],
    "test": [
        *HF,
        "triton>=3.6; platform_system == 'Linux'",  # kernels run interpreted and are compiled without a GPU
        "pytest>=8.3",
        "pytest-xdist>=3.6",
        "pytest-timeout>=2.3",
        "webdataset>=1.0",
        "urllib3>=2.2",
        "ray>=2.40",  # curation on a cluster; the tests start one with two workers on this machine
        "scikit-image>=0.24",
        "scikit-learn>=1.5",
        "ruff>=0.11",
    ],
    # For machines with an NVIDIA GPU, each alone. None belongs in `test`: flash-attn is source only and needs
    # nvcc; transformer-engine's import raises RuntimeError without cuDNN; DALI is 194 MB. apex and DeepEP cannot
    # be listed: `apex` on PyPI is another project, and DeepEP is not there (build both from their repositories).
    "flash-attn": ["flash-attn>=2.8"],
    "transformer-engine": ["transformer-engine[pytorch]>=2.10"],
    "torchao": ["torchao>=0.18"],  # on a CPU its FP8 linear layers run emulated
    "dali": ["nvidia-dali-cuda130>=2.4"],
}


# GPUs that nvcc makes code for: A100, H100 and H200, B200.
CUDA_ARCHS = ("80", "90", "100")


class CudaExtension(Extension):
    """Built by nvcc (`BuildExtension.build_cuda`)."""


class BuildExtension(build_ext):
    """Builds what can be built, and says in one line why something could not be."""

    def build_extension(self, ext: Extension) -> None:
        try:
            if isinstance(ext, CudaExtension):
                self.build_cuda(ext)
            else:
                super().build_extension(ext)
        except Exception as error:  # setuptools raises a different type for every compiler
            if self.inplace or self.editable_mode:
                # A library of an older build would hide that this one failed.
                (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
            compiler = "nvcc" if isinstance(ext, CudaExtension) else "the C++ compiler"
            skipped(f"{compiler} failed ({' '.join(str(error).split())[:300]})", ext.name)

    def build_cuda(self, ext: CudaExtension) -> None:
        """Every source by nvcc, which hands C++ to the host's compiler, and one library of them all."""
        nvcc, folder = find_nvcc(), Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in cuda_archs(nvcc)]
        shared = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-O3", *codes]
        places = [f"-I{folder}" for folder in [*ext.include_dirs, *self.include_dirs]]
        defines = [f"-D{name}={value}" for name, value in ext.define_macros]
        objects = []
        for source in ext.sources:
            objects.append(str(folder / f"{Path(source).name}.o"))
            self.spawn([nvcc, *shared, *places, *defines, "-c", source, "-o", objects[-1]])
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # The library of torch's GPU part holds a symbol that is only weakly asked for: it must be kept all the same.
        libraries = [f"-L{d}" for d in ext.library_dirs] + [f"-l{name}" for name in ext.libraries]
        link = ["-shared", "-cudart=static", "-Xlinker=--no-as-needed", *codes, *libraries]
        self.spawn([nvcc, *objects, *link, "-o", str(target)])


def skipped(reason: str, name: str = "megatron_nucleus._C") -> None:
    print(
        f"{name} is not built: {reason}. The package works without it, in plain torch; "
        "to build it later: python setup.py build_ext --inplace",
        file=sys.stderr,
    )


def find_nvcc() -> str | None:
    """CUDA's compiler: of CUDA_HOME, else on the path."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


def cuda_archs(nvcc: str) -> list[str]:
    """Those of MN_CUDA_ARCHS, or of `CUDA_ARCHS` the ones that this nvcc knows."""
    if asked := os.environ.get("MN_CUDA_ARCHS", "").split():
        return asked
    known = subprocess.run(
        [nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True
    ).stdout.split()
    return [arch for arch in CUDA_ARCHS if f"sm_{arch}" in known]


def cuda_extension(torch_root: Path) -> list[Extension]:
    """The GPU extension where it can be built and used."""
    asked, has_cuda = os.environ.get("MN_BUILD_CUDA"), (torch_root / "lib" / "libtorch_cuda.so").is_file()
    if asked == "0" or (asked != "1" and not has_cuda):
        return []
    if find_nvcc() is None:
        skipped("nvcc is neither on the path nor in CUDA_HOME", "megatron_nucleus._C_cuda")
        return []
    sources = [p for end in ("cu", "cpp") for p in sorted((ROOT / "csrc" / "cuda").glob(f"*.{end}"))]
    return [
        CudaExtension(
            "megatron_nucleus._C_cuda",
            sources=[str(p.relative_to(ROOT)) for p in sources],
            depends=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cuda").glob("*.cuh")),
            include_dirs=[str(torch_root / "include")],
            library_dirs=[str(torch_root / "lib")],
            libraries=["torch", "torch_cpu", "c10", *(["torch_cuda"] if has_cuda else [])],
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), ("USE_CUDA", "1")],
            optional=True,
            py_limited_api=True,
        )
    ]


def extensions() -> list[Extension]:
    """The extensions, or nothing where torch's headers are absent (an isolated build)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        skipped("torch is not importable in this build (use --no-build-isolation)")
        return []
    torch_root = Path(spec.submodule_search_locations[0])
    if not (torch_root / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        skipped(f"the torch in {torch_root} has no stable C++ interface (torch >= 2.11)")
        return []
    return [
        *cuda_extension(torch_root),
        Extension(
            "megatron_nucleus._C",
            sources=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.cpp")),
            depends=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.h")),
            include_dirs=[str(torch_root / "include")],
            library_dirs=[str(torch_root / "lib")],
            libraries=["torch", "torch_cpu", "c10"],
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
            # -fopenmp-simd: vectorised sums without an OpenMP runtime (threads are torch's). -fno-thread-jumps:
            # the pass turns the clamp of exp into branches and doubles the divisions of the vectorised SwiGLU.
            extra_compile_args=[
                "-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-fopenmp-simd", "-ffp-contract=fast",
                "-fno-math-errno", "-fno-trapping-math", "-fno-thread-jumps",
            ],
            language="c++",
            optional=True,
            py_limited_api=True,
        )
    ]  # fmt: skip


setup(
    name="megatron-nucleus",
    version=VERSION,
    description="Train Nucleus-Image, a sparse mixture-of-experts diffusion transformer, end to end",
    license="Apache-2.0",
    python_requires=">=3.11",
    # Named so that an editable install is a plain entry of sys.path, which tests/triton_ops cannot shadow.
    package_dir={"": "."},
    packages=find_packages(include=["megatron_nucleus", "megatron_nucleus.*", "triton_ops", "triton_ops.*"]),
    package_data={"triton_ops": ["tuned/*.json"]},  # tile sizes measured on GPUs (tools/tune_ops.py)
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
