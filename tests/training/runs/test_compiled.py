"""A compiled model is the model. Here, since torch.compile cannot trace the checks of shapes of the other tests."""

import torch

from retro.model import RetroConfig
from retro.evaluation.copying import copying_text
from retro.model import RetroForCausalLM
from retro.common.settings import find_config, read_yaml


@torch.no_grad()
def test_the_recipes_model_compiled():
    torch.manual_seed(0)
    fields = read_yaml(find_config("train_small", "train"))["model"]
    model = RetroForCausalLM(RetroConfig(vocab_size=500, **fields)).eval()
    ids, neighbors, _ = copying_text(model.config)
    compiled = torch.compile(model, backend="aot_eager")
    for given in ((ids, neighbors), (ids,)):
        torch.testing.assert_close(compiled(*given).logits, model(*given).logits, rtol=1e-4, atol=1e-4)
