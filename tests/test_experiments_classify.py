"""Classifiers: the paper's linear one and the feature extractor, trained, stored, and used."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from studies import save_model
from torch.utils.data import TensorDataset

from pyro_vae_defence import data
from pyro_vae_defence.experiments.__main__ import main
from pyro_vae_defence.experiments.cards import trained_models
from pyro_vae_defence.experiments.classify import (
    CLASSIFIERS,
    ClassifierConfig,
    TrainClassifier,
    _inputs,
    fit_classifier,
)
from pyro_vae_defence.experiments.evaluate import Evaluate
from pyro_vae_defence.experiments.train import MODELS
from pyro_vae_defence.models import ConvVAE, program
from pyro_vae_defence.models.classifier import (
    ConvClassifier,
    LinearClassifier,
    MLPClassifier,
    flatten_latents,
    load_classifier,
)
from pyro_vae_defence.models.pretrained import load_card, load_pretrained

TINY = {"dataset": "mnist_subset", "max_epochs": 2, "batch_size": 500}


@pytest.fixture
def models(tmp_path):
    torch.manual_seed(0)
    save_model(ConvVAE(), "mnist_vae", tmp_path / "models")
    return tmp_path / "models"


def separable(num):
    x = torch.randn(num, 2)
    return TensorDataset(x, (x[:, 0] > x[:, 1]).long())


def test_the_papers_rule_learns_halves_and_stops():
    classifier = LinearClassifier(2, 2)
    config = ClassifierConfig("mnist_subset", learning_rate=1.0, early_stop=4, batch_size=50)
    history = fit_classifier(classifier, separable(500), separable(200), config)
    assert min(history) < 0.1  # nats; a coin has 0.69
    x, y = separable(500).tensors
    assert (classifier(x).argmax(-1) == y).double().mean() > 0.97
    assert not classifier.training
    # Labels without pattern: no improvement for early_stop epochs ends it, and the best weights
    # stay.
    torch.manual_seed(0)
    noise = TensorDataset(torch.randn(200, 2), torch.randint(2, (200,)))
    other = TensorDataset(torch.randn(200, 2), torch.randint(2, (200,)))
    classifier = LinearClassifier(2, 2)
    history = fit_classifier(classifier, noise, other, config)
    best = history.index(min(history))
    assert len(history) == best + 5 < config.max_epochs
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(classifier(other.tensors[0]), other.tensors[1])
    assert float(loss) == pytest.approx(min(history), rel=1e-5)


def test_linear_classifier_reads_any_programs_latents(tutorial_vae):
    x = torch.rand(3, 1, 28, 28)
    classifier = LinearClassifier(5, 10)
    means = program.posterior_mean(tutorial_vae, x)
    assert torch.equal(classifier(means), classifier(means["latent"]))
    assert torch.equal(classifier.classify(tutorial_vae, x), classifier(means).argmax(-1))
    several = {"a": torch.ones(2, 3, 2), "b": torch.zeros(2, 4), "c": torch.tensor([5.0, 6.0])}
    flat = flatten_latents(several)
    assert flat.shape == (2, 11)
    assert flat[:, 10].tolist() == [5.0, 6.0]  # of a site without event dimensions


def test_a_linear_classifier_of_means_is_trained_and_stored(tmp_path):
    card = TrainClassifier("mnist_vae_classifier", tmp_path, overrides=TINY).run()
    classifier, loaded = load_classifier("mnist_vae_classifier", tmp_path)
    assert loaded == card
    assert card.training["weights"] == load_card("mnist_vae").sha256
    assert card.training["epochs"] == 2
    vae = load_pretrained("mnist_vae")
    test = data.load("mnist_subset", "test")
    right = (classifier.classify(vae, test.images()) == test.labels).double().mean()
    entry = card.metrics["test_accuracy"]
    assert float(right) == pytest.approx(entry["estimate"])
    # The packaged VAE's means separate digits linearly; chance is one in ten.
    assert entry["low"] > 0.7
    assert entry["num_images"] == 1000


def test_colours_of_a_digit_are_resampled_together(monkeypatch):
    dataset = data.load("color_mnist_subset", "test")
    cpu = torch.device("cpu")
    plain = ClassifierConfig("color_mnist_subset")
    assert torch.equal(_inputs(dataset, None, plain, cpu).origins, torch.arange(7000) // 7)
    drawn = ClassifierConfig("color_mnist_subset", "m", inputs="guide", num_images=200, num_draws=2)
    monkeypatch.setattr(
        "pyro_vae_defence.experiments.classify._draw",
        lambda vae, config: lambda x, generator: torch.zeros(2, len(x), 3),
    )
    some = _inputs(dataset, ConvVAE(3), drawn, cpu)
    assert len(some) == len(some.origins) == 40
    assert torch.equal(some.origins[:20], some.origins[20:])
    assert torch.equal(dataset.labels[7 * some.origins, 0], some.labels)


def test_hidden_layers_tell_what_is_not_linear():
    """Classes by the sign of a product: a linear rule is right for half of the points."""

    def crossed(num):
        x = torch.randn(num, 2)
        return TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long())

    torch.manual_seed(0)
    config = ClassifierConfig(
        "mnist_subset", optimiser="adam", learning_rate=1e-2, max_epochs=30, batch_size=50
    )
    classifier = MLPClassifier(2, 2, hidden_dim=16)
    fit_classifier(classifier, crossed(1000), crossed(200), config)
    x, y = crossed(1000).tensors
    assert (classifier(x).argmax(-1) == y).double().mean() > 0.9
    assert torch.equal(classifier({"z": x}), classifier(x))  # dropout is over
    # Nor has it a say in what one predicts that is still trained.
    modes = []
    classifier.train().register_forward_pre_hook(lambda module, _: modes.append(module.training))
    classifier.classify(ConvVAE(latent_dim=2), torch.rand(2, 1, 28, 28))
    assert modes == [False]
    assert classifier.training
    with pytest.raises(ValueError, match="MLPClassifier of num_latents=2 is given latents"):
        classifier(torch.zeros(3, 4))
    for wrong in ({"hidden_dim": 0}, {"dropout": 1.0}, {"dropout": "0.5"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            MLPClassifier(2, 2, **wrong)


def test_one_with_hidden_layers_is_trained_and_stored(tmp_path):
    name = "mnist_vae_mlp_classifier"
    card = TrainClassifier(name, tmp_path, overrides={**TINY, "hidden_dim": 12}).run()
    classifier, _ = load_classifier(name, tmp_path)
    assert isinstance(classifier, MLPClassifier)
    assert classifier.config == {
        "num_latents": 64, "num_classes": 10, "hidden_dim": 12, "dropout": 0.2
    }  # fmt: skip
    assert card.training["hidden_dim"] == 12
    assert not classifier.training
    assert "two hidden layers" in trained_models(tmp_path)


def test_a_card_from_before_a_choice_is_of_its_default(tmp_path):
    """Weights of a linear classifier are not replaced by others of the same name."""
    path = tmp_path / "mnist_vae_classifier.json"
    training = dataclasses.asdict(CLASSIFIERS["mnist_vae_classifier"])
    del training["hidden_dim"]
    path.write_text(json.dumps({"training": training}))
    with pytest.raises(ValueError, match="trained with hidden_dim=0, not 8"):
        TrainClassifier("mnist_vae_classifier", tmp_path, overrides={"hidden_dim": 8}).run()


def test_features_are_trained_by_the_same_command_and_measure_distances(models, capsys):
    settings = [f"--set={key}={value}" for key, value in TINY.items()]
    arguments = ["train", "mnist_features", "--output", str(models), *settings]
    assert main(arguments) == 0
    assert "mnist_features: test accuracy 0." in capsys.readouterr().out
    extractor, _ = load_classifier("mnist_features", models)
    assert isinstance(extractor, ConvClassifier)
    assert extractor.features(torch.rand(2, 1, 28, 28)).shape == (2, 64)
    changes = {"num_images": 50, "num_samples": 2, "features": "mnist_features"}
    changes |= {"ais_images": 3, "ais_steps": 3, "ais_chains": 2}
    study = Evaluate("mnist_vae", models / "out", None, models, changes, progress=False)
    result = study.run()
    distance = result["metrics"]["frechet[mnist_features]"]
    assert distance["estimate"] > 0
    assert "fid" not in json.dumps(result).lower()
    ais = result["metrics"]["nll[ais 3]"]
    assert ais["num_images"] == 3
    assert set(ais["on_the_same_images"]) == {"nll[iwae 2]", "difference", "acceptance_rate"}


def test_every_model_has_a_classifier():
    for model, config in MODELS.items():
        assert CLASSIFIERS[f"{model}_classifier"].model == model
        if config.dataset == "color_mnist":
            assert CLASSIFIERS[f"{model}_color_classifier"].column == 1
    defaults = CLASSIFIERS["mnist_vae_classifier"]
    assert (defaults.learning_rate, defaults.patience, defaults.early_stop) == (1.0, 3, 20)


def test_mistakes(models, tmp_path):
    with pytest.raises(ValueError, match="no classifier named 'x'"):
        TrainClassifier("x", tmp_path)
    with pytest.raises(ValueError, match="'mnist_vae' is a ConvVAE, no classifier"):
        load_classifier("mnist_vae", models)
    with pytest.raises(ValueError, match="num_latents must be an integer of at least 1, got 0"):
        LinearClassifier(0, 3)
    with pytest.raises(ValueError, match="in_channels must be an integer of at least 1"):
        ConvClassifier(0, 3)
    TrainClassifier("mnist_vae_classifier", tmp_path, models=models, overrides=TINY).run()
    path = tmp_path / "mnist_vae_classifier.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="do not match their card"):
        load_classifier("mnist_vae_classifier", tmp_path)
