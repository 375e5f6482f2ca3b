"""Package metadata and the optional C++ extension ``megatron_nucleus._C`` (csrc/README.md).

``python setup.py build_ext --inplace`` builds the extension alone. Without a C++20 compiler or without torch
the package installs all the same: every operation also exists in plain torch (tools/doctor.py shows which run).
"""

import importlib.util
import re
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


class BuildExtension(build_ext):
    """Builds what can be built, and says in one line why something could not be."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:  # setuptools raises a different type for every compiler
            if self.inplace or self.editable_mode:
                # A library of an older build would hide that this one failed.
                (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
            skipped(f"the C++ compiler failed ({' '.join(str(error).split())[:300]})")


def skipped(reason: str) -> None:
    print(
        f"megatron_nucleus._C is not built: {reason}. The package works without it, in plain torch; "
        "to build it later: python setup.py build_ext --inplace",
        file=sys.stderr,
    )


def extensions() -> list[Extension]:
    """The CPU extension, or nothing where torch's headers are absent (an isolated build)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        skipped("torch is not importable in this build (use --no-build-isolation)")
        return []
    torch_root = Path(spec.submodule_search_locations[0])
    if not (torch_root / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        skipped(f"the torch in {torch_root} has no stable C++ interface (torch >= 2.11)")
        return []
    return [
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
