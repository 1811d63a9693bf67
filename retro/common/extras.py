"""Libraries that come with an extra of the package."""

from importlib.util import find_spec

EXTRAS = {
    "bm25s": "bm25",
    "datasketch": "minhash",
    "fastapi": "serve",
    "gguf": "gguf",
    "ir_measures": "eval",
    "lm_eval": "eval",
    "matplotlib": "eval",
    "pydantic": "eval",
    "ray": "ray",
    "uvicorn": "serve",
}


def check_installed(library: str, what: str) -> None:
    """Raise ValueError, naming the extra, if `what` needs a library that is not installed."""
    if find_spec(library) is None:
        raise ValueError(missing(library, what))


def missing(library: str, what: str) -> str:
    """The sentence for a library that `what` needs and that is not installed."""
    return f'{what} needs {library}, which is not installed; pip install "retro-lm[{EXTRAS[library]}]"'
