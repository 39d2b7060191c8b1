"""Balls, divergences, latents arithmetic, random streams, files."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

from pyro_vae_defence import metrics
from pyro_vae_defence.defence import calibrate_radius, clip_dark_pixels
from pyro_vae_defence.defence.detector import conformal_rank
from pyro_vae_defence.metrics import Interval
from pyro_vae_defence.models import ConvVAE
from pyro_vae_defence.objectives import linear_schedule
from pyro_vae_defence.ops import divergences
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.balls import L1, L2, Linf
from pyro_vae_defence.ops.checks import check_within
from pyro_vae_defence.ops.files import (
    atomic_path,
    atomic_save,
    check_writable,
    load_tensors,
    naming,
    remove_partial,
    write_atomically,
    write_json,
)
from pyro_vae_defence.ops.locks import sole_writer
from pyro_vae_defence.ops.provenance import provenance
from pyro_vae_defence.ops.streams import Streams, philox

BALLS = [Linf(0.1), L2(1.5), L1(4.0)]


def _words(values):
    return tuple(torch.tensor([v]) for v in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    assert tuple(int(w) for w in philox(_words(counter), key)) == expected
    arrays = tuple(w.numpy() for w in _words(counter))
    assert tuple(w.item() for w in philox(arrays, key)) == expected


@pytest.mark.parametrize("rows", [1, 5, 5000])
def test_streams_of_numbers_and_of_tensors_are_the_same_bits(rows):
    """Few words are made by NumPy, many and those of a step that is a tensor by torch."""
    streams = Streams.create(rows, 2, seed=2**63 + 5, first_image=2**32 - 5000)
    step = 2**33 + 7
    recorded = streams.uniform(torch.tensor(step), 9, (15,), torch.float64)
    assert torch.equal(streams.uniform(step, 9, (15,), torch.float64), recorded)


def test_streams_are_philoxs_words_and_their_box_muller_transform(float64):
    """Of the known answer above; what a seed gives is the same from version to version."""
    words = torch.tensor([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]).double()
    u = (words + 0.5) / 2**32
    streams = Streams.create(1, seed=0)
    assert torch.equal(streams.uniform(0, 0, (4,), torch.float64)[0], u)
    radius, angle = (-2 * u[:2].log()).sqrt(), 2 * math.pi * u[2:]
    expected = torch.cat([radius * angle.cos(), radius * angle.sin()])
    torch.testing.assert_close(streams.normal(0, 0, (4,), torch.float64)[0], expected)


def test_streams_do_not_depend_on_the_batch(float64):
    streams = Streams.create(6, 2, seed=5)
    some = Streams(5, torch.tensor([4]), torch.tensor([1]))
    for draw in ("uniform", "normal"):
        whole = getattr(streams, draw)(3, 1, (7,), torch.float64)
        alone = getattr(some, draw)(3, 1, (7,), torch.float64)
        # Row of chain 1, image 4 of 6 is 1 * 6 + 4. Uniforms are the bits themselves; logarithms
        # and cosines may be rounded differently in vectors of another length.
        close = 0.0 if draw == "uniform" else 1e-12
        torch.testing.assert_close(whole[10], alone[0], rtol=0, atol=close)


def test_streams_differ_in_every_coordinate():
    base = Streams.create(3, 2, seed=5)
    value = base.normal(0, 0, (4,), torch.float32)
    assert len(value.unique(dim=0)) == 6
    for other in (
        base.normal(1, 0, (4,), torch.float32),
        base.normal(0, 1, (4,), torch.float32),
        base._replace(seed=6).normal(0, 0, (4,), torch.float32),
    ):
        assert not torch.isclose(value, other).any()


def test_streams_follow_their_distributions():
    # 400,000 numbers; each of five bounds is 5 standard errors: error rate about 3e-6 in all.
    streams = Streams.create(1000, 1, seed=11)
    z = streams.normal(0, 0, (400,), torch.float64).flatten()
    n = z.numel()
    for moment, mean, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs(z.pow(moment).mean() - mean) < 5 * math.sqrt(variance / n)
    u = streams.uniform(0, 1, (400,), torch.float64).flatten()
    assert u.min() > 0
    assert u.max() <= 1
    assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / n)


def test_seed_comes_from_the_global_seed_or_a_generator():
    torch.manual_seed(3)
    first = Streams.create(2).seed
    torch.manual_seed(3)
    assert Streams.create(2).seed == first
    generator = torch.Generator().manual_seed(3)
    second = Streams.create(2, generator=generator).seed
    assert Streams.create(2, generator=generator.manual_seed(3)).seed == second


def test_purpose_out_of_range():
    with pytest.raises(ValueError, match="purpose must lie in 0..4095, got 4096"):
        Streams.create(2, seed=0).uniform(0, 4096, (), torch.float32)


@pytest.mark.parametrize("ball", BALLS, ids=str)
class TestBalls:
    def test_projection_is_inside_and_idempotent(self, ball):
        eps = 2 * torch.randn(50, 1, 5, 5)
        projected = ball.project(eps)
        assert (ball.norm(projected) <= ball.radius * (1 + 1e-6)).all()
        assert torch.allclose(ball.project(projected), projected, atol=1e-5)
        small = 1e-4 * eps
        assert torch.equal(ball.project(small), small)

    def test_projection_is_the_nearest_point(self, ball, float64):
        eps = 2 * torch.randn(20, 25)
        projected = ball.project(eps)
        distance = (eps - projected).norm(dim=1)
        for _ in range(200):
            other = ball.project(projected + 0.1 * torch.randn_like(eps))
            assert ((eps - other).norm(dim=1) >= distance - 1e-9).all()

    @pytest.mark.parametrize("scale", [1e-30, 1e8, 1e25])
    def test_float32_projects_far_points_and_follows_any_gradient(self, ball, scale):
        eps = torch.randn(20, 25)
        far = ball.project(scale * eps)
        expected = ball.project(scale * eps.double())
        torch.testing.assert_close(
            far.double(), expected, rtol=1e-4, atol=1e-4 * scale / (1 + scale)
        )
        torch.testing.assert_close(ball.step_direction(scale * eps), ball.step_direction(eps))

    def test_steepest_ascent_maximises_the_inner_product(self, ball, float64):
        gradient = torch.randn(20, 25)
        unit = type(ball)(1.0)
        best = (gradient * unit.steepest_ascent(gradient)).sum(1)
        assert torch.allclose(unit.norm(unit.steepest_ascent(gradient)), torch.ones(20))
        for _ in range(200):
            direction = torch.randn_like(gradient)
            direction = direction / unit.norm(direction)[:, None]
            assert ((gradient * direction).sum(1) <= best + 1e-9).all()

    def test_random_start_is_inside_and_per_image(self, ball, float64):
        x = torch.rand(8, 1, 5, 5)
        start = ball.random_start(x, Streams.create(8, seed=1))
        assert (ball.norm(start) <= ball.radius).all()
        alone = ball.random_start(x[5:6], Streams.create(1, seed=1, first_image=5))
        torch.testing.assert_close(start[5:6], alone, rtol=0, atol=1e-12)

    def test_random_start_is_uniform(self, ball, float64):
        """A share s^D of a ball in D dimensions lies within s radii, half of it on either side of
        0 in each. Kolmogorov's test of 4,000 starts at 1e-4; signs within 5 standard errors."""
        start = ball.random_start(torch.empty(4000, 1, 1, 3), Streams.create(4000, seed=1))
        share = (ball.norm(start) / ball.radius) ** 3
        assert stats.kstest(share.numpy(), "uniform").pvalue > 1e-4
        assert ((start > 0).double().mean(0) - 0.5).abs().max() < 2.5 / 4000**0.5

    def test_inside_holds_exactly_after_rounding(self, ball):
        x = torch.rand(200, 1, 28, 28)
        eps = ball.project(torch.randn_like(x))
        x_adv = ball.inside(x, (x + eps).clamp(0, 1))
        assert (ball.norm(x_adv - x) <= ball.radius).all()
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1

    def test_runs_on_meta(self, ball):
        x = torch.rand(4, 1, 5, 5, device="meta")
        streams = Streams(0, torch.arange(4, device="meta"), torch.arange(4, device="meta"))
        eps = ball.project(ball.random_start(x, streams) + ball.steepest_ascent(x))
        assert ball.inside(x, eps).shape == x.shape


def test_l1_projects_what_has_no_sum_in_float32():
    far = torch.tensor([[3e38, -1.0, 2.0, 0.0], [1.0, 3e38, -3e38, 0.5]])
    expected = torch.tensor([[4.0, 0.0, 0.0, 0.0], [0.0, 2.0, -2.0, 0.0]])
    torch.testing.assert_close(L1(4.0).project(far), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("radius", [0.0, -0.1, math.inf, math.nan, "0.1", True])
def test_radius_must_be_positive(radius):
    with pytest.raises(ValueError, match="radius must be a positive finite number"):
        Linf(radius)


@pytest.mark.parametrize("ball", [L2(0.01), L2(1e-3), L1(0.01), L1(1e-3)], ids=str)
def test_small_balls_hold_whatever_the_rounding_of_pixels(ball):
    x, away = torch.rand(50, 1, 28, 28), torch.randn(50, 1, 28, 28)
    x_adv = x + ball.radius * away / ball.norm(away).reshape(-1, 1, 1, 1)
    assert (ball.norm(x_adv - x) > ball.radius).any()
    norm = ball.norm(ball.inside(x, x_adv) - x)
    assert (norm <= ball.radius).all()
    assert (norm > 0.95 * ball.radius).all()


@pytest.mark.parametrize("radius", [1e-9, 1e-6])
def test_balls_that_hold_but_for_a_bit_are_not_left(radius, float64):
    """Where shrinking by so little is undone when pixels are rounded."""
    ball = L2(radius)
    x = torch.rand(2000, 1, 4, 4)
    eps = ball.project_box(3 * radius * torch.randn_like(x), -x, 1 - x)
    assert (ball.norm(x + eps - x) > radius).any()
    norm = ball.norm(ball.inside(x, x + eps) - x)
    assert (norm <= radius).all()
    assert (norm > radius - 1e-15).double().mean() > 0.99


@pytest.mark.parametrize(("radius", "mend"), [(8, "8/255"), (1.5, "1.5/255"), (255.0, "255/255")])
def test_radius_in_grey_levels_is_refused(radius, mend):
    with pytest.raises(ValueError, match=f"Linf must be at most 1.* write {mend}$"):
        Linf(radius)
    assert Linf(1.0).radius == 1
    # The other norms grow with the image, and a bound that does not bind is a sanity check.
    assert (L2(radius).radius, L1(radius).radius) == (radius, radius)


def test_radius_of_numpy_is_a_number():
    ball = Linf(np.float32(0.25))
    assert type(ball.radius) is float
    assert ball == Linf(0.25)
    assert L1(np.int64(3)).radius == 3


def _gaussian(loc, scale):
    return {"z": Independent(Normal(loc, scale), 1)}


def test_divergences_closed_forms(float64):
    m, n = torch.randn(4, 3), torch.randn(4, 3)
    s, t = torch.rand(4, 3) + 0.5, torch.rand(4, 3) + 0.5
    p, q = _gaussian(m, s), _gaussian(n, t)
    kl = (torch.log(t / s) + (s**2 + (m - n) ** 2) / (2 * t**2) - 0.5).sum(1)
    lk = (torch.log(s / t) + (t**2 + (m - n) ** 2) / (2 * s**2) - 0.5).sum(1)
    assert torch.allclose(divergences.kl(p, q), kl)
    assert torch.allclose(divergences.symmetric_kl(p, q), (kl + lk) / 2)
    w2 = ((m - n) ** 2 + (s - t) ** 2).sum(1)
    assert torch.allclose(divergences.squared_wasserstein(p, q), w2)


def test_divergences_add_sites_and_inner_plates(float64):
    p = {"a": Normal(torch.randn(4, 3), 1.0), **_gaussian(torch.randn(4, 2), torch.ones(4, 2))}
    q = {"a": Normal(torch.randn(4, 3), 2.0), **_gaussian(torch.randn(4, 2), torch.ones(4, 2))}
    expected = kl_divergence(p["a"], q["a"]).sum(1) + kl_divergence(p["z"], q["z"])
    assert torch.allclose(divergences.kl(p, q), expected)


def test_divergence_errors():
    p = _gaussian(torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="same latent sites"):
        divergences.kl(p, {"y": p["z"]})
    with pytest.raises(ValueError, match="factorised Gaussian"):
        divergences.squared_wasserstein(
            {"b": Bernoulli(torch.rand(2))}, {"b": Bernoulli(torch.rand(2))}
        )


def test_latents_arithmetic():
    a = {"u": torch.randn(4, 3), "v": torch.randn(4, 2, 2)}
    b = {"u": torch.randn(4, 3), "v": torch.randn(4, 2, 2)}
    expected = (a["u"] * b["u"]).sum(1) + (a["v"] * b["v"]).sum((1, 2))
    assert torch.allclose(lat.dot(a, b), expected)
    scale = torch.arange(4.0)
    assert torch.allclose(lat.add(a, b, scale)["v"][3], a["v"][3] + 3 * b["v"][3])
    chosen = lat.where(torch.tensor([True, False, True, False]), a, b)
    assert torch.equal(chosen["v"][0], a["v"][0])
    assert torch.equal(chosen["v"][1], b["v"][1])
    folded = lat.repeat(a, 3)
    assert torch.equal(lat.unfold(folded["v"], 3)[2], a["v"])


def _boxes(event=(1, 3, 4)):
    """Perturbations, gradients, and bounds around 0, some of which are 0 themselves, as for
    images."""
    x = torch.rand(5, *event, dtype=torch.float64).round(decimals=1)
    return 2 * torch.randn(5, *event, dtype=torch.float64), -x, 1 - x


def _feasible(ball, low, high, num=400):
    """Random points of a ball and a box, on the border of both as well."""
    for _ in range(num):
        direction = torch.randn_like(low) * (torch.rand_like(low) < torch.rand(()))
        point = ball.project(3 * ball.radius * torch.rand(()) * direction)
        yield torch.minimum(torch.maximum(point, low), high)


@pytest.mark.parametrize("ball", [Linf(0.3), L2(1.2), L1(2.5)], ids=str)
def test_projection_on_ball_and_box_is_the_nearest_point(ball):
    far, low, high = _boxes()
    nearest = ball.project_box(far, low, high)
    assert (ball.norm(nearest) <= ball.radius * (1 + 1e-12)).all()
    assert ((low <= nearest) & (nearest <= high)).all()
    for point in _feasible(ball, low, high):
        # The characterisation of a projection on a convex set.
        angle = ((far - nearest) * (point - nearest)).flatten(1).sum(1)
        assert (angle <= 1e-6).all()
    assert torch.allclose(ball.project_box(0.01 * low, low, high), 0.01 * low)
    # Clipping the projection is not enough where the box cuts the ball.
    if not isinstance(ball, Linf):
        clipped = torch.minimum(torch.maximum(ball.project(far), low), high)
        assert ((far - clipped).norm() > (far - nearest).norm() + 1e-3).any()


@pytest.mark.parametrize("ball", [Linf(0.3), L2(1.2), L1(2.5)], ids=str)
def test_projection_of_a_far_step_is_the_best_point_of_ball_and_box(ball):
    gradient, low, high = _boxes()
    best = ball.project_box(1e4 * ball.step_direction(gradient), low, high)
    gain = (gradient * best).flatten(1).sum(1)
    for point in _feasible(ball, low, high):
        assert (gain >= (gradient * point).flatten(1).sum(1) - 1e-3).all()
    assert (ball.step_direction(torch.zeros_like(gradient)) == 0).all()


def test_files_are_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "made" / "x.json"
    write_json(path, {"interval": Interval(0.5, 0.25, 1.0, 0.95, 9, 3), "r": [float("nan"), (1,)]})
    expected = {"interval": {"estimate": 0.5, "low": 0.25, "high": 1.0}, "r": [None, [1]]}
    assert json.loads(path.read_text()) == expected
    assert path.stat().st_mode & 0o777 == 0o644

    def fail(failure):
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            assert temporary.parent == path.parent
            raise failure

    for failure in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(failure):
            fail(failure)
    assert json.loads(path.read_text()) == expected
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]


def test_permissions_are_those_of_the_umask_or_of_the_file_before(tmp_path):
    before = os.umask(0o077)
    try:
        for mask, mode in ((0o077, 0o600), (0o002, 0o664)):
            os.umask(mask)
            write_json(tmp_path / f"{mask}", [])
            assert (tmp_path / f"{mask}").stat().st_mode & 0o777 == mode
        (tmp_path / "2").chmod(0o640)
        write_json(tmp_path / "2", [1])
        assert (tmp_path / "2").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    for name in ("disk", "home"):
        (tmp_path / name).mkdir()
    link = tmp_path / "home" / "x.json"
    link.symlink_to(tmp_path / "disk" / "y.json")  # not there yet
    for contents in ([1], [2]):
        write_json(link, contents)
        assert link.is_symlink()
        assert json.loads((tmp_path / "disk" / "y.json").read_text()) == contents
    (tmp_path / "disk" / ".y.json.0.partial").touch()
    remove_partial(link)
    assert [p.name for p in tmp_path.rglob("*.json")] == ["y.json", "x.json"]
    assert not list(tmp_path.rglob(".*"))


def test_what_is_no_ordinary_file_is_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for touch in (check_writable, lambda path: write_json(path, [])):
        with pytest.raises(OSError, match=f"{pipe} is no ordinary file"):
            touch(pipe)
        with pytest.raises(IsADirectoryError, match=f"{tmp_path} is a directory"):
            touch(tmp_path)
    assert pipe.is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_name_for_which_there_is_no_temporary_one_is_found_beforehand(tmp_path):
    with pytest.raises(OSError, match="File name too long"):
        check_writable(tmp_path / ("a" * 250))


def test_a_full_disk_is_said_with_the_file(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "c.pt"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        for write in (
            lambda: atomic_save(torch.zeros(100_000), path),
            lambda: write_atomically(path, bytes(100_000)),
        ):
            with pytest.raises(OSError, match=rf"File too large: '{path}'"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


class Anything:
    """What no file of tensors holds."""


def test_files_that_cannot_be_read_are_named_in_one_line_without_torchs_advice(tmp_path):
    path = tmp_path / "c.pt"

    def message(content=None):
        if content is not None:
            torch.save(content, path)
        found = pytest.raises(ValueError, match=r"c\.pt is bad")
        with found as caught, naming(f"{path} is bad", "mend it"):
            load_tensors(path)
        assert "weights_only" not in str(caught.value)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "Anything" in message(Anything())
    assert message(Anything()).endswith("; mend it")
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(path))
    assert message().endswith("; mend it")
    path.write_bytes(b"no checkpoint")
    assert message().endswith("; mend it")
    path.unlink()  # what could not be opened is not to be mended
    assert message().endswith("No such file or directory: '" + str(path) + "')")
    torch.save({"a": torch.ones(2)}, path)
    assert load_tensors(path)["a"].tolist() == [1, 1]


def test_provenance_names_commit_versions_and_threads():
    source = provenance()
    assert torch.__version__.startswith(source["torch"])
    assert source["threads"] == torch.get_num_threads()
    assert set(source) >= {"commit", "python", "pyro-ppl", "machine"}


def out_of_memory():
    """What torch raises on the CPU."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    return raised.value


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), out_of_memory()]
)
def test_short_memory_is_no_damage(tmp_path, monkeypatch, error):
    """Or a good file would be deleted."""
    atomic_save(torch.zeros(3), tmp_path / "a.pt")

    def load(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(type(error)) as raised, naming("it is damaged", "delete it"):
        load_tensors(tmp_path / "a.pt")
    assert raised.value is error


class TestSoleWriter:
    def test_links_lead_to_the_same_file(self, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        with sole_writer(tmp_path / "real" / "a.json"):
            with pytest.raises(ValueError, match="is being written by this very process"):
                sole_writer(tmp_path / "link" / "a.json").__enter__()
            assert (tmp_path / "real" / ".a.json.lock").exists()
        with sole_writer(tmp_path / "link" / "a.json"):
            pass
        assert not list((tmp_path / "real").iterdir())
        (tmp_path / "b.json").symlink_to("real/a.json")  # a file that is not there yet
        said = pytest.raises(ValueError, match="is being written by this very process")
        with sole_writer(tmp_path / "b.json"), said:
            sole_writer(tmp_path / "real" / "a.json").__enter__()

    def test_one_of_many_threads_writes(self, tmp_path):
        start, end = threading.Barrier(8), threading.Barrier(8)

        def write(_):
            start.wait(10)
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(sole_writer(tmp_path / "a.json"))
                    return True
                except ValueError:
                    return False
                finally:
                    end.wait(10)

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(write, range(8))) == 1
        assert not list(tmp_path.iterdir())

    def test_a_failure_holds_nothing(self, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", full)
            with pytest.raises(OSError, match="No space"):
                sole_writer(tmp_path / "a.json").__enter__()
        with sole_writer(tmp_path / "a.json"):
            pass

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_a_forked_process_holds_nothing_and_ends_nothing(self, tmp_path):
        """It meets its parent's lock as any other process does, and leaves the file of it."""
        path, said = tmp_path / "a.json", tmp_path / "said"
        block = sole_writer(path)
        block.__enter__()
        child = os.fork()
        if not child:
            try:
                with sole_writer(path):
                    pass
            except ValueError as error:
                said.write_text(str(error))
            block.__exit__(None, None, None)
            os._exit(0)
        os.waitpid(child, 0)
        assert f"is being written by process {os.getpid()} on" in said.read_text()
        assert (tmp_path / ".a.json.lock").exists()
        block.__exit__(None, None, None)
        assert [p.name for p in tmp_path.iterdir()] == ["said"]

    def test_the_lock_of_another_user_is_named(self, tmp_path, monkeypatch):
        def refused(*_):
            raise PermissionError(errno.EACCES, "Permission denied")

        (tmp_path / ".a.json.lock").touch()
        monkeypatch.setattr(os, "open", refused)
        with pytest.raises(
            ValueError, match=r"\.a\.json\.lock is another user's.* delete that file"
        ):
            sole_writer(tmp_path / "a.json").__enter__()
        with pytest.raises(PermissionError):
            sole_writer(tmp_path / "b.json").__enter__()


class TestNumbers:
    """Arguments that are numbers of an interval."""

    @pytest.mark.parametrize("value", ["0.5", None, True, math.nan, math.inf, 0, 1.0, [0.5], -1])
    def test_what_is_none_is_named(self, value):
        with pytest.raises(ValueError, match=r"share must lie in \(0, 1\), got .*; use 0.05"):
            check_within("share", value, "(0, 1)", "use 0.05")

    @pytest.mark.parametrize("value", [0, 0.5, np.float32(0.5), torch.tensor(0.5), 1e300])
    def test_ends_and_numbers_of_any_kind(self, value):
        check_within("share", value, "[0, inf)")
        check_within("share", math.inf, "[0, inf]")
        check_within("share", 1, "[0, 1]")

    def test_text_is_not_compared_with_numbers(self):
        x = torch.rand(4, 1, 28, 28)
        scores = torch.rand(30)
        for compute in (
            lambda: conformal_rank(30, "0.05"),
            lambda: metrics.fpr_at_tpr(scores, scores, "0.95"),
            lambda: calibrate_radius(ConvVAE().eval(), x, (0.0, 0.1), quantile="0.9"),
            lambda: clip_dark_pixels(x, "0.1"),
            lambda: linear_schedule("100"),
        ):
            with pytest.raises(ValueError, match=r"must lie in .*, got '"):
                compute()
