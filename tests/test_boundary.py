"""Public calls give the same whatever the caller's context, and refuse what is no number."""

import copy
import dataclasses
import io
import pickle
import threading

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from programs import LinearGaussianVAE, TutorialVAE

from pyro_vae_defence import attacks, defence, mcmc, metrics, models, training
from pyro_vae_defence.attacks.interop import LatentClassifier
from pyro_vae_defence.models import program
from pyro_vae_defence.models.classifier import LinearClassifier
from pyro_vae_defence.ops.balls import L1, L2, Linf
from pyro_vae_defence.ops.boundary import public
from pyro_vae_defence.ops.checks import check_integer, check_positive
from pyro_vae_defence.ops.streams import Streams


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _images(count=3):
    return torch.rand(count, 1, 4, 4, generator=_generator(1))


VAE = LinearGaussianVAE()
CALLS = {
    "attack": lambda x: attacks.PGD(attacks.symmetric_kl(VAE), Linf(0.1), 3)(x, _generator()).x_adv,
    "defence": lambda x: defence.MCMCDefence(VAE, num_samples=2, warmup_steps=1)(
        x, _generator()
    ).samples["z"],
    "mode": lambda x: defence.PosteriorModeDefence(VAE)(x, _generator()).latents["z"],
    "margin": lambda x: torch.stack(
        attacks.r_margin(
            VAE,
            attacks.PGD(attacks.maximum_damage(VAE), L2(1.0), 2),
            x,
            0.1,
            num_draws=3,
            generator=_generator(),
        )
    ),
    "nll": lambda x: metrics.nll(VAE, x, num_samples=3, generator=_generator()),
    "metric": lambda x: program.mean_posterior_variance(VAE, [x])["z"],
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_results_do_not_depend_on_the_callers_context(call):
    expected = call(_images())
    with torch.no_grad():
        assert torch.equal(call(_images()), expected)
    with torch.inference_mode():
        made_there = _images()
        assert torch.equal(call(made_there), expected)
    assert torch.equal(call(made_there), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(call(_images()), expected)
    torch.set_default_dtype(torch.float64)
    try:
        images = _images().float()
        expected = call(images)
        assert expected.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(call(images), expected)


def test_a_public_call_keeps_grad_mode_and_says_no_gradient_in_inference_mode():
    modes = public(lambda: (torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
    assert modes() == (True, False)
    with torch.no_grad():
        assert modes() == (False, False)
    with torch.inference_mode():
        assert modes() == (False, False)
        latents = {"z": torch.zeros(2)}
        assert not public(lambda given: given["z"].is_inference())(latents)
    kept = {"z": torch.zeros(2)}
    assert public(lambda given: given)(kept) is kept


def test_public_calls_of_threads_wait_for_each_other():
    inside, most, met = [], [], threading.Barrier(4)

    @public
    def call():
        inside.append(1)
        most.append(len(inside))
        threading.Event().wait(0.005)
        inside.pop()

    def run():
        met.wait()
        call()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]


def test_a_stock_kernel_runs_without_gradients():
    def kernel(model):
        return pyro.infer.HMC(model, num_steps=2, step_size=0.1)

    guard = defence.MCMCDefence(VAE, kernel, num_samples=2, warmup_steps=1)
    expected = guard(_images(2), _generator()).samples["z"]
    with torch.no_grad():
        found = guard(_images(2), _generator()).samples["z"]
    assert torch.equal(found, expected)
    assert not found.requires_grad


# --- Precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_noise_is_that_of_float32_rounded(dtype):
    streams = Streams.create(2, seed=3)
    uniform = streams.uniform(0, 0, (4096,), dtype)
    wide = streams.uniform(0, 0, (4096,), torch.float32).clamp(min=torch.finfo(dtype).tiny)
    assert torch.equal(uniform, wide.to(dtype))
    assert (uniform > 0).all()
    assert (uniform <= 1).all()
    normal = streams.normal(0, 0, (4097,), dtype)
    assert torch.equal(normal, streams.normal(0, 0, (4097,), torch.float32).to(dtype))
    assert normal.isfinite().all()


def test_half_precision_is_refused_by_name():
    x = _images().half()
    with pytest.raises(ValueError, match="x has dtype torch.float16"):
        defence.NoDefence(VAE)(x)
    with pytest.raises(ValueError, match="x has dtype torch.bfloat16"):
        attacks.random_noise(_images().bfloat16(), Linf(0.1))
    energies = mcmc.BatchedHMC(potential_fn=lambda z: z["z"].square().sum(1))
    with pytest.raises(ValueError, match="the energy has dtype torch.float16"):
        energies.sample({"z": torch.zeros(2, 3, dtype=torch.float16)})


def test_numbers_of_numpy_are_numbers_and_true_is_none():
    attack = attacks.PGD(attacks.symmetric_kl(VAE), Linf(0.1), num_steps=np.int64(3))
    assert type(attack.num_steps) is int
    assert attack.num_steps == 3
    guard = defence.MCMCDefence(VAE, num_samples=np.int64(2), warmup_steps=np.int32(1))
    assert type(guard.num_samples) is int
    assert guard(_images()).settings["num_samples"] == 2
    kernel = mcmc.BatchedHMC(VAE.model, step_size=np.float32(0.5), num_steps=np.int64(2))
    assert type(kernel.step_size) is float
    assert type(kernel.num_steps) is int
    for check in (check_integer, check_positive):
        with pytest.raises(ValueError, match="got True"):
            check("steps", True)


def test_an_excess_by_rounding_is_shown():
    x = _images(1)
    x[0, 0, 0, 0] = 1 + 2.0**-20
    with pytest.raises(ValueError, match=r"to 1\.00000095"):
        defence.NoDefence(VAE)(x)


# --- Not a number ---------------------------------------------------------------------------------


class _Broken(LinearGaussianVAE):
    """NaN out of the guide for the second image."""

    def guide(self, x):
        with pyro.plate("data", x.shape[0]):
            mean = torch.where(x[:, 0, 0, :1] == 0.5, torch.nan, x.flatten(1)[:, :3])
            pyro.sample("z", dist.Normal(mean, 0.1, validate_args=False).to_event(1))


def test_reconstructions_and_scores_that_are_none_are_found():
    x = _images()
    x[:, 0, 0, 0] = torch.tensor([0.25, 0.5, 0.75])
    vae = _Broken()
    with pyro.validation_enabled(False):
        with pytest.raises(ValueError, match=r"1 of 3 rows \(first rows: \[1\]\)"):
            defence.NoDefence(vae)(x)
        with pytest.raises(ValueError, match=r"score of classes .* 1 of 3 rows"):
            LinearClassifier(3, 3).classify(vae, x)

    def none(latents):
        return latents[:, :1] * torch.tensor([torch.nan, 1.0])

    defended = defence.DefendedClassifier(defence.NoDefence(VAE), none)
    with pytest.raises(ValueError, match=r"score of classes .* 3 of 3 rows"):
        defended.predict(x)


def test_metrics_rank_no_nan():
    y = torch.rand(2, 1, 28, 28, generator=_generator())
    for value in (torch.nan, torch.inf):
        broken = y.clone()
        broken[0, 0, 3, 3] = value
        for pair in ((broken, y), (y, broken)):
            with pytest.raises(ValueError, match=r"[xy] is not finite for 1 of 2 rows"):
                metrics.ms_ssim(*pair)
            found = public(lambda pair=pair: metrics.ms_ssim(*pair))()
            assert found[0].isnan()
            assert found[1] == 1.0
    with pytest.raises(ValueError, match="means has entries that are not finite"):
        metrics.active_units(torch.tensor([[1.0, torch.nan], [2.0, 1.0]]))


def test_images_and_features_that_are_none_are_named():
    x = _images()
    x[1, 0, 2, 2] = torch.nan
    with pytest.raises(ValueError, match=r"x is not finite for 1 of 3 rows \(first rows: \[1\]\)"):
        metrics.nll(VAE, x, num_samples=2)
    features = torch.rand(4, 3, generator=_generator())
    with pytest.raises(ValueError, match="other is not finite for 1 of 4 rows"):
        metrics.frechet_distance(features, features.clone().fill_diagonal_(torch.inf)[[0, 3, 3, 3]])
    with pytest.raises(ValueError, match="y is not finite for 1 of 3 rows"):
        metrics.fid(_images(), x)


def test_a_radius_that_float32_cannot_square_is_refused():
    for ball in (L2, L1):
        result = attacks.PGD(attacks.symmetric_kl(VAE), ball(1e12), 2)(_images(), _generator())
        assert (result.x_adv != result.x_ref).flatten(2).any(2).all()
        with pytest.raises(ValueError, match=r"must be at most 1e\+12"):
            ball(1e20)


def test_an_attack_without_a_finite_gradient_says_so():
    def objective(x_ref):
        # The root of zero has an infinite slope, times zero.
        return lambda x: (0.0 * x).flatten(1).sum(1).sqrt() + 1.0

    with pytest.raises(ValueError, match="gradient of objective is not finite"):
        attacks.PGD(objective, Linf(0.1), 2)(_images())
    assert attacks.Square(objective, Linf(0.1), 2)(_images()).objective.eq(1).all()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("black", [slice(1, 2), slice(None)])
def test_whether_a_gradient_is_finite_is_asked_of_all_micro_batches(black, tmp_path):
    ends = []

    def objective(x_ref):
        total = x_ref.flatten(1).sum(1)
        if ends and ends.pop():
            raise KeyboardInterrupt
        return lambda x: x.flatten(1).sum(1) + (total + 0.0 * x.flatten(1).sum(1)).sqrt()

    x = _images()
    x[black] = 0.0
    for batch_size in (1, 3):
        path = tmp_path / f"{batch_size}.pt"
        attack = attacks.PGD(objective, Linf(0.1), 2, batch_size=batch_size, checkpoint=path)
        if len(x[black]) == len(x):
            ends[:] = [True, False, False]  # a second call goes on from what the first has left
            if batch_size == 1:
                with pytest.raises(KeyboardInterrupt):
                    attack(x, _generator())
                assert path.exists()
            ends.clear()
            with pytest.raises(ValueError, match="gradient of objective is not finite"):
                attack(x, _generator())
            # The file is gone, by which an objective that was mended would be refused.
            mended = dataclasses.replace(
                attack, objective=lambda x_ref: lambda x: x.flatten(1).sum(1)
            )
            assert (mended(x, _generator()).objective > mended.objective(x)(x)).all()
        else:
            moved = attack(x, _generator()).objective[0] > objective(x)(x)
            assert moved.tolist()[::2] == [True, True]


# --- Promises of attacks --------------------------------------------------------------------------


@pytest.mark.parametrize("make", [attacks.PGD, attacks.MomentumPGD, attacks.APGD, attacks.NES])
@pytest.mark.parametrize("steps", [1, 3])
def test_solved_is_what_holds_for_the_result(make, steps):
    def brightness(x_ref):
        return lambda x: x.flatten(1).sum(1)

    x = _images(8)
    plain = make(brightness, Linf(0.2), num_steps=steps)(x, _generator()).objective[0]
    goal = float(plain.median())
    stop = attacks.reaches(goal)
    result = make(brightness, Linf(0.2), num_steps=steps, stop=stop)(x, _generator())
    assert torch.equal(result.solved, result.objective >= goal)
    assert result.solved.any()


def test_results_do_not_hang_on_references():
    x = _images().requires_grad_()
    for make in (attacks.PGD, attacks.APGD, attacks.LBFGS, attacks.Square):
        result = make(attacks.symmetric_kl(VAE), L2(0.5), num_steps=2)(x, _generator())
        assert not any(value.requires_grad for value in result)


def test_what_is_known_per_image_is_of_these_images():
    x, classifier = _images(2), LinearClassifier(3, 4)
    with pytest.raises(ValueError, match="labels has 5 entries, but the attack has 2 images"):
        attacks.PGD(attacks.dlr(VAE, classifier, torch.arange(5) % 4), Linf(0.1), 1)(x)
    objective = attacks.cross_entropy(VAE, classifier)
    stop = attacks.misclassified(VAE, classifier, targets=torch.arange(3))
    with pytest.raises(ValueError, match="targets has 3 entries"):
        attacks.PGD(objective, Linf(0.1), 1, stop=stop)(x)
    outside = attacks.cross_entropy(VAE, classifier, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.3.* from 0 to 4"):
        attacks.PGD(outside, Linf(0.1), 1)(x)
    repeated = attacks.PGD(attacks.cross_entropy(VAE, classifier, torch.tensor([1, 2])), Linf(0.1))
    assert repeated(x).x_adv.shape == (1, 2, 1, 4, 4)


def test_objectives_and_criteria_of_another_kind_are_refused():
    for wrong in (lambda x: 1.0, lambda x: x.flatten(1).sum(1, keepdim=True)):
        with pytest.raises(ValueError, match="objective must return"):
            attacks.PGD(lambda x_ref, wrong=wrong: wrong, Linf(0.1), 1)(_images())
    for wrong in (lambda x, v: True, lambda x, v: v, lambda x, v: v[:, None] > 0):
        stop = lambda x_ref, wrong=wrong: wrong  # noqa: E731
        with pytest.raises(ValueError, match="stop must say of every image"):
            attacks.PGD(attacks.symmetric_kl(VAE), Linf(0.1), 1, stop=stop)(_images())


# --- Pyro's contract ------------------------------------------------------------------------------


def _draws(global_seed, **options):
    torch.manual_seed(global_seed)
    kernel = mcmc.BatchedHMC(VAE.model, generator=_generator(3))
    run = pyro.infer.MCMC(kernel, num_samples=2, warmup_steps=1, disable_progbar=True, **options)
    run.run(_images(2))
    return run.get_samples(group_by_chain=True)["z"]


def test_a_generator_governs_the_start_too():
    assert torch.equal(_draws(1), _draws(2))


def test_a_generator_governs_what_comes_from_torchs_global_seed():
    def kernel(model):
        return pyro.infer.HMC(model, num_steps=2, step_size=0.1)

    guard = defence.MCMCDefence(VAE, kernel, num_samples=2, warmup_steps=1)
    x, drawn = _images(2), torch.Generator().manual_seed(3)
    torch.manual_seed(1)
    expected = guard(x, drawn).samples["z"]
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # nothing of it was used
    again = torch.Generator().manual_seed(3)
    torch.manual_seed(2)
    assert torch.equal(guard(x, again).samples["z"], expected)
    # The generator goes on as ever, and so do later draws.
    assert torch.equal(drawn.get_state(), again.get_state())
    assert not torch.equal(guard(x, again).samples["z"], expected)
    streamed = next(iter(guard.stream([x], torch.Generator().manual_seed(3))))
    assert torch.equal(streamed.samples["z"], expected)
    # Without one, and with torch's own, the global seed is what it was.
    for own in (None, torch.default_generator):
        found = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            found.append(guard(x, own).samples["z"])
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])
        assert not torch.equal(guard(x, own).samples["z"], found[2])


@pytest.mark.filterwarnings("ignore")
def test_forked_chains_with_a_generator_differ_and_repeat():
    options = {"num_chains": 2, "mp_context": "fork"}
    both = _draws(1, **options)
    assert not torch.equal(both[0], both[1])
    assert torch.equal(_draws(2, **options), both)
    assert torch.equal(_draws(1)[0], both[0])


def test_starts_of_another_dtype_come_in_the_models_own():
    start = {"z": torch.full((2, 3), 0.5, dtype=torch.float64)}
    found = []
    for params in (start, {"z": start["z"].float()}):
        kernel = mcmc.BatchedHMC(VAE.model, generator=_generator())
        run = pyro.infer.MCMC(
            kernel, num_samples=1, warmup_steps=1, initial_params=params, disable_progbar=True
        )
        run.run(_images(2))
        found.append(run.get_samples()["z"])
    assert found[0].dtype == torch.float32
    assert torch.equal(*found)


def test_networks_and_what_holds_them_can_be_pickled_after_use():
    vae = models.ConvVAE().eval()
    guard = defence.NoDefence(vae)
    x = torch.rand(1, 1, 28, 28, generator=_generator())
    for thing in (vae, guard, LatentClassifier(vae, LinearClassifier(64, 3))):
        expected = guard(x, _generator()).reconstruction
        pickle.dumps(thing)
        guard(x)
        stored = io.BytesIO()
        torch.save(thing, stored)
        again = pickle.loads(pickle.dumps(thing))
        again = again if isinstance(again, defence.NoDefence) else getattr(again, "vae", again)
        again = again if isinstance(again, defence.NoDefence) else defence.NoDefence(again)
        assert torch.equal(again(x, _generator()).reconstruction, expected)


def test_a_network_whose_names_another_has_used_can_be_pickled():
    vae = TutorialVAE().eval()
    x = torch.rand(1, 1, 28, 28, generator=_generator())
    for each in (vae, copy.deepcopy(vae)):
        program.encode(each, x)
    pickle.dumps(vae)


# --- Training -------------------------------------------------------------------------------------


class _Trained(torch.nn.Module):
    """A user's VAE with statistics, and a scale of which too much is infinite."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(16, 4), torch.nn.BatchNorm1d(4)
        )
        self.decoder = torch.nn.Linear(2, 16)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            mean = self.decoder(z).reshape(x.shape)
            pyro.sample("obs", dist.Normal(mean, 1.0).to_event(3), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            mean, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(mean, log_scale.exp()).to_event(1))


def _trained(x, loader=None, **config):
    pyro.clear_param_store()
    torch.manual_seed(0)
    vae = _Trained()
    config = training.FitConfig(schedule="constant", progress=False, **{"epochs": 2} | config)
    result = training.fit(vae, pyro.infer.Trace_ELBO(), loader or [x, x], config)
    return torch.cat([p.detach().flatten() for p in vae.state_dict().values()]), result


def test_training_does_not_depend_on_the_callers_context():
    x = _images(4)
    expected, _ = _trained(x)
    with torch.no_grad():
        assert torch.equal(_trained(x)[0], expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(_trained(x)[0], expected)
    with torch.inference_mode():
        there = x.clone()
    assert torch.equal(_trained(there)[0], expected)
    pyro.clear_param_store()
    torch.manual_seed(0)
    vae = _Trained()
    config = training.FitConfig(epochs=2, schedule="constant", progress=False)
    with torch.inference_mode():
        training.fit(vae, pyro.infer.Trace_ELBO(), [x, x], config)
    found = torch.cat([p.detach().flatten() for p in vae.state_dict().values()])
    assert torch.equal(found, expected)


def test_networks_made_in_inference_mode_are_named():
    with torch.inference_mode():
        vae = _Trained()
    config = training.FitConfig(epochs=1, schedule="constant", progress=False)
    with pytest.raises(ValueError, match=r"made in torch\.inference_mode: make or load them"):
        training.fit(vae, pyro.infer.Trace_ELBO(), [_images(4)], config)
    with pytest.raises(ValueError, match=r"made in torch\.inference_mode: make or load them"):
        defence.NoDefence(vae)(_images(4))


def test_images_of_another_dtype_than_the_networks():
    """NumPy's float64 comes in the networks' float32; what would lose more is the caller's."""
    vae, x = _Trained(), _images(4)
    given = [
        defence.NoDefence(vae)(each, torch.Generator().manual_seed(0)) for each in (x, x.double())
    ]
    assert torch.equal(given[0].reconstruction, given[1].reconstruction)
    assert given[1].reconstruction.dtype == torch.float32
    match = (
        r"parameters are torch.float64 and the images torch.float32: convert the images, x.double"
    )
    with pytest.raises(ValueError, match=match):
        defence.NoDefence(vae.double())(x)
    # Images in half precision would be refused, too.
    with pytest.raises(ValueError, match=r"bfloat16 and .*: convert the VAE, vae.float\(\)"):
        defence.NoDefence(vae.bfloat16())(x)


def test_conditions_of_another_dtype_than_the_networks():
    class Labelled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def guide(self, x, y):
            pyro.module("layer", self.layer)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.layer(y), 1.0).to_event(1))

        def model(self, x, y):
            self.guide(x, y)
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(0 * x, 1.0).to_event(3), obs=x)

    x, y = _images(4), torch.zeros(4, 2, dtype=torch.float64)
    config = training.FitConfig(epochs=1, schedule="constant", progress=False)
    for call in (
        lambda: defence.NoDefence(Labelled())((x, y)),
        lambda: training.fit(Labelled(), pyro.infer.Trace_ELBO(), [(x, y)], config),
    ):
        with pytest.raises(ValueError, match=r"condition 1 .* is torch.float64: convert it, y.flo"):
            call()


def test_settings_of_numpy_are_stored_as_numbers(tmp_path):
    config = {"epochs": np.int64(1), "learning_rate": np.float64(1e-3), "clip_norm": np.float32(1)}
    made = training.FitConfig(**config)
    assert [type(getattr(made, name)) for name in config] == [int, float, float]


def _diverge(x, **config):
    with pytest.raises(training.NonFiniteLossError) as caught:
        _trained(x, **config)
    return str(caught.value)


def test_divergence_is_one_line_that_names_epoch_step_and_learning_rate():
    x = _images(4)
    # Pyro's validation finds it before there is a loss.
    said = _diverge(x, learning_rate=1e10)
    assert said.startswith("the loss is nan at epoch 1, step 2 (learning rate 1e+10); lower the")
    assert "\n" not in said
    # Adam's step does not fit into a float32.
    said = _diverge(x, learning_rate=1e38)
    assert said.startswith(
        "the step of the optimiser is inf at epoch 1, step 1 (learning rate 1e+3"
    )
    # After the last step nothing but the validation shows it.
    pyro.clear_param_store()
    config = training.FitConfig(epochs=1, schedule="constant", learning_rate=1e10, progress=False)
    match = r"^the validation loss is nan at epoch 1 \(learning rate 1e\+10\)"
    with pytest.raises(training.NonFiniteLossError, match=match):
        training.fit(_Trained(), pyro.infer.Trace_ELBO(), [x], config, validation=[x])


class _Improbable(_Trained):
    """Some images have no density when they are validated."""

    def model(self, x):
        super().model(x)
        if not self.decoder.training:
            pyro.factor("scored", torch.where(x[:, 0, 0, 0] == 1.0, -torch.inf, 0.0).sum())


@pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")
def test_a_validation_loss_that_is_infinite_loses_no_epoch(tmp_path):
    x, path = _images(4), tmp_path / "c.pt"
    white = x.clone()
    white[0, 0, 0, 0] = 1.0

    def train(validation, path=None, learning_rate=1e-3, steps=2):
        pyro.clear_param_store()
        torch.manual_seed(0)
        vae = _Improbable()
        config = training.FitConfig(
            epochs=2, schedule="constant", progress=False, learning_rate=learning_rate
        )
        options = {"validation": [validation], "checkpoint": path}
        try:
            training.fit(vae, pyro.infer.Trace_ELBO(), [x] * steps, config, **options)
        except training.NonFiniteLossError as error:
            return vae, str(error)
        return vae, None

    expected, _ = train(x)
    vae, said = train(white, path)
    assert said.startswith("the validation loss is inf at epoch 1 (learning rate")
    # Weights and statistics are those after the epoch, in the VAE as in the file.
    saved = torch.load(path, weights_only=False)
    assert (saved["epoch"], saved["batch"], saved["steps"]) == (0, 2, 2)
    assert all(map(torch.equal, saved["weights"].values(), vae.state_dict().values()))
    assert saved["weights"]["encoder.2.num_batches_tracked"] == 2
    # With other images to validate on it goes on from there.
    resumed, said = train(x, path)
    assert said is None
    assert all(map(torch.equal, resumed.state_dict().values(), expected.state_dict().values()))
    # Weights that have diverged are not saved.
    with pyro.validation_enabled(False):
        _, said = train(x, tmp_path / "diverged.pt", learning_rate=1e10, steps=1)
    assert said.startswith("the validation loss is nan at epoch 1 (")
    assert not (tmp_path / "diverged.pt").exists()


def test_one_process_of_several_does_not_run_programs_alone(monkeypatch):
    class Failing(_Trained):
        runs = 0

        def guide(self, x):
            Failing.runs += 1
            if Failing.runs > 1:
                raise ValueError("the programs' own")
            super().guide(x)

    monkeypatch.setattr(training.loop.parallel, "world_size", lambda: 2)
    for name in ("broadcast", "sum_gradients", "check_shares"):
        monkeypatch.setattr(training.loop.parallel, name, lambda *_: None)
    monkeypatch.setattr(training.loop.parallel, "total", lambda *numbers: list(numbers))
    pyro.clear_param_store()
    config = training.FitConfig(epochs=1, schedule="constant", progress=False)
    with pytest.raises(ValueError, match="the programs' own"):
        training.fit(Failing(), pyro.infer.Trace_ELBO(), [_images(4)] * 2, config)
    assert Failing.runs == 2


def test_statistics_are_not_spoiled_by_a_step_that_fails():
    x = _images(4)
    pyro.clear_param_store()
    torch.manual_seed(0)
    vae = _Trained().train()
    config = training.FitConfig(epochs=1, schedule="constant", learning_rate=1e10, progress=False)
    with pytest.raises(training.NonFiniteLossError):
        training.fit(vae, pyro.infer.Trace_ELBO(), [x, x], config)
    assert all(value.isfinite().all() for value in vae.state_dict().values())
    # Statistics of the first step, which was made, alone.
    torch.manual_seed(0)
    first = _Trained().train()
    first.encoder(x)
    for name, value in first.encoder[2].named_buffers():
        assert torch.equal(value, vae.encoder[2].get_buffer(name)), name
    assert vae.training  # as before, since the call has failed


def test_what_is_wrong_with_a_program_is_not_called_divergence():
    class Binary(_Trained):
        def model(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
                logits = torch.zeros_like(x)
                pyro.sample("obs", dist.Bernoulli(logits=logits).to_event(3), obs=x)

    config = training.FitConfig(epochs=1, schedule="constant", progress=False)
    with pytest.raises(ValueError, match="to be within the support"):
        training.fit(Binary(), pyro.infer.Trace_ELBO(), [_images(4)], config)
