"""The generative classifier and the ensemble over layers, against values worked out by hand."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_methods.errors import InvalidArgument, LightningMethodsWarning, ShapeMismatch, UnsupportedTraining
from lightning_methods.rog import GenerativeClassifier, LayerEnsemble
from lightning_methods.rog.ensemble import fit_ensemble
from lightning_methods.rog.selection import clearly_better, noisy_log_likelihood

F64 = torch.float64
NINE = torch.tensor([(0, 0), (2, 0), (0, 2), (4, 4), (6, 4), (4, 6), (-3, 5), (-1, 5), (-3, 7)], dtype=F64)
THREE = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])


def clusters(n: int = 600, d: int = 6, wrong: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return features, given labels and true ones of three clusters."""
    generator = torch.Generator().manual_seed(0)
    true = torch.arange(n) % 3
    x = torch.randn(n, d, generator=generator, dtype=F64) + 6 * torch.nn.functional.one_hot(true, d)
    flipped = torch.rand(n, generator=generator) < wrong
    return x, torch.where(flipped, (true + 1) % 3, true), true


def test_linear_discriminant_by_hand() -> None:
    fitted = GenerativeClassifier(estimator="sample").fit(NINE, THREE)
    third = torch.tensor([[2, 2], [14, 14], [-7, 17]], dtype=F64) / 3
    torch.testing.assert_close(fitted.location + fitted.center, third)
    torch.testing.assert_close(fitted.whitening.T @ fitted.whitening, torch.tensor([[1.5, 0.75], [0.75, 1.5]]).double())
    x = torch.tensor([[1.0, 2.0]], dtype=F64)
    logits = torch.tensor([2.401387711332, -18.598612288668, -5.098612288668], dtype=F64)
    torch.testing.assert_close(fitted(x)[0], logits.log_softmax(0), rtol=1e-8, atol=1e-9)
    assert float(fitted(x).exp()[0, 0]) == pytest.approx(0.999447220606, rel=1e-9)


@pytest.mark.parametrize("estimator", ["mcd", "official", "sample"])
def test_one_linear_layer_is_the_quadratic_form(estimator: Any) -> None:
    x, given, _ = clusters(wrong=0.2)
    fitted = GenerativeClassifier(estimator=estimator, priors=[0.2, 0.3, 0.5]).fit(x, given)
    quadratic = torch.tensor([0.2, 0.3, 0.5], dtype=F64).log() - fitted.mahalanobis(x) / 2
    torch.testing.assert_close(fitted(x), quadratic.log_softmax(1), rtol=1e-8, atol=1e-8)
    linear = fitted.to_linear(F64)
    torch.testing.assert_close(linear(x).log_softmax(1), fitted(x), rtol=1e-8, atol=1e-8)


def test_robust_means_stay_where_wrong_labels_draw_the_plain_ones() -> None:
    x, given, true = clusters(wrong=0.3)
    means = torch.stack([x[true == c].mean(0) for c in range(3)])
    away = {}
    for estimator in ("mcd", "sample"):
        fitted = GenerativeClassifier(estimator=estimator).fit(x, given)  # type: ignore[arg-type]
        away[estimator] = float((fitted.location + fitted.center - means).norm(dim=1).max())
    assert away["mcd"] < 0.5 < 2 < away["sample"]


def test_a_shift_of_the_features_changes_no_prediction() -> None:
    x, given, _ = clusters(wrong=0.2)
    moved = GenerativeClassifier().fit(x + 1000, given)
    torch.testing.assert_close(moved(x + 1000), GenerativeClassifier().fit(x, given)(x), rtol=1e-6, atol=1e-6)


def test_principal_components_and_features_that_do_not_vary() -> None:
    x, given, true = clusters()
    wide = torch.cat([x, torch.zeros(len(x), 4), x[:, :1]], dim=1)
    for fitted in (GenerativeClassifier(max_dim=3), GenerativeClassifier()):
        posterior = fitted.fit(wide, given)(wide)
        assert bool(posterior.isfinite().all())
        assert float((posterior.argmax(1) == true).double().mean()) > 0.98


def test_a_missing_class_is_never_predicted() -> None:
    x, given, _ = clusters()
    with pytest.warns(LightningMethodsWarning, match="class 3"):
        fitted = GenerativeClassifier().fit(x, given, num_classes=4)
    assert bool((fitted(x)[:, 3] == -torch.inf).all())
    assert not bool(fitted(x).isnan().any())


def test_state_goes_through_a_safe_file_bit_for_bit_and_stays_wide() -> None:
    x, given, _ = clusters()
    fitted = GenerativeClassifier().fit(x, given)
    file = io.BytesIO()
    torch.save(fitted.state_dict(), file)
    file.seek(0)
    other = GenerativeClassifier()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), fitted(x))
    assert torch.equal(other.half()(x), fitted(x))


def test_the_ensemble_prefers_the_layer_that_separates() -> None:
    x, given, true = clusters(wrong=0.3)
    noise = torch.randn(len(x), 6, generator=torch.Generator().manual_seed(1), dtype=F64)
    features = {"noise": noise, "good": x}
    ensemble = LayerEnsemble(["noise", "good"]).fit(features, given)
    ensemble.learn_weights(features, given, "noisy_val")
    assert float(ensemble.weights.sum()) == pytest.approx(1.0)
    assert float(ensemble.weights[1]) > 0.6
    mixed = ensemble({"noise": noise, "good": x})
    torch.testing.assert_close(mixed.exp().sum(1), torch.ones(len(x), dtype=F64))
    assert float((mixed.argmax(1) == true).double().mean()) > 0.95
    assert ensemble.learn_weights(features, given, "last").weights.tolist() == [0.0, 1.0]


def test_weights_are_learned_in_inference_mode_too() -> None:
    x, given, _ = clusters()
    usual = LayerEnsemble(["a", "b"]).fit({"a": x, "b": -x}, given).learn_weights({"a": x, "b": -x}, given, "clean_val")
    with torch.inference_mode():
        features = {"a": x.clone(), "b": -x}
        ensemble = LayerEnsemble(["a", "b"]).fit(features, given).learn_weights(features, given, "clean_val")
    assert torch.equal(ensemble.weights, usual.weights)


@pytest.mark.parametrize(
    "settings",
    [
        {"estimator": "mdc"},
        {"support_fraction": 0.2},
        {"priors": "equal"},
        {"priors": [-1.0, 2.0]},
        {"priors": []},
        {"shrinkage": -0.1},
        {"max_dim": 0},
        {"starts": "median"},
    ],
)
def test_bad_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        GenerativeClassifier(**settings)


def test_bad_data() -> None:
    x, y = NINE, THREE
    with pytest.raises(InvalidArgument, match="at least two"):
        GenerativeClassifier().fit(x, torch.zeros_like(y))
    with pytest.raises(InvalidArgument, match="NaN or infinity"):
        GenerativeClassifier().fit(x / 0, y)
    with pytest.raises(InvalidArgument, match="whole numbers"):
        GenerativeClassifier().fit(x, y.double())
    with pytest.raises(InvalidArgument, match="num_classes"):
        GenerativeClassifier().fit(x, y, num_classes=2)
    with pytest.raises(InvalidArgument, match="probabilities"):
        GenerativeClassifier(priors=[0.5, 0.5]).fit(x, y)
    for features, labels in ((x[0], y), (x, y[:3]), (x.long(), y)):
        with pytest.raises(ShapeMismatch):
            GenerativeClassifier().fit(features, labels)
    with pytest.raises(UnsupportedTraining, match="fit"):
        GenerativeClassifier()(x)
    with pytest.raises(ShapeMismatch, match="fitted"):
        GenerativeClassifier().fit(x, y)(x[:, :1])
    with pytest.raises(InvalidArgument, match="each once"):
        LayerEnsemble(["a", "a"])
    with pytest.raises(ShapeMismatch, match="layer1"):
        LayerEnsemble(["layer1"]).fit({"layer2": x}, y)


def noisy_posterior(errors: Tensor, true: Tensor, following: Tensor) -> Tensor:
    """Return log-probabilities that are sure of the true class, but where `errors`, of that which `following` names."""
    said = torch.where(errors, following, true)
    return torch.nn.functional.one_hot(said, 3).double().add(0.02).log().log_softmax(1)


def test_the_likelihood_of_noisy_labels_tells_what_agreement_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    true = torch.arange(3000) % 3
    labels = torch.where(torch.rand(3000, generator=generator) < 0.4, (true + 1) % 3, true)
    # errors of the kind that the labels have cost hardly any agreement with them
    good = noisy_posterior(torch.rand(3000, generator=generator) < 0.05, true, (true + 2) % 3)
    poor = noisy_posterior(torch.rand(3000, generator=generator) < 0.18, true, (true + 1) % 3)
    assert not clearly_better(*((x.argmax(1) == labels).double() for x in (good, poor)))
    scores = [noisy_log_likelihood(x, labels) for x in (good, poor)]
    assert clearly_better(scores[0], scores[1])
    assert not clearly_better(scores[1], scores[0])


def test_the_likelihood_of_clean_labels_is_that_of_a_calibrated_classifier() -> None:
    true = torch.arange(300) % 3
    sure = noisy_posterior(torch.zeros(300, dtype=torch.bool), true, true)
    assert float(noisy_log_likelihood(sure, true).mean()) > -0.1
    chance = noisy_log_likelihood(torch.zeros(300, 3).log_softmax(1), true)
    assert float(chance.mean()) == pytest.approx(-1.0986, abs=1e-3)
    absent = torch.cat([sure, torch.full((300, 1), -torch.inf, dtype=F64)], 1)  # a class without samples
    assert bool(noisy_log_likelihood(absent, true).isfinite().all())
    assert not clearly_better(chance, chance)


@pytest.mark.parametrize(("wrong", "expected"), [(0.4, "confirmed"), (0.0, (0.7, 0.9, 1.0, "confirmed"))])
def test_the_support_is_chosen_by_a_noisy_validation_split(wrong: float, expected: Any) -> None:
    x, given, true = clusters(3000, 12, wrong)
    x = x * torch.linspace(0.6, 1.4, 12, dtype=F64)
    predicted = torch.zeros(1000, dtype=torch.int64)
    held_out = ({"a": x[2000:]}, given[2000:], predicted)
    found = fit_ensemble({"a": x[:2000]}, given[:2000], 3, validation=held_out)
    assert found.support_fraction is None or found.support_fraction in ([expected] if wrong else expected)
    assert not found.prefers_softmax
    assert float((found.ensemble({"a": x[2000:]}).argmax(1) == true[2000:]).double().mean()) > 0.98
    right = fit_ensemble({"a": x[:2000]}, given[:2000], 3, validation=(*held_out[:2], given[2000:]))
    assert right.prefers_softmax == (wrong > 0)  # a network that knows the labels of the split agrees with more


def test_a_fit_to_the_confirmed_samples_leaves_out_the_wrong_ones() -> None:
    x, given, true = clusters(1200, 6, 0.4)
    found = fit_ensemble({"a": x}, given, 3, validation=None, support_fraction="confirmed")
    assert found.support_fraction == "confirmed"
    counts = found.ensemble.by_layer()["a"].counts
    assert int(counts.sum()) == pytest.approx(int((given == true).sum()), abs=12)
    assert float((found.ensemble({"a": x}).argmax(1) == true).double().mean()) > 0.98


def test_a_class_that_nothing_confirms_keeps_its_samples() -> None:
    x, given, _ = clusters(600, 6)
    given = given.clone()
    given[given == 2] = torch.where(torch.arange(200) < 3, 2, 1)  # three samples are left of the class
    found = fit_ensemble({"a": x}, given, 3, validation=None, support_fraction="confirmed")
    assert bool(found.ensemble({"a": x}).isfinite().all())
    assert found.ensemble.num_classes == 3


def test_a_small_validation_split_chooses_nothing() -> None:
    x, given, _ = clusters(900, 6)
    for count, chosen in ((29, True), (31, False)):
        held_out = ({"a": x[:count]}, given[:count], given[:count])
        found = fit_ensemble({"a": x[100:]}, given[100:], 3, validation=held_out)
        robust = fit_ensemble({"a": x[100:]}, given[100:], 3, validation=held_out, support_fraction=None)
        same = torch.equal(found.ensemble.by_layer()["a"].weight, robust.ensemble.by_layer()["a"].weight)
        assert same or not chosen
        assert not (chosen and found.prefers_softmax)


@pytest.mark.parametrize("support", [None, 1.0, "confirmed"])
def test_roundings_of_the_features_stay_roundings(support: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(48) % 3
    x = torch.randn(48, 16, generator=generator) + torch.nn.functional.one_hot(y, 16)
    near = x * (1 + 1e-7 * torch.randn(48, 16, generator=generator))
    first, second = (
        fit_ensemble({"a": z}, y, 3, validation=None, support_fraction=support, max_dim=8).ensemble.state_dict()
        for z in (x, near)
    )
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-5, atol=1e-5)
