"""Support vector machines and class subspaces equal what scikit-learn finds the slow way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.svm import SVC

from lightning_methods.errors import InvalidArgument, ShapeMismatch
from lightning_methods.geometric_scattering import (
    ScatteringSVM,
    class_subspaces,
    filter_responses,
    pca_dimensions,
    z_scores,
)
from lightning_methods.geometric_scattering import svm as svm_module


@pytest.fixture(scope="module")
def clusters() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    y = torch.arange(90) % 3
    return torch.randn(90, 6, dtype=torch.float64) * torch.rand(6) + torch.eye(6, dtype=torch.float64)[y] * 2, y


def test_dimensions_are_those_of_scikit_learn(clusters):
    x, _ = clusters
    z = z_scores(x)
    np.testing.assert_allclose(z.numpy(), ((x - x.mean(0)) / x.std(0, correction=0)).numpy())
    shares = (0.5, 0.8, 0.9, 0.99)
    assert pca_dimensions(z, shares) == [PCA(s, svd_solver="full").fit(z.numpy()).n_components_ for s in shares]
    assert z_scores(torch.tensor([[1.0, 0, 4], [2, 0, 4]])).shape == (2, 2)


def test_distances_to_the_subspaces_of_the_classes(clusters):
    x, y = clusters
    z = z_scores(x)
    found = class_subspaces(z, y)
    for j in range(3):
        pca = PCA(0.9, svd_solver="full").fit(z[y == j].numpy())
        c = torch.from_numpy(pca.components_)
        assert found.dimensions[j] == len(c)
        residual = (z - z @ c.T @ c).square().sum(1)
        for i in range(3):
            assert float(found.distances[i, j]) == pytest.approx(float(residual[y == i].mean()))
    torch.testing.assert_close(found.nearest.sum(1), torch.ones(3, dtype=torch.float64))
    d, w = found.distances, 1 - found.nearest.diagonal()
    expected = w[1] / min(d[0, 1] / d[0, 0], d[1, 0] / d[1, 1])
    assert float(found.preference[0, 1]) == pytest.approx(float(expected))
    assert (found.preference.diagonal() == 0).all()


def test_the_filters_sum_to_what_is_between_the_first_and_the_last_power():
    omega, response = filter_responses()
    torch.testing.assert_close(response.sum(0), omega - omega**32)


def test_each_machine_is_tuned_as_by_hand(clusters):
    x, y = clusters
    x = x[:, :4] + 0.8 * torch.randn(90, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gammas, costs = (0.01, 0.1, 1.0), (0.1, 1.0, 10.0)
    svm = ScatteringSVM(gammas=gammas, costs=costs, scaler="transductive", seed=3)
    found = svm.cross_validate(x, y, folds=10, protocol="gao2019")
    parts = np.array_split(np.random.default_rng(3).permutation(90), 10)
    z, labels = z_scores(x).numpy(), y.numpy()
    for k in (0, 7):
        rest = [p for i, p in enumerate(parts) if i != k]
        votes = []
        for i, val in enumerate(rest):
            train = np.concatenate([p for j, p in enumerate(rest) if j != i])
            best, chosen = -1.0, None
            for cost in costs:
                for gamma in gammas:
                    machine = SVC(C=cost, gamma=gamma).fit(z[train], labels[train])
                    score = machine.score(z[val], labels[val])
                    if score > best:
                        best, chosen = score, (cost, gamma, machine)
            assert tuple(found.chosen[k, i]) == chosen[:2]
            votes.append(chosen[2].predict(z[parts[k]]))
        voted = [max(v := list(column), key=v.count) for column in np.array(votes).T]
        assert found.accuracies[k] == pytest.approx((voted == labels[parts[k]]).mean())
    assert found.mean == pytest.approx(found.accuracies.mean())


@pytest.mark.slow
def test_fit_predict_and_protocols(clusters):
    x, y = clusters
    svm = ScatteringSVM(models=3, gammas=(0.1,), costs=(1.0, 10.0)).fit(x[:60], y[:60])
    assert (svm.predict(x[60:]) == y[60:]).double().mean() > 0.8
    # what is standardised already
    z = z_scores(x)
    plain, scaled = (
        ScatteringSVM(models=4, gammas=(0.1,), costs=(1.0,), scaler=scaler).cross_validate(z, y, folds=5)
        for scaler in ("none", "transductive")
    )
    assert np.array_equal(plain.accuracies, scaled.accuracies)
    one, two = (
        ScatteringSVM(models=4, gammas=(0.1,), costs=(1.0,), jobs=jobs).cross_validate(x, y, folds=5) for jobs in (1, 2)
    )
    assert np.array_equal(one.accuracies, two.accuracies)
    assert one.chosen.shape == (5, 4, 2)


@pytest.mark.parametrize("scaler", ["transductive", "train"])
def test_an_interrupted_validation_goes_on_where_it_stopped(clusters, tmp_path, monkeypatch, scaler):
    x, y = clusters
    settings = {"models": 4, "gammas": (0.01, 0.1), "costs": (1.0, 10.0), "scaler": scaler}
    whole = ScatteringSVM(**settings).cross_validate(x, y, folds=5)
    compute, calls = ScatteringSVM._cell, []

    def stopping(self, *given):
        calls.append(given[-1])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return compute(self, *given)

    monkeypatch.setattr(ScatteringSVM, "_cell", stopping)
    with pytest.raises(KeyboardInterrupt):
        ScatteringSVM(**settings).cross_validate(x, y, folds=5, folder=tmp_path)
    resumed = ScatteringSVM(**settings).cross_validate(x, y, folds=5, folder=str(tmp_path))
    assert len(calls) == len(set(calls)) + 1 == (10 if scaler == "transductive" else 5) + 1
    for ours, theirs in zip(resumed, whole, strict=True):
        assert np.array_equal(ours, theirs)
    ScatteringSVM(**settings).cross_validate(x, y, folds=5, folder=tmp_path)
    assert len(calls) == len(set(calls)) + 1  # all of it is known
    ScatteringSVM(**{**settings, "costs": (2.0,)}).cross_validate(x, y, folds=5, folder=tmp_path)
    assert len(calls) > len(set(calls)) + 1  # other settings are not


def test_machines_that_serve_two_folds_are_those_of_each_fold_alone(clusters):
    x, y = clusters
    svm = ScatteringSVM(models=4, gammas=(0.01, 0.1, 1.0), costs=(0.1, 1.0, 10.0), scaler="transductive")
    found = svm.cross_validate(x, y, folds=5)
    parts = svm_module._folds(y.numpy(), 5, "stratified", 0)
    z = z_scores(x).numpy()
    distances = svm_module._squared_distances(z, z)
    for k in range(5):
        alone = svm._cell(x.numpy(), y.numpy(), parts, distances, (k,))
        assert [vote.chosen for vote in alone] == [tuple(chosen) for chosen in found.chosen[k]]
        voted = svm_module._vote([vote.predicted for vote in alone])
        assert found.accuracies[k] == (voted == y.numpy()[parts[k]]).mean()


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda x, y: ScatteringSVM(models=1), InvalidArgument, "models=1"),
        (lambda x, y: ScatteringSVM(gammas=()), InvalidArgument, "gammas"),
        (lambda x, y: ScatteringSVM(costs=(-1.0,)), InvalidArgument, "costs"),
        (lambda x, y: ScatteringSVM(scaler="all"), InvalidArgument, "transductive"),
        (lambda x, y: ScatteringSVM().predict(x), InvalidArgument, "call fit first"),
        (lambda x, y: ScatteringSVM().fit(x, y[:5]), ShapeMismatch, "needed"),
        (lambda x, y: ScatteringSVM().fit(x / 0, y), InvalidArgument, "not finite"),
        (lambda x, y: ScatteringSVM().fit(x, y * 0), InvalidArgument, "same label"),
        (lambda x, y: ScatteringSVM().cross_validate(x, y, folds=2), InvalidArgument, "folds=2"),
        (lambda x, y: ScatteringSVM().cross_validate(x, y, folds=80), InvalidArgument, "smallest class"),
        (lambda x, y: ScatteringSVM().cross_validate(x, y, protocol="gin"), InvalidArgument, "gao2019"),
        (lambda x, y: class_subspaces(x, y[:3]), ShapeMismatch, "one a graph"),
        (lambda x, y: class_subspaces(x, torch.arange(90)), InvalidArgument, "two classes of two"),
        (lambda x, y: pca_dimensions(x, (1.0,)), InvalidArgument, "share=1.0"),
        (lambda x, y: z_scores(x[:1]), ShapeMismatch, "n > 1"),
    ],
)
def test_bad_input(clusters, call, error, says):
    with pytest.raises(error, match=says):
        call(*clusters)
