"""Sampled text with its sources: what each chunk found, as plain values and for people."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any


def sample_text(
    model: Any, tokenizer: Any, prompt: str, retriever: Any, num_neighbors: int | None, **options: Any
) -> dict:
    """Sample once: the prompt, the generated text, and for each whole chunk its text and the neighbors it found."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    if not inputs["input_ids"].numel():
        raise ValueError("the prompt has no tokens; give at least one character.")
    out = model.generate(
        **inputs, retriever=retriever, num_neighbors=num_neighbors, return_dict_in_generate=True, **options
    )
    ids = out.sequences[0].tolist()
    m, start = model.config.chunk_len, inputs["input_ids"].shape[1]
    text = lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)  # noqa: E731
    chunks = [
        {"chunk": number, "text": text(ids[number * m : (number + 1) * m]), "neighbors": _described(found, retriever)}
        for number, found in enumerate(out["neighbors"][0] if retriever is not None else [])
    ]
    return {"prompt": prompt, "text": text(ids[start:]), "chunks": chunks}


def _described(found: Any, retriever: Any) -> list[dict[str, Any]]:
    """The neighbors of one chunk as plain values; missing ones are left out."""
    decode = retriever.store.tokenizer.decode
    return [
        {**asdict(source), "score": float(score), "text": decode(tokens[mask].tolist(), skip_special_tokens=True)}
        for source, score, tokens, mask in zip(
            found.sources[0], found.scores[0], found.tokens[0], found.mask[0], strict=True
        )
        if source is not None
    ]


def sample_page(sample: dict[str, Any]) -> str:
    """A sample with its sources for people."""
    lines = [sample["prompt"] + sample["text"], "", "sources: what each chunk found, read by the chunk after it"]
    for chunk in sample["chunks"]:
        lines.append(f"  chunk {chunk['chunk'] + 1}: {_short(chunk['text'])}")
        for neighbor in chunk["neighbors"]:
            where = f"{neighbor['title'] or neighbor['document_id']}, chunk {neighbor['position'] + 1}"
            lines.append(f"    {neighbor['score']:7.3f}  {where}: {_short(neighbor['text'])}")
        if not chunk["neighbors"]:
            lines.append("    no neighbors")
    if not sample["chunks"]:
        lines.append("  none: retrieval is off, or no chunk was whole")
    return "\n".join(lines)


def _short(text: str, width: int = 80) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"
