"""Seconds per generated token: RETRO[ON] and [OFF], a RETRO-fitted model and its base, and RETRO-pytorch 0.3.9.

Models of the shape of configs/train_small.yaml with random weights; neighbors come from a callable that costs nothing,
so that what is timed is the model: its step, and the encoding of new neighbors at each chunk's end. A prompt is run
first, and the tokens up to the given length are timed (RETRO-pytorch runs the whole text for each token, and is timed
over few). All take turns, each figure is the median of the rounds. The effect of looking ahead is measured with a
search that takes as long as --search-ms says, or with the datastore's own.

    python benchmarks/generation.py --json generation.json
    python benchmarks/generation.py --retrofit fitted --store fitstore --json generation.json
"""

import argparse
import contextlib
import io
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
import transformers

import retro
from retro.common.settings import find_config, read_yaml
from retro.model import RetroConfig, RetroForCausalLM
from retro.retrieval import Neighbors, Retriever
from retro.retrofit import RetrofitForCausalLM, retrofit

VOCAB_SIZE = 8192
LLAMA = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=10,
    num_attention_heads=3,
    num_key_value_heads=1,
    pad_token_id=0,
)


class Clock:
    """A streamer that notes when each token came."""

    def __init__(self):
        self.at = []

    def put(self, tokens) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        pass

    def seconds(self) -> list[float]:
        """Of each token after the first, which ends the run of the prompt."""
        return np.diff(self.at[1:]).tolist()


def random_search(queries, num_neighbors: int, seconds: float = 0.0) -> Neighbors:
    """Neighbors of random tokens, the same for the same query."""
    time.sleep(seconds)
    draw = lambda query: np.random.default_rng(int(query.sum())).integers(3, VOCAB_SIZE, (num_neighbors, 128))  # noqa: E731
    tokens = np.stack([draw(query) for query in np.asarray(queries)])
    ids, sources = np.zeros(tokens.shape[:2], np.int64), [[None] * num_neighbors for _ in tokens]
    return Neighbors(ids, tokens, np.ones(tokens.shape, bool), ids.astype(np.float32), sources)


def timed(model, prompts: torch.Tensor, new_tokens: int, **options) -> list[float]:
    """Seconds of each step that follows the prompt's."""
    clock = Clock()
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    model.generate(prompts, streamer=clock, **settings, **options)
    return clock.seconds()


def in_turns(cases: dict[str, Callable[[], list[float]]], rounds: int) -> dict[str, dict[str, float]]:
    """The mean and the longest step of each case: medians of the rounds, after one that does not count."""
    steps = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, case in cases.items():
            found = case()
            if number:
                steps[name].append(found)
    return {
        name: {
            "seconds_per_token": median(mean(one) for one in found),
            "median_step_seconds": median(median(one) for one in found),
            "longest_step_seconds": median(max(one) for one in found),
        }
        for name, found in steps.items()
    }


def small_retro(lengths: list[int], changes: Sequence[str] = ()) -> RetroForCausalLM:
    fields = read_yaml(find_config("train_small", "train"))["model"]
    fields |= {name: int(value) for name, value in (change.split("=") for change in changes)}
    return RetroForCausalLM(RetroConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=max(lengths), **fields)).eval()


def fitted_model(arguments: argparse.Namespace) -> RetrofitForCausalLM:
    """The folder given, or a small random Llama with the pointer, its gate open."""
    if arguments.retrofit:
        return RetrofitForCausalLM.from_pretrained(arguments.retrofit)
    config = transformers.LlamaConfig(**LLAMA, max_position_embeddings=max(arguments.lengths))
    model = retrofit(transformers.LlamaForCausalLM(config).eval(), form="pointer")
    with torch.no_grad():
        model.form.gate.opening.fill_(1.0)
    return model


def peer(retro_config: RetroConfig, length: int, new_tokens: int) -> Callable[[], list[float]] | None:
    """RETRO-pytorch's generate() at the same widths and depths (its heads are always 8); None if it is not there."""
    try:
        from retro_pytorch import RETRO, TrainingWrapper
    except ImportError:
        return None
    start, m = length - new_tokens, retro_config.chunk_len
    model = RETRO(
        num_tokens=VOCAB_SIZE,
        max_seq_len=length,
        enc_dim=retro_config.hidden_size,
        dec_dim=retro_config.hidden_size,
        enc_depth=retro_config.encoder_num_layers,
        dec_depth=retro_config.num_hidden_layers,
        dec_cross_attn_layers=tuple(retro_config.cca_layers),
        dim_head=retro_config.head_dim,
        chunk_size=m,
    )
    wrapper = TrainingWrapper.__new__(TrainingWrapper)  # its constructor wants a folder of text and a BERT
    torch.nn.Module.__init__(wrapper)
    wrapper.retro, wrapper.chunk_size, wrapper.max_seq_len = model.eval(), m, length - 1
    wrapper.fetch_knn_chunks_fn = lambda chunks: torch.randint(3, VOCAB_SIZE, (len(chunks), 2, 128))
    prompt = torch.randint(200, VOCAB_SIZE, (1, start))  # 102 would end the text

    def run() -> list[float]:
        started_at = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            out = wrapper.generate(prompt)
        return [(time.perf_counter() - started_at) / (out.shape[1] - start)]

    return run


def text_of(store, length: int) -> torch.Tensor:
    """The first tokens of a store, [1, length]."""
    rows = np.arange(min(store.num_chunks, length))
    chunks = zip(store.chunks(rows).tolist(), store.chunk_lens(rows).tolist(), strict=True)
    return torch.tensor([[token for chunk, count in chunks for token in chunk[:count]][:length]])


def at_lengths(small, fitted, search, arguments: argparse.Namespace, store) -> dict[str, dict]:
    """Each model over texts of each length."""
    results = {}
    for length in arguments.lengths:
        start, steps = length - arguments.tokens, arguments.tokens
        prompt = torch.randint(3, VOCAB_SIZE, (1, start))
        text = prompt if store is None else text_of(store, start)
        cases = {
            "RETRO[ON]": lambda: timed(small, prompt, steps, retriever=random_search),  # noqa: B023
            "RETRO[OFF]": lambda: timed(small, prompt, steps),  # noqa: B023
            "fitted ON": lambda: timed(fitted, text, steps, retriever=search),  # noqa: B023
            "its base": lambda: timed(fitted.base, text, steps),  # noqa: B023
        }
        other = peer(small.config, length, arguments.peer_tokens) if length == arguments.lengths[0] else None
        if other is not None:
            cases["RETRO-pytorch"] = other
        results[str(length)] = in_turns(cases, arguments.rounds)
    return results


def batched(small, arguments: argparse.Namespace) -> dict[str, dict]:
    """Prompts of all lengths at once, left-padded, and the longest alone."""
    longest, steps, rows = arguments.lengths[0] - arguments.tokens, arguments.tokens, arguments.batch
    lens = torch.linspace(max(1, longest // 2), longest, rows).long()
    mask = (torch.arange(longest) >= longest - lens[:, None]).long()
    prompts = torch.randint(3, VOCAB_SIZE, (rows, longest)) * mask
    options = {"retriever": random_search}
    return in_turns(
        {
            "batch 1": lambda: timed(small, prompts[-1:], steps, **options),
            f"batch {rows}, ragged": lambda: timed(small, prompts, steps, attention_mask=mask, **options),
        },
        arguments.rounds,
    )


def ahead(small, fitted, search, arguments: argparse.Namespace, store) -> dict[str, dict]:
    """A search that takes its time, with and without looking ahead."""
    start, steps = arguments.lengths[0] - arguments.tokens, arguments.tokens
    prompt = torch.randint(3, VOCAB_SIZE, (1, start))
    slow = partial(random_search, seconds=arguments.search_ms / 1000)
    models = {f"RETRO[ON], searches of {arguments.search_ms:g} ms": (small, prompt, slow)}
    if store is not None:
        models["fitted ON, searches of the store"] = (fitted, text_of(store, start), search)
    cases = {
        f"{name}, lookahead {tokens}": partial(timed, model, text, steps, retriever=found, lookahead=tokens)
        for name, (model, text, found) in models.items()
        for tokens in (0, arguments.lookahead)
    }
    return in_turns(cases, arguments.rounds)


def measure(arguments: argparse.Namespace) -> dict:
    retriever = None if arguments.store is None else Retriever(arguments.store)
    small, fitted, search = (
        small_retro(arguments.lengths, arguments.model),
        fitted_model(arguments),
        retriever or random_search,
    )
    store = None if retriever is None else retriever.store
    results = {
        "versions": {
            "retro-lm": retro.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": {"platform": platform.platform(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "settings": {name: str(value) for name, value in vars(arguments).items()},
        "lengths": at_lengths(small, fitted, search, arguments, store),
        "batch": batched(small, arguments),
        "lookahead": ahead(small, fitted, search, arguments, store),
    }
    first = results["lengths"][str(arguments.lengths[0])]
    seconds = {name: case["seconds_per_token"] for name, case in first.items()}
    one, many = (case["seconds_per_token"] for case in results["batch"].values())
    results["ratios"] = {
        "ON / OFF": {
            length: cases["RETRO[ON]"]["seconds_per_token"] / cases["RETRO[OFF]"]["seconds_per_token"]
            for length, cases in results["lengths"].items()
        },
        "fitted ON / base": {
            length: cases["fitted ON"]["seconds_per_token"] / cases["its base"]["seconds_per_token"]
            for length, cases in results["lengths"].items()
        },
        "RETRO-pytorch / ON": seconds["RETRO-pytorch"] / seconds["RETRO[ON]"] if "RETRO-pytorch" in seconds else None,
        "throughput of the batch / batch 1": arguments.batch * one / many,
    }
    return results


def show(results: dict) -> None:
    print(f"{'milliseconds':48}{'mean':>10}{'median':>10}{'longest':>10}")
    tables = {f"{length} tokens": cases for length, cases in results["lengths"].items()}
    for title, cases in {**tables, "batch": results["batch"], "lookahead": results["lookahead"]}.items():
        print(title)
        for name, case in cases.items():
            print(f"  {name:46}" + "".join(f"{1000 * seconds:10.3f}" for seconds in case.values()))
    for name, ratio in results["ratios"].items():
        values = ratio if isinstance(ratio, dict) else {"": ratio}
        print(f"{name:48}" + "".join(f"{length:>6} {x:.2f}" for length, x in values.items() if x is not None))
    if results["ratios"]["RETRO-pytorch / ON"] is None:
        print("RETRO-pytorch is not installed and was left out; pip install retro-pytorch==0.3.9")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048], help="tokens in a text, prompt included")
    parser.add_argument("--tokens", type=int, default=129, help="of them generated; the first is not timed")
    parser.add_argument("--peer-tokens", type=int, default=4, help="the same for RETRO-pytorch, at the first length")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lookahead", type=int, default=16)
    parser.add_argument("--search-ms", type=float, default=30.0, help="what a search takes in the runs that look ahead")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", nargs="*", default=[], metavar="FIELD=N", help="another shape than train_small's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--retrofit", type=Path, help="a folder that `retro retrofit` wrote; default: a small Llama")
    parser.add_argument("--store", type=Path, help="its datastore, for real searches")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if (arguments.retrofit is None) != (arguments.store is None):
        parser.error("--retrofit and --store go together: the store is searched for the fitted model")
    torch.manual_seed(arguments.seed)
    results = measure(arguments)
    show(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
