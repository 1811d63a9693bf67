"""Faster float32 products are float32 products, and the switch is put back."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from retro.common import products
from retro.common.products import fast_products

PRECISION = torch.get_float32_matmul_precision


def test_forward_and_backward_are_those_of_float64():
    x, weight = torch.randn(300, 64, requires_grad=True), torch.randn(200, 64, requires_grad=True)
    with fast_products():
        torch.nn.functional.linear(x, weight).square().sum().backward()
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    torch.nn.functional.linear(*wide).square().sum().backward()
    for tensor, exact in zip((x, weight), wide, strict=True):
        assert (tensor.grad - exact.grad).abs().max() <= 1e-5 * exact.grad.abs().max()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="nothing changes where a GPU is at hand")
def test_the_switch_is_put_back_after_errors_nesting_and_threads(monkeypatch):
    monkeypatch.setattr(products, "_is_exact", lambda: True)

    @fast_products()
    def fails(number):
        with fast_products():
            assert PRECISION() == "medium"
        assert PRECISION() == "medium"
        raise KeyError(number)

    with ThreadPoolExecutor(4) as pool:
        errors = [future.exception() for future in [pool.submit(fails, number) for number in range(40)]]
    assert all(isinstance(error, KeyError) for error in errors) and PRECISION() == "highest"


def test_a_users_choice_and_rounding_processors_are_left_alone(monkeypatch):
    torch.set_float32_matmul_precision("high")
    try:
        with fast_products():
            assert PRECISION() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(products, "_is_exact", lambda: False)
    with fast_products():
        assert PRECISION() == "highest"
