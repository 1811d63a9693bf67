"""RETRO-fitting: neighbors for any pretrained Hugging Face causal LM, whose own weights stay as they are.

`retro.retrofit(base, ...)` is the function: this package is callable, since it bears the function's name.
"""

import sys
from types import ModuleType

from retro.common.lazy import on_demand

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


__getattr__, __dir__ = on_demand(__name__, _HOME)


sys.modules[__name__].__class__ = _CallablePackage
