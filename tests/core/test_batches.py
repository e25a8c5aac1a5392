"""Inputs and targets are found in batches of every usual kind, or the error says what the batch held."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch

from lightning_methods.core.batches import batch_size_of, describe_batch, inputs_of, mask_of, targets_of
from lightning_methods.errors import BatchFormat

X, Y = torch.ones(2, 3), torch.tensor([0, 1])
Named = namedtuple("Named", ["label", "image"])
Positional = namedtuple("Positional", ["first", "second"])


@dataclass
class Record:
    pixel_values: torch.Tensor
    labels: torch.Tensor


class Graph:
    """As torch_geometric's Data: fields by attribute, listed by `keys()`, absent ones are None."""

    def __init__(self, **fields):
        self._store = fields

    def keys(self):
        return list(self._store)

    def __getattr__(self, name):
        if name in ("x", "edge_index", "y"):
            return self.__dict__["_store"].get(name)
        raise AttributeError(name)


BATCHES = {
    "tuple": (X, Y),
    "list": [X, Y, "index"],
    "dict": {"x": X, "y": Y},
    "dict of images": {"index": 3, "image": X, "label": Y},
    "dict of tokens": {"input_ids": X, "labels": Y},
    "mapping": UserDict(inputs=X, targets=Y),
    "named tuple by name": Named(Y, X),
    "named tuple by position": Positional(X, Y),
    "dataclass": Record(X, Y),
    "graph": Graph(x=X, y=Y),
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_usual_batches(batch):
    assert inputs_of(batch) is X
    assert targets_of(batch) is Y


@pytest.mark.parametrize(
    ("batch", "selector"),
    [
        ((X, X, Y), 2),
        ((X, Y), -1),
        ({"a": X, "b": Y}, "b"),
        ({0: Y}, 0),
        (Record(X, Y), "labels"),
        (Named(Y, X), "label"),
        ((X, {"deep": Y}), lambda batch: batch[1]["deep"]),
    ],
    ids=["index", "negative index", "key", "integer key", "attribute", "field", "function"],
)
def test_selectors(batch, selector):
    assert targets_of(batch, selector) is Y


def test_a_bare_tensor_is_its_own_inputs():
    assert inputs_of(X) is X
    with pytest.raises(BatchFormat, match=r"a tensor of shape \(2, 3\) and torch.float32"):
        targets_of(X)


@pytest.mark.parametrize(
    ("batch", "selector", "said"),
    [
        ((X,), None, r"No targets were found in the batch, which is a tuple of 1: tensor\(2, 3\)"),
        ({"pictures": X, "n": 3}, None, r"a dict with 'pictures': tensor\(2, 3\), 'n': int"),
        (Graph(x=X), None, r"a Graph with x: tensor\(2, 3\)"),
        ({"image": X, "labels": Y}, "label", "said to be under 'label'.*Did you mean 'labels'"),
        ((X, Y), 5, "said to be under 5"),
        (Record(X, Y), "label", "Did you mean 'labels'"),
        ((X, Y), lambda batch: None, "No targets were found"),
        (object(), None, "a object with no fields"),
    ],
)
def test_errors_say_what_the_batch_held(batch, selector, said):
    with pytest.raises(BatchFormat, match=said):
        targets_of(batch, selector)


def test_sizes_and_words():
    assert [batch_size_of(y) for y in (Y, torch.tensor(3), None)] == [2, 1, 1]
    assert describe_batch([X, "a"]) == "a list of 2: tensor(2, 3), str"


def test_masks():
    mask = torch.tensor([[1, 1, 0]])
    assert mask_of({"attention_mask": mask}, None) is None
    assert mask_of({"attention_mask": mask}, "attention_mask") is mask
    assert torch.equal(mask_of((torch.tensor([[7, 0]]),), lambda batch: batch[0] != 0), torch.tensor([[True, False]]))
    with pytest.raises(BatchFormat, match="Did you mean 'attention_mask'"):
        mask_of({"attention_mask": mask}, "attention_masks")
    with pytest.raises(BatchFormat, match="The mask is a list"):
        mask_of({"mask": [[1, 0]]}, "mask")
