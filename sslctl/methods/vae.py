"""Variational autoencoder (Kingma & Welling 2014, arXiv:1312.6114)."""

from torch import Tensor, nn

from sslctl.losses import gaussian_kl
from sslctl.methods.base import Batch, Facts, Method, feature_std, gather
from sslctl.models.backbones import Backbone
from sslctl.models.decoders import image_decoder


class VAE(Method):
    """Equation 7 with a Gaussian likelihood: both terms are sums over dimensions and means over images, in nats.

    likelihood_std: of a pixel around its reconstruction, in [0, 1]. beta: weight of the divergence (β-VAE), reached after
    beta_warmup_epochs, from 0: codes that nobody uses at first do not come back.
    """

    batch_coupling = None

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        *,
        code_dim: int,
        likelihood_std: float,
        beta: float,
        beta_warmup_epochs: float,
    ):
        super().__init__(backbone, facts)
        if code_dim < 1 or likelihood_std <= 0:
            raise ValueError(
                f"code_dim={code_dim}, likelihood_std={likelihood_std:g}: expected 1 at least, and more than 0"
            )
        self.mean_head = nn.Linear(backbone.embed_dim, code_dim)
        self.log_variance_head = nn.Linear(backbone.embed_dim, code_dim)
        self.decoder = image_decoder(backbone, code_dim, facts.channels, facts.image_size)
        self.likelihood_std, self.beta = likelihood_std, beta
        self.warmup_steps = round(beta_warmup_epochs * facts.steps_per_epoch)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        h = self.backbone(images)  # (B, D)
        return {"backbone": h, "mean": self.mean_head(h)}

    def schedules(self, step: int) -> dict[str, float]:
        return {"beta": self.beta * min(1.0, (step + 1) / (self.warmup_steps + 1))}

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        x = batch.views["global"][0]  # (B, C, H, W)
        h = self.backbone(x)  # (B, D)
        mean, log_variance = self.mean_head(h).float(), self.log_variance_head(h).float()  # (B, code_dim) each
        noise = batch.key.normal("vae/noise", mean.shape[1])
        decoded = self.decoded(mean + (log_variance / 2).exp() * noise)
        error = (x - decoded).square().flatten(1).sum(1)  # (B,)
        divergence = gaussian_kl(mean, log_variance)  # (B, code_dim)
        each = error / (2 * self.likelihood_std**2) + schedules["beta"] * divergence.sum(1)  # (B,)
        divergence, error = gather(divergence.detach()), gather(error.detach())
        return {
            "loss": gather(each).mean(),
            "kl": divergence.sum(1).mean(),
            "codes_in_use": (divergence.mean(0) > 0.01).float().sum(),
            "unexplained": error.mean() / (x[0].numel() * self.backbone.std.square().mean()),
            "feature_std": feature_std(h),
        }

    def decoded(self, code: Tensor) -> Tensor:
        """(B, code_dim) -> (B, C, H, W), about in [0, 1]."""
        return self.backbone.denormalize(self.decoder(code).float())

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        x = batch.views["global"][0]
        mean = self.mean_head(self.backbone(x))
        drawn = batch.key.normal("vae/picture", mean.shape[1]).to(mean)
        return {
            "view": x,
            "reconstruction": self.decoded(mean).clamp(0, 1),
            "drawn from the prior": self.decoded(drawn).clamp(0, 1),
        }
