"""Longest common token runs of chunks and neighbors: all pairs at once, against difflib and a dynamic program per pair.

Chunks of 64 tokens, 10 neighbors of 128 tokens each, words as often as in text (Zipf), in each neighbor a run of the
chunk of random length. All answers are compared. The three take turns; each figure is the median of the rounds.

    python benchmarks/overlap.py --json overlap.json
"""

import argparse
import difflib
import json
import platform
import time
from pathlib import Path
from statistics import median

import numpy as np

from retro.text.overlap import common_runs


def made_pairs(chunks: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Chunks [c, 64] and neighbors [c, 10, 128]."""
    generator = np.random.default_rng(seed)
    draw = lambda *shape: np.minimum(generator.zipf(1.3, shape), 8192)  # noqa: E731
    text, neighbors = draw(chunks, 64), draw(chunks, 10, 128)
    for c in range(chunks):
        for k in range(10):
            length = generator.integers(0, 65)
            start, there = generator.integers(0, 65 - length), generator.integers(0, 129 - length)
            neighbors[c, k, there : there + length] = text[c, start : start + length]
    return text, neighbors


def vectorised(text: np.ndarray, neighbors: np.ndarray) -> list[int]:
    """retro.text.overlap"""
    masks = np.ones(text.shape, bool), np.ones(neighbors.shape, bool)
    return common_runs(text, neighbors, *masks).lengths.ravel().tolist()


def by_difflib(text: np.ndarray, neighbors: np.ndarray) -> list[int]:
    """difflib.SequenceMatcher"""
    lengths = []
    for chunk, found in zip(text.tolist(), neighbors.tolist(), strict=True):
        matcher = difflib.SequenceMatcher(None, autojunk=False)
        matcher.set_seq2(chunk)  # what it keeps between pairs
        for neighbor in found:
            matcher.set_seq1(neighbor)
            lengths.append(matcher.find_longest_match().size)
    return lengths


def by_dynamic_program(text: np.ndarray, neighbors: np.ndarray) -> list[int]:
    """dynamic program in Python"""
    lengths = []
    for chunk, found in zip(text.tolist(), neighbors.tolist(), strict=True):
        for neighbor in found:
            longest, before = 0, [0] * (len(neighbor) + 1)
            for token in chunk:
                runs = [0] * (len(neighbor) + 1)
                for j, other in enumerate(neighbor, start=1):
                    if token == other:
                        runs[j] = before[j - 1] + 1
                        longest = max(longest, runs[j])
                before = runs
            lengths.append(longest)
    return lengths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    text, neighbors = made_pairs(arguments.chunks, arguments.seed)
    # the slow ones do a part of the work, and their rate is compared
    shares = {vectorised: 1, by_difflib: 8, by_dynamic_program: 32}
    expected, seconds = vectorised(text, neighbors), {function: [] for function in shares}
    for _ in range(arguments.rounds):
        for function, share in shares.items():
            part = slice(0, max(1, arguments.chunks // share))
            started = time.perf_counter()
            lengths = function(text[part], neighbors[part])
            seconds[function].append((time.perf_counter() - started) / len(lengths))
            assert lengths == expected[: len(lengths)], function.__doc__
    rates = {function.__doc__: 1 / median(times) for function, times in seconds.items()}
    fastest = rates[vectorised.__doc__]
    print(f"{'':32}{'pairs a second':>16}{'ratio':>10}")
    for name, rate in rates.items():
        print(f"{name:32}{rate:16,.0f}{fastest / rate:10.1f}")
    if arguments.json:
        about = {"chunks": arguments.chunks, "rounds": arguments.rounds, "machine": platform.processor()}
        arguments.json.write_text(json.dumps({"pairs_per_second": rates, **about}, indent=2) + "\n")


if __name__ == "__main__":
    main()
