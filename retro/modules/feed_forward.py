"""The position-wise feed-forward network, ungated (the paper's) or gated."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


class ResidualLinear(nn.Linear):
    """The linear map without bias that ends a sublayer and writes into the residual stream: W_o, W_down.

    A class of its own, so that it can be given a start of its own (see RetroPreTrainedModel).
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)


class FeedForward(nn.Module):
    """FFW(x) = W_down act(W_up x); gated: W_down (act(W_gate x) * W_up x) (Shazeer 2020). No biases.

    Raises ValueError for an unknown activation.
    """

    def __init__(self, dim: int, inner_dim: int, activation: str = "gelu", gated: bool = False):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {activation!r}; choose one of {', '.join(ACTIVATIONS)}.")
        self.activation = ACTIVATIONS[activation]
        self.gate_proj = nn.Linear(dim, inner_dim, bias=False) if gated else None
        self.up_proj = nn.Linear(dim, inner_dim, bias=False)
        self.down_proj = ResidualLinear(inner_dim, dim)

    def forward(self, x: Float[Tensor, "*s d"]) -> Float[Tensor, "*s d"]:
        up = self.up_proj(x)
        inner = self.activation(up) if self.gate_proj is None else self.activation(self.gate_proj(x)) * up
        return self.down_proj(inner)
