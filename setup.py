"""Packaging: `gardo` out of engine/ and `gardo_kernels` out of kernels/, one distribution."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
README = ROOT / "README.md"

SERVER = ["fastapi", "uvicorn", "prometheus-client"]  # of rewards outside the training process
DOCS = ["sphinx>=8", "myst-parser>=4", "furo", "latex2mathml>=3"]  # of the site: ./run docs
EXTRAS = {
    "cuda": ["bitsandbytes"],
    "flash": ["flash-attn"],  # built from source: needs nvcc and patience
    "flash4": ["flash-attn-4>=4.0.0b1"],  # pre-releases, which pip must be asked for
    "rewards": ["rapidocr", "onnxruntime", "rapidfuzz", "scipy", *SERVER],
    "track": ["tensorboard", "wandb"],
    "datasets": ["datasets>=4"],  # data.prompts: hf:owner/name; before 4 it runs code of the hub
    "docs": DOCS,
    "browser": ["playwright"],  # tests/engine/report/test_browser.py, docs/make_pictures.py
    "dev": [
        "bitsandbytes",  # its 8-bit AdamW runs on CPUs too
        "pytest",
        "pytest-xdist",  # ./run test uses all cores
        "hypothesis",
        "jsonschema",
        "markdown-it-py",  # of rich: reads model cards as the hub does
        "scipy",  # of transformers' Mask2Former
        "rapidocr",  # the ocr reward's three, to test with the real reader
        "onnxruntime",
        "rapidfuzz",
        "tensorboard",  # to read back what run.track wrote
        "wandb",
        *SERVER,
        *DOCS,
        "openai>=1.98",  # of `transformers serve`, in tests/integration/test_live_endpoint.py
        "datasets>=4",  # data.prompts: hf:FOLDER, in tests/engine/test_hf_prompts.py
        "ruff",
        "mypy",
        "types-PyYAML",
        "matplotlib",
        "build",
        "setuptools>=77",  # tests/test_packaging.py builds a wheel; a 3.12 venv starts without it
    ],
}


class WithRecipes(build_py):
    """Puts recipes/ and suites/ into wheels, where `gardo.shipped` finds them."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # then they are found in the checkout
            return
        for part in ("recipes", "suites"):
            target = Path(self.build_lib) / "gardo" / "_shipped" / part
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / part, target, ignore=shutil.ignore_patterns("__pycache__"))


setup(
    name="gardo-engine",
    version="0.1.0",
    description="RL fine-tuning of flow models (Flux, SD3.5) with gated, adaptive regularisation",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages("engine") + find_packages("kernels"),
    package_dir={"gardo": "engine/gardo", "gardo_kernels": "kernels/gardo_kernels"},
    include_package_data=False,
    cmdclass={"build_py": WithRecipes},
    package_data={
        "gardo": [
            "py.typed",
            "**/*.txt",
            "new/*.yaml",
            "published/**/*.json",
            "report/charts.js",
            "tiny/weights/**/*.json",
            "tiny/weights/**/*.safetensors",
            "tiny/weights/**/*.model",
        ],
        "gardo_kernels": ["py.typed", "launch_shapes.json"],
    },
    entry_points={"console_scripts": ["gardo = gardo.cli:main"]},
    install_requires=[
        "torch>=2.10,<2.14",
        "triton>=3.6,<3.10; sys_platform == 'linux'",
        "deepspeed>=0.19,<0.20",
        "diffusers>=0.42",
        "transformers>=5.17,<6",
        "peft>=0.18",
        "accelerate>=1",  # to build a model without its weights
        "psutil",
        "safetensors>=0.5",
        "httpx2>=2",  # huggingface_hub's own
        "pydantic>=2.10,<3",
        "PyYAML>=6",
        "typing-extensions>=4.12",
        "typer>=0.15",
        "rich>=13",
        "pillow>=10",
        "numpy>=2",
    ],
    extras_require=EXTRAS,
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
