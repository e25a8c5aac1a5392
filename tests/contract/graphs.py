"""Modules and data for the methods that take graphs: what `tests.support.training` has for rows."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch_geometric.data import Batch, Data

from lightning_methods.geometric_scattering import ScatteringClassifier
from tests.support.training import BATCH, CLASSES, FEATURES, SAMPLES, WIDTH, Samples, Settings, TinyModule

J = 2


@cache
def made_graphs(samples: int = SAMPLES) -> list[Data]:
    """Return rings, stars and complete graphs with noisy signals, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    graphs = []
    for _ in range(samples):
        n, y = (int(torch.randint(*low_high, (1,), generator=generator)) for low_high in ((5, 9), (0, CLASSES)))
        pairs = [
            [(i, (i + 1) % n) for i in range(n)],
            [(0, i) for i in range(1, n)],
            list(itertools.combinations(range(n), 2)),
        ][y]
        edges = torch.tensor([*pairs, *((j, i) for i, j in pairs)]).T.contiguous()
        x = torch.randn(n, FEATURES, generator=generator) + 1
        graphs.append(Data(x=x, edge_index=edges, y=torch.tensor([y])))
    return graphs


GRAPHS = Samples(made_graphs, Batch.from_data_list, lambda: Batch.from_data_list(made_graphs()[:2]))


class TinyGraphModule(TinyModule):
    """The same layers on the mean of what the nodes of each graph get from their neighbours."""

    def split(self, batch: Any) -> tuple[Any, Tensor]:
        return batch, batch.y

    def layers(self, x: Any) -> dict[str, Tensor]:
        source, target = x.edge_index
        signals = x.x.to(self.head.weight.dtype)
        heard = torch.zeros_like(signals).index_add(0, target, signals[source])
        pooled = signals.new_zeros(x.num_graphs, FEATURES).index_add(0, x.batch, heard)
        return super().layers(pooled / torch.bincount(x.batch, minlength=x.num_graphs)[:, None])


class ScatteringModule(ScatteringClassifier):
    """The classifier, with what a case asks of a module around it."""

    def __init__(self, settings: Settings | None = None) -> None:
        settings = settings or Settings()
        dropout = 0.2 if settings.stochastic else 0.0
        super().__init__(CLASSES, FEATURES, (WIDTH,), dropout=dropout, lr=1e-2, J=J, Q=2, normalized=False)
        self.settings = settings
        self.automatic_optimization = not settings.manual

    def forward(self, batch: Any) -> Tensor:
        if self.settings.checkpointing and torch.is_grad_enabled():
            return checkpoint(super().forward, batch, use_reentrant=False)
        return super().forward(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.settings.divisor is not None:
            loss = loss * len(batch.y) / self.settings.divisor
        if self.settings.during_step is not None:
            self.settings.during_step(self)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.settings.during_validation is not None:
            self.settings.during_validation(self)
        super().validation_step(batch, batch_idx)


class Unscattered(ScatteringModule):
    """The same network on the signals alone: what the wavelets add is left out."""

    def features(self, batch: Any) -> Tensor:
        own = torch.tensor(["|x|" in name for name in self.encoder.feature_names()])
        return super().features(batch) * own


class ScatteringByHand(ScatteringModule):
    """The features with dense powers of the walk, graph by graph, and their statistics from all of them at once."""

    def features(self, batch: Any) -> Tensor:
        return torch.stack([_features_by_hand(graph) for graph in batch.to_data_list()])

    def on_fit_start(self) -> None:
        if self.scaler.fitted or self.trainer.limit_train_batches == 0:
            return
        self.trainer.fit_loop.setup_data()
        seen = made_graphs()[: BATCH * int(self.trainer.num_training_batches)]
        x = torch.stack([_features_by_hand(graph) for graph in seen])
        self.scaler.mean.copy_(x.mean(0))
        self.scaler.scale.copy_(1 / x.std(0, correction=0))
        self.scaler.fitted.fill_(True)
        self.scaler._latest = (self.scaler.mean, self.scaler.scale)


def _features_by_hand(graph: Data) -> Tensor:
    n, x = len(graph.x), graph.x.double()
    adjacency = torch.zeros(n, n, dtype=torch.float64)
    adjacency[graph.edge_index[1], graph.edge_index[0]] = 1
    walk = (torch.eye(n, dtype=torch.float64) + adjacency / adjacency.sum(0)) / 2
    powers = [torch.linalg.matrix_power(walk, 2**j) for j in range(J + 1)]
    one, two = powers[0] - powers[1], powers[1] - powers[2]
    first = (one @ x).abs()
    paths = torch.stack([x.abs(), first, (two @ x).abs(), (two @ first).abs()], 1)
    return torch.stack([paths.sum(0), paths.square().sum(0)], -1).transpose(0, 1).flatten()
