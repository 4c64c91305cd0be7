"""One network's output as the target of another's."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sslctl.losses.exact import cross_entropy_of_other_views, exact, unit


@exact
def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """Minus the cosine between predictions and targets, mean over rows (SimSiam, arXiv:2011.10566, eq. 1).

    p, z: (B, D). No gradient reaches z. 2 + 2·this is BYOL's squared distance of unit vectors (arXiv:2006.07733, eq. 2).
    """
    return -(unit(p) * unit(z.detach())).sum(1).mean()


@exact
def dino(
    student_logits: Tensor,
    teacher_logits: Tensor,
    center: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """Cross entropy of every student view with every other teacher view (Caron et al. 2021, arXiv:2104.14294, eq. 3).

    student_logits: (V, B, K), the teacher's views first; teacher_logits: (T, B, K), T ≤ V; center: (K,) or (1, K). Mean over
    the T·(V - 1) pairs of different views. No gradient reaches the teacher.
    """
    targets = ((teacher_logits.detach() - center) / teacher_temperature).softmax(-1)  # (T, B, K)
    return cross_entropy_of_other_views(student_logits / student_temperature, targets)


@exact
def similarity_distillation(
    student: Tensor, teacher: Tensor, queue: Tensor, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """The student's similarities to a queue imitate the teacher's (SEED, arXiv:2101.04731, eq. 5).

    student, teacher: (B, D) of the same images; queue: (K, D) of earlier teacher embeddings. The teacher's own embedding
    stands before the queue in both distributions. Cross entropy, mean over rows; no gradient reaches teacher or queue.
    """
    student, teacher, queue = unit(student), unit(teacher.detach()), unit(queue.detach())
    own = torch.cat([(student * teacher).sum(1, keepdim=True), student @ queue.T], 1)  # (B, 1 + K)
    theirs = torch.cat([(teacher * teacher).sum(1, keepdim=True), teacher @ queue.T], 1)
    return F.cross_entropy(own / student_temperature, (theirs / teacher_temperature).softmax(1))


@exact
def ibot(
    student_logits: Tensor,
    teacher_logits: Tensor,
    center: Tensor,
    mask: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """Cross entropy of hidden patches with the same patches as the teacher sees them (iBOT, arXiv:2111.07832, eq. 2).

    student_logits, teacher_logits: (B, L, K); center: (K,); mask: (B, L) bool, True where the student saw no patch. Returns
    (B,): the mean over each image's hidden patches, 0 where none is hidden. No gradient reaches the teacher.
    """
    targets = ((teacher_logits.detach() - center) / teacher_temperature).softmax(-1)  # (B, L, K)
    log_p = (student_logits / student_temperature).log_softmax(-1)
    cross = -(targets * log_p).sum(-1)  # (B, L)
    return (cross * mask).sum(1) / mask.sum(1).clamp(min=1)


@exact
def hidden_patches(student_logits: Tensor, targets: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """iBOT's loss of hidden patches alone, whose targets are given (DINOv2, arXiv:2304.07193, section 4).

    student_logits, targets: (M, K), of the patches at the M places where mask (B, L) is True, in its order; the rows of
    targets sum to 1. Mean over images of the mean over each one's hidden patches, 0 for those of which none is hidden. No
    gradient reaches the targets.
    """
    cross = -(targets.detach() * (student_logits / temperature).log_softmax(-1)).sum(-1)  # (M,)
    hidden = mask.sum(1)  # (B,), M in all
    weights = (1 / hidden.clamp(min=1)).repeat_interleave(hidden, output_size=len(cross))  # (M,)
    return (cross * weights).sum() / len(mask)


@exact
def gram(student: Tensor, teacher: Tensor) -> Tensor:
    """Patches are alike where the teacher's are: Gram anchoring (DINOv3, arXiv:2508.10104, section 4.2).

    student, teacher: (B, L, D). Mean squared difference of the cosines of an image's patches, over images and pairs of
    patches. No gradient reaches the teacher.
    """
    student, teacher = unit(student), unit(teacher.detach())
    return (student @ student.mT - teacher @ teacher.mT).square().mean()


@exact
def memory_distillation(
    student: Tensor, teacher: Tensor, student_memory: Tensor, teacher_memory: Tensor, temperature: float
) -> Tensor:
    """The student ranks its memory as the teacher ranks its own (CompRess, arXiv:2010.14713, section 3).

    student: (B, d), student_memory: (K, d); teacher: (B, D), teacher_memory: (K, D): row k of both memories is one image.
    Kullback-Leibler divergence of the student's softmax similarities from the teacher's, mean over rows.
    """
    own = (unit(student) @ unit(student_memory.detach()).T / temperature).log_softmax(1)  # (B, K)
    theirs = (unit(teacher.detach()) @ unit(teacher_memory.detach()).T / temperature).log_softmax(1)
    return F.kl_div(own, theirs, reduction="batchmean", log_target=True)
