"""RETRO: language models that read from a datastore.

Public names load on demand, so that `import retro` is quick and pulls in neither torch nor an index library.
After `import retro`, transformers' AutoConfig and AutoModelForCausalLM know the model types `retro` and `retrofit`.
"""

from importlib import import_module

from retro.version import __version__

try:
    from wrapt import when_imported
except ImportError:  # without wrapt, register at import, which is slower
    when_imported = lambda name: lambda hook: hook(import_module(name))  # noqa: E731

from retro.common.lazy import on_demand

_HOME = {
    "load": "retro.loading",
    "Loaded": "retro.loading",
    "RetroConfig": "retro.model.config",
    "RetroForCausalLM": "retro.model.causal_lm",
    "RetroModel": "retro.model.causal_lm",
    "RetrofitConfig": "retro.retrofit",
    "RetrofitForCausalLM": "retro.retrofit",
    "retrofit": "retro.retrofit",
    "RetroCache": "retro.model.cache",
    "DataCollatorWithNeighbors": "retro.model.padding",
    "RetrievalError": "retro.model.generation",
    "Document": "retro.text.documents",
    "read_documents": "retro.text.corpus",
    "BuildSettings": "retro.retrieval",
    "build_store": "retro.retrieval",
    "Store": "retro.retrieval",
    "Retriever": "retro.retrieval",
    "RemoteRetriever": "retro.retrieval",
    "open_sharded": "retro.retrieval",
    "Neighbors": "retro.retrieval",
    "Source": "retro.retrieval",
    "build_index": "retro.retrieval",
    "build_neighbors": "retro.retrieval",
    "load_embedder": "retro.retrieval",
    "sample": "retro.sampling",
    "bits_per_byte": "retro.evaluation",
}
__all__ = ["__version__", *_HOME]
__getattr__, __dir__ = on_demand(__name__, _HOME)


@when_imported("transformers.models.auto.configuration_auto")
def _register_config(auto) -> None:
    from retro.model import RetroConfig
    from retro.retrofit.config import RetrofitConfig

    auto.AutoConfig.register(RetroConfig.model_type, RetroConfig)
    auto.AutoConfig.register(RetrofitConfig.model_type, RetrofitConfig)


@when_imported("transformers.models.auto.modeling_auto")
def _register_model(auto) -> None:
    from retro.model import RetroConfig, RetroForCausalLM, RetroModel
    from retro.retrofit.config import RetrofitConfig
    from retro.retrofit.model import RetrofitForCausalLM

    auto.AutoModelForCausalLM.register(RetrofitConfig, RetrofitForCausalLM)
    auto.AutoModel.register(RetroConfig, RetroModel)
    auto.AutoModelForCausalLM.register(RetroConfig, RetroForCausalLM)
    for kind in (RetroForCausalLM, RetrofitForCausalLM):  # a Trainer's label smoothing shifts labels for these names
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind.config_class.model_type] = kind.__name__
