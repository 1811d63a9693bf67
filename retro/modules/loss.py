"""Cross-entropy straight from hidden states, without the logits of all positions at once."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from retro.modules.kernels import reads_values

SLICE_TOKENS = 512
GPU_SLICE_LOGITS = 1 << 26  # of a slice, if that is more: fewer and larger kernels, 256 MB in float32


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made slice by slice in the forward pass, while its logits are there: nothing is computed twice."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, slice_tokens: int):
        count = (labels >= 0).sum().clamp(min=1)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], slice_tokens):
            part = slice(start, start + slice_tokens)
            h, target = hidden[part], labels[part]
            kept = (target >= 0)[:, None]
            logits = (h @ weight.T).float()
            highest = logits.amax(-1, keepdim=True)
            index = target.clamp(min=0)[:, None]
            of_target = logits.gather(1, index) - highest
            powers = logits.sub_(highest).exp_()
            sums = powers.sum(-1, keepdim=True)
            total += ((sums.log() - of_target) * kept).sum()
            if not (need_hidden or need_weight):
                continue
            powers.scatter_add_(1, index, -sums)  # the gradient of a row's logits, but for its scale
            if weight.dtype == torch.float32:
                scale = kept / (count * sums)  # applied where rows are short
            else:  # sums may be beyond the largest number
                powers, scale = powers.div_(sums), kept / count
            grad = powers.to(weight.dtype)
            if need_hidden:
                grad_hidden[part] = (grad @ weight) * scale
            if need_weight:
                scaled = (h * scale).to(h.dtype)
                if h.dtype == torch.float32:
                    torch.addmm(grad_weight, grad.T, scaled, out=grad_weight)
                else:
                    grad_weight += grad.T @ scaled
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total / count

    @staticmethod
    def backward(ctx, grad_output):
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_hidden = None if grad_hidden is None else grad_hidden * grad_output.to(grad_hidden.dtype)
        grad_weight = None if grad_weight is None else (grad_weight * grad_output).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None


def linear_cross_entropy(
    hidden: Float[Tensor, "t d"],
    weight: Float[Tensor, "v d"],
    labels: Int[Tensor, " t"],
    slice_tokens: int | None = None,
) -> Float[Tensor, ""]:
    """Mean of -log softmax(hidden W^T)[label] over the labels >= 0, in nats; 0 where there is none.

    At most `slice_tokens` rows of logits live at a time; default: 512, on a GPU those of 2^26 logits if more. Under
    autocast the product runs in the autocast type.
    """
    device_type = hidden.device.type
    if slice_tokens is None:
        slice_tokens = SLICE_TOKENS if device_type == "cpu" else max(SLICE_TOKENS, GPU_SLICE_LOGITS // weight.shape[0])
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(device_type, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, labels, slice_tokens)


def check_text(input_ids: Tensor | None, inputs_embeds: Tensor | None, **labels: Tensor | None) -> None:
    """Raise ValueError unless the text is given in one way, and with a label for each token if with any."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds.")
    shape = list(inputs_embeds.shape[:2] if input_ids is None else input_ids.shape)
    for name, x in labels.items():
        if x is not None and list(x.shape) != shape:
            raise ValueError(f"{name} has shape {list(x.shape)}, and there are {shape} tokens; give one for each.")


def check_tokens(vocab_size: int, mask: Tensor | None, input_ids: Tensor | None, **named: Tensor | None) -> None:
    """On CPUs, raise ValueError for a token that the model has not; elsewhere a kernel stops at it.

    Steps of one token, as generate() takes them, are not looked at. mask: of neighbor_ids. Labels below 0 are none.
    """
    if input_ids is not None and input_ids.shape[-1] == 1:
        return
    for name, ids in {"input_ids": input_ids, **named}.items():
        if ids is None or ids.numel() == 0 or ids.device.type != "cpu" or not reads_values(ids):
            continue
        if name == "neighbor_ids" and mask is not None and mask.shape == ids.shape:
            ids = ids.masked_fill(~mask.bool(), 0)
        low, high = (int(x) for x in ids.aminmax())
        if high >= vocab_size or (low < 0 and "labels" not in name):
            wrong = high if high >= vocab_size else low
            said = (
                f"{name} holds {wrong}, and the model has {vocab_size} tokens, from 0 on; is it of another tokenizer?"
            )
            raise ValueError(said)


def targets_of(
    labels: Int[Tensor, "b n"] | None, shift_labels: Int[Tensor, "b n"] | None = None
) -> Int[Tensor, "b n"] | None:
    """What each position is to predict, below 0 for nothing: labels shifted, or those that are shifted already."""
    if shift_labels is not None or labels is None:
        return shift_labels
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def of_items(
    mean: Float[Tensor, ""], targets: Int[Tensor, "b n"], num_items_in_batch: Tensor | int | None
) -> Float[Tensor, ""]:
    """A mean over the targets as its share of the mean over `num_items_in_batch` of them, None for the mean itself.

    So micro-batches and processes that share an update add up to the mean over all its targets, as Hugging Face's do.
    """
    if num_items_in_batch is None:
        return mean
    items = torch.as_tensor(num_items_in_batch, device=mean.device).max()  # DataParallel hands it out as a vector
    return mean * (targets >= 0).sum().to(mean.device) / items.clamp(min=1)
