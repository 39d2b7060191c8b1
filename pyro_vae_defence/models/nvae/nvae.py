"""NVAE as two Pyro programs over its latents; see :mod:`pyro_vae_defence.models.nvae.network`.

The model and the guide differ in how they choose the next latent on the way down.
"""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from pyro_vae_defence.models.nvae.config import NVAEConfig
from pyro_vae_defence.models.nvae.flows import FlowPosterior
from pyro_vae_defence.models.nvae.gaussian import gaussian
from pyro_vae_defence.models.nvae.network import NVAENetwork, TopDownPath, TopDownState
from pyro_vae_defence.models.nvae.noncentred import NonCentredNVAE
from pyro_vae_defence.types import Latents


class NVAE(NVAENetwork):
    """Hierarchical VAE: latent sites ``z_00`` (top), ``z_01``, ..., and the image at ``obs``.

    Images are those of :class:`~pyro_vae_defence.models.nvae.network.NVAENetwork`.

    **Sharing.** The guide walks the top-down path to build its posteriors. A model run that follows
    on the very same latent tensors (``poutine.replay``), with nothing changed in between, takes the
    features over instead of computing them again, so an ELBO costs one pass. Any other model run
    computes its own. The guide's features are kept until the next call of a program;
    ``share=False`` switches this off.

    **Modes.** In train mode batch statistics are used and updated, and the parameters are
    registered with Pyro's parameter store so that ``SVI`` finds them, under a name of this
    instance's own. In eval mode neither happens.

    **Memory.** With ``checkpointing`` a backward pass computes the activations of the towers anew,
    segment by segment, instead of keeping them: about a third more time, and memory for one
    segment and the features between segments. In train mode, where a second pass would move the
    statistics of batch norm once more, it has no effect.

    Args:
        config: the architecture.
        share: whether a model run may take over the guide's path.
        checkpointing: whether backward passes recompute activations; may be set at any time.

    Example:
        >>> config = NVAEConfig(num_groups_per_scale=2, num_channels_enc=4, num_channels_dec=4)
        >>> vae = NVAE(config).eval()
        >>> {site: tuple(z.shape) for site, z in vae.guide(torch.rand(3, 1, 28, 28)).items()}
        {'z_00': (3, 20, 8, 8), 'z_01': (3, 20, 8, 8)}
    """

    def __init__(
        self, config: NVAEConfig, *, share: bool = True, checkpointing: bool = False
    ) -> None:
        super().__init__(config, checkpointing=checkpointing)
        self.share = share
        # The path a guide walked, and its stamp, for a model run on the very same latents.
        self._shared: tuple[object, TopDownPath] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles do not carry a path, part of an autograd graph, along.
        return self.__dict__ | {"_shared": None}

    def model(self, x: Tensor) -> TorchDistribution:
        """Generative program p(x, z): the latent sites, then ``x`` observed at ``obs``.

        Returns p(x | z), batch shape ``(N,)``; ``ValueError`` for images of the wrong shape.
        """
        self.check_images(x)
        self.register()
        known = None
        if self._shared is not None:
            stamp, path = self._shared
            known = path if stamp == self._stamp(path.latents) else None
        self._shared = None

        def choose(group: int, state: TopDownState) -> Tensor:
            return pyro.sample(self.sites[group], gaussian(state.prior).to_event(3))

        with pyro.plate("data", x.shape[0]):
            observation = self.likelihood(self.walk(x.shape[0], choose, known))
            pyro.sample("obs", observation, obs=x)
        return observation

    def guide(self, x: Tensor) -> Latents:
        """Inference program q(z | x): site name -> latent ``(N, L, h, w)``.

        The distribution of a site is a Gaussian or, with flows, a :class:`flows.FlowPosterior`;
        ``ValueError`` for images of the wrong shape.
        """
        self._shared = None  # frees the last path before the next one is built
        encoded = self.bottom_up(x)
        self.register()

        def choose(group: int, state: TopDownState) -> Tensor:
            posterior, flow = self.posterior(group, state, encoded)
            q = posterior.to_event(3)
            if flow:
                q = FlowPosterior(q, flow, validate_args=False)
            return pyro.sample(self.sites[group], q)

        with pyro.plate("data", x.shape[0]):
            path = self.walk(x.shape[0], choose)
        if self.share:
            self._shared = (self._stamp(path.latents), path)
        return dict(zip(self.sites, path.latents))

    def noncentred(self) -> NonCentredNVAE:
        """The same model over the noise of its latents."""
        return NonCentredNVAE(self)

    def _stamp(self, latents: list[Tensor]) -> object:
        """Two equal stamps: features computed at the first are right at the second."""
        if torch.is_inference_mode_enabled():
            return object()  # nothing has a version there; equal to no other stamp
        tensors = [*latents, *self.parameters(), *self.buffers()]
        device_type = self.prior_ftr0.device.type
        autocast = torch.amp.is_autocast_available(device_type)
        return (
            torch.is_grad_enabled(),
            autocast and torch.is_autocast_enabled(device_type),
            [module.training for module in self.modules()],
            [(id(t), t.device, t.dtype, t.requires_grad, t._version) for t in tensors],
        )
