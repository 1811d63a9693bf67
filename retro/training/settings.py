"""The settings of the three recipes, and the learning rate as a function of the step."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from retro.common.values import (
    Count,
    CountOrZero,
    NotNegative,
    NumNeighbors,
    Positive,
    Probability,
    Range,
    Seed,
    Size,
    check_fields,
)

Beta = Annotated[float, Range(ge=0, lt=1)]
WARMUP_START_LR = 1e-7
# What may differ between a checkpoint and the run that goes on from it: where things are, and what is only looked at.
# Stores are told apart by fingerprint, the share of a batch that one process takes by the windows of all in one step.
FREE_FIELDS = (
    "output", "store", "valid_store", "batch_size", "gradient_accumulation_steps", "gradient_checkpointing",
    "device", "compile", "fsdp", "max_steps", "max_tokens", "eval_every", "eval_windows", "save_every",
    "keep_checkpoints", "log_every", "tracker",
)  # fmt: skip


@dataclass(kw_only=True)
class DataSettings:
    """What is trained on.

    Arguments:
        store: Folder of the datastore to train on, with the neighbors of its chunks (`retro neighbors`).
        valid_store: Folder of a store of held-out documents with neighbors in `store`, measured with and without
            retrieval. Default: nothing is measured.
        window_len: Tokens of a window, n in the paper; a multiple of the store's chunk length m.
        num_neighbors: Neighbors of a chunk, k in the paper; at most what the neighbor table holds.
        index: The kind of index whose neighbor table is read, such as tfidf. Default: any, the exact one first.
        retrieval: Whether to read neighbors; false trains the same decoder as a plain language model, without CCA,
            encoder and neighbors.
        random_neighbors: Whether to replace each neighbor by a random chunk of another document, as a control.
        drop_neighbors: Probability, from 0 to below 1, with which a chunk loses all its neighbors, drawn anew whenever
            it is read; without it the decoder leans on them, and RETRO[OFF] ends behind a plain language model. Not in
            the paper. Without retrieval it takes nothing.
    """

    store: str
    valid_store: str | None = None
    window_len: Size = 2048
    num_neighbors: NumNeighbors = 2
    index: str | None = None
    retrieval: bool = True
    random_neighbors: bool = False
    drop_neighbors: Annotated[float, Range(ge=0, lt=1)] = 0.0


@dataclass(kw_only=True)
class LengthSettings:
    """How much a step takes, and how long the run is.

    Arguments:
        batch_size: Windows of a process and micro-batch; a step of all processes takes batch_size *
            gradient_accumulation_steps * processes windows.
        gradient_accumulation_steps: Micro-batches of a step.
        max_steps: Steps of the run; give this or max_tokens. More of them prolong a run; the learning rate then follows
            the new length.
        max_tokens: Tokens of the run; give this or max_steps.
    """

    batch_size: Size = 8
    gradient_accumulation_steps: Count = 1
    max_steps: Count | None = None
    max_tokens: Count | None = None


@dataclass(kw_only=True)
class OptimizerSettings:
    """How weights are learned.

    Arguments:
        lr: The highest learning rate, which is reached after the warmup.
        lr_width: Width d at which `lr` was found. Matrices of a model of another width learn at lr * lr_width / d, so
            that one `lr` serves all widths, the encoder's taking d of the decoder too; embeddings, norms and other
            vectors learn at `lr`, and the share of a weight that decays in a step stays. Default: one rate for all.
        min_lr_ratio: The learning rate at the end of the run, as a share of `lr`; a cosine leads there.
        warmup_steps: Steps in which the learning rate rises in a line from 1e-7 to `lr`.
        optimizer: "adamw", or "muon": torch's Muon for the matrices that `lr_ratios` does not name, AdamW for the rest.
        lr_ratios: Parameters whose name contains a key learn at this multiple of `lr`; the first key that fits counts.
            A key that fits none is refused, unless `retrieval` is false: the parts it names may then be left out.
            Default: those of the form of a RETRO-fit; without a form, one rate for all.
        weight_decay: Weight decay of matrices; embeddings, norms, biases and other vectors do not decay.
        betas: The two betas of AdamW.
        max_grad_norm: Norm to which gradients are scaled down.
    """

    lr: Positive = 2e-4
    lr_width: Size | None = None
    min_lr_ratio: Probability = 0.1
    warmup_steps: CountOrZero = 750
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr_ratios: dict[str, NotNegative] | None = None
    weight_decay: NotNegative = 0.1
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    max_grad_norm: Positive = 1.0


@dataclass(kw_only=True)
class OutputSettings:
    """What is written, and how often.

    Arguments:
        output: Folder of the run; a run that finds its own checkpoint there goes on from it.
        save_every: Steps between two checkpoints.
        keep_checkpoints: The number of checkpoints kept, the last ones.
        eval_every: Steps between two measurements of `valid_store`; without one nothing is measured.
        eval_windows: Windows of the validation store that are measured, evenly spread; null takes all.
        log_every: Steps between two lines of the log.
        tracker: Where metrics go besides metrics.jsonl, which is always written; wandb stays on this machine with
            WANDB_MODE=offline.
    """

    output: str
    save_every: Count = 500
    keep_checkpoints: Count = 2
    eval_every: Count = 500
    eval_windows: Count | None = 64
    log_every: Count = 10
    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = "none"


@dataclass(kw_only=True)
class HardwareSettings:
    """How the run uses its processors and their memory.

    Arguments:
        device: Where to train, such as cpu or cuda:1, if it is a single process; several take one accelerator each.
            Default: the environment's RETRO_DEVICE, else the accelerator if there is one, else the CPU.
        mixed_precision: "bf16" runs the products in bfloat16; weights and optimizer stay in float32.
        compile: Whether to train through torch.compile: a RETRO as a whole, of a fitted base the layers that nothing is
            added inside of. Default: a RETRO on a GPU.
        gradient_checkpointing: Whether to compute activations again in the backward pass rather than keep them.
        fsdp: Whether to spread weights, gradients and moments over the processes (FSDP2), for a RETRO from scratch that
            is too large for each of them; the run is the same.
    """

    device: str | None = None
    mixed_precision: Literal["none", "bf16"] = "none"
    compile: bool | None = None
    gradient_checkpointing: bool = False
    fsdp: bool = False


@dataclass(kw_only=True)
class TrainSettings(HardwareSettings, OutputSettings, OptimizerSettings, LengthSettings, DataSettings):
    """The run and its model.

    Arguments:
        model: Any field of RetroConfig, as in model.hidden_size=256, or `preset` and the fields to change in it. The
            vocabulary, the special tokens and the chunk length come from the store.
        start: Folder of a trained model of the same configuration, whose weights the run begins with. Default: weights
            are drawn.
        seed: Seed of everything that is drawn, from 0 to below 2^32.
    """

    model: dict[str, Any] = field(default_factory=dict)
    start: str | None = None
    seed: Seed = 0

    def __post_init__(self):
        check_fields(self)
        if (self.max_steps is None) == (self.max_tokens is None):
            raise ValueError(
                f"max_steps is {self.max_steps} and max_tokens {self.max_tokens}; give one, and null for the other"
            )
        if self.random_neighbors and not self.retrieval:
            raise ValueError("random_neighbors is true and retrieval false; a plain model has no neighbors to replace")
        if self.drop_neighbors and not self.retrieval:
            self.drop_neighbors = 0.0  # a recipe's: a plain model has none to drop

    def num_steps(self, world_size: int) -> int:
        """Steps of the run: max_steps, or the steps that reach max_tokens."""
        if self.max_steps is not None:
            return self.max_steps
        return math.ceil(self.max_tokens / (self.windows_per_step(world_size) * self.window_len))

    def windows_per_step(self, world_size: int) -> int:
        """Windows that all processes together take in one step."""
        return self.batch_size * self.gradient_accumulation_steps * world_size


@dataclass(kw_only=True)
class RetrofitSettings(TrainSettings):
    """The base that learns to read neighbors, and what is added to it.

    Arguments:
        base: A Hugging Face name, a folder, a GGUF file or package:NAME; its tokenizer is the store's.
        base_dtype: The type in which the base is held; what is trained is float32.
        revision: Revision of a base on the hub. Default: the newest.
        model: Any field of RetrofitConfig, as in model.form=pointer. The chunk length comes from the store.
    """

    base: str
    base_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    revision: str | None = None
    model: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        if not self.retrieval:
            raise ValueError("retrieval is false, so that nothing would be trained; leave it out")


@dataclass(kw_only=True)
class FinetuneSettings(TrainSettings):
    """The model to start at, and the questions that it learns to answer.

    Arguments:
        start: Folder of a trained RETRO, all of whose weights are trained, or of a RETRO-fitted model, whose base
            stays as it is; or a base, by name, folder, GGUF file or package:NAME, which is fitted first.
        base_dtype: Type of a frozen base: "float32", "bfloat16" or "float16"; what is trained is float32. Default: that
            of its folder.
        questions: File of questions and answers, as for `retro task qa`.
        store: Folder of a datastore of the model's tokenizer, where passages are searched if the file has none.
        index: The index that finds passages, if the file has none. Default: the one of the model's training.
        num_neighbors: Passages of a question.
        retrieval: Whether to read passages; false trains without them.
        valid_store: Not for fine-tuning; leave it out.
        random_neighbors: Not for fine-tuning; leave it out.
        model: Not for fine-tuning; leave it out.
        compile: Not for fine-tuning, whose windows are of many lengths; leave it out.
    """

    start: str = field()
    questions: str
    base_dtype: Literal["float32", "bfloat16", "float16"] | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("valid_store", "model", "random_neighbors", "compile"):
            if getattr(self, name):
                raise ValueError(f"{name}: {getattr(self, name)} means nothing in fine-tuning; leave it out")
        self.compile = False


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
