"""One network's output as the target of another's."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sslctl.losses.exact import exact, unit


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
    log_p = (student_logits / student_temperature).log_softmax(-1)  # (V, B, K)
    cross = -torch.einsum("tbk,vbk->tv", targets, log_p) / student_logits.shape[1]  # (T, V)
    others = ~torch.eye(*cross.shape, dtype=torch.bool, device=cross.device)
    return cross[others].mean()


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
