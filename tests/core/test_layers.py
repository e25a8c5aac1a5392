"""Names and patterns find the layers that the user wrote, through every wrapper."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_methods.core.layers import check_patterns, match_layers, named_layers
from lightning_methods.errors import InvalidArgument, LayerNotFound


def block():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU())


@pytest.fixture
def net():
    return nn.ModuleDict({"layer1": block(), "layer2": nn.Sequential(block(), block()), "head": nn.Linear(4, 2)})


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ("head", ["head"]),
        ("layer1.0", ["layer1.0"]),
        ("layer*", ["layer1", "layer2"]),
        ("layer?", ["layer1", "layer2"]),
        ("layer[2]", ["layer2"]),
        ("layer2.*", ["layer2.0", "layer2.1"]),
        ("*.*.1", ["layer2.0.1", "layer2.1.1"]),
        ("**.1", ["layer1.1", "layer2.0.1", "layer2.1", "layer2.1.1"]),
        ("layer2.**", ["layer2.0", "layer2.0.0", "layer2.0.1", "layer2.1", "layer2.1.0", "layer2.1.1"]),
        (["head", "layer1"], ["layer1", "head"]),
        (["*", "!head"], ["layer1", "layer2"]),
        (["**", "!layer2", "!layer1.0"], ["layer1", "layer1.1", "head"]),
        ("!layer*", ["head"]),
        (["**", r"!re:layer2.*"], ["layer1", "layer1.0", "layer1.1", "head"]),
        (r"re:layer\d", ["layer1", "layer2"]),
        (r"re:layer2\.(0|1)\.1", ["layer2.0.1", "layer2.1.1"]),
    ],
)
def test_patterns(net, patterns, names):
    assert list(match_layers(net, patterns)) == names
    assert all(layer is net.get_submodule(name) for name, layer in match_layers(net, patterns).items())


def test_an_exact_name_wins_over_its_reading_as_a_pattern():
    net = nn.Module()
    net.add_module("a?", nn.ReLU())
    net.add_module("ab", nn.ReLU())
    assert list(match_layers(net, "a?")) == ["a?"]


WRAPPERS = {
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "checkpointed": checkpoint_wrapper,
    "data parallel": nn.DataParallel,
    "compiled and checkpointed": lambda m: torch.compile(checkpoint_wrapper(m), backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("depth", ["inner", "whole"])
def test_wrappers_do_not_show_in_names(net, wrap, depth):
    plain = [name for name, _ in named_layers(net)]
    if depth == "whole":
        net = wrap(net)
    else:
        net["layer1"] = wrap(net["layer1"])
    assert [name for name, _ in named_layers(net)] == plain
    (layer,) = match_layers(net, "layer1").values()
    if depth == "inner":
        assert layer is net["layer1"], "the wrapper: its hooks run outside of the compiled region"


def test_a_layer_named_module_is_no_wrapper():
    net = nn.Module()
    net.module = block()
    assert [name for name, _ in named_layers(net)] == ["module", "module.0", "module.1"]


def test_a_shared_module_comes_under_both_names_and_is_matched_once():
    shared = nn.Linear(2, 2)
    net = nn.ModuleDict({"a": shared, "b": shared})
    assert [name for name, _ in named_layers(net)] == ["a", "b"]
    assert list(match_layers(net, "*")) == ["a"]
    assert list(match_layers(net, "b")) == ["b"]


def test_a_module_that_holds_an_ancestor_ends():
    net = nn.Sequential(nn.Sequential(nn.ReLU()))
    net[0].add_module("up", net[0])
    assert [name for name, _ in named_layers(net)] == ["0", "0.0"]


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ("haed", "Did you mean 'head'"),
        ("layer3", "'layer1'"),
        ("layer2*1", r"'\*' stays within one level; 'layer2\*\*1' matches \['layer2.0.1', 'layer2.1', 'layer2.1.1'\]"),
        ("!haed", "Did you mean 'head'"),
        ("re:haed", "Did you mean 'head'"),
        ("zzz", "There are: 'layer1'"),
        (["head", "!head"], "leave no layer"),
    ],
)
def test_what_matches_nothing_is_told_with_what_is_near(net, patterns, said):
    with pytest.raises(LayerNotFound, match=said):
        match_layers(net, patterns)


@pytest.mark.parametrize("patterns", [[], "", "!", ["head", 3], "re:("])
def test_what_can_name_no_layer_is_refused_at_once(patterns):
    with pytest.raises(InvalidArgument):
        check_patterns(patterns)
