"""fit: it learns, resumes exactly, fails early and clearly."""

from __future__ import annotations

import functools
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import training_runs
from programs import TutorialVAE
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from training_runs import Elsewhere, KilledAfter, assert_equal, check_resumed

from pyro_vae_defence import data
from pyro_vae_defence.models import ConvVAE
from pyro_vae_defence.objectives import BetaELBO, linear_schedule
from pyro_vae_defence.training import (
    FitConfig,
    NonFiniteLossError,
    atomic_save,
    batches,
    evaluate,
    fit,
)

config = functools.partial(training_runs.config, epochs=3)


class FunctionalVAE:
    """No nn.Module: parameters live in Pyro's store."""

    def model(self, x):
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(loc, 1.0).expand([x.shape[0], 2]).to_event(1))
            mean = z.sum(-1)[:, None, None, None].expand(-1, 1, 2, 2)
            pyro.sample("obs", dist.Normal(mean, 1.0).to_event(3), obs=x)

    def guide(self, x):
        scale = pyro.param("scale", torch.ones(2), constraint=dist.constraints.positive)
        with pyro.plate("data", x.shape[0]):
            mean = x.flatten(1).mean(1, keepdim=True).expand(-1, 2)
            pyro.sample("z", dist.Normal(mean, scale).to_event(1))


@pytest.fixture
def images():
    return torch.rand(40, 1, 28, 28, generator=torch.Generator().manual_seed(1))


def loader(images, size=8):
    dataset = data.ImageDataset(
        (images * 255).byte(), torch.zeros(len(images)), "toy", "train", ["0"]
    )
    return data.batches(dataset, size, shuffle=True, labels=False)


def test_defaults_are_the_papers():
    default = FitConfig()
    assert (default.epochs, default.learning_rate) == (300, 5e-4)
    assert (default.schedule, default.factor, default.patience) == ("plateau", 0.5, 10)


def test_training_lowers_the_validation_loss(images):
    images = (images > 0.9).float()
    vae = TutorialVAE()
    result = fit(vae, Trace_ELBO(), loader(images), config(epochs=15), validation=[images])
    assert [entry["epoch"] for entry in result.history] == list(range(1, 16))
    assert result.steps == 15 * 5
    first, last = result.history[0], result.history[-1]
    assert last["validation_nelbo"] < 0.8 * first["validation_nelbo"]
    assert not vae.training


@pytest.mark.parametrize("schedule", ["plateau", "one_cycle", "constant"])
@pytest.mark.parametrize("killed_at", [2, 5, 8, 14])
def test_resumed_equals_uninterrupted(images, tmp_path, schedule, killed_at):
    settings = config(schedule=schedule, checkpoint_every=3)

    def run(path=None, seed=0, left=-1):
        pyro.clear_param_store()  # as a new process would
        torch.manual_seed(seed)
        vae, objective, x = TutorialVAE(), KilledAfter(left), [images]
        result = fit(vae, objective, loader(images), settings, validation=x, checkpoint=path)
        return vae.state_dict(), result.history

    check_resumed(run, tmp_path / "run" / "checkpoint.pt", killed_at, first=3)


def test_annealing_and_loader_generator_are_resumed(images, tmp_path):
    def run(seed, epochs_first):
        pyro.clear_param_store()
        torch.manual_seed(seed)
        vae = TutorialVAE()
        generator = torch.Generator().manual_seed(seed)
        dataset = loader(images).dataset
        batches = data.batches(dataset, 8, shuffle=True, generator=generator, labels=False)
        objective = BetaELBO(linear_schedule(12, end=3.0))
        path = tmp_path / f"{epochs_first}.pt"
        for epochs in (epochs_first, 4):
            pyro.clear_param_store()
            if epochs == 4 and epochs_first != 4:
                vae, objective = TutorialVAE(), BetaELBO(linear_schedule(12, end=3.0))
                generator.manual_seed(77)
            fit(vae, objective, batches, config(epochs=epochs), checkpoint=path)
        return vae.state_dict()

    whole, resumed = run(0, 4), run(0, 2)
    assert_equal(whole, resumed)


class Augmented(torch.utils.data.Dataset):
    """Images that are dimmed at random, in different ways."""

    def __init__(self, images, draw):
        self.images, self.draw = images, draw

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index] * self.draw()


def _sampled(images):
    generator = torch.Generator().manual_seed(int(torch.randint(2**30, ())))
    sampler = torch.utils.data.RandomSampler(images, generator=generator)
    return torch.utils.data.DataLoader(images, 8, sampler=sampler)


def _batch_sampled(images):
    inner = torch.utils.data.BatchSampler(_sampled(images).sampler, 8, False)
    return torch.utils.data.DataLoader(images, batch_sampler=inner)


@pytest.mark.parametrize("killed_at", [2, 5, 8])
@pytest.mark.parametrize(
    "make",
    [
        _sampled,
        _batch_sampled,
        lambda images: torch.utils.data.DataLoader(Augmented(images, random.random), 8),
        lambda images: torch.utils.data.DataLoader(
            Augmented(images, lambda: np.float32(np.random.rand())),  # noqa: NPY002
            8,
        ),
    ],
    ids=["sampler", "batch sampler", "random", "numpy"],
)
def test_resumption_knows_all_generators(images, tmp_path, make, killed_at):
    """Of samplers, NumPy and Python, too, not of torch and the loader alone."""

    def run(path=None, seed=0, left=-1):
        pyro.clear_param_store()  # as a new process would
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        vae, settings = TutorialVAE(), config(epochs=2, checkpoint_every=2)
        result = fit(vae, KilledAfter(left), make(images), settings, checkpoint=path)
        return vae.state_dict(), result.history

    check_resumed(run, tmp_path / "c.pt", killed_at)


def test_resumption_knows_the_generator_of_validation(images, tmp_path):
    """On which the validation loss depends, and on that the plateau rule."""

    def run(epochs, seed, path):
        pyro.clear_param_store()
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        validation = torch.utils.data.DataLoader(images[:9], 4, shuffle=True, generator=generator)
        settings = config(epochs=epochs, schedule="plateau")
        result = fit(
            TutorialVAE(), Trace_ELBO(), [images[9:]], settings,
            validation=validation, checkpoint=path,
        )  # fmt: skip
        return [entry["validation_loss"] for entry in result.history]

    whole = run(3, 0, None)
    run(1, 0, tmp_path / "c.pt")
    assert run(3, 99, tmp_path / "c.pt") == whole


def test_programs_without_a_module_train_and_resume(tmp_path):
    x = torch.rand(16, 1, 2, 2)
    path = tmp_path / "c.pt"

    def run(epochs):
        torch.manual_seed(0)
        pyro.clear_param_store()
        fit(FunctionalVAE(), Trace_ELBO(), [x, x], config(epochs=epochs), checkpoint=path)
        return {k: v.detach().clone() for k, v in pyro.get_param_store().items()}

    run(2)
    resumed = run(4)
    path.unlink()
    whole = run(4)
    assert set(whole) == {"loc", "scale"}
    assert_equal(whole, resumed)
    assert not torch.equal(whole["scale"], torch.ones(2))


@pytest.mark.parametrize("stagnant", [1.0, 0.0, -1.0])
def test_plateau_rule_halves_the_learning_rate(images, stagnant):
    class Stagnant(TraceMeanField_ELBO):
        def loss(self, model, guide, x):
            return stagnant

    result = fit(
        TutorialVAE(),
        Stagnant(),
        loader(images),
        config(epochs=6, learning_rate=1e-3, schedule="plateau", patience=1),
        validation=[images],
    )
    # The first epoch sets the record, two without improvement exceed the patience of one.
    rates = [1e-3, 1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4]
    assert [h["learning_rate"] for h in result.history] == rates


def test_non_finite_loss_fails_before_it_spoils_the_weights(images, tmp_path):
    vae = TutorialVAE()
    path = tmp_path / "c.pt"
    with pytest.raises(
        NonFiniteLossError, match=r"loss is (nan|inf) at epoch 2, step 6 .*lower the learning rate"
    ):
        fit(vae, Exploding(5), loader(images), config(), checkpoint=path)
    assert all(p.isfinite().all() for p in vae.parameters())
    assert torch.load(path, weights_only=True)["epoch"] == 1


class Exploding(TraceMeanField_ELBO):
    def __init__(self, after):
        super().__init__()
        self.after = after

    def loss_and_grads(self, model, guide, x):
        self.after -= 1
        loss = super().loss_and_grads(model, guide, x)
        return loss if self.after >= 0 else float("nan")


def test_checkpoints_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "c.pt"
    atomic_save({"a": 1}, path)
    with pytest.raises(Exception, match="pickle|local object"):
        atomic_save({"a": lambda: None}, path)
    assert torch.load(path, weights_only=True) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_evaluate_is_per_image_and_changes_nothing(images):
    vae = TutorialVAE()
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    vae.train()
    value = evaluate(vae, TraceMeanField_ELBO(), [images[:30], images[30:]])
    assert 0 < value < 10_000
    assert vae.training
    assert all(torch.equal(before[k], v) for k, v in vae.state_dict().items())
    with pytest.raises(ValueError, match="loader is empty"):
        evaluate(vae, TraceMeanField_ELBO(), [])


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        ([], "validation is empty"),
        ([torch.full((2, 1, 28, 28), 255.0)], "validation's first batch must lie in"),
        (lambda: [], "validation must be a list of batches or a DataLoader, got <function"),
    ],
)
def test_no_epoch_is_lost_to_what_cannot_be_validated_on(images, validation, message):
    vae = TutorialVAE()
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        fit(vae, Trace_ELBO(), [images[:4]], config(), validation=validation)
    assert all(torch.equal(before[k], v) for k, v in vae.state_dict().items())


def test_fewer_epochs_than_a_checkpoint_has_are_no_shorter_run(images, tmp_path):
    path = tmp_path / "c.pt"
    vae, batches = TutorialVAE(), [images[:4]]
    assert len(fit(vae, Trace_ELBO(), batches, config(epochs=2), checkpoint=path).history) == 2
    with pytest.raises(ValueError, match="epochs=1 is less than the 2 that checkpoint .*c.pt has"):
        fit(vae, Trace_ELBO(), batches, config(epochs=1), checkpoint=path)


def test_batches_are_moved_to_the_device_of_the_vae(images):
    vae, x = ConvVAE(), Elsewhere(images[:4])
    result = fit(vae, BetaELBO(), [(x, None)], config(epochs=1), validation=[x])
    evaluate(vae, BetaELBO(), [x])
    # A look at validation, a step, two validations, the mean posterior variance, the evaluation.
    assert x.asked == [torch.device("cpu")] * 6
    assert result.mean_posterior_variance["z"].shape == (64,)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_on_a_gpu_takes_batches_from_the_cpu(images, tmp_path):
    vae = ConvVAE().cuda()
    fit(vae, BetaELBO(), loader(images), config(), validation=[images], checkpoint=tmp_path / "c")
    resumed = ConvVAE().cuda()
    fit(
        resumed,
        BetaELBO(),
        loader(images),
        config(),
        validation=[images],
        checkpoint=tmp_path / "c",
    )
    assert all(torch.equal(vae.state_dict()[k], v) for k, v in resumed.state_dict().items())


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
            ({"learning_rate": -1.0}, "learning_rate must be a positive finite number, got -1.0"),
            ({"learning_rate": "1e-3"}, "learning_rate must be a positive finite number, got '1e"),
            ({"learning_rate": True}, "learning_rate must be a positive finite number, got True"),
            ({"schedule": "cosine"}, "schedule must be 'plateau', 'one_cycle' or 'constant'"),
            ({"factor": 1.5}, "factor must lie in (0, 1), got 1.5"),
            ({"factor": "0.5"}, "factor must lie in (0, 1), got '0.5'"),
            ({"patience": -1}, "patience must be an integer of at least 0"),
            ({"patience": 1.5}, "patience must be an integer of at least 0, got 1.5"),
            ({"checkpoint_every": 0}, "checkpoint_every must be an integer of at least 1"),
            ({"checkpoint_every": 2.5}, "checkpoint_every must be an integer of at least 1"),
            ({"compile": "false"}, "compile must be True or False, got 'false'"),
            ({"posterior_variance": "no"}, "posterior_variance must be True or False"),
            ({"progress": 0}, "progress must be True or False, got 0"),
            ({"name": 3}, "name must be text, got 3"),
        ],
    )
    def test_config(self, changes, message):
        import re

        with pytest.raises(ValueError, match=re.escape(message)):
            config(**changes)

    def test_plateau_needs_validation(self, images):
        with pytest.raises(ValueError, match="watches the validation loss"):
            fit(TutorialVAE(), Trace_ELBO(), loader(images), config(schedule="plateau"))

    def test_objective_must_be_an_elbo(self, images):
        with pytest.raises(ValueError, match="objective must be a Pyro ELBO"):
            fit(TutorialVAE(), nn.MSELoss(), loader(images), config())

    def test_what_is_called_later_is_checked_at_the_start(self, images):
        seen = []

        class Counting(TraceMeanField_ELBO):
            def loss_and_grads(self, *arguments):
                seen.append(1)
                return super().loss_and_grads(*arguments)

        for settings, message in (
            ({"on_epoch": "print"}, "on_epoch must be callable"),
            ({"config": {"epochs": 1}}, "config must be a FitConfig"),
        ):
            given = {"config": config(), **settings}
            with pytest.raises(ValueError, match=message):
                fit(TutorialVAE(), Counting(), loader(images), **given)
        assert not seen
        with pytest.raises(ValueError, match="objective must be a Pyro ELBO"):
            evaluate(TutorialVAE(), Trace_ELBO, loader(images))

    def test_images_out_of_range(self, images):
        with pytest.raises(ValueError, match=r"loader's first batch must lie in \[0, 1\]"):
            fit(TutorialVAE(), Trace_ELBO(), [255 * images], config())

    def test_empty_loader(self):
        with pytest.raises(ValueError, match="loader is empty"):
            fit(TutorialVAE(), Trace_ELBO(), [], config())

    def test_unregistered_parameters(self, images):
        class Forgetful(TutorialVAE):
            def guide(self, x):
                with pyro.plate("data", x.shape[0]):
                    h = nn.functional.softplus(self.hidden(x.reshape(-1, 784)))
                    scale = torch.exp(self.log_scale(h))
                    pyro.sample("latent", dist.Normal(self.loc(h), scale).to_event(1))

        with pytest.raises(ValueError, match=r"'hidden.weight'.* would not be trained"):
            fit(Forgetful(), Trace_ELBO(), loader(images), config())

    def test_names_taken_by_another_vae(self, images):
        fit(TutorialVAE(), Trace_ELBO(), loader(images), config(epochs=1))
        with pytest.raises(ValueError, match=r"pyro.clear_param_store\(\) first"):
            fit(TutorialVAE(), Trace_ELBO(), loader(images), config())

    def test_non_contiguous_parameters(self, images):
        # Pyro's store copies them, so that plain SVI would train the copies.
        vae = ConvVAE()
        vae.decoder.to(memory_format=torch.channels_last)
        with pytest.raises(ValueError, match="keep parameters contiguous"):
            fit(vae, Trace_ELBO(), loader(images), config())

    def test_checkpoint_of_another_run(self, images, tmp_path):
        path = tmp_path / "c.pt"
        fit(TutorialVAE(), Trace_ELBO(), loader(images), config(), checkpoint=path)
        pyro.clear_param_store()
        with pytest.raises(ValueError, match="written with other settings .*learning_rate"):
            fit(
                TutorialVAE(), Trace_ELBO(), loader(images), config(learning_rate=1.0),
                checkpoint=path,
            )  # fmt: skip
        pyro.clear_param_store()
        with pytest.raises(ValueError, match="belongs to another architecture"):
            fit(TutorialVAE(z_dim=3), Trace_ELBO(), loader(images), config(), checkpoint=path)
        with pytest.raises(ValueError, match="written with other settings .*another"):
            fit(
                TutorialVAE(), Trace_ELBO(), loader(images), config(name="another"),
                checkpoint=path,
            )  # fmt: skip
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(ValueError, match="cannot be read .* delete it"):
            fit(TutorialVAE(), Trace_ELBO(), loader(images), config(), checkpoint=path)


# --- Device ---------------------------------------------------------------------------------------


def test_a_device_that_is_there_already_changes_nothing(images):
    weights = []
    for where in ({}, {"device": "cpu"}):
        torch.manual_seed(3)
        pyro.clear_param_store()
        vae = TutorialVAE()
        fit(vae, Trace_ELBO(), loader(images), config(epochs=1), **where)
        weights.append(vae.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name])


def test_all_modules_and_batches_go_to_the_device(images, monkeypatch):
    class Parts:  # no module itself
        def __init__(self):
            self.parts = [TutorialVAE(), nn.Linear(2, 2)]

        def model(self, x, y):
            return self.parts[0].model(x)

        def guide(self, x, y):
            return self.parts[0].guide(x)

    vae = Parts()
    # Nothing can be trained there, which shows as soon as a value is asked for.
    with pytest.raises(RuntimeError, match="meta"):
        fit(vae, Trace_ELBO(), [(images, images)], config(), device="meta")
    assert {p.device.type for part in vae.parts for p in part.parameters()} == {"meta"}
    for name in ("check_images", "_check_finite"):
        monkeypatch.setattr(
            batches.program if name[0] == "c" else batches, name, lambda *a, **k: a[0]
        )
    reader = batches.Reader(vae, device=torch.device("meta"))
    assert {v.device.type for v in next(reader.read([(images, images)], "loader"))} == {"meta"}
    plain = batches.Reader(FunctionalVAE())
    assert next(plain.read([images], "loader"))[0].device.type == "cpu"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_goes_to_the_gpu_and_stays_there(images):
    vae = TutorialVAE()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    batches_there = data.batches(
        data.ImageDataset((images * 255).byte(), torch.zeros(40), "toy", "train", ["0"]),
        8, labels=False, device="cuda",
    )  # fmt: skip
    fit(vae, Trace_ELBO(), batches_there, config(epochs=1), device="cuda")
    for name, value in vae.state_dict().items():
        assert value.device.type == "cuda"
        assert not torch.equal(value.cpu(), before[name])


@pytest.mark.parametrize("device", ["nowhere", "cuda:99", 1.5])
def test_a_device_that_is_not_there(images, device):
    vae = TutorialVAE()
    with pytest.raises(ValueError, match=f"device={device!r} is no device that this machine has"):
        fit(vae, Trace_ELBO(), loader(images), config(), device=device)
    with pytest.raises(ValueError, match=f"device={device!r} is no device that this machine has"):
        data.batches(images, 8, device=device)
