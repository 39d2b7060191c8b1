"""What fit can do beyond the paper: clipping, averaging, bfloat16, compiled layers, logs, a
metric."""

from __future__ import annotations

import functools
import re
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import HierarchicalVAE, LinearGaussianVAE, TutorialVAE
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from training_runs import Killed, KilledAfter, assert_equal, check_resumed, config

from pyro_vae_defence.models import ConvVAE
from pyro_vae_defence.models.program import mean_posterior_variance
from pyro_vae_defence.objectives import AVAE
from pyro_vae_defence.training import NonFiniteLossError, evaluate, fit
from pyro_vae_defence.training.acceleration import in_bfloat16
from pyro_vae_defence.training.averaging import WeightAverage


@pytest.fixture
def images():
    return torch.rand(12, 1, 28, 28, generator=torch.Generator().manual_seed(1))


def new(vae=TutorialVAE, seed=0):
    """A VAE in what might be a new process."""
    pyro.clear_param_store()
    torch.manual_seed(seed)
    return vae()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_norm": 0.0}, "clip_norm must be a positive finite number, got 0.0"),
        ({"ema_decay": 1.0}, "ema_decay must lie in (0, 1), or be None for no average; got 1.0"),
        ({"precision": "half"}, "precision must be 'float32' or 'bfloat16', got 'half'"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**changes)


# --- Clipping -------------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """E log p(x | z) - KL = -(a - 3)^2 / 2 - (b + 4)^2 / 2 per image, up to a constant."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(()))
        self.b = nn.Parameter(torch.zeros(()))

    def model(self, x):
        pyro.module("quadratic", self)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            mean = torch.stack([self.a - 3, self.b + 4]).expand(len(x), 1, 1, 2)
            pyro.sample("obs", dist.Normal(mean, 1.0).to_event(3), obs=x)

    def guide(self, x):
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))


@pytest.mark.parametrize(("limit", "norm"), [(None, 10.0), (2.5, 2.5), (50.0, 10.0)])
def test_the_gradient_of_the_batch_is_clipped_by_its_norm(monkeypatch, limit, norm):
    used = []
    step = torch.optim.Adam.step

    def recording(self, *args, **kwargs):
        used.append(torch.stack([p.grad.clone() for p in self.param_groups[0]["params"]]))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", recording)
    two_images = torch.zeros(2, 1, 1, 2)  # the gradient of their summed loss is 2 (-3, 4)
    fit(Quadratic(), TraceMeanField_ELBO(), [two_images], config(epochs=1, clip_norm=limit))
    torch.testing.assert_close(used[0], norm * torch.tensor([-0.6, 0.8]))


def test_a_gradient_that_is_not_finite_never_reaches_the_weights():
    class Broken(TraceMeanField_ELBO):
        def loss_and_grads(self, *args):
            loss = super().loss_and_grads(*args)
            vae.a.grad.fill_(float("nan"))
            return loss

    vae = Quadratic()
    with pytest.raises(NonFiniteLossError, match="norm of the gradient is nan at epoch 1, step 1"):
        fit(vae, Broken(), [torch.zeros(2, 1, 1, 2)], config(clip_norm=1.0))
    assert vae.a.item() == vae.b.item() == 0.0


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_gradient_whose_square_overflows_ends_the_training(clip_norm):
    """Adam's mean of squares would be infinite, and its steps zero ever after, in silence."""

    class Outlier(TraceMeanField_ELBO):
        def loss_and_grads(self, *args):
            loss = super().loss_and_grads(*args)
            vae.a.grad.fill_(1e25)
            return loss

    vae = Quadratic()
    with pytest.raises(NonFiniteLossError, match="norm of the gradient is inf .*clip_norm"):
        fit(vae, Outlier(), [torch.zeros(2, 1, 1, 2)], config(clip_norm=clip_norm))
    assert vae.a.item() == vae.b.item() == 0.0


# --- Averaging ------------------------------------------------------------------------------------


def test_average_follows_its_formula(float64):
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    average = WeightAverage({"w": weight}, decay=0.4)
    expected = weight.detach().clone()
    for step, decay in [(1, 2 / 11), (2, 3 / 12), (3, 4 / 13), (4, 5 / 14), (5, 0.4), (6, 0.4)]:
        with torch.no_grad():
            weight += step
        average.update(step)
        expected = decay * expected + (1 - decay) * weight.detach()
        torch.testing.assert_close(average.values["w"], expected)


def test_average_is_exchanged_exactly_and_back_after_an_error():
    weight = nn.Parameter(torch.rand(5))
    average = WeightAverage({"w": weight}, decay=0.9)
    with torch.no_grad():
        weight.copy_(torch.rand(5))
    now, mean = weight.detach().clone(), average.values["w"].clone()

    def interrupted():
        assert torch.equal(weight, mean)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), average.swapped():
        interrupted()
    assert torch.equal(weight, now)
    assert torch.equal(average.values["w"], mean)


def test_average_is_validated_and_left_in_the_end(images, tmp_path):
    path = tmp_path / "c.pt"
    seen = []
    vae = new()
    result = fit(
        vae, TraceMeanField_ELBO(), [images], config(epochs=4, ema_decay=0.9),
        validation=[images], checkpoint=path,
        on_epoch=lambda entry: seen.append(vae.loc.weight.detach().clone()),
    )  # fmt: skip
    state = torch.load(path, weights_only=True)
    assert torch.equal(vae.loc.weight, seen[-1])
    assert torch.equal(vae.loc.weight, state["average"]["loc.weight"])
    assert not torch.equal(vae.loc.weight, state["weights"]["loc.weight"])
    # The noise of validation is small against what a step changes: the final weights were
    # validated.
    final = [evaluate(vae, TraceMeanField_ELBO(), [images]) for _ in range(5)]
    assert abs(result.history[-1]["validation_nelbo"] - sum(final) / 5) < 3 * (
        max(final) - min(final)
    )
    # The average was not trained on: the weights go the way they go without one.
    plain = new()
    fit(plain, TraceMeanField_ELBO(), [images], config(epochs=4), validation=[images])
    assert torch.equal(plain.loc.weight, state["weights"]["loc.weight"])


@pytest.mark.parametrize("kind", [TutorialVAE, ConvVAE])
def test_average_and_clipping_are_resumed(images, tmp_path, kind):
    """A ConvVAE has other names in Pyro's store whenever it is made."""

    def run(name, *epochs):
        for number in epochs:
            vae = new(kind)
            fit(
                vae, TraceMeanField_ELBO(), [images], checkpoint=tmp_path / name,
                config=config(epochs=number, ema_decay=0.9, clip_norm=100.0),
            )  # fmt: skip
        return vae.state_dict()

    whole, resumed, again = run("whole", 5), run("parts", 2, 5), run("parts", 5)
    assert_equal(whole, resumed)
    assert_equal(whole, again)
    with pytest.raises(ValueError, match=r"other settings .*'ema_decay': \(0.9, None\)"):
        fit(
            new(kind), TraceMeanField_ELBO(), [images], config(epochs=5, clip_norm=100.0),
            checkpoint=tmp_path / "whole",
        )  # fmt: skip


def test_checkpoint_of_an_older_format_is_refused(images, tmp_path):
    torch.save({"format": 1}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="has format 1, this version reads 4; delete it"):
        fit(TutorialVAE(), Trace_ELBO(), [images], config(), checkpoint=tmp_path / "c.pt")


def test_what_a_killed_process_left_is_removed(images, tmp_path):
    (tmp_path / ".c.pt.abc.partial").write_bytes(b"half a file")
    (tmp_path / ".d.pt.abc.partial").write_bytes(b"another run's")
    fit(TutorialVAE(), Trace_ELBO(), [images], config(), checkpoint=tmp_path / "c.pt")
    assert {p.name for p in tmp_path.iterdir()} == {"c.pt", ".d.pt.abc.partial"}


def test_resumption_restores_generators_before_the_next_batch_is_fetched(images, tmp_path):
    """A loader that draws noise when it fetches, killed after each of the three batches."""

    class Noisy:
        def __iter__(self):
            for batch in images.split(4):
                yield (batch + 0.1 * torch.rand(batch.shape)).clamp(max=1.0)

    def run(path=None, seed=0, left=-1):
        vae, objective, settings = new(seed=seed), KilledAfter(left), config(checkpoint_every=1)
        result = fit(vae, objective, Noisy(), settings, validation=[images], checkpoint=path)
        return vae.state_dict(), result.history

    for killed_at in (1, 2, 4):
        check_resumed(run, tmp_path / str(killed_at), killed_at)


def test_death_between_the_last_batch_and_validation_is_resumed(images, tmp_path):
    """The checkpoint of an epoch's last step must bring back the noise that validation draws."""

    class DeadlyValidation:
        def __iter__(self):
            raise Killed

    def run(path, validation):
        vae = new()
        result = fit(
            vae, TraceMeanField_ELBO(), images.split(4), config(checkpoint_every=3),
            validation=validation, checkpoint=path,
        )  # fmt: skip
        return vae.state_dict(), [entry["validation_loss"] for entry in result.history]

    whole, losses = run(None, [images])
    with pytest.raises(Killed):
        run(tmp_path / "c.pt", DeadlyValidation())
    resumed, resumed_losses = run(tmp_path / "c.pt", [images])
    assert losses == resumed_losses
    assert_equal(whole, resumed)


def test_what_on_epoch_draws_does_not_change_the_run(images):
    def run(on_epoch):
        vae = new()
        fit(vae, TraceMeanField_ELBO(), [images], config(), on_epoch=on_epoch)
        return vae.loc.weight

    assert torch.equal(run(None), run(lambda entry: torch.rand(3)))


def test_what_on_epoch_computes_does_not_change_running_statistics(images):
    def run(look):
        vae = new()
        vae.hidden = nn.Sequential(vae.hidden, nn.BatchNorm1d(16))
        modes = []

        def on_epoch(entry):
            modes.append(vae.hidden.training)
            if look:
                vae.hidden(images.flatten(1) + 1.0)

        fit(vae, TraceMeanField_ELBO(), [images], config(), on_epoch=on_epoch)
        assert not any(modes)
        return vae.hidden[1].running_mean

    assert torch.equal(run(False), run(True))


# --- bfloat16 and compilation ---------------------------------------------------------------------


def test_sites_stay_float32_around_bfloat16_layers(images):
    vae = ConvVAE()
    layers = []
    vae.decoder[4].register_forward_hook(lambda module, x, y: layers.append(y.dtype))
    guide = poutine.trace(in_bfloat16(vae.guide)).get_trace(images)
    replayed = poutine.replay(in_bfloat16(vae.model), trace=guide)
    model = poutine.trace(replayed).get_trace(images)
    guide.compute_log_prob()
    model.compute_log_prob()
    sites = [guide.nodes["z"], model.nodes["z"], model.nodes["obs"]]
    for site in sites:
        assert site["log_prob"].dtype == site["value"].dtype == torch.float32
        assert site["log_prob"].isfinite().all()
    assert layers == [torch.bfloat16]
    # It is the same model to the precision of 8 bits, and not the very same.
    with torch.no_grad():
        exact = vae.posterior(images).mean
    difference = (guide.nodes["z"]["fn"].mean - exact).abs().max() / exact.abs().max()
    assert 0 < difference < 2**-5


@pytest.mark.parametrize("objective", [TraceMeanField_ELBO, AVAE])
def test_bfloat16_gradients_are_close_to_exact_ones(images, objective):
    def gradients(wrap):
        vae = new(ConvVAE)
        objective().loss_and_grads(wrap(vae.model), wrap(vae.guide), images)
        return torch.cat([p.grad.flatten() for p in vae.parameters()])

    exact, low = gradients(lambda program: program), gradients(in_bfloat16)
    assert low.dtype == torch.float32
    assert torch.cosine_similarity(exact, low, dim=0) > 0.99
    assert not torch.equal(exact, low)


def test_bfloat16_leaves_programs_of_any_kind_alone():
    """Nested plates, a Gamma site, a mask of dimensions, no layers: nothing to lower, nothing
    lost."""
    vae = HierarchicalVAE()
    x = torch.rand(3, 1, 4, 4)
    torch.manual_seed(1)
    plain = Trace_ELBO(max_plate_nesting=2).loss(vae.model, vae.guide, x)
    torch.manual_seed(1)
    low = Trace_ELBO(max_plate_nesting=2).loss(in_bfloat16(vae.model), in_bfloat16(vae.guide), x)
    assert plain == low


def test_training_in_bfloat16_learns(images):
    images = (images > 0.9).float()
    vae = new()
    result = fit(
        vae, TraceMeanField_ELBO(), [images], validation=[images],
        config=config(epochs=40, precision="bfloat16"),
    )  # fmt: skip
    first, last = result.history[0], result.history[-1]
    assert last["validation_nelbo"] < 0.8 * first["validation_nelbo"]
    assert all(p.dtype == torch.float32 for p in vae.parameters())


# The compiler itself looks at the .grad of activations.
quiet_compiler = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@quiet_compiler
def test_compiled_children_train_alike_and_are_restored(images, monkeypatch):
    # The compiler's front end alone, which needs no C++ compiler and no minute.
    eager = functools.partialmethod(nn.Module.compile, backend="eager")
    monkeypatch.setattr(nn.Module, "compile", eager)

    def run(compile):
        vae = new()
        calls = []
        vae.decoder.register_forward_pre_hook(
            lambda module, x: calls.append(module._compiled_call_impl is not None)
        )
        fit(vae, TraceMeanField_ELBO(), [images], config(compile=compile))
        assert set(calls) == {compile}
        assert all(module._compiled_call_impl is None for module in vae.modules())
        return vae.state_dict()

    plain, compiled = run(False), run(True)
    for name, value in plain.items():
        torch.testing.assert_close(value, compiled[name])


@pytest.mark.slow
@quiet_compiler
def test_compiled_code_trains_alike(images):
    def run(compile):
        vae = new()
        fit(vae, TraceMeanField_ELBO(), [images], config(compile=compile))
        return vae.state_dict()

    plain, compiled = run(False), run(True)
    for name, value in plain.items():
        torch.testing.assert_close(value, compiled[name], rtol=1e-3, atol=1e-4)


def test_only_modules_are_compiled():
    with pytest.raises(ValueError, match=r"compile=True needs .* got LinearGaussianVAE"):
        fit(LinearGaussianVAE(), Trace_ELBO(), [torch.rand(2, 1, 4, 4)], config(compile=True))


# --- TensorBoard ----------------------------------------------------------------------------------


def test_missing_tensorboard_names_the_extra(images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [n for n in sys.modules if n.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match=r"pyro-vae-defence\[tensorboard\]"):
        fit(TutorialVAE(), Trace_ELBO(), [images], config(), tensorboard=tmp_path)


def test_tensorboard_has_every_epoch_once_also_after_resumption(images, tmp_path):
    pytest.importorskip("tensorboard", reason="extra tensorboard not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for epochs in (2, 5):
        vae = new()
        result = fit(
            vae, Trace_ELBO(), [images], config(epochs=epochs), validation=[images],
            checkpoint=tmp_path / "c.pt", tensorboard=tmp_path / "log",
        )  # fmt: skip
    log = EventAccumulator(str(tmp_path / "log")).Reload()
    assert set(log.Tags()["scalars"]) == result.history[0].keys() - {"epoch"}
    for name in ("train_loss", "validation_nelbo", "learning_rate"):
        events = log.Scalars(name)
        assert [event.step for event in events] == [1, 2, 3, 4, 5]
        logged = torch.tensor([event.value for event in events])
        torch.testing.assert_close(logged, torch.tensor([entry[name] for entry in result.history]))


# --- The mean posterior variance ------------------------------------------------------------------


def test_mean_posterior_variance_is_stored_with_the_model(images):
    vae = ConvVAE()
    result = fit(vae, Trace_ELBO(), [images[:8], images[8:]], config(epochs=1, ema_decay=0.5))
    expected = mean_posterior_variance(vae, [images])
    assert result.mean_posterior_variance.keys() == {"z"}
    torch.testing.assert_close(result.mean_posterior_variance["z"], expected["z"])
    assert vae.mean_posterior_variance is result.mean_posterior_variance


def test_mean_posterior_variance_can_be_skipped_and_is_for_vaes_that_keep_it(images):
    vae = ConvVAE()
    result = fit(vae, Trace_ELBO(), [images], config(epochs=1, posterior_variance=False))
    assert result.mean_posterior_variance is vae.mean_posterior_variance is None
    other = TutorialVAE()
    assert fit(other, Trace_ELBO(), [images], config()).mean_posterior_variance is None
    assert not hasattr(other, "mean_posterior_variance")


def test_a_flipped_bit_in_a_checkpoint_is_refused(images, tmp_path):
    path = tmp_path / "c.pt"
    fit(TutorialVAE(), Trace_ELBO(), [images], config(), checkpoint=path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="the checksum of .* does not match"):
        fit(TutorialVAE(), Trace_ELBO(), [images], config(), checkpoint=path)


class SpoiledGradient(Trace_ELBO):
    def loss_and_grads(self, model, guide, *args):
        loss = super().loss_and_grads(model, guide, *args)
        next(p for _, p in pyro.get_param_store().named_parameters()).grad.fill_(float("nan"))
        return loss


def test_a_nan_gradient_of_a_finite_loss_spoils_no_weights(images, tmp_path):
    vae = TutorialVAE()
    before = [p.detach().clone() for p in vae.parameters()]
    with pytest.raises(NonFiniteLossError, match="gradient is nan at epoch 1, step 1"):
        fit(vae, SpoiledGradient(), [images], config(), checkpoint=tmp_path / "c.pt")
    assert all(torch.equal(a, b) for a, b in zip(before, vae.parameters()))
    assert not (tmp_path / "c.pt").exists()


def test_loaders_that_are_read_once_and_places_without_room_are_found_first(images, tmp_path):
    spoiled = SpoiledGradient()  # raises at the first step
    with pytest.raises(ValueError, match="loader can be read only once"):
        fit(TutorialVAE(), spoiled, (x for x in images.split(8)), config())
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "c.pt"):
        with pytest.raises(ValueError, match="cannot be written"):
            fit(TutorialVAE(), spoiled, [images], config(), checkpoint=path)


def test_persistent_workers_cannot_be_continued(images, tmp_path):
    path = tmp_path / "c.pt"
    vae = TutorialVAE()
    fit(vae, Trace_ELBO(), [images], config(epochs=1), checkpoint=path)
    loader = torch.utils.data.DataLoader(images, 8, num_workers=1, persistent_workers=True)
    with pytest.raises(ValueError, match="random states are in no checkpoint"):
        fit(vae, Trace_ELBO(), loader, config(epochs=2), checkpoint=path)
