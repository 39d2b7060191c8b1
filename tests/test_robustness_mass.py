"""The bound of masses: the inequality for every likelihood, the masses against a grid, and every
attack of a net above the bound."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import PlaneVAE, energies_under_common_attack, plane_classifier

from pyro_vae_defence.models import program
from pyro_vae_defence.models.perturbation import most_likely_image
from pyro_vae_defence.ops.balls import L1, L2, Linf
from pyro_vae_defence.robustness import mass, mass_bound
from pyro_vae_defence.robustness.mass import MassBound, Masses, reaches

BALLS = {Linf: 0.15, L2: 0.8, L1: 2.5}
LIKELIHOODS = {
    "Bernoulli": lambda a: dist.Bernoulli(logits=3 * a, validate_args=False),
    "ContinuousBernoulli": lambda a: dist.ContinuousBernoulli(logits=3 * a, validate_args=False),
    "Normal": lambda a: dist.Normal(a.sigmoid(), 0.1 + a.abs() / 5, validate_args=False),
    "Laplace": lambda a: dist.Laplace(a.sigmoid(), 0.1 + a.abs() / 5, validate_args=False),
}
PAIRS = [(n, b) for n in LIKELIHOODS for b in BALLS if n != "Laplace" or b is Linf]


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@pytest.mark.parametrize("ratio", [1.0, 1.7])
def test_inequality_holds_at_every_latent(float64, name, kind, ratio):
    """Random decoders, images and perturbations, among them the worst ones for a decoder."""
    generator = torch.Generator().manual_seed(11)
    epsilon = BALLS[kind]
    ball, delta = kind(epsilon), ratio * epsilon
    narrow, wide = reaches(ball, delta)
    likelihood = LIKELIHOODS[name](torch.randn(400, 1, 4, 4, generator=generator))
    x = torch.rand(400, 1, 4, 4, generator=generator).round(decimals=1)  # some pixels at 0 and 1
    corner = (torch.rand(400, 1, 4, 4, generator=generator) - 0.5).sign() * epsilon
    towards = most_likely_image(likelihood, x, ball) - x
    noise = torch.randn(400, 1, 4, 4, generator=generator)
    for perturbation in (ball.project(corner), towards, -towards, ball.project(noise)):
        attacked = ball.inside(x, (x + perturbation).clamp(0, 1))

        def energy(image, reach):
            if reach is not None:
                image = most_likely_image(likelihood, image, reach)
            return -likelihood.log_prob(image).flatten(1).sum(1)

        defended = energy(attacked, kind(delta))
        assert bool((energy(x, wide) <= defended + 1e-9).all())
        assert bool((defended <= energy(x, narrow) + 1e-9).all())
        assert float((energy(x, narrow) - energy(x, wide)).min()) > 1e-3  # it says something


class TestInThePlane:
    epsilon, delta = 0.06, 0.08

    @pytest.fixture
    def vae(self, float64):
        return PlaneVAE()

    @pytest.fixture
    def clean(self, vae):
        generator = torch.Generator().manual_seed(5)
        z = torch.randn(60, 2, generator=generator)
        return (z @ vae.weight.T).sigmoid().view(-1, 1, 2, 4)

    @pytest.fixture
    def x(self, clean):
        return clean[:3]

    @pytest.fixture
    def labels(self, vae, x):
        return plane_classifier(program.posterior_mean(vae, x)["z"]).argmax(-1)

    GRID = torch.linspace(-5, 5, 101, dtype=torch.float64)

    def grid_masses(self, vae, x, reach, labels):
        """Log-masses of the right class and of the others around each image, ``(N,)`` each."""
        z = torch.cartesian_prod(self.GRID, self.GRID)
        read = self.read(vae, z @ vae.weight.T)
        area = 2 * math.log(float(self.GRID[1] - self.GRID[0]))
        found = []
        for image, label in zip(x, labels, strict=True):
            energy = program.potential(vae, image.expand(len(z), -1, -1, -1), reach)({"z": z})
            sets = (read == label, read != label)
            found.append(torch.stack([(-energy[inside]).logsumexp(0) + area for inside in sets]))
        return torch.stack(found, 1)

    def exact(self, vae, x, labels, kind=L2):
        """For two attacks, or in L_inf balls for one attack on both sets."""
        narrow, wide = reaches(kind(self.epsilon), self.delta)
        right, _ = self.grid_masses(vae, x, narrow, labels)
        _, wrong = self.grid_masses(vae, x, wide, labels)
        if kind is Linf:
            wrong = self.under_common_attack(vae, x, labels, narrow)
        return right, wrong

    def under_common_attack(self, vae, x, labels, narrow):
        """Log-masses of the wrong set ``(N,)``, by sums over the grid."""
        z = torch.cartesian_prod(self.GRID, self.GRID)
        logits = z @ vae.weight.T
        read = self.read(vae, logits)
        prior = 0.5 * z.square().sum(1) + math.log(2 * math.pi)
        area = 2 * math.log(float(self.GRID[1] - self.GRID[0]))
        found = []
        for image, label in zip(x, labels, strict=True):
            energy = program.potential(vae, image.expand(len(z), -1, -1, -1), narrow)({"z": z})
            own, other = read == label, read != label
            under = energies_under_common_attack(
                image.flatten(), self.epsilon, self.delta, logits[own],
                (-energy[own]).softmax(0), logits[other],
            )  # fmt: skip
            found.append((-(under + prior[other])).logsumexp(0) + area)
        return torch.stack(found)

    def read(self, vae, logits):
        decoded = logits.sigmoid().view(-1, 1, 2, 4)
        return plane_classifier(program.posterior_mean(vae, decoded)["z"]).argmax(-1)

    def bound(self, vae, x, labels, clean, kind=Linf, **options):
        ball = kind(self.epsilon)
        options = {"num_temperatures": 16, "num_steps": 3, "num_walks": 16, **options}
        generator = torch.Generator().manual_seed(1)
        return mass_bound(
            vae,
            plane_classifier,
            x,
            labels,
            ball,
            self.delta,
            clean,
            generator=generator,
            **options,
        )

    @pytest.mark.parametrize("kind", [Linf, L2])
    def test_masses_are_those_of_a_grid(self, vae, x, labels, clean, kind):
        """Thirty estimates of each of six masses, in both directions: twelve means within four
        standard errors (t with 29 degrees of freedom: one right implementation in 200 fails)."""
        copies = 30
        images = x.repeat(copies, 1, 1, 1), labels.repeat(copies)
        few = {"num_temperatures": 18, "num_walks": 16, "num_falling": 16}
        found = self.bound(vae, *images, clean, kind, **few)
        assert found.common_attack == (kind is Linf)
        for masses, truth in zip(
            (found.right, found.wrong), self.exact(vae, x, labels, kind), strict=True
        ):
            for weights in (
                (masses.rising.view(copies, -1) - truth).exp(),
                (truth - masses.falling.view(copies, -1)).exp(),
            ):
                error = weights.std(0) / copies**0.5
                assert bool(((weights.mean(0) - 1).abs() < 4 * error).all())
                assert bool((error < 0.3).all())

    def test_noise_is_never_used_twice_and_errors_have_that_of_the_shares(
        self, vae, x, labels, clean, monkeypatch
    ):
        """Walks that tune, rise, go on and fall, in two sets; a share s of 300 draws has the
        relative variance (1 - s) / (300 s), and a mixture the mean of its components'."""
        seeds, walks, bases = [], [], []
        walk, move, fit = mass.annealed.walk, mass.annealed.move, mass._Base.fit

        def seen_walk(*args, **options):
            seeds.append(args[5].seed)
            walks.append(walk(*args, **options))
            return walks[-1]

        def seen_move(*args, **options):
            seeds.append(args[5].seed)
            return move(*args, **options)

        def seen_fit(*args):
            bases.append(fit(*args))
            return bases[-1]

        monkeypatch.setattr(mass.annealed, "walk", seen_walk)
        monkeypatch.setattr(mass.annealed, "move", seen_move)
        monkeypatch.setattr(mass._Base, "fit", seen_fit)
        found = self.bound(vae, x, labels, clean, num_temperatures=5, num_steps=1, num_walks=4)
        generator = torch.Generator().manual_seed(1)
        first = int(torch.randint(2**62, (), generator=generator))
        assert sorted(set(seeds)) == [first + 1 + number for number in range(8)]
        classes = len(bases[0].loc)
        for row, label in enumerate(labels):
            shares = (bases[0].read == label).double().mean(1)
            expected = (1 - shares[label]) / (300 * shares[label])
            others = [k for k in range(classes) if k != label]
            outside = shares[others] / (300 * (1 - shares[others]))  # of those outside the class
            for masses, risen, variance in (
                (found.right, walks[1], expected),
                (found.wrong, walks[4], outside.sum() / (classes - 1) ** 2),
            ):
                assert variance > 0
                square = masses.standard_error[row].square()
                assert torch.allclose(square, risen.variance[row] + variance)

    def test_no_attack_of_a_net_passes_the_bound(self, vae, x, labels):
        """Of two attacks, and the better one of one attack on both sets."""
        _, wide = reaches(Linf(self.epsilon), self.delta)
        right, wrong = self.exact(vae, x, labels, Linf)
        bound = (right - wrong).sigmoid()
        of_two = (right - self.grid_masses(vae, x, wide, labels)[1]).sigmoid()
        assert bool((bound > of_two + 0.01).all())
        unattacked = self.grid_masses(vae, x, Linf(self.delta), labels)
        generator = torch.Generator().manual_seed(4)
        least = torch.ones(len(x))
        for _ in range(8):
            signs = (torch.rand(x.shape, generator=generator) - 0.5).sign()
            attacked = (x + self.epsilon * signs).clamp(0, 1)
            masses = self.grid_masses(vae, attacked, Linf(self.delta), labels)
            least = torch.minimum(least, (masses[0] - masses[1]).sigmoid())
        assert bool((least >= bound).all())
        assert bool((least < (unattacked[0] - unattacked[1]).sigmoid()).all())  # attacks attack

    def test_an_image_is_the_same_in_any_batch(self, vae, x, labels, clean):
        options = {"num_temperatures": 5, "num_walks": 6}
        whole = self.bound(vae, x, labels, clean, **options)
        parts = self.bound(vae, x, labels, clean, rows=6, **options)
        assert torch.allclose(whole.log_ratio, parts.log_ratio, rtol=0, atol=1e-9)
        again = self.bound(vae, x, labels, clean, **options)
        assert torch.equal(whole.log_ratio, again.log_ratio)

    def test_torchs_default_dtype_decides_nothing(self, vae, x, labels, clean):
        options = {"num_temperatures": 4, "num_walks": 2}
        expected = self.bound(vae, x, labels, clean, **options)
        for dtype in (torch.float32, torch.bfloat16):
            torch.set_default_dtype(dtype)  # the fixture puts its own back
            found = self.bound(vae, x, labels, clean, **options)
            assert torch.equal(found.log_ratio, expected.log_ratio)

    def test_classes_as_one_hot_vectors_are_scores(self, vae, x, labels, clean):
        """As of a tree or of nearest neighbours, whatever the type of their numbers."""

        def bound(kind):
            def classify(z):
                return torch.eye(3)[plane_classifier(z).argmax(1)].to(kind)

            options = {"num_temperatures": 4, "num_walks": 2, "generator": torch.Generator()}
            return mass_bound(
                vae, classify, x, labels, Linf(self.epsilon), self.delta, clean, **options
            )

        expected = bound(torch.float64).log_ratio
        assert bool(expected.isfinite().any())
        for kind in (torch.int64, torch.bool):
            assert torch.equal(bound(kind).log_ratio, expected)

    def test_wrong_arguments(self, vae, x, labels, clean):
        for options, message in (
            ({"num_temperatures": 2}, "num_temperatures"),
            ({"num_walks": 1}, "num_walks"),
            ({"num_falling": 0}, "num_falling"),
            ({"rows": 0}, "rows"),
            ({"num_walks": 4, "num_falling": 5}, "num_falling"),
        ):
            with pytest.raises(ValueError, match=message):
                self.bound(vae, x, labels, clean, **options)
        for wrong in (labels[:2], labels.double(), labels > 0, labels + 3, labels - 3):
            with pytest.raises(ValueError, match="labels"):
                self.bound(vae, x, wrong, clean)
        of_one_class = clean[:1].repeat(30, 1, 1, 1)
        with pytest.raises(ValueError, match=r"clean_images .* class .* pass more"):
            self.bound(vae, x, labels, of_one_class)


class TwoSites(PlaneVAE):
    """The latents of the plane at two sites, which guide and model have in other orders."""

    def model(self, x):
        with pyro.plate("data", len(x)):
            one, zero = x.new_ones(len(x), 1), x.new_zeros(len(x), 1)
            a = pyro.sample("a", dist.Normal(zero, one).to_event(1))
            b = pyro.sample("b", dist.LogNormal(zero, one).to_event(1))
            logits = (torch.cat([a, b.log()], 1) @ self.weight.T).view(-1, 1, 2, 4)
            image = dist.Bernoulli(logits=logits, validate_args=False).to_event(3)
            pyro.sample("x", image, obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            mean = (x.flatten(1) - 0.5) @ self.back.T
            pyro.sample("b", dist.LogNormal(mean[:, 1:], 0.4).to_event(1))
            pyro.sample("a", dist.Normal(mean[:, :1], 0.4).to_event(1))


@pytest.mark.slow
def test_sites_may_have_another_order_and_a_support(float64):
    """The same density in other words has the same masses: those of the plane, but that classes
    are read from means of LogNormals, whose logarithms are shifted alike for all latents."""
    plane, two = PlaneVAE(), TwoSites()
    z = torch.randn(60, 2, generator=torch.Generator().manual_seed(5))
    clean = (z @ plane.weight.T).sigmoid().view(-1, 1, 2, 4)
    copies, found = 12, []
    for vae, read in (
        (plane, plane_classifier),
        (two, lambda m: plane_classifier(torch.stack([m[:, 1], m[:, 0].log() - 0.08], 1))),
    ):
        labels = torch.zeros(copies, dtype=torch.long)
        found.append(
            mass_bound(
                vae, read, clean[:1].expand(copies, -1, -1, -1), labels, Linf(0.06), 0.08, clean,
                num_temperatures=32, num_steps=3, num_walks=16, num_falling=2,
                generator=torch.Generator().manual_seed(1),
            )
        )  # fmt: skip
    for one, other in ((found[0].right, found[1].right), (found[0].wrong, found[1].wrong)):
        center = one.rising.mean()
        first, second = (one.rising - center).exp(), (other.rising - center).exp()
        error = (first.var() / copies + second.var() / copies).sqrt()
        assert abs(float(first.mean() - second.mean())) < 5 * float(error)
        assert other.acceptance_rate.mean() > 0.5


def test_programs_for_which_nothing_is_proved_are_refused(float64):
    class Conditional(PlaneVAE):
        def model(self, x, sign):
            super().model(x)

        def guide(self, x, sign):
            super().guide(x)

    class Mixed(PlaneVAE):
        def model(self, x):
            with pyro.plate("data", len(x)):
                y = pyro.sample("y", dist.Categorical(logits=x.new_zeros(2)))
                zero = x.new_zeros(len(x), 2)
                z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
                logits = (z @ self.weight.T + y[..., None]).reshape(*y.shape, 1, 2, 4)
                image = dist.Bernoulli(logits=logits, validate_args=False).to_event(3)
                pyro.sample("x", image, obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Categorical(logits=x.new_zeros(2)))
                mean = (x.flatten(1) - 0.5) @ self.back.T
                pyro.sample("z", dist.Normal(mean, 0.4).to_event(1))

    x, labels = torch.rand(4, 1, 2, 4), torch.zeros(4, dtype=torch.long)
    sign = torch.ones(4)
    for vae, images, message in (
        (Conditional(), (x, sign), "conditional"),
        (Mixed(), x, "discrete"),
    ):
        with pytest.raises(ValueError, match=message):
            mass_bound(vae, plane_classifier, images, labels, Linf(0.1), 0.1, images)


def test_defenders_ball_must_hold_the_attackers():
    assert reaches(Linf(0.1), 0.1) == (None, Linf(0.2))
    assert reaches(L2(1.0), 2) == (L2(1.0), L2(3.0))
    assert reaches(Linf(0.6), 0.7) == (Linf(0.7 - 0.6), Linf(1.0))  # which holds all images
    for delta in (0.09, 1.1, math.nan, math.inf, True, "0.1"):
        with pytest.raises(ValueError, match="delta must be a radius of at least .* and at most 1"):
            reaches(Linf(0.1), delta)


def test_reads_its_estimates_on_the_safe_side():
    """The smaller estimate for the right class, the larger for the others; -inf for none."""
    zero = torch.zeros(2)
    right = Masses(torch.tensor([1.0, 1.0]), torch.tensor([9.0, 0.0]), zero + 0.3, zero, zero)
    wrong = Masses(torch.tensor([0.0, 2.0]), torch.tensor([4.0, 1.5]), zero + 0.4, zero, zero)
    bound = MassBound(0.1, 0.1, right, wrong, False)
    assert bound.log_ratio.tolist() == [-3.0, -2.0]
    assert bound.vote.tolist() == [False, False]
    assert torch.allclose(bound.probability, torch.tensor([-3.0, -2.0]).sigmoid())
    lost = wrong._replace(rising=torch.tensor([-torch.inf, torch.nan]))
    assert MassBound(0.1, 0.1, right, lost, False).probability.tolist() == [0.0, 0.0]
    assert torch.allclose(bound.standard_error, zero + 0.5)
    assert bound.right.gap.tolist() == [8.0, -1.0]
    assert bound.to_dict()["wrong"]["falling"] == [4.0, 1.5]
