import math

import pytest
import torch

from sslctl.losses import info_nce, nt_xent

TEMPERATURES = [0.07, 0.2, 1.0]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def reference_nt_xent(z1, z2, temperature):
    z, batch = z1.tolist() + z2.tolist(), len(z1)
    total = 0.0
    for i in range(2 * batch):
        partner = (i + batch) % (2 * batch)
        terms = [math.exp(cosine(z[i], z[j]) / temperature) for j in range(2 * batch) if j != i]
        total += math.log(sum(terms)) - cosine(z[i], z[partner]) / temperature
    return total / (2 * batch)


def reference_info_nce(query, positive, negatives, temperature, excluded=None):
    query, positive, negatives = query.tolist(), positive.tolist(), negatives.tolist()
    total = 0.0
    for i, anchor in enumerate(query):
        own = cosine(anchor, positive[i]) / temperature
        terms = [math.exp(own)]
        for j, other in enumerate(negatives):
            if excluded is None or not excluded[i, j]:
                terms.append(math.exp(cosine(anchor, other) / temperature))
        total += math.log(sum(terms)) - own
    return total / len(query)


# --- NT-Xent ---


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("batch", "dim"), [(1, 3), (2, 4), (7, 5)])
def test_nt_xent_equals_plain_python(temperature, batch, dim):
    z1, z2 = normal(batch, dim), 3 * normal(batch, dim, seed=1)
    expected = reference_nt_xent(z1, z2, temperature)
    assert nt_xent(z1, z2, temperature).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("batch", [2, 8, 256])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_of_orthogonal_views_is_the_log_of_all_others(batch, temperature):
    z = torch.eye(2 * batch, dtype=torch.float64)
    assert nt_xent(*z.chunk(2), temperature).item() == pytest.approx(math.log(2 * batch - 1), abs=1e-9)


@pytest.mark.parametrize("batch", [2, 8])
def test_nt_xent_of_collapsed_views_is_the_log_of_all_others(batch):
    z = torch.ones(batch, 4, dtype=torch.float64)
    assert nt_xent(z, 2 * z, 0.1).item() == pytest.approx(math.log(2 * batch - 1), abs=1e-9)


def test_nt_xent_of_equal_positives_and_orthogonal_rest_is_the_golden_value():
    z = torch.eye(8)
    assert nt_xent(z, z, 0.5).item() == pytest.approx(1.06288, abs=1e-5)


def test_nt_xent_is_invariant_to_scale():
    z1, z2 = normal(6, 4), normal(6, 4, seed=1)
    scales = torch.linspace(0.01, 100, 6, dtype=torch.float64)[:, None]
    expected = nt_xent(z1, z2, 0.2).item()
    assert nt_xent(z1 * scales, z2 * 7, 0.2).item() == pytest.approx(expected, abs=1e-9)


def test_nt_xent_is_invariant_to_swapped_views_and_to_permuted_images_only_together():
    z1, z2, order = normal(6, 4), normal(6, 4, seed=1), torch.tensor([3, 0, 5, 1, 4, 2])
    expected = nt_xent(z1, z2, 0.2).item()
    assert nt_xent(z2, z1, 0.2).item() == pytest.approx(expected, abs=1e-9)
    assert nt_xent(z1[order], z2[order], 0.2).item() == pytest.approx(expected, abs=1e-9)
    assert nt_xent(z1[order], z2, 0.2).item() != pytest.approx(expected, abs=1e-3)


def test_nt_xent_passes_gradcheck():
    z1, z2 = normal(3, 4).requires_grad_(), normal(3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.3), (z1, z2))


# --- InfoNCE ---


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("batch", "size", "dim"), [(1, 1, 2), (5, 9, 4), (6, 3, 8)])
def test_info_nce_equals_plain_python(temperature, batch, size, dim):
    query, positive, negatives = normal(batch, dim), normal(batch, dim, seed=1) * 5, normal(size, dim, seed=2) / 3
    expected = reference_info_nce(query, positive, negatives, temperature)
    assert info_nce(query, positive, negatives, temperature).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("size", "temperature", "golden"), [(4096, 0.1, 0.17055), (65536, 0.07, 0.04014)])
def test_info_nce_of_equal_positives_and_an_orthogonal_queue_is_the_golden_value(size, temperature, golden):
    query = torch.tensor([[1.0, 0, 0], [0, 2.0, 0]], dtype=torch.float64)
    negatives = torch.tensor([[0, 0, 1.0]], dtype=torch.float64).expand(size, -1)
    actual = info_nce(query, 3 * query, negatives, temperature).item()
    assert actual == pytest.approx(golden, abs=1e-5)
    assert actual == pytest.approx(math.log1p(size * math.exp(-1 / temperature)), abs=1e-9)
    # In fp32 the sum of 1 and 65,536 terms of 6e-7 is only good to some 1e-4: how many lanes add it up differs.
    single = info_nce(query.float(), query.float(), negatives.float(), temperature).item()
    assert single == pytest.approx(golden, abs=6e-4)


@pytest.mark.parametrize("size", [16, 4096])
def test_info_nce_without_information_is_the_log_of_one_and_the_queue(size):
    query, positive, negatives = torch.eye(3, dtype=torch.float64)[:, None]
    blind = info_nce(query, positive, negatives.expand(size, -1), 0.07)
    collapsed = info_nce(query, query, query.expand(size, -1), 0.07)
    assert blind.item() == pytest.approx(math.log(1 + size), abs=1e-9)
    assert collapsed.item() == pytest.approx(math.log(1 + size), abs=1e-9)


def test_info_nce_is_invariant_to_scale():
    query, positive, negatives = normal(5, 4), normal(5, 4, seed=1), normal(7, 4, seed=2)
    expected = info_nce(query, positive, negatives, 0.2).item()
    scales = torch.linspace(0.01, 100, 7, dtype=torch.float64)[:, None]
    actual = info_nce(query * scales[:5], positive * 9, negatives * scales, 0.2).item()
    assert actual == pytest.approx(expected, abs=1e-9)


def test_info_nce_is_invariant_to_permuted_images_and_to_a_permuted_queue():
    query, positive, negatives = normal(5, 4), normal(5, 4, seed=1), normal(7, 4, seed=2)
    excluded = normal(5, 7, seed=3) > 0.5
    order, queue_order = torch.tensor([2, 4, 0, 1, 3]), torch.tensor([6, 0, 3, 5, 1, 2, 4])
    expected = info_nce(query, positive, negatives, 0.2, excluded).item()
    images = info_nce(query[order], positive[order], negatives, 0.2, excluded[order]).item()
    queue = info_nce(query, positive, negatives[queue_order], 0.2, excluded[:, queue_order]).item()
    assert images == pytest.approx(expected, abs=1e-9)
    assert queue == pytest.approx(expected, abs=1e-9)
    assert info_nce(query[order], positive, negatives, 0.2).item() != pytest.approx(expected, abs=1e-3)


def test_info_nce_excluded_removes_exactly_those_negatives():
    query, positive, negatives = normal(5, 4), normal(5, 4, seed=1), normal(9, 4, seed=2)
    excluded = normal(5, 9, seed=3) > 0.3
    excluded[0] = False
    excluded[1] = True  # no negative is left: the loss of that query is 0
    actual = info_nce(query, positive, negatives, 0.2, excluded).item()
    assert actual == pytest.approx(reference_info_nce(query, positive, negatives, 0.2, excluded), abs=1e-9)
    assert actual < info_nce(query, positive, negatives, 0.2).item() - 0.1


def test_info_nce_excluding_for_all_equals_leaving_out():
    query, positive, negatives = normal(5, 4), normal(5, 4, seed=1), normal(9, 4, seed=2)
    unwanted = torch.tensor([1, 4, 8])
    excluded = torch.zeros(5, 9, dtype=torch.bool)
    excluded[:, unwanted] = True
    kept = negatives[[0, 2, 3, 5, 6, 7]]
    expected = info_nce(query, positive, kept, 0.2).item()
    assert info_nce(query, positive, negatives, 0.2, excluded).item() == pytest.approx(expected, abs=1e-12)


def test_info_nce_gives_excluded_negatives_no_gradient():
    query, positive, negatives = normal(2, 4), normal(2, 4, seed=1), normal(3, 4, seed=2).requires_grad_()
    excluded = torch.tensor([[False, True, False], [False, True, True]])
    info_nce(query, positive, negatives, 0.2, excluded).backward()
    assert torch.equal(negatives.grad[1], torch.zeros(4, dtype=torch.float64))
    assert (negatives.grad[[0, 2]].abs().amax(1) > 0).all()


@pytest.mark.parametrize("masked", [False, True])
def test_info_nce_passes_gradcheck(masked):
    tensors = tuple(normal(3, 4, seed=seed).requires_grad_() for seed in range(3))
    excluded = torch.eye(3, dtype=torch.bool) if masked else None
    assert torch.autograd.gradcheck(lambda q, p, n: info_nce(q, p, n, 0.3, excluded), tensors)
