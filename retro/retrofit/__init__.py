"""RETRO-fitting: neighbors for any pretrained Hugging Face causal LM, whose own weights stay as they are.

`retro.retrofit(base, ...)` is the function: this package is callable, since it bears the function's name.
"""

import sys
from importlib import import_module
from types import ModuleType

_HOME = {
    "RetrofitConfig": "retro.retrofit.config",
    "RetrofitForCausalLM": "retro.retrofit.model",
    "retrofit": "retro.retrofit.fitting",
    "open_base": "retro.retrofit.bases",
    "base_tokenizer": "retro.retrofit.bases",
}
__all__ = list(_HOME)


class _CallablePackage(ModuleType):
    def __call__(self, base, **options):
        return self.retrofit(base, **options)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'retro.retrofit' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


sys.modules[__name__].__class__ = _CallablePackage
