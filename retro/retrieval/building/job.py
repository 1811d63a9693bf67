"""What the tasks of a build share, and the tasks themselves by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retro.common.files import stable_hash
from retro.retrieval.building import tasks
from retro.retrieval.executors.tasks import Task
from retro.text.documents import InputPartition

PARTS = "parts"  # the folder of work in progress, inside the store
LIGHT_BYTES = 1 << 18  # of the inputs, below which no process is started to read a part
_LIGHT_ROWS = 1 << 15  # of a shard's tables
_TASKS = tasks.__name__


@dataclass(frozen=True)
class Job:
    """What the tasks of a build share; see `retro.retrieval.building.settings.BuildSettings` for what the names mean.

    plan: chunk_len, pad_token_id, dtypes, fingerprints, held_out, as a manifest holds them. own_embedder: the embedder
    is an object that cannot be loaded from its description, so that all keys are made in the calling process.
    """

    path: Path
    plan: dict[str, Any]
    filters: dict[str, Any]
    text_field: str
    on_bad: str
    shard_chunks: int
    min_chunk_len: int
    batch_size: int | None
    compile: bool
    own_embedder: bool

    @property
    def folder(self) -> Path:
        return self.path / PARTS

    @property
    def _common(self) -> dict[str, Any]:
        tokenizer = {"tokenizer": str(self.path / "tokenizer")}
        tokenizer["tokenizer_fingerprint"] = self.plan["tokenizer"]["fingerprint"]
        return {"folder": str(self.folder), **tokenizer}

    def read(self, number: int, partitions: Sequence[InputPartition]) -> Task:
        """Its name tells one split of the inputs from another. Streams and objects are read here, in their order."""
        held = [[partition.item.name, partition.start, partition.stop, partition.first] for partition in partitions]
        name = f"read-{number:06d}-{stable_hash(held)[:12]}"
        spec = {
            "name": name,
            "partitions": tasks.partitions_to_spec(partitions),
            "filters": self.filters,
            **self._common,
        }
        spec |= {"text_field": self.text_field, "on_bad": self.on_bad}
        spec |= {"held_out": self.plan["held_out"], "token_dtype": self.plan["token_dtype"]}
        light = sum(partition.bytes for partition in partitions) < LIGHT_BYTES
        here = any(partition.item.kind in ("stream", "object") for partition in partitions)
        return Task(name, f"{_TASKS}:read_part", spec, light=light, here=here)

    def tables(self, shard: str, runs: list[list[Any]], rows: int, signature: str | None) -> Task:
        spec = {"shard": shard, "runs": runs, "min_chunk_len": self.min_chunk_len, **self._common}
        spec |= {"signature": signature}
        spec |= {name: self.plan[name] for name in ("chunk_len", "pad_token_id", "token_dtype")}
        return Task(f"tables-{shard}", f"{_TASKS}:write_tables", spec, light=rows < _LIGHT_ROWS)

    def keys(self, shard: str, first_row: int, start: int, stop: int) -> Task:
        name = f"keys-{shard}-{start:010d}-{stop:010d}"
        spec = {"name": name, "shard": shard, "first_row": first_row, "start": start, "stop": stop, **self._common}
        spec |= {name: self.plan[name] for name in ("chunk_len", "key_dtype", "embedder")}
        spec |= {"batch_size": self.batch_size, "compile": self.compile, "own_threads": self.own_embedder}
        keyless = self.plan["embedder"]["dim"] == 0
        return Task(name, f"{_TASKS}:embed_block", spec, here=self.own_embedder, light=keyless, gpu=not keyless)

    def join(self, shard: str, blocks: list[str], rows: int, truncated: int) -> Task:
        spec = {"shard": shard, "blocks": blocks, "rows": rows, "truncated_chunks": truncated, **self._common}
        return Task(f"join-{shard}", f"{_TASKS}:join_keys", spec, light=rows < _LIGHT_ROWS)
