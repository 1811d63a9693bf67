"""Kills at drawn moments, full disks and two writers at once, tried on builds, neighbor tables, compaction and runs.

    sudo python benchmarks/crashes.py --kills 100 --disks 50 --writers 20 --work /tmp/crashes

Each job is done once undisturbed. Then it is attacked, and done again until it ends by itself: its files must be those
of the undisturbed job, to the byte (times aside). A full disk is a small tmpfs, which root alone may mount.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "RETRO_DEVICE": "cpu"}

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from retro.cli import main
from retro.common.records import SUMS_FILE

TIMED = {"elapsed_seconds", "tokens_per_second"}
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "cca_layers": [2, 3], "retrieved_len": 16}
RUN = {"model": {**SIZES, "encoder_num_layers": 1}, "window_len": 32, "batch_size": 2, "max_steps": 12, "lr": 1e-2}
RUN |= {"warmup_steps": 2, "save_every": 3, "log_every": 1}


@dataclass
class AttackedCommand:
    """A command, and what lies in its folder before it."""

    name: str
    argv: list[str]
    before: Path | None = None
    seconds: float = 0.0


def child(argv: list[str], log: Path, run: Callable[[list[str]], int] = main) -> int:
    """The process id of a fork, in a group of its own, that does a command."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        with open(log, "ab") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        code = run(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def import_list(file: Path, argv: list[str]) -> int:
    """Do a command and write down what it imports, so that its forks need not do so again and again."""
    code = main(argv)
    file.write_text("\n".join(sorted(sys.modules)))
    return code


def ended(pid: int, kill_after: float | None = None) -> int:
    """Its exit code, negative if it was killed."""
    if kill_after is not None:
        time.sleep(kill_after)
        for kill in (os.killpg, os.kill):
            try:
                kill(pid, signal.SIGKILL)
                break
            except ProcessLookupError:
                pass
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def digests(folder: Path) -> dict[str, str]:
    """Of all files, without what tells times, and what is summed over that."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.endswith("lock") and path.name != SUMS_FILE:
            data = path.read_bytes()
            if path.name in ("metrics.jsonl", "state.json"):
                lines = data.splitlines() if path.suffix == ".jsonl" else [data]
                told = [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in lines]
                data = json.dumps(told).encode()
            found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


class Attacks:
    """Jobs in one folder, which is a tmpfs if root asks, and what came of each attack on them."""

    def __init__(self, work: Path, seed: int) -> None:
        self.trial, self.log, self.draw = work / "trial", work / "log", random.Random(seed)
        self.trial.mkdir(parents=True)
        self.outcomes: dict[str, Counter] = {}

    def start(self, job: AttackedCommand) -> None:
        for path in self.trial.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if job.before is not None:
            shutil.copytree(job.before, self.trial, dirs_exist_ok=True)
        self.log.write_bytes(b"")

    def finish(self, job: AttackedCommand) -> str:
        """Do the job again until its end: what has come of it."""
        code = ended(child(job.argv, self.log))
        said = self.log.read_text(errors="replace")
        if "Traceback" in said:
            return "traceback"
        if code:
            return "does not go on"
        return "survived" if digests(self.trial) == self.expected else "silent"

    def note(self, attack: str, outcome: str, times: int = 1) -> None:
        self.outcomes.setdefault(attack, Counter())[outcome] += times
        if outcome not in ("survived", "refused"):
            number = sum(sum(counter.values()) for counter in self.outcomes.values())
            kept = self.log.with_name(f"{outcome.split()[0]}-{number}")
            shutil.copytree(self.trial, kept)
            shutil.copy(self.log, kept / "log")
            print(f"{attack}: {outcome}, kept as {kept}", flush=True)

    def undisturbed(self, job: AttackedCommand) -> None:
        self.start(job)
        ended(child(job.argv, self.log, partial(import_list, self.log.with_name("modules"))))
        for name in self.log.with_name("modules").read_text().split():
            with suppress(Exception):
                import_module(name)
        self.start(job)
        started = time.perf_counter()
        code = ended(child(job.argv, self.log))
        job.seconds = time.perf_counter() - started
        if code:
            raise SystemExit(f"{job.name} fails without any attack:\n{self.log.read_text()[-3000:]}")
        self.expected = digests(self.trial)

    def kills(self, job: AttackedCommand, number: int) -> None:
        done = 0
        while done < number:
            self.start(job)
            since = done
            for _ in range(self.draw.randint(1, 4)):
                if ended(child(job.argv, self.log), self.draw.uniform(0, job.seconds)) >= 0:
                    break
                done += 1
            if outcome := done > since and self.finish(job):
                self.note(f"kill -9 of {job.name}", outcome, done - since)

    def full_disks(self, job: AttackedCommand, number: int) -> None:
        """As many sizes of the disk between what lies there before and what lies there after."""
        sizes = [
            0 if folder is None else sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            for folder in (job.before, self.trial)
        ]
        for _ in range(number):
            size = int(self.draw.uniform(sizes[0] * 1.05 + (1 << 17), sizes[1] * 1.1 + (1 << 17)))
            for path in self.trial.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(self.trial)], check=True)
            try:
                self.start(job)
                code = ended(child(job.argv, self.log))
                last = (self.log.read_text(errors="replace").strip().splitlines() or [""])[-1]
                subprocess.run(["mount", "-o", "remount,size=1g", str(self.trial)], check=True)
                outcome = self.finish(job)
                if outcome == "survived" and code:
                    outcome = "refused" if last.startswith("retro: error: ") else f"no sentence ({last[:80]})"
                self.note(f"full disk in {job.name}", outcome)
            except OSError:
                self.note(f"full disk in {job.name}", "refused")  # what lies there before does not fit
            finally:
                subprocess.run(["umount", str(self.trial)], check=True)

    def two_writers(self, job: AttackedCommand, number: int) -> None:
        for _ in range(number):
            self.start(job)
            pids = [child(job.argv, self.log)]
            time.sleep(self.draw.uniform(0, job.seconds / 2))
            pids.append(child(job.argv, self.log))
            codes = [ended(pid) for pid in pids]
            outcome = self.finish(job)
            if outcome == "survived" and 0 not in codes:
                outcome = "neither ends"
            self.note(f"two writers of {job.name}", "refused" if outcome == "survived" and any(codes) else outcome)


def made_inputs(folder: Path, seed: int) -> dict[str, str]:
    """Documents of random words, their tokenizer and a tiny encoder."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    draw, words = random.Random(seed), [f"w{i}" for i in range(200)]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", cls_token="</s>"
    )
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=203)
    for name in ("tokenizer", "encoder"):
        tokenizer.save_pretrained(folder / name)
    BertModel(BertConfig(**sizes, max_position_embeddings=128)).save_pretrained(folder / "encoder")
    for name, count in (("docs", 400), ("more", 100)):
        with open(folder / f"{name}.jsonl", "w") as file:
            for i in range(count):
                text = " ".join(draw.choices(words, k=draw.randint(5, 120)))
                file.write(json.dumps({"id": f"{name}{i}", "text": text}) + "\n")
    (folder / "gone").write_text("".join(f"docs{i}\n" for i in range(0, 400, 3)))
    return {name: str(folder / name) for name in ("tokenizer", "encoder", "docs.jsonl", "more.jsonl", "gone")}


def jobs_of(work: Path, attacks: Attacks, seed: int, names: list[str]) -> list[AttackedCommand]:
    """Those of build, neighbors, compact and train, and the folders that they begin with."""
    made, store = made_inputs(work / "inputs", seed), str(attacks.trial / "store")
    build = ["build", store, made["docs.jsonl"], "--tokenizer", made["tokenizer"], "--embedder", made["encoder"]]
    build += ["--chunk-len", "8", "--shard-chunks", "900", "--workers", "1", "--index", "tfidf"]
    neighbors = ["neighbors", store, "--k", "4", "--workers", "1"]
    (work / "inputs/run.yaml").write_text(json.dumps(RUN | {"store": store, "output": f"{attacks.trial}/run"}))
    train = ["train", f"{work}/inputs/run.yaml"]
    add, remove = ["add", store, made["more.jsonl"], "--workers", "1"], ["remove", store, "--ids", made["gone"]]
    argvs = {"build": build, "neighbors": neighbors, "compact": ["compact", store], "train": train}
    earlier = {"build": [], "neighbors": [build], "compact": [build, add, remove], "train": [build, neighbors]}

    def kept(name: str) -> Path:
        attacks.start(AttackedCommand(name, []))
        for argv in earlier[name]:
            if ended(child(argv, attacks.log)):
                raise SystemExit(attacks.log.read_text()[-3000:])
        return Path(shutil.copytree(attacks.trial, work / f"before-{name}"))

    return [AttackedCommand(name, argvs[name], kept(name)) for name in argvs if name in names]


def run(work: Path, kills: int, disks: int, writers: int, seed: int, only: list[str]) -> dict[str, Counter]:
    """All attacks; the outcomes by attack."""
    shutil.rmtree(work, ignore_errors=True)
    attacks = Attacks(work, seed)
    jobs = jobs_of(work, attacks, seed, only)
    for job in jobs:
        attacks.undisturbed(job)
        attacks.full_disks(job, disks // len(jobs))
        attacks.two_writers(job, writers // len(jobs))
        attacks.kills(job, kills)
        print(job.name, f"{job.seconds:.1f} s", {k: dict(v) for k, v in attacks.outcomes.items()}, flush=True)
    return attacks.outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=["build", "neighbors", "compact", "train"])
    for name, default in (("kills", 100), ("disks", 50), ("writers", 20), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for attack, found in run(**vars(parser.parse_args())).items():
        print(f"{attack:32}" + ", ".join(f"{count} {outcome}" for outcome, count in found.items()))
