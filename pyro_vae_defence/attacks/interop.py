r"""Our models as plain ``torch.nn.Module`` classifiers, for libraries that know nothing of VAEs.

Foolbox, torchattacks and the Adversarial Robustness Toolbox attack modules that map images in [0,
1] to scores. :class:`LatentClassifier` and :class:`EncoderAttackHead` make a VAE one, in any mode.

A defence that samples has no useful gradient. With ``defended`` given, :class:`LatentClassifier`
returns the scores of the defended latents :math:`z_T` and differentiates a surrogate instead: by
default the guide's mean :math:`m(x)`, as if the defence were the identity on latents (BPDA). It
classifies :math:`z = m(x) + \mathrm{stop}(z_T - m(x))`.

References: Athalye, Carlini, Wagner, "Obfuscated gradients give a false sense of security", ICML
2018, https://arxiv.org/abs/1802.00420 (BPDA); Rauber et al., "Foolbox Native", JOSS 2020,
https://doi.org/10.21105/joss.02607; Kim, "Torchattacks", 2020, https://arxiv.org/abs/2010.01950;
Nicolae et al., "Adversarial Robustness Toolbox v1.0.0", 2018, https://arxiv.org/abs/1807.01069."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae_defence.attacks.adaptive import straight_through
from pyro_vae_defence.attacks.objectives import _rows, symmetric_kl
from pyro_vae_defence.models.classifier import scores_of_either
from pyro_vae_defence.models.modules import modules_of
from pyro_vae_defence.models.program import check_images, check_vae, evaluation_mode, posterior_mean
from pyro_vae_defence.ops.boundary import drop_references, public
from pyro_vae_defence.types import VAE, Encode, PreparedObjective


class LatentClassifier(nn.Module):
    """Images ``(N, C, H, W)`` in [0, 1] to scores ``(N, num_classes)`` of a classifier of latents.

    Args:
        vae: any Pyro VAE.
        classifier: latents, as site -> values or ``(N, D)`` of all sites together, to scores, e.g.
            a ``models.classifier.LinearClassifier``.
        latents: classify the guide's ``"mean"``, or a ``"sample"``, a new one at each call.
        defended: images to defended latents, such as ``MCMCDefence(...).encode``; detached.
        surrogate: images to latents, what is differentiated in place of ``defended``; the guide's
            mean when ``None``. It must have the same sites.

    Raises:
        ValueError: for something that is no VAE, or not callable, or a surrogate without a defence.
    """

    def __init__(
        self,
        vae: VAE,
        classifier: _rows.Classifier,
        *,
        latents: _rows.LatentsOf = "mean",
        defended: Encode | None = None,
        surrogate: Encode | None = None,
    ) -> None:
        super().__init__()
        check_vae(vae)
        _rows.check_latents(latents)
        for name, value in (("defended", defended), ("surrogate", surrogate)):
            if not (value is None or callable(value)):
                raise ValueError(f"{name} must map images to latents, got {value!r}")
        if not callable(classifier):
            raise ValueError(f"classifier must map latents to scores, got {classifier!r}")
        if surrogate is not None and defended is None:
            raise ValueError("surrogate replaces the gradient of a defence: give defended too")
        # Modules among these are registered, so that .to(device) and .parameters() reach them.
        self.vae: Any = vae
        self.classifier: Any = classifier
        self.latents = latents
        self.defended = defended
        self.surrogate = surrogate
        # Libraries ask for eval mode; the modules inside are switched to it while they run.
        self.training = False

    def __getstate__(self) -> dict[str, Any]:
        drop_references(modules_of(self.vae, self.classifier))
        return self.__dict__

    @public
    def forward(self, x: Tensor) -> Tensor:
        """Scores of every image; the gradient is that of the surrogate when defended."""
        with evaluation_mode(self.vae, self.classifier):
            if self.defended is None:
                return scores_of_either(
                    self.classifier, _rows.encode_rows(self.vae, x, self.latents)
                )
            smooth = self.surrogate(x) if self.surrogate else posterior_mean(self.vae, x)
            with torch.no_grad():
                exact = self.defended(x.detach())
            if exact.keys() != smooth.keys():
                raise ValueError(
                    f"defended and surrogate must have the same latent sites, "
                    f"got {sorted(exact)} and {sorted(smooth)}"
                )
            return scores_of_either(self.classifier, straight_through(exact, smooth))


class EncoderAttackHead(nn.Module):
    r"""Two scores per image, :math:`(0, \Delta(x))`, for untargeted attacks on label 0.

    Their cross-entropy with label 0, :math:`\log(1 + e^\Delta)`, and their margin :math:`\Delta`
    increase in the objective: a library that makes class 0 unlikely maximises :math:`\Delta`. Use
    labels ``zeros(N)`` and the library's random start (at the references the gradient is zero). Row
    i of a batch is compared with reference i, so attack all references in one batch.

    Args:
        vae: any Pyro VAE, on its final device.
        x_ref: the references ``(N, C, H, W)`` in [0, 1].
        objective: a prepared objective; ``symmetric_kl(vae)`` when ``None``.

    Raises:
        ValueError: for something that is no VAE, images not in [0, 1], or batches of another size.
    """

    def __init__(self, vae: VAE, x_ref: Tensor, objective: PreparedObjective | None = None) -> None:
        super().__init__()
        self.vae: Any = check_vae(vae)
        check_images(x_ref, "x_ref")
        self.num_images = x_ref.shape[0]
        objective = objective or symmetric_kl(vae)
        _rows.check_entries(objective, len(x_ref))
        self._objective = objective(x_ref)
        self.training = False

    @public
    def forward(self, x: Tensor) -> Tensor:
        """Scores ``(N, 2)``."""
        if x.shape[0] != self.num_images:
            raise ValueError(
                f"x has {x.shape[0]} images, but there are {self.num_images} references, and row i "
                "is compared with reference i; attack all of them in one batch"
            )
        value = self._objective(x)
        return torch.stack([torch.zeros_like(value), value], 1)
