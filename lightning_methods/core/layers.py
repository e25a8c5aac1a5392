"""Layer names and patterns -> submodules, the same way for every method."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import nn

from lightning_methods.errors import InvalidArgument, LayerNotFound, did_you_mean

# attribute names under which wrappers keep the module that the user wrote
_WRAPPER_ATTRIBUTES = {"_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_WRAPPER_CLASSES = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def named_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every submodule under the name that the user gave it.

    Names that wrappers (compile, DDP, FSDP, checkpointing) add are left out. A module registered under two names comes
    under both. Where a wrapper and the module in it share a name, the wrapper comes first: its hooks run outside of the
    compiled region.

    Example:
        >>> from torch import nn
        >>> [name for name, _ in named_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))]
        ['0', '1']
    """
    yield from _walk(module, "", frozenset())


def _walk(module: nn.Module, prefix: str, above: frozenset[int]) -> Iterator[tuple[str, nn.Module]]:
    for attribute, child in module._modules.items():
        if child is None or id(child) in above:  # a module that holds an ancestor must not send us round in circles
            continue
        wrapped = attribute in _WRAPPER_ATTRIBUTES or (attribute == "module" and isinstance(module, _WRAPPER_CLASSES))
        name = prefix if wrapped else f"{prefix}.{attribute}" if prefix else attribute
        if not wrapped:
            yield name, child
        yield from _walk(child, name, above | {id(child)})


def match_layers(module: nn.Module, patterns: str | Sequence[str]) -> dict[str, nn.Module]:
    r"""Return the submodules that `patterns` name, in the order of `named_layers`, each module once.

    A pattern is a name (`"layer4"`), a glob in which `*` stays within one level and `**` crosses levels
    (`"layer*"`, `"**.relu"`), a regular expression for the whole name (`r"re:layer[34]\.\d+"`), or one of these after
    `!`, which leaves out what it matches and everything below. Exclusions alone start from all layers.

    Args:
        module: where to look.
        patterns: one pattern or several.

    Raises:
        LayerNotFound: if a pattern, also an exclusion, matches nothing, or if the exclusions leave nothing.
        InvalidArgument: if `patterns` is empty or a regular expression cannot be read.

    Example:
        >>> from torch import nn
        >>> net = nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "head": nn.Linear(2, 2)})
        >>> list(match_layers(net, ["body.*", "head"]))
        ['body.0', 'body.1', 'head']
        >>> list(match_layers(net, "!body"))
        ['head']
    """
    patterns = check_patterns(patterns)
    layers = dict(named_layers_first(module))
    wanted = [p for p in patterns if not p.startswith("!")] or ["**"]
    unwanted = [p[1:] for p in patterns if p.startswith("!")]

    included = {name for pattern in wanted for name in _matches(pattern, layers)}
    excluded = {name for pattern in unwanted for name in _matches(pattern, layers)}
    selected: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        below_excluded = any(name == x or name.startswith(f"{x}.") for x in excluded)
        if name in included and not below_excluded and all(layer is not other for other in selected.values()):
            selected[name] = layer
    if not selected:
        raise LayerNotFound(f"layers={list(patterns)} leave no layer. Loosen the patterns that start with '!'.")
    return selected


def check_patterns(patterns: str | Sequence[str]) -> list[str]:
    """Return `patterns` as a list, or raise `InvalidArgument` for what can never name a layer."""
    given = [patterns] if isinstance(patterns, str) else list(patterns)
    if not given or not all(isinstance(p, str) and p.lstrip("!") for p in given):
        raise InvalidArgument(
            f"layers={patterns!r} names no layer. Give names or patterns as in `model.named_modules()`, "
            "for instance layers=['encoder.*', '!encoder.head']."
        )
    for pattern in given:
        _compiled(pattern.lstrip("!"))
    return given


def match_names(pattern: str, names: Sequence[str]) -> list[str]:
    """Return the `names` that one pattern matches; an exact name wins over its reading as a glob."""
    if pattern in names:
        return [pattern]
    expression = _compiled(pattern)
    return [name for name in names if expression.fullmatch(name)]


def named_layers_first(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield `named_layers` without the second module of a name (the one inside a wrapper)."""
    seen: set[str] = set()
    for name, layer in named_layers(module):
        if name not in seen:
            seen.add(name)
            yield name, layer


def _matches(pattern: str, layers: dict[str, nn.Module]) -> list[str]:
    names = list(layers)
    found = match_names(pattern, names)
    if found:
        return found
    deeper = pattern.replace("**", "*").replace("*", "**")
    if deeper != pattern and not pattern.startswith("re:") and match_names(deeper, names):
        hint = f"'*' stays within one level; {deeper!r} matches {match_names(deeper, names)[:5]}."
    else:
        hint = did_you_mean(pattern, names)
    raise LayerNotFound(f"No layer matches {pattern!r}. {hint}")


def _compiled(pattern: str) -> re.Pattern[str]:
    if pattern.startswith("re:"):
        try:
            return re.compile(pattern[3:])
        except re.error as error:
            raise InvalidArgument(f"The pattern {pattern!r} is not a regular expression: {error}.") from error
    pieces = re.split(r"(\*\*|\*|\?|\[[^\]]+\])", pattern)
    translated = {"**": ".*", "*": r"[^.]*", "?": r"[^.]"}
    return re.compile(
        "".join(translated.get(p, p if p.startswith("[") and p.endswith("]") else re.escape(p)) for p in pieces)
    )
