"""Posteriors on grids against closed forms, and the studies of the paper's inequalities and of
Figure 1 that are made of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from studies import save_model
from torch.distributions import Normal

from pyro_vae_defence.experiments import grids
from pyro_vae_defence.experiments.__main__ import main
from pyro_vae_defence.experiments.study import middle, write_pages
from pyro_vae_defence.experiments.theory import LINEAR, LinearGaussian, Theory, TheoryConfig
from pyro_vae_defence.experiments.two_latents import (
    Below,
    TwoLatents,
    TwoLatentsConfig,
    _grid_errors,
    latents_figure,
    picture,
    raster,
)
from pyro_vae_defence.models import ConvVAE, program
from pyro_vae_defence.models.contract import check_vae

ROOT = Path(__file__).resolve().parents[1]

GRID = grids.Grid(4.0, 0.05)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, number in (("mnist_vae_2d", 2), ("mnist_vae", 64)):
        vae, variance = ConvVAE(latent_dim=number), {"z": torch.full((number,), 0.5)}
        save_model(vae, name, directory, mean_posterior_variance=variance)
    return directory


@pytest.fixture
def linear():
    return LinearGaussian()


def gaussian(mean, scale):
    """Log masses of independent normals in the cells of the grid."""
    loc, sd = (torch.tensor(value, dtype=torch.float64) for value in (mean, scale))
    return Normal(loc, sd).log_prob(GRID.nodes.flatten(0, 1)).sum(-1).log_softmax(0)


# --- Grids ----------------------------------------------------------------------------------------


def test_divergences_of_normals():
    p, q = gaussian([0.0, 0.5], [0.3, 0.4]), gaussian([0.3, 0.5], [0.6, 0.4])
    forward = math.log(2) + (0.09 + 0.09) / (2 * 0.36) - 0.5
    backward = -math.log(2) + (0.36 + 0.09) / (2 * 0.09) - 0.5
    assert float(grids.kl(p, q)) == pytest.approx(forward, abs=1e-6)
    assert float(grids.kl(q, p)) == pytest.approx(backward, abs=1e-6)
    shifted = gaussian([0.2, 0.5], [0.3, 0.4])
    exact = math.erf(0.2 / 0.3 / math.sqrt(8))
    assert float(grids.total_variation(p.exp(), shifted.exp())) == pytest.approx(exact, abs=1e-3)


def test_posterior_of_a_linear_model(linear):
    x = linear.images(3, torch.Generator().manual_seed(0))
    mass = grids.posterior(grids.energies(linear, x, GRID)).exp()
    nodes = GRID.nodes.flatten(0, 1)
    mean = mass @ nodes
    expected = (x.flatten(1) - 0.5).double() @ linear.posterior_mean.double().T
    assert torch.allclose(mean, expected, atol=1e-5)
    centred = nodes - mean[:1]
    covariance = centred.T @ (mass[0][:, None] * centred)
    assert torch.allclose(covariance, linear.covariance.double(), atol=1e-5)


def test_a_linear_model_is_a_vae_with_a_wrong_encoder(linear):
    x = linear.images(2, torch.Generator().manual_seed(0))
    check_vae(linear)
    energy = program.potential(linear, x)
    z = torch.randn(2, 2)
    joint = Normal(0.0, 1.0).log_prob(z).sum(1) + linear.observation(z).log_prob(x)
    assert torch.allclose(energy({"z": z}), -joint, atol=1e-4)
    error = linear.encoder - linear.posterior_mean
    assert torch.allclose(error @ linear.weight, torch.zeros(2, 2), atol=1e-5)
    assert torch.allclose(error.norm(dim=1), linear.posterior_mean.norm(dim=1))


def test_energies_are_the_decoders_up_to_a_constant_of_the_image():
    vae, x = ConvVAE(latent_dim=2).eval(), torch.rand(2, 1, 28, 28)
    grid = grids.Grid(2.0, 0.5)
    found = grids.energies(vae, x, grid).flatten(1)
    nodes = grid.nodes.flatten(0, 1)
    for image in range(2):
        rows = x[image : image + 1].expand(len(nodes), -1, -1, -1)
        with torch.no_grad():
            decoder = program.potential(vae, rows)({"z": nodes.float()}).double()
        difference = found[image] - decoder
        assert torch.allclose(difference, difference[:1].expand_as(difference), atol=2e-3)


def test_a_table_reproduces_parabolas(float64):
    axis = GRID.axis
    energy = 2 * axis[:, None] ** 2 - axis[:, None] * axis + 0.5 * axis - 3
    z = (torch.rand(50, 2) * 7 - 3.5).requires_grad_()
    found = grids.Table(energy, GRID)({"z": z})
    first, second = z.unbind(1)
    assert torch.allclose(found, 2 * first**2 - first * second + 0.5 * second - 3)
    (gradient,) = torch.autograd.grad(found.sum(), z)
    expected = torch.stack([4 * first - second, 0.5 - first], 1)
    assert torch.allclose(gradient, expected)
    assert not GRID.contains({"z": torch.tensor([[5.0, 0.0]])}).item()


def test_points_are_counted_where_their_mass_is():
    p = gaussian([-1.0, 0.5], [0.3, 0.4])
    z = grids.draws(p, GRID, 20_000, torch.Generator().manual_seed(0))
    shares, masses = GRID.shares(z, 4), grids.in_blocks(p[None], GRID, 4)
    assert float(shares.sum()) == pytest.approx(1)
    assert float(masses.sum()) == pytest.approx(1)
    floor = 0.5 * (2 * masses * (1 - masses) / math.pi / len(z)).sqrt().sum()
    assert float(grids.total_variation(shares, masses[0])) < 1.3 * float(floor)
    assert float(GRID.shares(torch.full((2, 2), 3.99), 4)[-1]) == 1


def test_what_does_not_fit_a_grid_is_refused():
    outside = torch.distributions.Normal(torch.tensor([[3.5, 0.0]]), torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"half_width=4.0 leaves 0\.31 of a guide's mass"):
        grids.guide(outside, GRID)
    scales = torch.tensor([[0.04, 1.0], [0.4, 0.02], [0.3, 0.033]])
    narrow = torch.distributions.Normal(torch.zeros(3, 2), scales)
    with pytest.raises(ValueError, match=r"spacing=0\.05 .* images \[1, 2\],.* make it 0\.0299 or"):
        grids.guide(narrow, GRID)
    for spacing, block in ((0.3, 1), (0.1, 3), (4.0, 1)):
        with pytest.raises(ValueError, match="spacing="):
            grids.check_grid(4.0, spacing, block)


@pytest.mark.parametrize("place", [0.0, 0.01, 0.025])  # between two nodes, and on one
def test_the_narrowest_guide_that_is_taken(place):
    scale, spread = 0.67001 * GRID.spacing, math.log(4)
    q = Normal(torch.full((1, 2), place), torch.full((1, 2), scale))
    p = gaussian([place, place], [4 * scale, 4 * scale])
    exact = 2 * (spread + 1 / 32 - 0.5)
    assert float(grids.kl(grids.guide(q, GRID), p[None])) == pytest.approx(exact, abs=0.01)


# --- Lemma 1, Theorem 1 ---------------------------------------------------------------------------

LINEAR_SETTINGS = {
    "num_images": 3, "radii": (0.002, 0.02, 0.1), "theorem_radii": (0.02,), "transitions": (1, 20),
    "num_chains": 3000, "half_width": 4.0, "spacing": 0.05, "block": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def of_linear(tmp_path_factory):
    directory = tmp_path_factory.mktemp("theory")
    Theory(LINEAR, directory, overrides=LINEAR_SETTINGS, progress=False).run()
    return directory


def test_divergences_of_a_linear_model_are_the_closed_forms(of_linear):
    result = json.loads((of_linear / f"{LINEAR}.json").read_text())
    lemma = result["lemma"]
    for cell in lemma.values():
        assert cell["closed_form"]["kl_error"] < 1e-4
        assert cell["closed_form"]["variation_error"] < 2e-3
        # All orders beyond the second vanish, and Pinsker's bound is above what it bounds.
        assert cell["second_order"]["estimate"] == pytest.approx(cell["kl"]["estimate"], rel=1e-3)
        assert cell["most_over_bound"] < 0
    small, large = (lemma[radius] for radius in ("0.002", "0.02"))
    for name, power in (("kl", 2), ("pinsker", 1)):
        ratio, norms = (large[n]["estimate"] / small[n]["estimate"] for n in (name, "norm"))
        assert math.log(ratio) / math.log(norms) == pytest.approx(power, rel=0.2)
    assert lemma["0.1"]["vacuous"]["estimate"] == 1


def test_both_sides_of_a_linear_model(of_linear, linear):
    result = json.loads((of_linear / f"{LINEAR}.json").read_text())
    cell = result["theorem"]["0.02"]
    study = Theory(LINEAR, of_linear, overrides=LINEAR_SETTINGS, progress=False)
    study.load()
    precision = torch.linalg.inv(linear.covariance)

    def variation(moved):
        """Total variation of normals of the posterior's covariance."""
        return torch.erf(((moved @ precision) * moved).sum(1).sqrt() / math.sqrt(8)).median()

    x_ref, x_adv = ((x - 0.5).flatten(1) for x in (study.x_ref, study.attacked[0.02]))
    begin, end = cell["transitions"]["0"], cell["transitions"]["limit"]
    error = linear.encoder - linear.posterior_mean
    own = variation(x_adv @ error.T)
    assert begin["to_target"]["estimate"] == pytest.approx(float(own), abs=5e-3)
    left = variation((x_adv - x_ref) @ linear.encoder.T)
    assert begin["left"]["estimate"] == pytest.approx(float(left), abs=5e-3)
    left = variation(x_adv @ linear.posterior_mean.T - x_ref @ linear.encoder.T)
    assert end["left"]["estimate"] == pytest.approx(float(left), abs=5e-3)
    # Chains arrive.
    assert cell["transitions"]["20"]["to_target"]["estimate"] < 2 * cell["floor"]["estimate"]
    assert cell["transitions"]["1"]["to_target"]["estimate"] < begin["to_target"]["estimate"]
    for entry in cell["transitions"].values():
        assert entry["most_over_bound"] < 0
        assert entry["most_over_exact"] < 0.02
        assert entry["right"]["estimate"] >= entry["right_exact"]["estimate"]


def test_theory_is_resumed_and_printed(of_linear):
    path = of_linear / f"{LINEAR}.json"
    stored = json.loads(path.read_text())
    lost = stored["theorem"].pop("0.02")
    path.write_text(json.dumps(stored))
    again = Theory(LINEAR, of_linear, overrides=LINEAR_SETTINGS, progress=False).run()
    assert again["theorem"]["0.02"] == lost
    write_pages({"theory": Theory}, of_linear)
    text = (of_linear / "tables.md").read_text()
    assert "Off the closed forms by" in text
    assert "### Theorem 1, radius 0.02" in text
    assert "(images/theory_linear_gaussian.png)" in text
    assert (of_linear / "images" / "theory_linear_gaussian.png").exists()


def test_theory_of_a_trained_model(models, tmp_path):
    settings = {
        **LINEAR_SETTINGS, "num_images": 2, "radii": (0.1,), "theorem_radii": (0.1,),
        "num_chains": 100, "half_width": 6.0, "spacing": 0.25, "transitions": (1,),
    }  # fmt: skip
    result = Theory("mnist_vae_2d", tmp_path, None, models, settings, progress=False).run()
    assert result["lemma"]["0.1"]["kl"]["estimate"] > 0
    assert "closed_form" not in result["lemma"]["0.1"]
    assert result["errors"]["interpolation_energy"] < 0.1
    changed = {**settings, "model": "mnist_vae"}
    other = Theory("mnist_vae_2d", tmp_path / "64", None, models, changed, progress=False)
    with pytest.raises(ValueError, match="two latent dimensions, got 64"):
        other.run()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"radii": (0.2, 0.1)}, "radii must ascend"),
        ({"transitions": (5, 1)}, "transitions must ascend"),
        ({"theorem_radii": (0.3,)}, r"theorem_radii must be among radii, got \[0.3\]"),
        ({"spacing": 0.07}, "spacing=0.07 must divide"),
    ],
)
def test_wrong_settings_of_theory(setting, message):
    with pytest.raises(ValueError, match=message):
        TheoryConfig(LINEAR, **setting)


# --- Figure 1 -------------------------------------------------------------------------------------


def test_depth_and_region_of_a_normal_posterior(linear):
    x = linear.images(1, torch.Generator().manual_seed(0))
    log_p = grids.posterior(grids.energies(linear, x, GRID))
    mean = ((x - 0.5).flatten(1) @ linear.posterior_mean.T).squeeze(0)
    scale = linear.covariance.diagonal().sqrt()
    z = mean + scale * torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.3], [0.0, 2.6]])
    rows = x.expand(4, -1, -1, -1)
    below = Below(linear, rows, log_p.expand(4, -1), GRID)
    # The mode is a node, up to half a diagonal away.
    assert torch.allclose(below(z), torch.tensor([0.0, 2.0, 2.645, 3.38]), atol=0.06)
    assert float(below.region[0]) == pytest.approx(-math.log(0.05), abs=0.06)
    assert below.inside(z).tolist() == [1, 1, 1, 0]


def test_a_posterior_survives_its_picture():
    log_p = gaussian([-1.0, 0.5], [0.3, 0.4])
    depth = (log_p.max() - log_p).reshape(GRID.size, GRID.size).clamp(max=400)
    found = torch.as_tensor(raster(picture(log_p, GRID)))
    assert float((found.sqrt() - depth.sqrt()).abs().max()) < 20 / 255  # 256 shades


def test_encodings_and_chains_are_written_and_drawn(models, tmp_path):
    settings = {
        "num_images": 3, "num_attacks": 2, "spacing": 0.5, "chain.num_samples": 4,
        "chain.num_steps": 1,
    }  # fmt: skip
    name = "mnist_radius_0.1"
    run = TwoLatents(name, tmp_path, None, models, settings, progress=False)
    first, *others = run.run()["images"].values()
    assert torch.tensor(first["paths"]).shape == (3, 4, 2)
    assert torch.equal(torch.tensor(first["paths"])[:, -1], torch.tensor(first["end"]["z"]))
    assert all("paths" not in cell for cell in others)
    # Rows are the reference and its own attacks.
    assert (run.versions[1:, 1] - run.x_ref[1]).abs().max() <= 0.1 + 1e-6
    cell = others[0]
    assert [len(cell["start"][n]) for n in ("z", "below_mode", "ms_ssim")] == [3, 3, 3]
    energy = program.potential(run.vae, run.x_ref[1:2].expand(3, -1, -1, -1))
    with torch.no_grad():
        before, after = (energy({"z": torch.tensor(cell[n]["z"])}) for n in ("start", "end"))
    differences = [torch.tensor(cell[n]["below_mode"]) for n in ("start", "end")]
    assert torch.allclose(after - before, differences[1] - differences[0], atol=1e-3)
    # Half the spacing is what a run with it says.
    half = TwoLatents(name, tmp_path, None, models, settings | {"spacing": 0.25}, progress=False)
    half.load()
    half.versions, half.defended = run.versions, run.defended
    for number, finer in enumerate(run.result["finer"].values()):
        cell = half.image(number)
        assert finer["kl"] == cell["kl"] != others[0]["kl"]
        assert finer["variation"] == cell["variation"]
        for place in ("start", "end"):
            assert finer[place].items() <= cell[place].items()
    write_pages({"two_latents": TwoLatents}, tmp_path)
    text = (tmp_path / "tables.md").read_text()
    assert "| attacked, behind HMC |" in text
    assert "with half its spacing, 0.25, depths" in text
    assert "![Two latent dimensions" in text
    labels = latents_figure(run.result, first).axes[0].get_legend_handles_labels()[1]
    assert len(labels) <= 5


def test_what_half_the_spacing_changes_is_said():
    def cell(depth, inside, kl):
        place = {"below_mode": [depth] * 3, "inside_reference": [inside] * 3}
        place["inside_own"] = [1.0] * 3
        return {"start": place, "end": place, "kl": [kl] * 2, "variation": [0.5] * 2}

    images = {"00": cell(1.0, 1.0, 2.0), "01": cell(3.0, 0.0, 4.0), "02": cell(5.0, 0.0, 6.0)}
    finer = {"00": cell(1.5, 1.0, 2.0), "01": cell(2.75, 0.0, 4.0), "02": cell(5.0, 1.0, 6.5)}
    found = {"config": {"spacing": 0.1}, "images": images, "finer": finer}
    (said, _) = _grid_errors(found)
    assert "half its spacing, 0.05, depths in the table change by at most 0.25 nats" in said
    assert "shares by 0.33, the median KL by 0 nats and the median total variation by 0;" in said
    assert "depths by up to 0.5 nats, KL by 0.5, total variations by 0." in said
    del finer["02"]
    assert _grid_errors(found) == []


def test_the_picture_of_the_readme_is_of_its_result():
    found = json.loads((ROOT / "docs/results/two_latents/mnist_radius_0.2.json").read_text())
    first, *_ = cells = list(found["images"].values())
    depths = [
        float(torch.tensor(first[place]["below_mode"][1:]).quantile(0.5))
        for place in ("start", "end")
    ]
    back = torch.tensor([cell["end"]["inside_reference"][1:] for cell in cells]).mean()
    text = " ".join((ROOT / "README.md").read_text().split())
    assert "docs/images/two_latents_mnist_radius_0.2_00.png" in text
    assert f"lie {depths[0]:.0f} nats below the mode" in text
    assert f"the ends of chains (dots) {depths[1]:.0f}, medians of ten attacks" in text
    assert (f"{float(back):.1f}", len(cells)) == ("0.2", 20)
    over = [
        float(middle(torch.tensor([cell[place]["below_mode"][1:] for cell in cells]).flatten()))
        for place in ("start", "end")
    ]
    assert (
        f"over 20 digits the medians are {over[0]:.0f} and {over[1]:.0f}, and a fifth of the "
        "chains get back"
    ) in text


def test_wrong_settings_of_two_latents(models, tmp_path, capsys):
    for field, value in (("num_chains", 2), ("warmup_steps", 1)):
        command = ["two_latents", "mnist_radius_0.1", "--set", f"chain.{field}={value}"]
        assert main([*command, "--output", str(tmp_path)]) == 2
        assert f"chain.{field} must be" in capsys.readouterr().err
    with pytest.raises(ValueError, match="num_drawn must be at most num_images"):
        TwoLatentsConfig("mnist_vae_2d", num_drawn=50)
    with pytest.raises(ValueError, match="two latent dimensions, got 64"):
        TwoLatents(
            "mnist_radius_0.1", tmp_path, None, models, {"model": "mnist_vae"}, progress=False
        ).run()
