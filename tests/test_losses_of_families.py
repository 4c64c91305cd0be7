"""The losses beside nt_xent and info_nce: against slow references written out in loops, and at values known by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from sslctl.losses import (
    barlow_twins,
    cpc,
    dcl,
    dino,
    gram,
    hidden_patches,
    ibot,
    koleo,
    memory_distillation,
    msn,
    negative_cosine,
    nnclr,
    nt_xent,
    sigreg,
    similarity_distillation,
    sinkhorn,
    supcon,
    swav,
    vicreg,
    whitening_mse,
)
from sslctl.ops.kmeans import spherical_kmeans


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(rows):
    return [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in rows.tolist()]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def softmax(row):
    powers = [math.exp(x) for x in row]
    return [p / sum(powers) for p in powers]


def cross_entropy(target, logits):
    return -sum(t * math.log(p) for t, p in zip(target, softmax(logits), strict=True))


# --- References ---


def reference_dcl(z1, z2, temperature, sigma=None):
    z, batch = unit(z1) + unit(z2), len(z1)
    own = [dot(z[i], z[(i + batch) % (2 * batch)]) for i in range(2 * batch)]
    weights = [1.0] * (2 * batch)
    if sigma is not None:
        powers = [math.exp(s / sigma) for s in own]
        weights = [2 - p / (sum(powers) / len(powers)) for p in powers]
    total = 0.0
    for i in range(2 * batch):
        others = [j for j in range(2 * batch) if j not in (i, (i + batch) % (2 * batch))]
        total += (
            math.log(sum(math.exp(dot(z[i], z[j]) / temperature) for j in others)) - weights[i] * own[i] / temperature
        )
    return total / (2 * batch)


def reference_supcon(z, label, temperature):
    z, label = unit(z), label.tolist()
    total = 0.0
    for i in range(len(z)):
        positives = [j for j in range(len(z)) if j != i and label[j] == label[i]]
        whole = sum(math.exp(dot(z[i], z[j]) / temperature) for j in range(len(z)) if j != i)
        terms = [math.log(math.exp(dot(z[i], z[j]) / temperature) / whole) for j in positives]
        total += -sum(terms) / len(terms) if terms else 0.0
    return total / len(z) * temperature / 0.07


def reference_nnclr(p, nearest, temperature):
    p, n = unit(p), unit(nearest)
    rows = [[dot(n[i], p[j]) / temperature for j in range(len(p))] for i in range(len(p))]
    return sum(-math.log(softmax(row)[i]) for i, row in enumerate(rows)) / len(rows)


def reference_dino(student, teacher, center, student_temperature, teacher_temperature):
    total, pairs = 0.0, 0
    for t in range(len(teacher)):
        for s in range(len(student)):
            if s != t:
                pairs += 1
                for b in range(student.shape[1]):
                    target = softmax(((teacher[t, b] - center) / teacher_temperature).tolist())
                    total += cross_entropy(target, (student[s, b] / student_temperature).tolist()) / student.shape[1]
    return total / pairs


def reference_barlow(z1, z2, lambda_):
    columns = []
    for z in (z1, z2):
        columns.append([((c - c.mean()) / (c.var(correction=0) + 1e-5).sqrt()).tolist() for c in z.T])
    n, d, total = len(z1), z1.shape[1], 0.0
    for i in range(d):
        for j in range(d):
            c = dot(columns[0][i], columns[1][j]) / n
            total += (1 - c) ** 2 if i == j else lambda_ * c**2
    return total


def reference_vicreg(z1, z2, invariance, variance, covariance):
    n, d = z1.shape
    value = invariance * float(((z1 - z2) ** 2).sum()) / (n * d)
    for z in (z1, z2):
        value += variance / 2 * sum(max(0.0, 1 - math.sqrt(float(c.var()) + 1e-4)) for c in z.T) / d
        cov = torch.cov(z.T)
        value += covariance * sum(float(cov[i, j]) ** 2 for i in range(d) for j in range(d) if i != j) / d
    return value


def reference_sinkhorn(scores, epsilon, iterations):
    q = [[math.exp(x / epsilon) for x in row] for row in scores.tolist()]
    for _ in range(iterations):
        sums = [sum(row[k] for row in q) for k in range(len(q[0]))]
        q = [[x / s for x, s in zip(row, sums, strict=True)] for row in q]
        q = [[x / sum(row) for x in row] for row in q]
    return torch.tensor(q, dtype=torch.float64)


def reference_sigreg(z, directions):
    total, step = 0.0, 3 / 16
    for direction in directions.T:
        projected = (z @ (direction / direction.norm())).tolist()
        values = []
        for k in range(-16, 17):  # the whole of [-3, 3]
            t = k * step
            real = sum(math.cos(t * x) for x in projected) / len(projected)
            imaginary = sum(math.sin(t * x) for x in projected) / len(projected)
            gauss = math.exp(-t * t / 2)
            values.append(((real - gauss) ** 2 + imaginary**2) * gauss)
        total += len(projected) * step * (sum(values) - (values[0] + values[-1]) / 2)
    return total / directions.shape[1]


def reference_seed(student, teacher, queue, student_temperature, teacher_temperature):
    s, t, q = unit(student), unit(teacher), unit(queue)
    total = 0.0
    for own, theirs in zip(s, t, strict=True):
        bank = [theirs, *q]
        target = softmax([dot(theirs, row) / teacher_temperature for row in bank])
        total += cross_entropy(target, [dot(own, row) / student_temperature for row in bank])
    return total / len(s)


LABEL = torch.tensor([0, 1, 1, 2, 0, 1, 1, 2])
CASES = {
    "dcl": (dcl, reference_dcl, (normal(5, 4), normal(5, 4, seed=1), 0.2)),
    "dclw": (dcl, reference_dcl, (normal(5, 4), normal(5, 4, seed=1), 0.2, 0.5)),
    "supcon": (supcon, reference_supcon, (normal(8, 5), LABEL, 0.1)),
    "supcon, a class of one": (supcon, reference_supcon, (normal(4, 5), torch.tensor([0, 0, 1, 2]), 0.1)),
    "nnclr": (nnclr, reference_nnclr, (normal(6, 4), normal(6, 4, seed=1), 0.1)),
    "dino": (dino, reference_dino, (normal(4, 3, 7), normal(2, 3, 7, seed=1), normal(7, seed=2), 0.1, 0.04)),
    "barlow_twins": (barlow_twins, reference_barlow, (normal(9, 5), normal(9, 5, seed=1), 0.0051)),
    "vicreg": (vicreg, reference_vicreg, (normal(9, 5) / 2, normal(9, 5, seed=1), 25.0, 25.0, 1.0)),
    "sigreg": (sigreg, reference_sigreg, (normal(20, 5), normal(5, 6, seed=1))),
    "similarity_distillation": (
        similarity_distillation,
        reference_seed,
        (normal(4, 6), normal(4, 6, seed=1), normal(9, 6, seed=2), 0.2, 0.07),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_equals_the_formula_written_out(name):
    loss, reference, arguments = CASES[name]
    assert float(loss(*arguments)) == pytest.approx(reference(*arguments), rel=1e-6, abs=1e-9)


DIFFERENTIABLE = {  # losses as functions of all that gets a gradient
    "dcl": (lambda a, b: dcl(a, b, 0.2), (normal(3, 4), normal(3, 4, seed=1))),
    "supcon": (lambda z: supcon(z, LABEL[:5], 0.1), (normal(5, 3),)),
    "nnclr": (lambda p, n: nnclr(p, n, 0.2), (normal(3, 4), normal(3, 4, seed=1))),
    "cpc": (lambda p, c: cpc(p, c, torch.tensor([2, 0])), (normal(2, 3), normal(4, 3, seed=1))),
    "negative_cosine": (lambda p: negative_cosine(p, normal(3, 4, seed=1)), (normal(3, 4),)),
    "dino": (lambda s: dino(s, normal(1, 2, 3, seed=1), normal(3), 0.1, 0.2), (normal(2, 2, 3),)),
    "barlow_twins": (lambda a, b: barlow_twins(a, b, 0.1), (normal(4, 3), normal(4, 3, seed=1))),
    "vicreg": (lambda a, b: vicreg(a, b, 25, 25, 1), (normal(4, 3) / 2, normal(4, 3, seed=1) / 2)),
    "whitening_mse": (lambda v: whitening_mse(v, torch.tensor([[[3, 0, 1, 2]]])), (normal(2, 4, 2),)),
    "sigreg": (lambda z: sigreg(z, normal(3, 2, seed=1)), (normal(4, 3),)),
    "swav": (lambda s: swav(s, normal(1, 2, 3, seed=1).softmax(2), 0.5), (normal(2, 2, 3),)),
    "msn": (lambda s: msn(s, normal(2, 3, seed=1).softmax(1), 0.5, 0.7), (normal(2, 2, 3),)),
    "similarity_distillation": (
        lambda s: similarity_distillation(s, normal(2, 3, seed=1), normal(4, 3, seed=2), 0.2, 0.1),
        (normal(2, 3),),
    ),
    "memory_distillation": (
        lambda s: memory_distillation(s, normal(2, 3, seed=1), normal(4, 3, seed=2), normal(4, 3, seed=3), 0.2),
        (normal(2, 3),),
    ),
    "koleo": (koleo, (normal(5, 3),)),
    "gram": (lambda s: gram(s, normal(2, 4, 3, seed=1)), (normal(2, 4, 3),)),
    "hidden_patches": (
        lambda s: hidden_patches(s, normal(2, 3, seed=1).softmax(1), torch.eye(2, dtype=torch.bool), 0.2),
        (normal(2, 3),),
    ),
    "ibot": (
        lambda s: ibot(s, normal(2, 2, 3, seed=1), normal(3), torch.eye(2, dtype=torch.bool), 0.2, 0.1),
        (normal(2, 2, 3),),
    ),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_reach_all_that_is_not_a_target(name):
    loss, arguments = DIFFERENTIABLE[name]
    assert torch.autograd.gradcheck(loss, [argument.requires_grad_() for argument in arguments])


def test_the_weights_of_positives_in_dclw_have_no_gradient():
    z1, z2 = normal(5, 4).requires_grad_(), normal(5, 4, seed=1).requires_grad_()
    gradient = torch.autograd.grad(dcl(z1, z2, 0.2, 0.5), z1)[0]
    own = F.cosine_similarity(z1, z2)
    weight = 2 - (own / 0.5).exp() / (own / 0.5).exp().mean()
    constant = (
        dcl(z1, z2, 0.2) - ((weight.detach() - 1) * own / 0.2).mean()
    )  # the weights of both directions are the same
    assert dcl(z1, z2, 0.2, 0.5).item() == pytest.approx(constant.item())
    torch.testing.assert_close(gradient, torch.autograd.grad(constant, z1)[0])


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn_equals_the_formula_written_out(iterations):
    scores = normal(12, 5) / 3
    torch.testing.assert_close(sinkhorn(scores, 0.05, iterations), reference_sinkhorn(scores, 0.05, iterations))


def test_swav_is_the_mean_cross_entropy_of_different_views():
    scores, codes = normal(4, 3, 5), sinkhorn(normal(6, 5, seed=1), 0.05, 3).view(2, 3, 5)
    pairs = [(t, v) for t in range(2) for v in range(4) if t != v]
    each = [cross_entropy(codes[t, b].tolist(), (scores[v, b] / 0.1).tolist()) for t, v in pairs for b in range(3)]
    assert float(swav(scores, codes, 0.1)) == pytest.approx(sum(each) / len(each), rel=1e-6)


# --- Known values ---

EYE = torch.eye(40, dtype=torch.float64)
SAME = torch.ones(16, 8, dtype=torch.float64)
ZEROS = torch.zeros(2, 3, 10, dtype=torch.float64)
KNOWN = {
    "dcl, orthogonal": (lambda: dcl(EYE[:8], EYE[:8], 0.1), -10 + math.log(14)),
    "dcl, blind": (lambda: dcl(EYE[:8], EYE[8:16], 0.1), math.log(14)),
    "dcl, collapsed": (lambda: dcl(SAME, SAME, 0.1), math.log(30)),
    "supcon, one class": (lambda: supcon(SAME, torch.zeros(16), 0.1), math.log(15) * 0.1 / 0.07),
    "supcon, no positive": (lambda: supcon(EYE[:4], torch.arange(4), 0.1), 0.0),
    "nnclr, blind": (lambda: nnclr(EYE[:8], EYE[8:16], 0.1), math.log(8)),
    "nnclr, ideal": (lambda: nnclr(EYE[:8], EYE[:8], 0.1), math.log(1 + 7 * math.exp(-10))),
    "moco v3, ideal": (lambda: 4 * 0.2 * nnclr(EYE[:4], EYE[:4], 0.2), 0.01601),
    "cosine, parallel": (lambda: negative_cosine(EYE[:4], 3 * EYE[:4]), -1.0),
    "cosine, orthogonal": (lambda: negative_cosine(EYE[:4], EYE[4:8]), 0.0),
    "dino, equal logits": (lambda: dino(ZEROS.repeat(2, 1, 1), ZEROS, ZEROS[0, 0], 0.1, 0.04), math.log(10)),
    "swav, equal scores": (lambda: swav(ZEROS, sinkhorn(ZEROS[0], 0.05, 3)[None], 0.1), math.log(10)),
    "barlow, collapsed": (lambda: barlow_twins(SAME, SAME, 0.0051), 8.0),
    "vicreg, collapsed": (lambda: vicreg(SAME, SAME, 25, 25, 1), 24.75),
    "sigreg, zeros": (lambda: sigreg(torch.zeros(100, 8), normal(8, 4, dtype=torch.float32)), 40.205),
    "sigreg, gaussian": (lambda: sum(sigreg(normal(200, 16, seed=s), normal(16, 32)) for s in range(200)) / 200, 1.05),
}


@pytest.mark.parametrize("name", KNOWN)
def test_loss_has_its_known_value(name):
    value, expected = KNOWN[name]
    tolerance = 0.05 if name == "sigreg, gaussian" else 2e-5
    assert float(value()) == pytest.approx(expected, rel=tolerance, abs=1e-6)


@pytest.mark.parametrize("loss", ["dino", "swav"])
def test_a_mean_over_many_images_and_prototypes_keeps_its_digits(loss):
    """A million equal products: added up one after the other in fp32, they would say that outputs know something."""
    scores = torch.zeros(2, 256, 4096)
    same = {
        "dino": lambda: dino(scores, scores, scores[0, 0], 0.1, 0.04),
        "swav": lambda: swav(scores, scores.softmax(2), 0.1),
    }
    assert same[loss]().item() == pytest.approx(math.log(4096), rel=1e-5)


def test_supcon_with_a_class_an_image_is_nt_xent():
    z1, z2 = normal(6, 4), normal(6, 4, seed=1)
    expected = nt_xent(z1, z2, 0.1) * 0.1 / 0.07
    torch.testing.assert_close(supcon(torch.cat([z1, z2]), torch.arange(6).repeat(2), 0.1), expected)


def test_distillation_of_the_teacher_itself_is_its_entropy():
    z, queue = normal(5, 6), normal(9, 6, seed=1)
    bank = torch.cat([torch.ones(5, 1), F.normalize(z, dim=1) @ F.normalize(queue, dim=1).T], 1) / 0.1
    entropy = torch.special.entr(bank.softmax(1)).sum(1).mean()
    torch.testing.assert_close(similarity_distillation(z, z, queue, 0.1, 0.1), entropy)


def test_sinkhorn_uses_all_prototypes_alike_after_many_rounds():
    codes = sinkhorn(normal(256, 30) / 10, 0.05, 50)
    torch.testing.assert_close(codes.sum(1), torch.ones(256, dtype=torch.float64))
    torch.testing.assert_close(codes.sum(0) * 30 / 256, torch.ones(30, dtype=torch.float64), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sinkhorn_of_extreme_scores_in_half_precision_is_finite(dtype):
    codes = sinkhorn(torch.tensor([[1.0, -1.0], [1.0, 0.9]], dtype=dtype), 0.001, 3)
    assert codes.dtype == torch.float32
    assert torch.isfinite(codes).all()


def test_barlow_twins_ignores_scale_shift_and_order():
    z1, z2 = normal(32, 5), normal(32, 5, seed=1)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    changed = barlow_twins(3 * z1[order] + 2, 0.5 * z2[order] - 1, 0.01)
    torch.testing.assert_close(changed, barlow_twins(z1, z2, 0.01), rtol=1e-3, atol=0)  # ε is not scaled
    torch.testing.assert_close(barlow_twins(z2, z1, 0.01), barlow_twins(z1, z2, 0.01))


def whitened_by(z):
    """Mean 0, covariance 1, by the same factor that W-MSE takes, through numpy's inverse."""
    z = z - z.mean(0)
    return z @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T))).T


def test_whitening_mse_is_the_distance_of_views_whitened_in_parts():
    views, parts = normal(3, 24, 4), torch.randperm(24, generator=torch.Generator().manual_seed(0)).view(1, 2, 12)
    expected = []
    for part in parts[0]:
        white = [F.normalize(whitened_by(view[part]), dim=1) for view in views]
        expected += [2 - 2 * (white[i] * white[j]).sum(1).mean() for i, j in ((0, 1), (0, 2), (1, 2))]
    torch.testing.assert_close(whitening_mse(views, parts), torch.stack(expected).mean())
    torch.testing.assert_close(torch.cov(whitened_by(views[0]).T), torch.eye(4, dtype=torch.float64))


def test_whitening_mse_of_collapsed_rows_is_no_number():
    views = normal(2, 8, 3)
    views[1, :, 2] = 3.0
    assert whitening_mse(views, torch.arange(8).view(1, 1, 8)).isnan()


def test_whitening_mse_refuses_parts_that_cannot_be_whitened():
    with pytest.raises(ValueError, match="4 embeddings of 4 dimensions"):
        whitening_mse(normal(2, 8, 4), torch.arange(8).view(1, 2, 4))


def test_no_gradient_reaches_targets_queue_or_codes():
    p, z, queue = (normal(4, 6, seed=s).requires_grad_() for s in range(3))
    (negative_cosine(p, z) + similarity_distillation(p, z, queue, 0.1, 0.1)).backward()
    assert p.grad.abs().sum() > 0
    assert z.grad is None
    assert queue.grad is None
    student, teacher = normal(3, 4, 6).requires_grad_(), normal(2, 4, 6, seed=1).requires_grad_()
    (dino(student, teacher, torch.zeros(6), 0.1, 0.04) + swav(student, teacher.softmax(-1), 0.1)).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert not sinkhorn(teacher[0], 0.05, 3).requires_grad
    msn(student, teacher[0].softmax(-1), 0.1, 1.0).backward()
    assert teacher.grad is None


# --- Hidden patches, predicted patches, memories ---


def test_ibot_equals_its_reference():
    student, teacher, center = normal(3, 4, 5, seed=1), normal(3, 4, 5, seed=2), normal(5, seed=3)
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    expected = []
    for b in range(3):
        each = [
            cross_entropy(
                softmax([(t - c) / 0.05 for t, c in zip(teacher[b, l].tolist(), center.tolist(), strict=True)]),
                [x / 0.1 for x in student[b, l].tolist()],
            )
            for l in range(4)
            if mask[b, l]
        ]
        expected.append(sum(each) / len(each) if each else 0.0)
    assert ibot(student, teacher, center, mask, 0.1, 0.05).tolist() == pytest.approx(expected, rel=1e-6)


def test_ibot_looks_at_hidden_patches_only():
    student, teacher, center = normal(2, 4, 5, seed=1), normal(2, 4, 5, seed=2), torch.zeros(5).double()
    mask = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]], dtype=torch.bool)
    before = ibot(student, teacher, center, mask, 0.1, 0.05)
    elsewhere = ibot(student + ~mask[..., None] * normal(2, 4, 5, seed=3), teacher, center, mask, 0.1, 0.05)
    hidden = ibot(student + mask[..., None] * normal(2, 4, 5, seed=3), teacher, center, mask, 0.1, 0.05)
    assert torch.equal(before, elsewhere)
    assert not torch.isclose(before, hidden).any()


def test_ibot_of_equal_logits_is_the_logarithm_of_the_prototypes():
    zeros = torch.zeros(2, 3, 8192)
    value = ibot(zeros, zeros, torch.zeros(8192), torch.ones(2, 3, dtype=torch.bool), 0.1, 0.04)
    assert value.tolist() == pytest.approx([math.log(8192)] * 2, rel=1e-5)


def test_hidden_patches_are_ibots_by_image_and_of_given_targets():
    student, teacher, center = normal(3, 4, 5, seed=1), normal(3, 4, 5, seed=2), normal(5, seed=3)
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    targets = ((teacher - center) / 0.05).softmax(-1)
    actual = hidden_patches(student[mask], targets[mask].requires_grad_(), mask, 0.1)
    assert actual.item() == pytest.approx(ibot(student, teacher, center, mask, 0.1, 0.05).mean().item(), rel=1e-9)
    assert not actual.requires_grad
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    assert hidden_patches(student[nothing], targets[nothing], nothing, 0.1) == 0


def test_koleo_is_the_logarithm_of_the_nearest_distance():
    z = normal(6, 3)
    rows = unit(z)
    expected = 0.0
    for i in range(6):
        others = (sum((a - b) ** 2 for a, b in zip(rows[i], rows[j], strict=True)) for j in range(6) if j != i)
        expected -= math.log(math.sqrt(min(others))) / 6
    assert koleo(z).item() == pytest.approx(expected, rel=1e-6)
    assert koleo(EYE[:4]).item() == pytest.approx(-math.log(2) / 2, rel=1e-6)
    assert koleo(SAME).item() == pytest.approx(-math.log(1e-8 + 1e-8 * 8**0.5), rel=1e-6)  # collapsed


def test_gram_compares_cosines_of_patches():
    student, teacher = normal(2, 3, 4, seed=1), normal(2, 3, 4, seed=2)
    expected = 0.0
    for image in range(2):
        own, theirs = unit(student[image]), unit(teacher[image])
        expected += sum((dot(own[i], own[j]) - dot(theirs[i], theirs[j])) ** 2 for i in range(3) for j in range(3)) / 18
    assert gram(student, teacher).item() == pytest.approx(expected, rel=1e-6)
    turned = student @ torch.linalg.qr(normal(4, 4, seed=3))[0] * 3  # in other directions, and longer
    assert gram(student, turned).item() == pytest.approx(0, abs=1e-12)


def test_sinkhorn_of_parts_is_that_of_the_whole():
    """Each part is given the others' shares, as processes do; they need not be of one size."""
    scores, shares = normal(12, 5) / 3, []
    sinkhorn(scores[7:], 0.05, 3, lambda own: shares.append(own) or own)  # how often it asks
    assert len(shares) == 3
    whole, left = sinkhorn(scores, 0.05, 3), iter(range(3))

    def of_both(own):
        log_q = scores / 0.05
        for _ in range(next(left)):
            log_q = log_q - log_q.logsumexp(0)
            log_q = log_q - log_q.logsumexp(1, keepdim=True)
        return torch.cat([own, log_q[7:].logsumexp(0, keepdim=True)])

    torch.testing.assert_close(sinkhorn(scores[:7], 0.05, 3, of_both), whole[:7])


def test_swav_counts_views_by_their_weights():
    scores, codes = normal(4, 3, 5), sinkhorn(normal(6, 5, seed=1), 0.05, 3).view(2, 3, 5)
    weights = torch.tensor([1.0, 1.0, 0.5, 0.0]).double()
    pairs = [(t, v) for t in range(2) for v in range(4) if t != v]
    each = [
        weights[v].item() * cross_entropy(codes[t, b].tolist(), (scores[v, b] / 0.1).tolist())
        for t, v in pairs
        for b in range(3)
    ]
    assert float(swav(scores, codes, 0.1, weights)) == pytest.approx(sum(each) / len(each), rel=1e-6)


def test_msn_equals_its_reference():
    scores, targets = normal(2, 3, 4, seed=1), normal(3, 4, seed=2).softmax(1)
    p = [[softmax([x / 0.1 for x in scores[v, b].tolist()]) for b in range(3)] for v in range(2)]
    cross = [
        cross_entropy(targets[b].tolist(), [x / 0.1 for x in scores[v, b].tolist()]) for v in range(2) for b in range(3)
    ]
    mean = [sum(p[v][b][k] for v in range(2) for b in range(3)) / 6 for k in range(4)]
    entropy = -sum(x * math.log(x) for x in mean)
    expected = sum(cross) / 6 + 0.7 * (math.log(4) - entropy)
    assert msn(scores, targets, 0.1, 0.7).item() == pytest.approx(expected, rel=1e-6)


def test_msn_punishes_one_prototype_for_all():
    uniform = torch.zeros(2, 8, 16)
    assert msn(uniform, uniform[0].softmax(1), 0.1, 5.0).item() == pytest.approx(math.log(16), rel=1e-5)
    collapsed = torch.zeros(2, 8, 16)
    collapsed[..., 0] = 100.0
    target = collapsed[0].softmax(1)
    assert msn(collapsed, target, 0.1, 0.0).item() == pytest.approx(0, abs=1e-5)
    assert msn(collapsed, target, 0.1, 1.0).item() == pytest.approx(math.log(16), rel=1e-5)


def test_cpc_equals_its_reference_and_knows_its_blind_value():
    prediction, candidates, own = normal(3, 4, seed=1), normal(6, 4, seed=2), torch.tensor([5, 0, 2])
    rows, columns = prediction.tolist(), candidates.tolist()
    expected = (
        sum(-math.log(softmax([dot(r, c) for c in columns])[k]) for r, k in zip(rows, own.tolist(), strict=True)) / 3
    )
    assert cpc(prediction, candidates, own).item() == pytest.approx(expected, rel=1e-6)
    assert cpc(torch.zeros(3, 4), torch.randn(6, 4), own).item() == pytest.approx(math.log(6), rel=1e-6)


def test_memory_distillation_equals_its_reference():
    student, teacher = normal(3, 4, seed=1), normal(3, 6, seed=2)
    own, theirs = normal(5, 4, seed=3), normal(5, 6, seed=4)
    expected = 0.0
    for s, t in zip(unit(student), unit(teacher), strict=True):
        q = softmax([dot(s, m) / 0.04 for m in unit(own)])
        p = softmax([dot(t, m) / 0.04 for m in unit(theirs)])
        expected += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 3
    assert memory_distillation(student, teacher, own, theirs, 0.04).item() == pytest.approx(expected, rel=1e-6)
    assert memory_distillation(teacher, teacher, theirs, theirs, 0.04).item() == pytest.approx(0, abs=1e-12)


def test_no_gradient_reaches_teachers_and_memories():
    leaves = [normal(4, 5, seed=n).requires_grad_() for n in range(4)]
    memory_distillation(*leaves, 0.1).backward()
    assert leaves[0].grad.abs().sum() > 0
    assert all(leaf.grad is None for leaf in leaves[1:])
    student, teacher = (normal(2, 3, 4, seed=n).requires_grad_() for n in (1, 2))
    ibot(student, teacher, torch.zeros(4), torch.ones(2, 3, dtype=torch.bool), 0.1, 0.05).sum().backward()
    assert teacher.grad is None


# --- k-means ---


def test_spherical_kmeans_finds_directions_that_are_there():
    axes = torch.eye(6)[:3]
    z = F.normalize(axes.repeat_interleave(50, 0) + 0.1 * normal(150, 6, dtype=torch.float32), dim=1)
    centroids, chosen = spherical_kmeans(z, z[[0, 60, 120]], 10)
    assert chosen.tolist() == [0] * 50 + [1] * 50 + [2] * 50
    torch.testing.assert_close(centroids.norm(dim=1), torch.ones(3))
    assert ((centroids * axes).sum(1) > 0.99).all()


@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_spherical_kmeans_equals_lloyds_algorithm_in_loops(iterations):
    z = F.normalize(normal(60, 3), dim=1)
    centroids = z[:5].tolist()
    for _ in range(iterations):
        chosen = [max(range(5), key=lambda k: dot(row, centroids[k])) for row in z.tolist()]
        groups = [[row for row, own in zip(z.tolist(), chosen, strict=True) if own == k] for k in range(5)]
        sums = torch.tensor([[sum(column) for column in zip(*group, strict=True)] for group in groups])
        centroids = unit(sums.double())
    chosen = [max(range(5), key=lambda k: dot(row, centroids[k])) for row in z.tolist()]
    actual, nearest = spherical_kmeans(z, z[:5], iterations)
    torch.testing.assert_close(actual, torch.tensor(centroids, dtype=torch.float64), atol=1e-6, rtol=0)
    assert nearest.tolist() == chosen


def test_a_centroid_that_nobody_chose_stays():
    z = F.normalize(torch.tensor([[1.0, 0.1], [1.0, -0.1]]), dim=1)
    lonely = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    centroids, chosen = spherical_kmeans(z, lonely, 3)
    assert torch.equal(centroids[1], lonely[1])
    assert chosen.tolist() == [0, 0]
