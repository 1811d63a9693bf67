"""Sampled text with its sources: as objects, as JSON, for the terminal and as a page. Names load on demand."""

from importlib import import_module

_HOME = {
    "Attribution": "sources",
    "CopiedRun": "sources",
    "ReadNeighbor": "sources",
    "ReadingChunk": "sources",
    "TextPieces": "pieces",
    "TextStream": "pieces",
    "as_json": "sources",
    "attribute": "sources",
    "html_fragment": "page",
    "html_page": "page",
    "prompt_tokens": "sampling",
    "sample": "sampling",
    "terminal_stream": "terminal",
    "terminal_text": "terminal",
    "token_gains": "sampling",
    "token_texts": "pieces",
    "visible": "pieces",
    "wants_color": "terminal",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
