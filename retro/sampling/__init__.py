"""Sampled text with its sources: as objects, as JSON, for the terminal and as a page. Names load on demand."""

from retro.common.lazy import on_demand

_HOME = {
    "Attribution": "retro.sampling.sources",
    "CopiedRun": "retro.sampling.sources",
    "ReadNeighbor": "retro.sampling.sources",
    "ReadingChunk": "retro.sampling.sources",
    "IncrementalDetokenizer": "retro.sampling.detokenizer",
    "TextStream": "retro.sampling.detokenizer",
    "as_json": "retro.sampling.sources",
    "attribute": "retro.sampling.sources",
    "html_fragment": "retro.sampling.page",
    "html_page": "retro.sampling.page",
    "filled_up": "retro.sampling.sampler",
    "prompt_tokens": "retro.sampling.sampler",
    "sample": "retro.sampling.sampler",
    "terminal_stream": "retro.sampling.terminal",
    "terminal_text": "retro.sampling.terminal",
    "token_gains": "retro.sampling.sampler",
    "token_texts": "retro.sampling.detokenizer",
    "visible": "retro.sampling.detokenizer",
    "wants_color": "retro.sampling.terminal",
}
__all__ = list(_HOME)
__getattr__, __dir__ = on_demand(__name__, _HOME)
