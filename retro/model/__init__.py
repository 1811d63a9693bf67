"""RETRO as a Hugging Face model: configuration, decoder with neighbors, cache, generation. Names load on demand."""

from importlib import import_module

_HOME = {
    "RetroCache": "retro.model.cache",
    "RetroConfig": "retro.model.config",
    "RetroForCausalLM": "retro.model.causal_lm",
    "RetroModel": "retro.model.causal_lm",
    "RetroPreTrainedModel": "retro.model.start",
    "RetrievalError": "retro.model.generation",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
