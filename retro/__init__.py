"""RETRO: language models that read from a datastore.

Public names load on demand, so that `import retro` is quick and pulls in neither torch nor an index library.
After `import retro`, transformers' AutoConfig and AutoModelForCausalLM know the model types `retro` and `retrofit`.
"""

from importlib import import_module

try:
    from wrapt import when_imported
except ImportError:  # without wrapt, register at import, which is slower
    when_imported = lambda name: lambda hook: hook(import_module(name))  # noqa: E731

__version__ = "0.1.0"

_HOME = {
    "RetroConfig": "retro.config",
    "RetroForCausalLM": "retro.model",
    "RetroModel": "retro.model",
    "RetrofitConfig": "retro.retrofit",
    "RetrofitForCausalLM": "retro.retrofit",
    "retrofit": "retro.retrofit",
    "RetroCache": "retro.cache",
    "RetrievalError": "retro.generation",
    "Document": "retro.corpus",
    "read_documents": "retro.corpus",
    "BuildSettings": "retro.retrieval",
    "build_store": "retro.retrieval",
    "Store": "retro.retrieval",
    "Retriever": "retro.retrieval",
    "Neighbors": "retro.retrieval",
    "build_index": "retro.retrieval",
    "build_neighbors": "retro.retrieval",
    "load_embedder": "retro.retrieval",
    "bits_per_byte": "retro.evaluation",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'retro' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


@when_imported("transformers.models.auto.configuration_auto")
def _register_config(auto) -> None:
    from retro.config import RetroConfig
    from retro.retrofit.config import RetrofitConfig

    auto.AutoConfig.register(RetroConfig.model_type, RetroConfig)
    auto.AutoConfig.register(RetrofitConfig.model_type, RetrofitConfig)


@when_imported("transformers.models.auto.modeling_auto")
def _register_model(auto) -> None:
    from retro.config import RetroConfig
    from retro.model import RetroForCausalLM, RetroModel
    from retro.retrofit.config import RetrofitConfig
    from retro.retrofit.model import RetrofitForCausalLM

    auto.AutoModelForCausalLM.register(RetrofitConfig, RetrofitForCausalLM)
    auto.AutoModel.register(RetroConfig, RetroModel)
    auto.AutoModelForCausalLM.register(RetroConfig, RetroForCausalLM)
