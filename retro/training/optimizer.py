"""What moves the weights: AdamW or Muon beside it, at learning rates that carry over from width to width."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from retro.training.settings import TrainSettings


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer | MuonAndAdamW:
    """The optimizer over the weights that are trained, grouped by weight decay and by learning rate.

    Raises ValueError for "muon" where this torch has none, and over weights that are spread over processes.
    """
    muon = settings.optimizer == "muon"
    if muon and not hasattr(torch.optim, "Muon"):
        raise ValueError(f"optimizer: muon needs torch 2.9 or newer, and this is {torch.__version__}; take adamw")
    if muon and settings.fsdp:
        raise ValueError("optimizer: muon takes whole matrices, which fsdp spreads over processes; take adamw")
    ratio = 1.0 if settings.lr_width is None else settings.lr_width / model.config.get_text_config().hidden_size
    ratios = settings.lr_ratios
    if ratios is None:
        ratios = model.form.lr_ratios if hasattr(model, "form") else {}
    groups = parameter_groups(model, settings.weight_decay, ratios, settings.retrieval, ratio, muon)
    if muon:
        if not any(group["is_muons"] for group in groups):
            raise ValueError("optimizer: muon finds no matrix that lr_ratios does not name; take adamw")
        return MuonAndAdamW(groups, settings)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    lr_ratios: dict[str, float],
    all_fit: bool = True,
    width_ratio: float = 1.0,
    muon: bool = False,
) -> list[dict[str, Any]]:
    """Trained parameters by what moves them and by ratio to the learning rate (`lr_ratio`, which `train_step` reads).

    Only matrices decay: not biases, what has one axis, nor embeddings, whose rows get a gradient only when their token
    occurs, but would shrink at every step. With `muon` the matrices that `lr_ratios` does not name are Muon's
    (`is_muons`), but for output embeddings.

    width_ratio: the width at which the learning rate was found, over that of the decoder. A step of Adam moves every
        weight by about the learning rate, and so what a matrix gives by d times as much, since d products add up: the
        rate of matrices takes this ratio, and their weight decay its inverse, so that as much decays in a step. An
        update of Muon is orthogonal; at the same size it changes what a matrix gives sqrt(d) times as much, so its rate
        takes the root. Embeddings and norms keep the rate; the final norm of the induction start falls as 1 / d, and
        stands for muP's output multiplier. Source: Yang et al. 2022 (muP), table 8.

    Raises ValueError for a ratio that names no parameter if `all_fit`.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    output = getattr(model.get_output_embeddings(), "weight", None)
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    unused = set(lr_ratios)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        pattern = next((pattern for pattern in lr_ratios if pattern in name), None)
        unused.discard(pattern)
        is_matrix = parameter.ndim >= 2 and not name.endswith("bias") and id(parameter) not in embeddings
        is_muons = muon and is_matrix and parameter.ndim == 2 and pattern is None and parameter is not output
        groups.setdefault((is_muons, is_matrix, lr_ratios.get(pattern, 1.0)), []).append(parameter)
    if unused and all_fit:
        raise ValueError(
            f"lr_ratios: {sorted(unused)[0]!r} is in no trained parameter's name; see model.named_parameters()"
        )
    of_width = lambda is_muons, is_matrix: (width_ratio**0.5 if is_muons else width_ratio) if is_matrix else 1.0  # noqa: E731
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay / of_width(*kind) if kind[1] else 0.0,
            "lr_ratio": ratio * of_width(*kind),
            "is_muons": kind[0],
        }
        for (*kind, ratio), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def step_if_finite(optimizer: torch.optim.Optimizer | MuonAndAdamW, grad_norm: torch.Tensor) -> None:
    """A step, but none if the norm of its gradient is not finite: weights and moments then stay as they are.

    The fused AdamW is told so on the device, as GradScaler tells it; Muon knows no such thing, so that the host looks.
    """
    skips = (~grad_norm.isfinite()).float()
    if isinstance(optimizer, MuonAndAdamW):
        if not skips.item():
            optimizer.step()
        return
    optimizer.found_inf = skips
    optimizer.step()


class MuonAndAdamW:
    """torch's Muon for the groups that are its own and AdamW for the rest, used, saved and loaded as one optimizer.

    An update of Muon is as large as AdamW's at the same learning rate ("match_rms_adamw"). Source: Jordan et al. 2024.
    """

    def __init__(self, groups: list[dict[str, Any]], settings: TrainSettings):
        assert any(group["is_muons"] for group in groups) and not all(group["is_muons"] for group in groups)
        own, rest = ([group for group in groups if group["is_muons"] == wanted] for wanted in (True, False))
        adamw = torch.optim.AdamW(rest, lr=settings.lr, betas=settings.betas, fused=True)
        self.parts = (torch.optim.Muon(own, lr=settings.lr, adjust_lr_fn="match_rms_adamw"), adamw)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of both, whose learning rates may be set."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Of both, as one optimizer gives it: parameters are counted through the groups."""
        state, groups, before = {}, [], 0
        for part in self.parts:
            own = part.state_dict()
            state |= {before + index: entry for index, entry in own["state"].items()}
            shifted = [{**group, "params": [before + i for i in group["params"]]} for group in own["param_groups"]]
            groups, before = [*groups, *shifted], before + sum(len(group["params"]) for group in shifted)
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        groups, before = list(state["param_groups"]), 0
        for part in self.parts:
            own, groups = groups[: len(part.param_groups)], groups[len(part.param_groups) :]
            size = sum(len(group["params"]) for group in own)
            entries = {i - before: one for i, one in state["state"].items() if before <= i < before + size}
            shifted = [{**group, "params": [i - before for i in group["params"]]} for group in own]
            part.load_state_dict({"state": entries, "param_groups": shifted})
            before += size
