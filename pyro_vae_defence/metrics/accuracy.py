"""What an attack does to the predicted classes, one value per image.

Two questions are easily confused. *Adversarial accuracy* (paper, "Robustness measures") asks
whether the class predicted for the attacked image is the one predicted for its reference, right or
wrong; *correctness* asks whether a prediction is the label. A defence that always predicts one
class has the best adversarial accuracy, so the two are reported side by side.
"""

from __future__ import annotations

from torch import Tensor

from pyro_vae_defence.ops.checks import check_on_device, check_tensor, is_integer


def adversarial_accuracy(prediction_ref: Tensor, prediction_adv: Tensor) -> Tensor:
    """1 where the attack left the predicted class unchanged, 0 where it changed it; float ``(N,)``.

    Args:
        prediction_ref, prediction_adv: classes predicted for the reference images and for the
            attacked ones, integers of shape ``(N,)``.

    Raises:
        ValueError: an argument is not a vector of classes, or lengths or devices differ.
    """
    return _equal("prediction_ref", prediction_ref, "prediction_adv", prediction_adv)


def correct(prediction: Tensor, label: Tensor) -> Tensor:
    """1 where the predicted class is the label, 0 elsewhere; as :func:`adversarial_accuracy`."""
    return _equal("prediction", prediction, "label", label)


def _equal(name_a: str, a: Tensor, name_b: str, b: Tensor) -> Tensor:
    for name, classes in ((name_a, a), (name_b, b)):
        check_tensor(name, classes)
        if classes.ndim != 1 or not is_integer(classes):
            raise ValueError(
                f"{name} has shape {tuple(classes.shape)} and dtype {classes.dtype}: "
                "pass integer classes of shape (N,), such as logits.argmax(-1)"
            )
    if len(a) != len(b):
        raise ValueError(f"{name_b} has {len(b)} classes: pass {len(a)}, one per image")
    check_on_device(name_b, b, name_a, a.device)
    return (a == b).float()
