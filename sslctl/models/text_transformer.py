"""A small Transformer encoder for token ids (Vaswani et al. 2017, arXiv:1706.03762; BERT, arXiv:1810.04805)."""

import torch
from torch import Tensor, nn

from sslctl.data.modality import TEXTS


class SmallTransformer(nn.Module):
    """(B, L) int64 -> (B, embed_dim): the mean of the tokens' vectors. Norms stand before each block; GELU.

    tokens(): the vectors themselves. pad: the id that nobody attends to.
    """

    modality = TEXTS
    pad = 0

    def __init__(self, embed_dim: int, depth: int, heads: int, dropout: float, vocabulary: int, length: int):
        super().__init__()
        if embed_dim % heads:
            raise ValueError(f"backbone.heads={heads} do not divide backbone.embed_dim={embed_dim}")
        self.embed_dim, self.vocabulary, self.length = embed_dim, vocabulary, length
        self.embedding = nn.Embedding(vocabulary, embed_dim)
        self.positions = nn.Parameter(torch.empty(length, embed_dim))
        for table in (self.embedding.weight, self.positions):
            nn.init.normal_(table, std=0.02)
        layer = nn.TransformerEncoderLayer(
            embed_dim, heads, 4 * embed_dim, dropout, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(embed_dim), enable_nested_tensor=False)

    def tokens(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, D)."""
        x = self.embedding(ids) + self.positions[: ids.shape[1]]
        return self.encoder(x, src_key_padding_mask=ids == self.pad)

    def forward(self, ids: Tensor) -> Tensor:
        there = (ids != self.pad)[..., None]  # (B, L, 1)
        return (self.tokens(ids) * there).sum(1) / there.sum(1).clamp(min=1)

    def layer_names(self) -> list[tuple[str, ...]]:
        return [("embedding", "positions"), *((f"encoder.layers.{i}",) for i in range(len(self.encoder.layers)))]
