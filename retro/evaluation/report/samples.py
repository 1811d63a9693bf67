"""Texts with their sources, as --json of `retro generate` holds them, back to what the page of sources is made of."""

from __future__ import annotations

from typing import Any

from retro.retrieval import Source
from retro.sampling import Attribution, CopiedRun, ReadingChunk, ReadNeighbor


def attribution_from_json(value: dict[str, Any]) -> Attribution:
    """What `retro.sampling.as_json` was given. The value has the shape `retro.evaluation.report.shapes.TEXT`."""
    chunks = [
        ReadingChunk(
            chunk["chunk"],
            chunk["start"],
            chunk["stop"],
            chunk["num_prompt_tokens"],
            tuple(map(_neighbor, chunk["neighbors"])),
        )
        for chunk in value["chunks"]
    ]
    return Attribution(
        tuple(value["token_ids"]),
        tuple(value["tokens"]),
        value["num_prompt_tokens"],
        value["chunk_len"],
        tuple(chunks),
        value["retrieved"],
        None if value["gains"] is None else tuple(value["gains"]),
    )


def _neighbor(value: dict[str, Any]) -> ReadNeighbor:
    name, position = value["document_id"], value["position"]
    known = name is not None and position is not None
    source = Source(name, value["title"] or "", value["source"] or "", position, value["date"]) if known else None
    copied = None if value["copied"] is None else CopiedRun(**value["copied"])
    return ReadNeighbor(
        value["row"], value["score"], source, tuple(value["tokens"]), value["continuation_start"], copied
    )
