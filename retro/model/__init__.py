"""RETRO as a Hugging Face model: configuration, decoder with neighbors, cache, generation. Names load on demand."""

from retro.common.lazy import on_demand

_HOME = {
    "RetroCache": "retro.model.cache",
    "RetroConfig": "retro.model.config",
    "RetroForCausalLM": "retro.model.causal_lm",
    "RetroModel": "retro.model.causal_lm",
    "RetroPreTrainedModel": "retro.model.start",
    "RetrievalError": "retro.model.generation",
}
__all__ = list(_HOME)
__getattr__, __dir__ = on_demand(__name__, _HOME)
