"""The settings of a training run, and the learning rate as a function of the step."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

WARMUP_START_LR = 1e-7
# What may differ between a checkpoint and the run that goes on from it: where things are, and what is only looked at.
# Stores are told apart by fingerprint, the share of a batch that one process takes by the windows of all in one step.
FREE_FIELDS = (
    "output", "store", "valid_store", "batch_size", "gradient_accumulation_steps", "gradient_checkpointing",
    "fsdp", "eval_every", "eval_windows", "save_every", "keep_checkpoints", "log_every", "tracker",
)  # fmt: skip


@dataclass(kw_only=True)
class TrainSettings:
    """One training run.

    output: folder of the run; a run that finds its own checkpoint there goes on from it.
    store: the datastore to train on, with the neighbors of its chunks.
    valid_store: a store of held-out documents, with neighbors in `store`; evaluated with and without retrieval.
    model: any field of RetroConfig, or `preset` and the fields to change in it. The vocabulary, the special tokens and
        the chunk length come from the store.
    retrieval: false trains the same decoder as a plain language model: no CCA, no encoder, no neighbors.
    random_neighbors: replace each neighbor by a random chunk of another document: a control.
    drop_neighbors: the probability with which a chunk loses all its neighbors, drawn anew whenever it is read; without
        it the decoder leans on them, and RETRO[OFF] ends behind a plain language model. Not in the paper. Of a
        plain model, `retrieval` false, it takes nothing.
    num_neighbors: k in training, at most what the neighbor table holds.
    index: the kind of index whose neighbor table is read ("tfidf" ...); any, the exact one first, if null.
    window_len: n, tokens in a window; a multiple of the store's chunk length m.
    batch_size: windows per process and micro-batch; a step of all processes takes batch_size *
        gradient_accumulation_steps * processes windows.
    max_steps, max_tokens: the length of the run; exactly one of them.
    lr, min_lr_ratio, warmup_steps: see `learning_rate`.
    lr_width: the width d at which `lr` was found. Matrices of a model of another width learn at lr * lr_width / d, so
        that one `lr` serves all widths, the encoder's taking d of the decoder too; embeddings, norms and other vectors
        learn at `lr`, and the share of a weight that decays in a step stays. null: one rate for all.
    optimizer: "adamw", or "muon": torch's Muon for the matrices that `lr_ratios` does not name, AdamW for the rest.
    lr_ratios: parameters whose name contains a key learn at this multiple of `lr`; the first key that fits counts.
        A key that fits none is refused, unless `retrieval` is false: the parts it names may then be left out.
    weight_decay: of matrices; embeddings, norms, biases and other vectors do not decay.
    max_grad_norm: gradients are scaled down to this norm.
    eval_windows: at most so many windows of the validation store, evenly spread; all if null.
    keep_checkpoints: the last N are kept.
    mixed_precision: "bf16" runs the products in bfloat16; weights and optimizer stay in float32.
    gradient_checkpointing: compute activations again in the backward pass rather than keep them.
    fsdp: spread weights, gradients and moments over the processes (FSDP2), for a model too large for each of them; the
        run is the same. For RetroForCausalLM.
    tracker: metrics.jsonl is always written; "tensorboard" and "wandb" (offline with WANDB_MODE=offline) besides.
    """

    output: str
    store: str
    valid_store: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    retrieval: bool = True
    random_neighbors: bool = False
    drop_neighbors: float = 0.0
    num_neighbors: int = 2
    index: str | None = None
    window_len: int = 2048
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    max_steps: int | None = None
    max_tokens: int | None = None
    lr: float = 2e-4
    lr_width: int | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"
    min_lr_ratio: float = 0.1
    warmup_steps: int = 750
    lr_ratios: dict[str, float] = field(default_factory=dict)
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    seed: int = 0
    eval_every: int = 500
    eval_windows: int | None = 64
    save_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 10
    mixed_precision: Literal["none", "bf16"] = "none"
    gradient_checkpointing: bool = False
    fsdp: bool = False
    tracker: Literal["none", "tensorboard", "wandb"] = "none"

    def __post_init__(self):
        if (self.max_steps is None) == (self.max_tokens is None):
            raise ValueError(
                f"max_steps is {self.max_steps} and max_tokens {self.max_tokens}; give one, and null for the other"
            )
        if self.random_neighbors and not self.retrieval:
            raise ValueError("random_neighbors is true and retrieval false; a plain model has no neighbors to replace")
        for name in _POSITIVE:
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} is not above 0; give a positive number")
        for name in ("warmup_steps", "weight_decay", "seed", "min_lr_ratio"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} is below 0; give 0 or more")
        if not 0 <= self.drop_neighbors < 1:
            raise ValueError(f"drop_neighbors: {self.drop_neighbors} is no probability below 1; give for example 0.2")
        if self.drop_neighbors and not self.retrieval:
            self.drop_neighbors = 0.0  # a recipe's: a plain model has none to drop
        if self.seed >= 2**32:
            raise ValueError(f"seed: {self.seed} is not below 2^32; give a smaller one")

    def num_steps(self, world_size: int) -> int:
        """Steps of the run: max_steps, or the steps that reach max_tokens."""
        if self.max_steps is not None:
            return self.max_steps
        return math.ceil(self.max_tokens / (self.windows_per_step(world_size) * self.window_len))

    def windows_per_step(self, world_size: int) -> int:
        """Windows that all processes together take in one step."""
        return self.batch_size * self.gradient_accumulation_steps * world_size


_POSITIVE = (
    "num_neighbors", "lr_width", "window_len", "batch_size", "gradient_accumulation_steps", "max_steps", "max_tokens",
    "lr", "max_grad_norm", "eval_every", "eval_windows", "save_every", "keep_checkpoints", "log_every",
)  # fmt: skip


def learning_rate(step: int, num_steps: int, settings: TrainSettings) -> float:
    """The learning rate of a step, 0-based: a pure function, so that resuming needs no scheduler.

    Linear from 1e-7 to `lr` over `warmup_steps`, then a cosine down to `min_lr_ratio * lr` at the end of the run.

    Source: section C.1.
    """
    top, bottom = settings.lr, settings.lr * settings.min_lr_ratio
    if step < settings.warmup_steps:
        return WARMUP_START_LR + (top - WARMUP_START_LR) * step / settings.warmup_steps
    progress = min(1.0, (step - settings.warmup_steps) / max(1, num_steps - settings.warmup_steps))
    return bottom + (top - bottom) * 0.5 * (1.0 + math.cos(math.pi * progress))
