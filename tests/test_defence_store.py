"""Results of a whole dataset in a Zarr store: what it holds, and how a call is taken up again."""

from __future__ import annotations

import copy
import errno
import functools
import json
import os
import shutil

import numpy as np
import pyro
import pytest
import torch
from programs import LinearGaussianVAE, TutorialVAE
from pyro.infer import NUTS
from torch import nn

pytest.importorskip("zarr")
import xarray

from pyro_vae_defence.defence import ConvergenceRule, DefenceResult, MCMCDefence, NoDefence, store
from pyro_vae_defence.defence.base import BaseDefence
from pyro_vae_defence.defence.result import setting
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.models import ConvVAE
from pyro_vae_defence.ops.locks import sole_writer

KERNEL = functools.partial(BatchedHMC, num_steps=2)


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def read(path):
    """Group/variable -> values of a whole store."""
    tree = xarray.open_datatree(path, engine="zarr")
    return {
        f"{group.name}/{name}": values.values
        for group in tree.children.values()
        for name, values in group.variables.items()
    }


def assert_same(one, other):
    one, other = read(one), read(other)
    assert one.keys() == other.keys()
    for name, values in one.items():
        assert values.dtype == other[name].dtype, name
        np.testing.assert_array_equal(values, other[name], name)


@pytest.fixture
def x():
    return torch.rand(7, 1, 4, 4, dtype=torch.float64)


@pytest.fixture
def defence(linear_vae):
    return MCMCDefence(linear_vae, KERNEL, num_samples=3, warmup_steps=2, num_chains=2)


class Pairs:
    """A map-style dataset and nothing more: images with labels, and who was asked for."""

    def __init__(self, x):
        self.x, self.asked = x, []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.asked.append(index)
        return self.x[index], index % 2


class TestContents:
    @pytest.mark.parametrize("batch_size", [4, 6, 4096])
    def test_it_holds_what_one_call_returns(self, defence, x, batch_size, tmp_path):
        """Micro-batches of 2, 3 and 7 images; with the default chunks the same bits."""
        defence.batch_size = batch_size
        path = defence.to_zarr(
            Pairs(x), tmp_path / "a.zarr", generator=seeded(), observed_data=True
        )
        result, found = defence(x, seeded()), read(path)
        tree = result.to_datatree()
        for group in ("posterior", "sample_stats", "observed_data"):
            for name, values in tree[group].data_vars.items():
                np.testing.assert_array_equal(found[f"{group}/{name}"], values.values, name)
                assert found[f"{group}/{name}"].dtype == values.dtype
            np.testing.assert_array_equal(found[f"{group}/image"], np.arange(7))
        np.testing.assert_array_equal(found["defence/reconstruction"], result.reconstruction)
        np.testing.assert_array_equal(found["defence/num_gradients"], result.num_gradients)
        assert sorted(os.listdir(tmp_path)) == ["a.zarr"]

    def test_other_chunks_differ_by_rounding_alone(self, defence, x, tmp_path):
        found = read(defence.to_zarr(x, tmp_path / "a", generator=seeded(), chunk_size=2))
        expected = defence(x, seeded())
        np.testing.assert_allclose(found["posterior/z"], expected.samples["z"], rtol=1e-9)

    def test_attributes_say_what_it_is_of(self, defence, x, tmp_path):
        path = defence.to_zarr(x, tmp_path / "a", generator=seeded(), chunk_size=2)
        tree = xarray.open_datatree(path, engine="zarr")
        assert tree.attrs["seed"] == store_seed(seeded())
        assert (tree.attrs["num_images"], tree.attrs["chunk_size"]) == (7, 2)
        assert tree.attrs["settings"]["kernel_num_steps"] == 2
        assert tree["posterior"].attrs["kernel"] == "BatchedHMC"
        assert "observed_data" not in tree.children

    def test_convergence_is_there_where_it_is_known(self, linear_vae, x, tmp_path):
        rule = ConvergenceRule(check_every=8)
        defence = MCMCDefence(
            linear_vae, KERNEL, num_samples=16, num_chains=4, until_converged=rule
        )
        found = read(defence.to_zarr(x, tmp_path / "a", generator=seeded(), chunk_size=3))
        assert found["defence/converged"].shape == (7,)
        assert found["defence/converged"].dtype == bool

    def test_controls_have_no_statistics(self, linear_vae, x, tmp_path):
        path = NoDefence(linear_vae).to_zarr(x, tmp_path / "a", generator=seeded())
        assert "sample_stats" not in xarray.open_datatree(path, engine="zarr").children

    def test_arviz_reads_it(self, defence, x, tmp_path):
        from pyro_vae_defence import diagnostics

        path = defence.to_zarr(x, tmp_path / "a", generator=seeded(), chunk_size=3)
        tree = xarray.open_datatree(path, engine="zarr")
        expected = diagnostics.ess(defence(x, seeded()).to_datatree())["z"]
        np.testing.assert_allclose(diagnostics.ess(tree)["z"], expected)
        assert xarray.open_zarr(path, group="posterior").sizes["image"] == 7


def store_seed(generator):
    from pyro_vae_defence.ops.streams import draw_seed

    return draw_seed(generator)


class TestTakingUp:
    def test_what_is_finished_is_not_made_again(self, defence, x, tmp_path, monkeypatch):
        whole = defence.to_zarr(Pairs(x), tmp_path / "whole", generator=seeded(), chunk_size=2)
        put, done = store._Store.put, []

        def dies(self, groups, number, *rest):
            """After the arrays of the third chunk and before its mark."""
            if len(done) == 2:
                monkeypatch.setattr(store, "write_atomically", lambda *_: 1 / 0)
            done.append(number)
            put(self, groups, number, *rest)

        monkeypatch.setattr(store._Store, "put", dies)
        path, partial = tmp_path / "a", tmp_path / "a.partial"
        with pytest.raises(ZeroDivisionError):
            defence.to_zarr(Pairs(x), path, generator=seeded(), chunk_size=2)
        monkeypatch.undo()
        assert not path.exists()
        assert sorted(os.listdir(partial / ".finished")) == ["0", "1"]
        # What the dead process has left of the third chunk is not believed.
        (chunk,) = (partial / "posterior" / "z").glob("0.0.2.0")
        chunk.write_bytes(b"")
        (tmp_path / ".a.123.new").mkdir()
        images = Pairs(x)
        assert defence.to_zarr(images, path, generator=seeded(), chunk_size=2) == path
        # First some are looked at, then those of finished chunks; the others are defended.
        assert images.asked == [0, 0, 3, 6, 0, 1, 2, 3, 4, 5, 6]
        assert_same(whole, path)
        assert sorted(os.listdir(tmp_path)) == ["a", "whole"]

    def test_finished_chunks_of_images_that_have_changed_are_refused(
        self, defence, x, tmp_path, monkeypatch
    ):
        """Of any of them, and before more is computed."""
        defend, calls = BaseDefence._defend, []

        def dies(*args):
            calls.append(1)
            return defend(*args) if len(calls) < 3 else 1 / 0

        monkeypatch.setattr(BaseDefence, "_defend", dies)
        with pytest.raises(ZeroDivisionError):
            defence.to_zarr(x, tmp_path / "a", generator=seeded(), chunk_size=2)
        other = x.clone()
        other[2, 0, 0, 0] = 0.5
        with pytest.raises(ValueError, match=r"dataset\[2\] to dataset\[3\] have changed.*same"):
            defence.to_zarr(other, tmp_path / "a", generator=seeded(), chunk_size=2)
        assert len(calls) == 3

    def test_a_finished_store_of_any_other_image_is_refused(self, defence, x, tmp_path):
        """Not of the first, the middle or the last alone, and of labels, too."""
        images = [(image, 0) for image in x]
        path = defence.to_zarr(images, tmp_path / "a", generator=seeded(), chunk_size=2)
        for changed in ((1 - x[2], 0), (x[2], 1)):
            other = [*images[:2], changed, *images[3:]]
            with pytest.raises(ValueError, match=r"a holds results of other images: dataset\[2\]"):
                defence.to_zarr(other, path, generator=seeded(), chunk_size=2)
        assert defence.to_zarr(images, path, generator=seeded(), chunk_size=2) == path

    def test_what_an_earlier_version_has_begun_is_finished(self, defence, x, tmp_path, monkeypatch):
        """It wrote no hash of each image."""

        def make(images, path):
            return defence.to_zarr(images, path, generator=seeded(), chunk_size=2)

        with monkeypatch.context() as patch:
            patch.setattr(store._Store, "close", lambda self: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                make(x, tmp_path / "a")
        partial = tmp_path / "a.partial"
        (partial / ".finished" / "2").unlink()
        shutil.rmtree(partial / "defence" / store._HASH)
        known = json.loads((partial / ".zmetadata").read_text())
        known["metadata"] = {k: v for k, v in known["metadata"].items() if store._HASH not in k}
        (partial / ".zmetadata").write_text(json.dumps(known))
        found, whole = read(make(x, tmp_path / "a")), read(make(x, tmp_path / "b"))
        assert whole.keys() - found.keys() == {f"defence/{store._HASH}"}
        np.testing.assert_array_equal(found["posterior/z"], whole["posterior/z"])

    def test_a_finished_store_costs_nothing(self, defence, x, tmp_path, monkeypatch):
        path = defence.to_zarr(x, tmp_path / "a", generator=seeded(), chunk_size=2)
        monkeypatch.setattr(BaseDefence, "_defend", lambda *_: pytest.fail("computed again"))
        assert defence.to_zarr(x, path, generator=seeded(), chunk_size=2) == path

    @pytest.mark.parametrize(
        ("change", "what"),
        [
            ({"seed": 4}, "seed"),
            ({"chunk_size": 3}, "chunk_size"),
            ({"observed_data": True}, "observed_data"),
            ({"kernel": BatchedHMC}, "settings.kernel_num_steps is 2, now it is None"),
            ({"num_samples": 4}, "settings.num_samples is 3, now it is 4"),
            ({"length": 6}, "num_images"),
            ({"pixel": 0.5}, "images_hash"),
            ({"weight": 2.0}, "weights_hash"),
            ({"version": "9"}, "inference_library_version"),
        ],
    )
    def test_another_run_is_refused(self, defence, x, tmp_path, monkeypatch, change, what):
        """Be the store finished or not."""
        path, partial = tmp_path / "a", tmp_path / "a.partial"
        defence.to_zarr(x, path, generator=seeded(), chunk_size=4)
        options = {"chunk_size": 4}
        options |= {k: v for k, v in change.items() if k in ("chunk_size", "observed_data")}
        for name in ("num_samples", "kernel"):
            setattr(defence, name, change.get(name, getattr(defence, name)))
        x = x[: change.get("length", 7)].clone()
        x[0, 0, 0, 0] = change.get("pixel", float(x[0, 0, 0, 0]))
        defence.vae.weight[0, 0] += change.get("weight", 0.0)
        if "version" in change:
            monkeypatch.setattr(store.pyro_vae_defence, "__version__", "9")
        for place in (path, partial):
            if place == partial:
                path.rename(partial)
                (partial / ".finished").mkdir()
            options["generator"] = seeded(change.get("seed", 3))
            with pytest.raises(ValueError, match=f"{place} holds another run: its {what}.*delete"):
                defence.to_zarr(x, path, **options)

    def test_what_settings_do_not_show_is_seen(self, defence, x, tmp_path):
        """A tensor of the kernel, whose name and numbers stay."""
        metric = {"z": torch.ones(3)}
        defence.kernel = functools.partial(BatchedHMC, inverse_mass_matrix=metric)
        path = defence.to_zarr(x, tmp_path / "a", generator=seeded())
        metric["z"][0] = 2.0
        with pytest.raises(ValueError, match="its defence_hash"):
            defence.to_zarr(x, path, generator=seeded())

    def test_parameters_of_pyros_store_are_seen(self, x, tmp_path, float64):
        class Stored(LinearGaussianVAE):
            def guide(self, x):
                scale = pyro.param("scale", torch.ones(()))
                with pyro.plate("data", x.shape[0]):
                    mean = x.new_zeros(x.shape[0], 3)
                    pyro.sample("z", pyro.distributions.Normal(mean, scale).to_event(1))

        path = NoDefence(Stored()).to_zarr(x, tmp_path / "a", generator=seeded())
        assert NoDefence(Stored()).to_zarr(x, path, generator=seeded()) == path
        pyro.get_param_store()["scale"] = torch.tensor(2.0)
        with pytest.raises(ValueError, match="its weights_hash"):
            NoDefence(Stored()).to_zarr(x, path, generator=seeded())

    def test_something_else_is_left_alone(self, defence, x, tmp_path):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "mine").touch()
        with pytest.raises(ValueError, match="is no store of to_zarr"):
            defence.to_zarr(x, tmp_path / "a", generator=seeded())
        assert (tmp_path / "a" / "mine").exists()

    def test_marks_of_a_store_that_is_gone_are_gone(self, defence, x, tmp_path, monkeypatch):
        """Killed between the last two steps; the user deletes the result and starts again."""
        path = tmp_path / "a"

        def dies(self):
            self.partial.rename(self.path)
            raise KeyboardInterrupt

        monkeypatch.setattr(store._Store, "close", dies)
        with pytest.raises(KeyboardInterrupt):
            defence.to_zarr(x, path, generator=seeded(), chunk_size=2)
        monkeypatch.undo()
        whole = read(path)
        shutil.rmtree(path)
        found = read(defence.to_zarr(x, path, generator=seeded(), chunk_size=2))
        np.testing.assert_array_equal(found["posterior/z"], whole["posterior/z"])

    def test_one_run_at_a_time_writes_a_store(self, defence, x, tmp_path):
        """The first to finish takes away what the others are writing into."""
        path = tmp_path / "a"
        with sole_writer(path), pytest.raises(ValueError, match="a is being written by"):
            defence.to_zarr(x, path, generator=seeded())
        defence.to_zarr(x, path, generator=seeded())
        assert list(tmp_path.iterdir()) == [path]

    def test_a_full_disk_is_named_and_nothing_stays_on_it(self, defence, x, tmp_path, monkeypatch):
        def full(*arguments):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        path = tmp_path / "a"
        monkeypatch.setattr("zarr.consolidate_metadata", full)
        with pytest.raises(OSError, match="No space left on device: .*a.partial"):
            defence.to_zarr(x, path, generator=seeded())
        assert list(tmp_path.iterdir()) == []

    def test_a_leftover_mark_is_cleared(self, defence, x, tmp_path):
        path = defence.to_zarr(x, tmp_path / "a", generator=seeded())
        (path / ".finished").mkdir()
        defence.to_zarr(x, path, generator=seeded())
        assert not (path / ".finished").exists()

    def test_foreign_kernels_do_not_know_what_ran_before(self, linear_vae, x, tmp_path):
        defence = MCMCDefence(linear_vae, NUTS, num_samples=2, warmup_steps=2)
        whole = defence.to_zarr(x[:4], tmp_path / "a", generator=seeded(), chunk_size=2)
        shutil.copytree(whole, tmp_path / "b.partial")
        marks = tmp_path / "b.partial" / ".finished"
        marks.mkdir()
        (marks / "0").write_text(store.fingerprint([x[0], x[1]]))
        torch.rand(5)
        state = torch.get_rng_state()
        assert_same(defence.to_zarr(x[:4], tmp_path / "b", generator=seeded(), chunk_size=2), whole)
        assert torch.equal(torch.get_rng_state(), state)


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"generator": None}, "generator must be a torch.Generator"),
            ({"chunk_size": 0}, "chunk_size must be"),
        ],
    )
    def test_options(self, defence, x, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            defence.to_zarr(x, tmp_path / "a", **{"generator": seeded(), **options})
        assert not os.listdir(tmp_path)

    def test_numpys_sizes_and_streams(self, defence, x, tmp_path):
        defence.to_zarr(x, tmp_path / "a", generator=seeded(), chunk_size=np.int64(3))
        defence.to_zarr(x, tmp_path / "b", generator=seeded(), chunk_size=3)
        assert_same(tmp_path / "a", tmp_path / "b")
        joined = DefenceResult.join(defence.stream([x[:4], x[4:]], seeded()))
        assert torch.equal(joined.x, x)

    def test_a_place_that_cannot_be_written_is_found_first(self, defence, x, tmp_path):
        (tmp_path / "file").touch()
        seen = []
        defence.parts = lambda *arguments: seen.append(1)
        with pytest.raises(ValueError, match="file/below' cannot be written"):
            defence.to_zarr(x, tmp_path / "file" / "below", generator=seeded())
        assert not seen

    def test_datasets(self, defence, x, tmp_path):
        with pytest.raises(ValueError, match=r"got generator; defence.stream\(\) takes"):
            defence.to_zarr((i for i in x), tmp_path / "a", generator=seeded())
        with pytest.raises(ValueError, match="dataset is empty"):
            defence.to_zarr(x[:0], tmp_path / "a", generator=seeded())
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            defence.to_zarr(x + 1, tmp_path / "a", generator=seeded())
        assert not os.listdir(tmp_path)

    def test_without_zarr_it_says_what_to_install(self, defence, x, tmp_path, monkeypatch):
        monkeypatch.setattr(store.importlib.util, "find_spec", lambda _: None)
        with pytest.raises(ImportError, match=r"pip install 'pyro-vae-defence\[zarr\]'"):
            defence.to_zarr(x, tmp_path / "a", generator=seeded())


def test_fingerprints_tell_apart_what_differs():
    network, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    values = [
        1, 1.0, True, "1", None, b"1", [1], {"1": 1}, torch.ones(2), torch.ones(2, 1),
        torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.bfloat16), torch.tensor(1),
        network, other, functools.partial(print, end=""), functools.partial(print), print, len,
        [[1], 2], [[1, 2]], ConvergenceRule(), ConvergenceRule(check_every=9), TutorialVAE(),
    ]  # fmt: skip
    hashes = [store.fingerprint(value) for value in values]
    assert len(set(hashes)) == len(values)
    other.load_state_dict(network.state_dict())
    assert store.fingerprint(network) == store.fingerprint(other)


@pytest.mark.parametrize(
    "text",
    [
        "lambda x: {k} * x",  # as an edited script, or a cell that was run again, has it
        "lambda x: by * x",
        "lambda x: net(x)",
        "lambda x, *, by={k}: by * x",
        "lambda x: helper(x)",
        "lambda x: [y * {k} for y in x]",
        "functools.partial(lambda by, x: by * x, {k})",
        "lambda x: table[0] * x",
        "lambda x: nested['a'] * x",
        "lambda x: x in chosen",
        "lambda x: array * tensor * x",
    ],
)
def test_what_a_function_computes_with_tells_it_from_others(text):
    def made(k):
        around = {"by": k, "functools": functools, "net": torch.nn.Linear(1, 1, bias=False)}
        torch.nn.init.constant_(around["net"].weight, k)
        around |= {"table": [k, 2], "nested": {"a": (1, {"b": [k]})}, "chosen": {"x", k}}
        around |= {"array": np.array([1.0, k]), "tensor": torch.tensor(k)}
        exec(f"def helper(x): return helper(x - 1) if x > {k} else x", around)
        return eval(text.format(k=k), around)

    first, same, other = (store.fingerprint(made(k)) for k in (0.5, 0.5, 0.9))
    assert first == same != other


@pytest.mark.parametrize("kind", ["itself", "many", "objects"])
def test_containers_that_are_no_settings_are_left_out(kind):
    """Those that hold themselves, a dataset or a cache, and what has no known value."""

    def made(k):
        table = {"many": [k] * 20_000, "objects": {k: object()}}.get(kind, [k])
        if kind == "itself":
            table.append({"again": table})
        return eval("lambda x: table[x]", {"table": table})

    assert store.fingerprint(made(1)) == store.fingerprint(made(2))


def test_functions_that_all_call_each_other_are_hashed_once_each():
    """Along all ways from one to another there would be 20 factorial."""

    def made(k):
        names = [f"f{number}" for number in range(20)]
        around = {}
        for name in names:
            own = k if name == names[-1] else 0
            exec(f"def {name}(x): return {own} + " + " + ".join(f"{n}(x)" for n in names), around)
        return around["f0"]

    assert store.fingerprint(made(1)) == store.fingerprint(made(1)) != store.fingerprint(made(2))


def test_sets_are_equal_whatever_their_order_and_kinds_are_told_apart():
    words = [str(k) for k in range(50)]
    assert store.fingerprint(set(words)) == store.fingerprint(set(reversed(words)))
    values = [{1, 2}, {1, 3}, torch.float32, torch.float64, 1j, 2j, np.float32(1.5), np.float32(2)]
    assert len({store.fingerprint(value) for value in values}) == len(values)


def test_settings_do_not_say_where_an_object_stands_in_memory():
    class Prepare:
        pass

    assert setting(Prepare()) == "Prepare"
    assert setting([].append) == "append"


def test_networks_with_equal_weights_that_do_something_else_are_others():
    class Scaled(nn.Module):
        def __init__(self, scale, kind="bernoulli"):
            super().__init__()
            self.scale, self.kind, self.inner = scale, kind, nn.Linear(2, 2, bias=False)
            nn.init.ones_(self.inner.weight)

    prints = [
        store.fingerprint(network) for network in (Scaled(1.0), Scaled(2.0), Scaled(1.0, "normal"))
    ]
    assert len(set(prints)) == 3
    assert store.fingerprint(Scaled(1.0).eval()) == prints[0]
    vae = ConvVAE()
    assert vae.scope != copy.deepcopy(vae).scope
    assert store.fingerprint(vae) == store.fingerprint(copy.deepcopy(vae))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.relu, torch.tanh),
        (nn.functional.relu, nn.functional.elu),
        (functools.partial(nn.functional.leaky_relu, negative_slope=0.1),
         functools.partial(nn.functional.leaky_relu, negative_slope=0.2)),
        ([1, 2], [1, 3]),
        ({"likelihood": {"scale": 0.1}}, {"likelihood": {"scale": 0.2}}),
        (np.float32(0.1), np.float32(0.2)),
    ],
)  # fmt: skip
def test_what_a_network_holds_beside_its_weights_tells_it_from_others(one, other):
    def made(value, mask=1.0):
        network = nn.Linear(1, 1)
        nn.init.ones_(network.weight), nn.init.zeros_(network.bias)
        network.held, network.itself = value, functools.partial(print, network)
        network.register_buffer("mask", torch.tensor(mask), persistent=False)
        network.seen = torch.rand(3)  # by the last run
        return store.fingerprint(network)

    assert made(one) == made(one) != made(other)
    assert made(one) != made(one, 2.0)


def test_a_store_of_another_activation_is_refused(x, tmp_path, float64):
    class Linear(LinearGaussianVAE, nn.Module):
        def __init__(self, activation):
            nn.Module.__init__(self)
            LinearGaussianVAE.__init__(self)
            self.activation = activation

    path = NoDefence(Linear(torch.relu)).to_zarr(x, tmp_path / "a", generator=seeded())
    with pytest.raises(ValueError, match="its weights_hash"):
        NoDefence(Linear(torch.tanh)).to_zarr(x, path, generator=seeded())


def test_arrays_that_torch_does_not_know_are_hashed():
    arrays = [["a", "b"], ["a", "c"], [None, 1]]
    values = [np.array(a, dtype=object if None in a else None) for a in arrays]
    values += [np.arange(3, dtype=">f4"), np.arange(3.0)[::-1], np.arange(3.0)]
    hashes = [store.fingerprint(value) for value in values]
    assert len(set(hashes)) == len(values)
    assert store.fingerprint(np.arange(3.0)) == store.fingerprint(torch.arange(3.0).double())
