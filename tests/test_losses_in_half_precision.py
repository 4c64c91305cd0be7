"""Every public loss in bf16 and fp16: calculated in fp32, under autocast and of rounded inputs alike, and finite."""

import pytest
import torch
import torch.nn.functional as F

from sslctl import losses

B, D, K, V = 64, 32, 50, 3


def rows(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def probabilities(seed, *shape):
    return (rows(seed, *shape) / 0.1).softmax(-1)


Z1, Z2, QUEUE = rows(0, B, D), rows(1, B, D), rows(2, K, D)
COSINES = F.normalize(rows(3, V, B, K), dim=-1)
LABEL, PARTS = torch.arange(B) % 10, torch.randperm(B, generator=torch.Generator().manual_seed(0)).view(1, 1, B)
MASK = torch.arange(B * 4).view(B, 4) % 3 == 0
HIDDEN = rows(17, int(MASK.sum()), K)
CALLS = {  # name -> (its floating tensors, the rest)
    "nt_xent": ((Z1, Z2), lambda f, *z: f(*z, 0.05)),
    "info_nce": ((Z1, Z2, QUEUE), lambda f, *z: f(*z, 0.05)),
    "dcl": ((Z1, Z2), lambda f, *z: f(*z, 0.1, sigma=0.5)),
    "supcon": ((Z1,), lambda f, z: f(z, LABEL, 0.07)),
    "nnclr": ((Z1, Z2), lambda f, *z: f(*z, 0.1)),
    "cpc": ((Z1, QUEUE), lambda f, *z: f(*z, torch.arange(B) % K)),
    "negative_cosine": ((Z1, Z2), lambda f, *z: f(*z)),
    "barlow_twins": ((Z1, Z2), lambda f, *z: f(*z, 0.0051)),
    "vicreg": ((Z1, Z2), lambda f, *z: f(*z, 25.0, 25.0, 1.0)),
    "whitening_mse": ((rows(4, 2, B, 8),), lambda f, z: f(z, PARTS)),
    "sigreg": ((Z1, rows(5, D, 16)), lambda f, *z: f(*z)),
    "sinkhorn": ((COSINES[0],), lambda f, scores: f(scores, 0.05, 3)),
    "swav": ((COSINES, probabilities(6, 2, B, K)), lambda f, *z: f(*z, 0.1)),
    "msn": ((COSINES, probabilities(6, B, K)), lambda f, *z: f(*z, 0.1, 1.0)),
    "dino": ((COSINES, COSINES[:2], rows(7, 1, K) / 100), lambda f, *z: f(*z, 0.1, 0.04)),
    "ibot": ((rows(8, B, 4, K), rows(9, B, 4, K), rows(7, K) / 100), lambda f, s, t, c: f(s, t, c, MASK, 0.1, 0.04)),
    "koleo": ((Z1,), lambda f, z: f(z)),
    "hidden_patches": ((HIDDEN, HIDDEN.softmax(-1)), lambda f, *z: f(*z, MASK, 0.1)),
    "gram": ((rows(8, B, 4, D), rows(9, B, 4, D)), lambda f, *z: f(*z)),
    "similarity_distillation": ((Z1, Z2, QUEUE), lambda f, *z: f(*z, 0.2, 0.01)),
    "memory_distillation": ((Z1, Z2, QUEUE, rows(10, K, D)), lambda f, *z: f(*z, 0.04)),
    "squared_error": ((Z1, Z2), lambda f, *z: f(*z)),
    "gaussian_kl": ((Z1, Z2), lambda f, *z: f(*z)),
    "soft_cross_entropy": ((rows(11, B, K), probabilities(12, B, K), rows(13, B).exp()), lambda f, *z: f(*z)),
    "masked_mse": ((rows(14, B, 4, 12), rows(15, B, 4, 12)), lambda f, *z: f(*z, MASK, True)),
    "normalized_patches": ((rows(16, B, 4, 12),), lambda f, z: f(z)),
}
TYPES = [torch.bfloat16, torch.float16]


def test_none_is_left_out():
    assert CALLS.keys() == set(losses.__all__)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", CALLS)
def test_under_autocast_it_is_that_of_fp32(name, dtype):
    tensors, call = CALLS[name]
    expected = call(getattr(losses, name), *tensors)
    with torch.autocast("cpu", dtype):
        actual = call(getattr(losses, name), *tensors)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)
    assert torch.isfinite(actual).all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", CALLS)
def test_of_rounded_inputs_it_is_calculated_in_fp32(name, dtype):
    tensors, call = CALLS[name]
    low = [tensor.to(dtype) for tensor in tensors]
    expected = call(getattr(losses, name), *(tensor.float() for tensor in low))
    with torch.autocast("cpu", dtype):
        actual = call(getattr(losses, name), *low)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)
    exact = call(getattr(losses, name), *(tensor.double() for tensor in low))
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "dcl", "nnclr", "barlow_twins", "vicreg", "sigreg", "cpc"])
def test_without_its_guard_it_is_not(name, dtype):
    """What products in the lower precision would give."""
    tensors, call = CALLS[name]
    loss = getattr(losses, name)
    expected = call(loss, *tensors)
    with torch.autocast("cpu", dtype):
        actual = call(loss.__wrapped__, *tensors)
    assert abs(actual.float() - expected) > 1e-6


@pytest.mark.parametrize("dtype", TYPES)
def test_arguments_given_by_name_are_those_of_fp32_too(dtype):
    z1, z2 = Z1.to(dtype), Z2.to(dtype)
    assert torch.equal(losses.nt_xent(z1=z1, z2=z2, temperature=0.1), losses.nt_xent(z1, z2, 0.1))


@pytest.mark.parametrize("name", CALLS)
def test_doubles_stay_double(name):
    tensors, call = CALLS[name]
    assert call(getattr(losses, name), *(tensor.double() for tensor in tensors)).dtype == torch.float64
