"""The loop on tiny real stores: exact resume, many processes as one, refusals, and what a run leaves behind."""

import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import retro
from retro.training.windows import IGNORED
from retro.evaluation import ScoringSettings, bits_per_byte
from retro.loading import load
from retro.provenance import check_store
from retro.retrieval import Store, build_neighbors
from retro.text.documents import Document
from retro.common.settings import save_settings
from retro.training import loop, batches, script, validation, pretrain
from retro.training.checkpoint import last_checkpoint, random_states, restore_random_states
from retro.training.loop import fit
from retro.training.validation import validate
from retro.training.optimizer import make_optimizer, parameter_groups
from tests.stand_ins import HashingEmbedder, make_store, make_words_tokenizer, words
from tests.waiting import FOREVER, wait_until

PRETRAIN = Path(__file__).parents[3] / "train" / "pretrain.py"
UNTIMED = ("elapsed_seconds", "tokens_per_second")


def metrics(output: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in UNTIMED} for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    """Two runs' folders hold the same bits: weights, moments, random states, counters, metrics."""
    for folder, against in ((one, other), (last_checkpoint(one), last_checkpoint(other))):
        assert folder.name == against.name or folder == one
        mine, theirs = load_file(folder / "model.safetensors"), load_file(against / "model.safetensors")
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    for name in ("optimizer.safetensors", "rng-0.json"):
        assert (last_checkpoint(one) / name).read_bytes() == (last_checkpoint(other) / name).read_bytes(), name
    states = [json.loads((last_checkpoint(run) / "state.json").read_text()) for run in (one, other)]
    assert [{**state, "elapsed_seconds": 0} for state in states][0] == {**states[1], "elapsed_seconds": 0}
    assert metrics(one) == metrics(other)


def stop_after(monkeypatch, step: int) -> None:
    """SIGTERM while the given step is under way."""
    train_step = loop.train_step

    def interrupted(run, *arguments):
        if run.state.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(run, *arguments)

    monkeypatch.setattr(loop, "train_step", interrupted)


def poison_before(monkeypatch, step: int) -> None:
    """Spoil a weight, so that the given step's loss is not a number."""
    train_step = loop.train_step

    def poisoned(run, *arguments):
        if run.state.step == step - 1:
            next(run.state.model.parameters()).data.fill_(float("nan"))
        return train_step(run, *arguments)

    monkeypatch.setattr(loop, "train_step", poisoned)


# Resume


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_run_is_the_undisturbed_run_bit_for_bit(
    optimizer, make_settings, prepare, monkeypatch, tmp_path
):
    changes = dict(max_steps=20, gradient_accumulation_steps=2, log_every=3, eval_every=8, save_every=7)
    changes |= {"optimizer": optimizer}
    assert fit(prepare(make_settings("whole", **changes)))
    settings, parts = make_settings("parts", **changes), tmp_path / "parts"
    for step in (1, 5, 19):
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            assert not fit(prepare(settings))
        assert last_checkpoint(parts).name == f"step-{step:08d}"
        run = prepare(settings)
        assert run.state.step == step and run.loader.position["window"] == step * 4 % len(run.loader.windows)
    assert fit(run)
    assert run.loader.position["epoch"] == 2, "the run crosses epochs"
    assert_same_run(tmp_path / "whole", parts)


def test_lines_written_after_the_last_checkpoint_are_written_again(make_settings, prepare, monkeypatch, tmp_path):
    settings = make_settings("killed", log_every=1, save_every=4)
    with monkeypatch.context() as patch:
        poison_before(patch, 6)
        with pytest.raises(ValueError):
            fit(prepare(settings))
    assert metrics(tmp_path / "killed")[-1]["step"] == 5
    assert fit(prepare(settings))
    assert fit(prepare(make_settings("whole", log_every=1, save_every=4)))
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_a_checkpoint_that_a_killed_run_had_half_deleted_is_gone(make_settings, prepare, monkeypatch, tmp_path):
    settings, checkpoints = make_settings("killed", save_every=2, eval_every=100), tmp_path / "killed/checkpoints"

    def killed(path, **options):
        next(path.iterdir()).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("retro.common.files.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            fit(prepare(settings))
    assert fit(prepare(settings))
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000004", "step-00000006"]


def test_a_finished_run_is_left_as_it_is(make_settings, prepare, tmp_path):
    settings = make_settings(max_steps=2)
    assert fit(prepare(settings))
    before = metrics(tmp_path / "run"), (tmp_path / "run" / "model.safetensors").read_bytes()
    assert fit(prepare(settings))
    assert before == (metrics(tmp_path / "run"), (tmp_path / "run" / "model.safetensors").read_bytes())


def test_a_finished_run_is_prolonged_and_started_from(make_settings, prepare, tmp_path, caplog):
    """It says what it does where no bar is shown; a prolonged run keeps its lines, one that starts from it its weights."""
    caplog.set_level("INFO", "retro.training")
    fit(prepare(make_settings(max_steps=2)))
    said = [record.getMessage() for record in caplog.records if record.name.endswith("sayings")]
    assert "training on cpu, 2 steps of 64 tokens" in said[0] and said[1].startswith("step 2 of 2: loss ")
    assert "bits per byte on" in said[2] and "the model is trained, 2 steps, loss " in said[-2]
    assert said[-1].startswith(f"next: retro evaluate {tmp_path / 'run'} --store")
    trained = dict(prepare(make_settings(max_steps=2)).state.model.state_dict())
    fit(prepare(make_settings(max_steps=4)))
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [2, 4]
    start = str(tmp_path / "first")
    shutil.copytree(tmp_path / "run" / "checkpoints" / "step-00000002", start)
    begun = prepare(make_settings("other", start=start, max_steps=1, seed=9)).state
    assert begun.step == 0 and all(torch.equal(value, trained[name]) for name, value in begun.model.state_dict().items())
    with pytest.raises(ValueError, match="is another model: .*hidden_size"):
        prepare(make_settings("third", start=start, model={"hidden_size": 64}))


def test_random_states_survive_json():
    def draw():
        return random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist()

    random.gauss(0, 1), np.random.randn()  # leaves half a pair behind in both
    states = json.loads(json.dumps(random_states()))
    first = draw()
    assert draw() != first
    restore_random_states(states)
    assert draw() == first


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(lr=5e-3), ["lr (0.01 there, 0.005 now)"]),
        (dict(max_steps=3, seed=1), ["seed (0 there, 1 now)"]),
        (dict(model={"hidden_size": 64}), ["model.hidden_size (32 there, 64 now)"]),
        (dict(batch_size=3), ["windows_per_step (2 there, 3 now)"]),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(make_settings, prepare, tmp_path, change, named):
    fit(prepare(make_settings(max_steps=2)))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(ValueError) as error:
        prepare(make_settings(**{"max_steps": 2, **change}))
    assert all(part in str(error.value) for part in [*named, "another configuration"]), error.value
    assert "\n" not in str(error.value)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


def test_what_is_only_looked_at_may_change(make_settings, prepare, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        fit(prepare(make_settings(batch_size=2)))
    run = prepare(
        make_settings(batch_size=1, gradient_accumulation_steps=2, log_every=1, valid_store=None, eval_every=1)
    )
    assert run.state.step == 2


def test_another_store_is_another_configuration(make_settings, prepare, stores, tmp_path):
    fit(prepare(make_settings(max_steps=2)))
    moved = tmp_path / "moved"
    shutil.copytree(stores["train"], moved)
    prepare(make_settings(max_steps=2, store=str(moved)))  # the same store elsewhere
    with pytest.raises(ValueError, match="store_fingerprint"):
        prepare(make_settings(max_steps=2, store=str(stores["valid"]), valid_store=None, retrieval=False))


def test_old_checkpoints_go_and_a_half_written_one_is_not_taken(make_settings, prepare, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    (folder / "writing-step-00000099").mkdir(parents=True)
    (tmp_path / "run" / ".tmp-1.0-0-config.yaml").write_text("half")
    fit(prepare(make_settings(save_every=1, keep_checkpoints=2)))
    assert not list(tmp_path.rglob(".tmp-*")) and not list(tmp_path.rglob("writing-*"))
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-00000005", "step-00000006"]
    assert last_checkpoint(tmp_path / "run").name == "step-00000006"


# What goes wrong


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_offered(make_settings, prepare, tmp_path):
    settings, run = make_settings(save_every=2, keep_checkpoints=2), tmp_path / "run"
    fit(prepare(settings))
    newest = last_checkpoint(run)
    for name in ("model.safetensors", "optimizer.safetensors", "state.json", "rng-0.json", "tokenizer.json"):
        sound = (newest / name).read_bytes()
        (newest / name).write_bytes(sound[:-40] + bytes([sound[-40] ^ 1]) + sound[-39:])
        said = f"{newest} is damaged .*{name}.*; delete it to go on from step-00000004, which is whole"
        with pytest.raises(ValueError, match=said) as error:
            prepare(settings)
        assert "\n" not in str(error.value)
        (newest / name).write_bytes(sound)
    assert prepare(settings).state.step == 6
    for folder in (newest, run):
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-4] + b"bits")
        with pytest.raises(ValueError, match=f"{folder}/model.safetensors is damaged.*yourself, delete .*checksums.json"):
            load(str(folder))
    (newest / "checksums.json").unlink()
    with pytest.raises(ValueError, match="checksums.json is missing"):
        prepare(settings)
    shutil.rmtree(newest)
    assert prepare(settings).state.step == 4


def test_a_loss_that_is_no_number_stops_the_run_and_the_last_good_checkpoint_stays(
    make_settings, prepare, monkeypatch, tmp_path
):
    poison_before(monkeypatch, 5)
    with pytest.raises(ValueError, match=r"the loss is nan at step 5.*checkpoints/step-00000004") as error:
        fit(prepare(make_settings(save_every=2)))
    assert "\n" not in str(error.value)
    kept = last_checkpoint(tmp_path / "run")
    assert kept.name == "step-00000004"
    assert all(tensor.isfinite().all() for tensor in load_file(kept / "model.safetensors").values())
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_not_finite_moves_nothing(optimizer, make_settings, prepare):
    run = prepare(make_settings(optimizer=optimizer, warmup_steps=0))
    for number, batch in zip(range(3), run.loader):  # a good step, one that is not, a good one
        before = [tensor.clone() for tensor in state_of(run)]
        with pytest.MonkeyPatch.context() as patch:
            if number == 1:
                clip = torch.nn.utils.clip_grad_norm_
                patch.setattr(loop.nn.utils, "clip_grad_norm_", lambda *given: clip(*given) * math.inf)
            loop.train_step(run, batch, sum(batches.count_targets(part) for part in batch))
        same = [torch.equal(*pair) for pair in zip(before, state_of(run), strict=False)]
        assert all(same) == (number == 1)
    with pytest.raises(ValueError, match="the gradient norm is inf at step 2, so the run stops .* no checkpoint yet"):
        loop.read_results(run)


def state_of(run) -> list[torch.Tensor]:
    """Weights and moments."""
    moments = run.state.optimizer.state_dict()["state"].values()
    return [*run.state.model.parameters(), *(tensor for entry in moments for tensor in entry.values())]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(window_len=30), ["window_len: 30", "m = 8", "32"]),
        (dict(num_neighbors=3), ["k >= 3", "retro neighbors"]),
        (dict(model={"hidden_sizes": 3}), ["model", "hidden_sizes", "hidden_size"]),
        (dict(model={"hidden_size": "wide"}), ["model", "hidden_size", "wide"]),
        (dict(model={"cca_layers": [9]}), ["model", "cca_layers", "9"]),
        (dict(model={"preset": "9b"}), ["model", "9b", "172m"]),
        (dict(model={"chunk_len": 4}), ["model.chunk_len: 4", "8"]),
        (dict(model={"vocab_size": 4}), ["model.vocab_size: 4", "63"]),
        (dict(store="nowhere"), ["nowhere"]),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_sentence_before_anything_is_written(
    make_settings, prepare, tmp_path, changes, named
):
    with pytest.raises((ValueError, OSError)) as error:
        prepare(make_settings(**changes))
    assert all(part in str(error.value) for part in named), error.value
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_validation_store_of_another_tokenizer_is_refused(make_settings, prepare, stores):
    with pytest.raises(ValueError, match="differ in tokenizer"):
        prepare(make_settings(valid_store=str(stores["other"])))


@pytest.mark.filterwarnings("ignore:.*no supported trackers")
def test_a_missing_tracker_is_refused(make_settings, prepare, monkeypatch):
    from accelerate import tracking

    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(ValueError, match="tracker: tensorboard is not installed"):
        prepare(make_settings(tracker="tensorboard"))


def test_processes_that_do_not_know_of_each_other_are_refused(make_settings, prepare, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched, but accelerate sees 1"):
        prepare(make_settings())
    assert not (tmp_path / "run").exists()


# One step


def test_only_matrices_decay(prepare, make_settings):
    model = prepare(make_settings(model={"position": "relative", "smeared_keys": True})).state.model
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay, no_decay = ([names[id(p)] for p in group["params"]] for group in parameter_groups(model, 0.5, {}))
    assert sorted([*decay, *no_decay]) == sorted(names.values())
    assert all(name.endswith("proj.weight") for name in decay), decay
    kinds = ("norm", "bias", "smear", "embed")
    assert all(any(kind in name for kind in kinds) for name in no_decay), no_decay
    assert all(any(kind in name for name in no_decay) for kind in kinds)


def test_the_optimizer_decays_what_it_should(prepare, make_settings):
    model = prepare(make_settings()).state.model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, make_settings(lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decay = {id(parameter) for parameter in parameter_groups(model, 0.5, {})[0]["params"]}
    for name, parameter in model.named_parameters():
        factor = 0.95 if id(parameter) in decay else 1.0
        assert torch.allclose(parameter, before[name] * factor), name


def test_parameters_with_a_learning_rate_of_their_own(prepare, make_settings):
    run = prepare(make_settings(lr_ratios={"layers.1.cross_attention.": 0.1, "encoder": 0.0}, warmup_steps=0))
    before = {name: parameter.detach().clone() for name, parameter in run.state.model.named_parameters()}
    batch = next(iter(run.loader))
    loop.train_step(run, batch, sum(batches.count_targets(part) for part in batch))
    for name, parameter in run.state.model.named_parameters():
        largest = (parameter - before[name]).abs().max().item()  # Adam's first step is the learning rate
        ratio = 0.1 if "layers.1.cross_attention." in name else 0.0 if "encoder" in name else 1.0
        assert largest == pytest.approx(run.settings.lr * ratio, rel=0.25, abs=1e-9), name
    with pytest.raises(ValueError, match="lr_ratios: 'encodr' is in no trained parameter's name"):
        prepare(make_settings("other", lr_ratios={"encodr": 0.1}))


def test_one_rate_serves_every_width(prepare, make_settings):
    """At twice the width it was found at, matrices take half of the rate and twice the decay, all else stays."""
    run = prepare(make_settings(lr=0.01, lr_width=16, warmup_steps=0, weight_decay=0.5))
    before = {name: parameter.detach().clone() for name, parameter in run.state.model.named_parameters()}
    batch = next(iter(run.loader))
    loop.train_step(run, batch, sum(batches.count_targets(part) for part in batch))
    for name, parameter in run.state.model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed" not in name
        moved = parameter - before[name] * (1 - 0.01 * 0.5 if is_matrix else 1)
        assert moved.abs().max().item() == pytest.approx(0.005 if is_matrix else 0.01, rel=0.25), name


def test_muon_moves_the_matrices_without_a_rate_of_their_own(prepare, make_settings):
    """By an orthogonal update, 0.2 sqrt(longer side) times the rate; AdamW moves all else."""
    changes = dict(lr=0.01, lr_width=8, warmup_steps=0, weight_decay=0.0)
    run = prepare(make_settings(**changes, optimizer="muon", lr_ratios={"cross_attention.attention": 0.5}))
    before = {name: parameter.detach().clone() for name, parameter in run.state.model.named_parameters()}
    batch = next(iter(run.loader))
    loop.train_step(run, batch, sum(batches.count_targets(part) for part in batch))
    for name, parameter in run.state.model.named_parameters():
        moved, is_matrix = (parameter - before[name]).detach(), parameter.ndim == 2 and "embed" not in name
        if is_matrix and "cross_attention.attention" not in name:
            rate = 0.01 * (8 / 32) ** 0.5 * 0.2 * max(parameter.shape) ** 0.5
            assert 0.6 < torch.linalg.matrix_norm(moved, 2).item() / rate < 1.3, name
        else:
            ratio = 8 / 32 if is_matrix else 1.0
            ratio *= 0.5 if "cross_attention.attention" in name else 1.0
            assert moved.abs().max().item() == pytest.approx(0.01 * ratio, rel=0.25), name


def test_muon_does_not_take_matrices_apart(make_settings, prepare):
    model = prepare(make_settings()).state.model
    with pytest.raises(ValueError, match="optimizer: muon takes whole matrices, which fsdp spreads"):
        make_optimizer(model, make_settings(optimizer="muon", fsdp=True))


def test_a_run_that_drops_neighbors_resumes_to_the_same_bits(prepare, make_settings, monkeypatch, tmp_path):
    assert fit(prepare(make_settings("whole", drop_neighbors=0.5)))
    stop_after(monkeypatch, 3)
    assert not fit(prepare(make_settings("parts", drop_neighbors=0.5)))
    monkeypatch.undo()
    assert fit(prepare(make_settings("parts", drop_neighbors=0.5)))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert fit(prepare(make_settings("none")))
    assert metrics(tmp_path / "none") != metrics(tmp_path / "whole")


def test_bf16_and_gradient_checkpointing_stay_near_the_plain_run(prepare, make_settings, tmp_path, fresh_accelerate):
    fit(prepare(make_settings("plain", log_every=1, lr=1e-3)))
    fit(prepare(make_settings("checkpointed", log_every=1, lr=1e-3, gradient_checkpointing=True)))
    assert_close_runs(tmp_path / "plain", tmp_path / "checkpointed")
    fresh_accelerate(reset_partial_state=True)
    run = prepare(make_settings("bf16", log_every=1, lr=1e-3, mixed_precision="bf16"))
    fit(run)
    assert {parameter.dtype for parameter in run.state.model.parameters()} == {torch.float32}
    plain, low = ([m["loss"] for m in metrics(tmp_path / name) if "loss" in m] for name in ("plain", "bf16"))
    assert low == pytest.approx(plain, rel=2e-2) and low != plain


def test_accumulated_micro_batches_weigh_by_their_tokens(prepare, make_settings, tmp_path):
    fit(prepare(make_settings("one", batch_size=4, log_every=1, lr=1e-3)))
    fit(prepare(make_settings("four", batch_size=1, gradient_accumulation_steps=4, log_every=1, lr=1e-3)))
    assert_close_runs(tmp_path / "one", tmp_path / "four")


def assert_close_runs(one: Path, other: Path) -> None:
    for mine, theirs in zip(metrics(one), metrics(other), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5), (mine, theirs)
    mine, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert all(torch.allclose(mine[name], theirs[name], atol=1e-4) for name in mine)


def test_the_model_learns_the_phrases(prepare, make_settings, tmp_path):
    fit(prepare(make_settings(max_steps=60, log_every=5)))
    lines = metrics(tmp_path / "run")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[0] > 3.5 and losses[-1] < 2.0
    assert [line["bits_per_byte_on"] for line in lines if "bits_per_byte_on" in line][-1] < 1.0


# Validation


def test_validation_is_the_sum_of_token_losses_over_the_sum_of_bytes(prepare, make_settings):
    run = prepare(make_settings(eval_windows=None))
    got = validate(run)
    model, valid = run.state.model.eval(), run.valid
    nats, tokens, size = {"on": 0.0, "off": 0.0}, 0, 0.0
    for window in range(len(valid)):
        batch = {name: tensor[None] for name, tensor in valid[window].items()}
        for mode in nats:
            given = {k: v for k, v in batch.items() if k != "labels" and (mode == "on" or "neighbor" not in k)}
            with torch.no_grad():
                log_p = F.log_softmax(model(**given).logits[0, :-1].double(), -1)
            targets = batch["labels"][0, 1:]
            nats[mode] -= sum(log_p[i, t].item() for i, t in enumerate(targets.tolist()) if t != IGNORED)
        documents = batch["document_ids"][0, 1:][targets != IGNORED]
        records = [valid.store.document(int(row)) for row in documents]
        tokens, size = tokens + len(records), size + sum(one.num_bytes / one.num_tokens for one in records)
    assert got["valid_tokens"] == tokens and got["valid_bytes"] == pytest.approx(size)
    for mode, value in nats.items():
        assert got[f"bits_per_token_{mode}"] == pytest.approx(value / math.log(2) / tokens, rel=1e-5)
        assert got[f"bits_per_byte_{mode}"] == pytest.approx(value / math.log(2) / size, rel=1e-5)
    assert got["bits_per_byte_on"] != got["bits_per_byte_off"]


def test_validation_is_what_bits_per_byte_says_of_the_same_windows(prepare, make_settings, tmp_path):
    """Held-out documents that fill a window each, by a tokenizer without an end of text, which is not evaluated."""
    tokenizer, embedder, made = make_words_tokenizer(60), HashingEmbedder(), {}
    tokenizer.eos_token = None
    texts = {"train": [words(40, seed=i) for i in range(20)], "held": [words(32, seed=100 + i) for i in range(5)]}
    for name, own in texts.items():
        made[name] = make_store(tmp_path, own, tokenizer, embedder, name=name, chunk_len=8)
    build_neighbors(made["train"], 2, embedder=embedder)
    build_neighbors(made["train"], 2, queries=made["held"], embedder=embedder)
    stores = dict(store=str(made["train"].path), valid_store=str(made["held"].path), eval_windows=None)
    run = prepare(make_settings(**stores))
    got = validate(run)
    retriever = load(run.state.model, made["train"], embedder=embedder).retriever
    documents = [Document(f"d{i}", text) for i, text in enumerate(texts["held"])]
    result = bits_per_byte(run.state.model, documents, retriever, scoring=ScoringSettings(32, 16))
    assert got["valid_tokens"] == result["tokens"] == 5 * 31
    for mode in ("on", "off"):
        bits = result["bpb"][f"retro_{mode}"] * result["bytes"]
        assert got[f"bits_per_token_{mode}"] == pytest.approx(bits / result["tokens"], rel=1e-6)
        assert got[f"bits_per_byte_{mode}"] == pytest.approx(bits / got["valid_bytes"], rel=1e-6)
    assert got["valid_bytes"] == pytest.approx(result["bytes"], rel=0.02), "the first word has no space before it"


def test_at_most_so_many_windows_are_evaluated_spread_over_the_store(prepare, make_settings):
    run = prepare(make_settings(eval_windows=3, batch_size=2))
    assert [part.tolist() for part in validation._own_validation(run)] == [
        [0, (len(run.valid) - 1) // 2],
        [len(run.valid) - 1],
    ]


def test_a_plain_language_model_has_no_retrieval(prepare, make_settings, tmp_path):
    run = prepare(make_settings(retrieval=False))
    assert not any("encoder" in name or "cross" in name for name, _ in run.state.model.named_parameters())
    assert set(run.loader.step(run.loader.position)[0]) == {"input_ids", "labels", "document_ids"}
    fit(run)
    last = metrics(tmp_path / "run")[-1]
    assert "bits_per_byte_off" in last and "bits_per_byte_on" not in last


def test_random_neighbors_replace_the_true_ones_everywhere(prepare, make_settings):
    true, control = prepare(make_settings()), prepare(make_settings("control", random_neighbors=True))
    for name in ("loader", "valid"):
        pair = [getattr(run, name) for run in (true, control)]
        windows = [one.windows if name == "loader" else one for one in pair]
        one, other = (w.batch(np.arange(len(w))) for w in windows)
        assert torch.equal(one["input_ids"], other["input_ids"])
        same = (one["neighbor_ids"] == other["neighbor_ids"]).all(-1) & one["neighbor_mask"].any(-1)
        assert same.float().mean() < 0.2


# What a run leaves behind


def test_the_trained_folder_is_a_model_that_knows_its_store(make_settings, prepare, stores, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = prepare(make_settings(max_steps=2))
    fit(run)
    folder = tmp_path / "run"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    batch = run.valid.batch(np.arange(2))
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, run.state.model.eval()(**batch).logits)
    assert AutoTokenizer.from_pretrained(folder)("w1 w2").input_ids == run.store.tokenizer("w1 w2").input_ids
    record = json.loads((folder / "retro.json").read_text())
    assert record["index"] == "exact"
    assert record["store_fingerprint"] == run.store.fingerprint
    assert record["embedder"]["name"] == "hashing" and record["library_version"] == retro.__version__
    for path in (folder, last_checkpoint(folder)):
        check_store(path, Store.open(stores["train"]))
        check_store(path, Store.open(stores["valid"]))
        with pytest.raises(ValueError) as error:
            check_store(path, Store.open(stores["other"]))
        other = Store.open(stores["other"])
        for part in (
            str(path),
            str(other.path),
            run.store.tokenizer_fingerprint[:12],
            other.tokenizer_fingerprint[:12],
        ):
            assert part in str(error.value)


def test_a_folder_that_does_not_say_where_it_comes_from_passes_with_a_warning(stores, tmp_path, caplog):
    check_store(tmp_path, Store.open(stores["train"]))
    assert "no retro.json" in caplog.text


@pytest.mark.parametrize("text", ["{", "[]", '{"tokenizer": "t"}'])
def test_a_damaged_record_is_refused_in_one_sentence(stores, tmp_path, text):
    (tmp_path / "retro.json").write_text(text)
    with pytest.raises(ValueError, match="retro.json .*; restore it from a copy") as error:
        check_store(tmp_path, Store.open(stores["train"]))
    assert "\n" not in str(error.value)


def test_nothing_is_pickled(make_settings, prepare, tmp_path):
    fit(prepare(make_settings(max_steps=2)))
    kinds = {path.suffix for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert kinds <= {".json", ".jsonl", ".yaml", ".safetensors", ".jinja"}


def test_models_of_presets_take_vocabulary_and_chunks_from_the_store(make_settings, stores):
    store = Store.open(stores["train"])
    config = pretrain.model_config(
        make_settings(model={"preset": "172m", "hidden_size": 64, "cca_layers": None}), store
    )
    assert (config.vocab_size, config.chunk_len, config.hidden_size, config.position) == (63, 8, 64, "relative")
    assert (config.pad_token_id, config.eos_token_id, config.max_position_embeddings) == (0, 1, 32)


# Processes


def start(settings, tmp_path, rank: int = 0, world_size: int = 1, port: int = 0, code: str = "") -> subprocess.Popen:
    """One process of a run, started as a launcher starts it, or with `code` before it."""
    file = tmp_path / f"{Path(settings.output).name}.yaml"
    save_settings(settings, file)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    if world_size > 1:
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code += "\nimport runpy, sys\nsys.argv.pop(0)\nrunpy.run_path(sys.argv[0], run_name='__main__')" if code else ""
    command = [sys.executable, *(["-c", code] if code else []), str(PRETRAIN), str(file)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


WAITS = """
import time
from retro.training import loop
train_step, request = loop.train_step, loop.StopRequest()

def waiting(run, *arguments):
    while run.state.step == 10 and not request.is_requested:
        time.sleep(0.01)
    return train_step(run, *arguments)

loop.train_step, loop.StopRequest = waiting, lambda: request
"""


def test_sigterm_saves_and_exits_0_and_the_run_goes_on_exactly(make_settings, prepare, tmp_path):
    changes = dict(max_steps=20, log_every=1, save_every=1000, eval_every=1000, valid_store=None)
    process = start(make_settings("parts", **changes), tmp_path, code=WAITS)
    lines = tmp_path / "parts" / "metrics.jsonl"
    wait_until(lambda: process.poll() is not None or lines.is_file() and lines.read_text().count("\n") >= 3)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=FOREVER)
    assert process.returncode == 0, errors
    step = int(last_checkpoint(tmp_path / "parts").name.removeprefix("step-"))
    assert 3 <= step <= 11 and metrics(tmp_path / "parts")[-1]["step"] == step
    assert fit(prepare(make_settings("parts", **changes)))
    assert fit(prepare(make_settings("whole", **changes)))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def run_pair(settings, tmp_path, code: str = "") -> None:
    """A run of two processes, to its end."""
    with socket.socket() as bound:  # so that nobody else is given the port; rank 0 may listen there
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", 0))
        processes = [start(settings, tmp_path, rank, 2, bound.getsockname()[1], code) for rank in range(2)]
        errors = [process.communicate(timeout=FOREVER)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors


TRACED = "from retro.training import compiling\ncompiling.BACKEND = 'eager'"  # without waiting for a compiler


def test_two_compiled_processes_give_the_loss_curve_of_one_with_twice_the_batch(make_settings, prepare, tmp_path):
    changes = dict(max_steps=8, gradient_accumulation_steps=2, log_every=1, lr=1e-3, eval_windows=5)
    run_pair(make_settings("two", batch_size=2, compile=True, **changes), tmp_path, TRACED)
    fit(prepare(make_settings("one", batch_size=4, **changes)))
    assert_close_runs(tmp_path / "one", tmp_path / "two")
    assert {"rng-0.json", "rng-1.json"} <= {path.name for path in last_checkpoint(tmp_path / "two").iterdir()}


def test_a_sharded_run_is_the_run_of_one_process_and_goes_on_whole_or_sharded(make_settings, prepare, tmp_path):
    changes = dict(max_steps=6, save_every=3, log_every=1, lr=1e-3, eval_windows=5, gradient_checkpointing=True)
    run_pair(make_settings("sharded", fsdp=True, **changes), tmp_path)
    fit(prepare(make_settings("one", batch_size=4, **changes)))
    assert_close_runs(tmp_path / "one", tmp_path / "sharded")
    assert load_file(tmp_path / "one" / "model.safetensors").keys() == saved_names(tmp_path / "sharded")
    for name in ("again", "whole"):
        shutil.copytree(tmp_path / "sharded", tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / "step-00000006")
    run_pair(make_settings("again", fsdp=True, **changes), tmp_path)
    fit(prepare(make_settings("whole", batch_size=4, **changes)))
    for name in ("again", "whole"):
        assert_close_runs(tmp_path / "sharded", tmp_path / name)


def saved_names(folder: Path) -> set[str]:
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["RetroForCausalLM"]
    return load_file(folder / "model.safetensors").keys()


def test_sharding_needs_somebody_to_share_with(make_settings, prepare):
    with pytest.raises(ValueError, match="fsdp is true with a single process; launch several"):
        prepare(make_settings(fsdp=True))


def test_the_script_says_a_mistake_in_one_line(make_settings, tmp_path, monkeypatch, capsys):
    save_settings(make_settings(window_len=30), tmp_path / "a.yaml")
    for arguments, said in ((["batch_sise=3"], "batch_sise: unknown"), ([], "window_len: 30 is not a multiple")):
        monkeypatch.setattr(sys, "argv", ["pretrain.py", str(tmp_path / "a.yaml"), *arguments])
        assert script.run_script(pretrain.main) == 2
        assert capsys.readouterr().err.startswith(f"error: {said}")
