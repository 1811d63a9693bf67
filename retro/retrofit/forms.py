"""What a RETRO-fit adds to a base, one class for each form.

A form is a module that holds every new weight. It names the points of the residual stream that it wants to see, and
writes in one of two ways: at each point it gives what to add to the stream, or, when the run is over, what to mix with
the logits. Hooks, the base and its dtype are not its business.

    "pointer"   copies from the neighbors by the base's own features: see retro.retrofit.pointer
    "paper"     the paper's encoder and chunked cross-attention: see retro.retrofit.paper
    "joint"     both, over the same features of the neighbors
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

from retro.retrofit.anatomy import Anatomy
from retro.retrofit.config import RetrofitConfig
from retro.retrofit.hooks import HookPoint, RetrofitContext
from retro.retrofit.paper import PaperForm
from retro.retrofit.pointer import PointerForm
from retro.retrofit.starts import Observed


class Form(Protocol):
    """A form: an nn.Module made as Form(config, base, anatomy), on any device; `start` gives its weights their start.

    hook_points: in the order in which the base reaches them. start_points: where `start` wants to see the stream of a
    text. mixes_logits: whether there may be a `mixture`. lr_ratios: multiples of the learning rate, as in
    `OptimizerSettings`.
    """

    hook_points: list[HookPoint]
    start_points: Sequence[HookPoint]
    mixes_logits: bool
    lr_ratios: dict[str, float]

    def start(self, observed: Observed) -> None:
        """Give every weight its start, such that every update is exactly 0. Not called when weights are loaded."""

    def update(
        self, point: HookPoint, h: Float[Tensor, "b n d"], context: RetrofitContext
    ) -> Float[Tensor, "b n d"] | None:
        """What to add to the residual stream h at a hook point, in any type; None to only look.

        With `context.cache` h is that of new tokens, and what later ones need is kept there.

        The gradient of the whole must flow through what is returned and `context.state` only. With gradient
        checkpointing a point is computed again, in the backward pass: the same point must do the same work again.
        """

    def mixture(self, context: RetrofitContext) -> Mixture | None:
        """What to mix with the base's logits, once it has run over the text; None for a form that wrote before."""


@runtime_checkable
class Mixture(Protocol):
    """A distribution of a form's own, mixed with the base's."""

    def edit(self, logits: Float[Tensor, "b s v"]) -> Float[Tensor, "b s v"]:
        """The mixture's logits at the last s positions of the run, from the base's and in their type."""

    def log_likelihood(
        self, logits: Float[Tensor, "b s v"], targets: Int[Tensor, "b s"], start: int
    ) -> Float[Tensor, "b s"]:
        """The mixture's log-probability of a token each at positions start, start + 1, ..., from the base's logits."""


class JointForm(nn.Module):
    """CCA writes into the stream what it reads, and the pointer copies from the same neighbors into the logits."""

    mixes_logits = True

    def __init__(self, config: RetrofitConfig, base: nn.Module, anatomy: Anatomy):
        super().__init__()
        self.paper, self.pointer = PaperForm(config, base, anatomy), PointerForm(config, base, anatomy)
        self.hook_points = sorted(self.paper.hook_points + self.pointer.hook_points)
        self.start_points = self.paper.start_points
        self.lr_ratios = {**self.pointer.lr_ratios, **self.paper.lr_ratios}

    def start(self, observed: Observed) -> None:
        self.paper.start(observed)
        self.pointer.start(observed)

    def update(
        self, point: HookPoint, h: Float[Tensor, "b n d"], context: RetrofitContext
    ) -> Float[Tensor, "b n d"] | None:
        return (self.paper if point in self.paper.hook_points else self.pointer).update(point, h, context)

    def mixture(self, context: RetrofitContext) -> Mixture | None:
        return self.pointer.mixture(context)


FORMS: dict[str, type] = {"pointer": PointerForm, "paper": PaperForm, "joint": JointForm}


def form_class(name: str) -> type:
    """The class of a form; ValueError, with the known names, for another."""
    if name not in FORMS:
        raise ValueError(f"form is {name!r}; choose one of {', '.join(FORMS)}.")
    return FORMS[name]
