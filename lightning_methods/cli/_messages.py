"""Turn jsonargparse's report on a value that fits no type into the sentence that matters.

Such a report lists, for each type of a union, why the value is not of it. Most of that is noise (`Expected a <class
'NoneType'>`); what is left names the wrong option, the class that does not exist or the constructor's own words.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator

from lightning_methods.errors import did_you_mean

_KEY = re.compile(r'^Parser key "(?P<key>[^"]+)":\s*')
_GIVEN = re.compile(r"^\s*Given value: (?P<value>.*)$", re.MULTILINE)
_NOISE = re.compile(
    r"NoneType|Expected a (path but|<class 'list'>|<class 'dict'>|List)|^Does not validate against|^Subtypes:|^Errors:"
    r"|^Given value|^Parser key |^Not a valid subclass of|^Subclass types expect|^a (class path|dict) |^$"
)
_PROBLEM = re.compile(r"^Problem with given class_path '(?P<path>[^']+)':$")
_NO_CLASS = re.compile(r"^Expected a dot import path string: (?P<name>\S+)")
_OPTION = re.compile(r"^Option '(?P<option>[^']+)' is not accepted")
_PLAIN_TYPE = re.compile(r"<class '([\w.]+)'>")
_ROOTS = {  # last word of an option -> the class whose subclasses it takes
    "model": ("lightning.pytorch", "LightningModule"),
    "data": ("lightning.pytorch", "LightningDataModule"),
    "callbacks": ("lightning.pytorch", "Callback"),
    "logger": ("lightning.pytorch.loggers", "Logger"),
    "optimizer": ("torch.optim", "Optimizer"),
    "lr_scheduler": ("torch.optim.lr_scheduler", "LRScheduler"),
}


def readable(message: str) -> str:
    """Return the sentences of a parser's message that tell the user what to change.

    Args:
        message: the text of jsonargparse.

    Example:
        >>> readable("unrecognized arguments: --foo")
        'unrecognized arguments: --foo'
    """
    found = _KEY.match(message)
    key = found["key"] if found else ""
    body = message[found.end() :] if found else message
    if "Does not validate against" not in body:
        return f"{key}: {body.strip()}" if key else message.strip()
    sentences = list(dict.fromkeys(_sentences(body, key)))
    given = _GIVEN.search(body)
    expected = [s for s in sentences if s.startswith("expected ")]
    if sentences and sentences == expected and given:
        sentences = [f"{' or '.join(expected)}, got {given['value']!r}"]
    text = "; ".join(sentences) or " ".join(body.split())
    return f"{key}: {text}" if key else text


def _sentences(body: str, key: str) -> Iterator[str]:
    path = ""
    for line in body.splitlines():
        text = line.strip().removeprefix("- ").strip()
        if problem := _PROBLEM.match(text):
            path = problem["path"]
        elif missing := _NO_CLASS.match(text):
            name = missing["name"]
            yield f"there is no class {name!r}. {did_you_mean(name, _class_names(key))}"
        elif option := _OPTION.match(text):
            close = did_you_mean(option["option"], _parameters(path))
            yield f"{path.rpartition('.')[2]} has no option {option['option']!r}. {close}"
        elif not _NOISE.search(text):
            text = _PLAIN_TYPE.sub(r"\1", text)
            text = re.sub(r"^Expected (an? )?", "expected ", text)
            yield f"{path.rpartition('.')[2]}: {text}" if path else text


def _class_names(key: str) -> list[str]:
    module, name = _ROOTS.get(key.rpartition(".")[2], ("", ""))
    if not module:
        return []
    todo, names = [getattr(importlib.import_module(module), name)], set()
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        if not cls.__name__.startswith("_") and not inspect.isabstract(cls):
            names.add(cls.__name__)
    return sorted(names - {name})


def _parameters(path: str) -> list[str]:
    module, _, name = path.rpartition(".")
    try:
        return [p for p in inspect.signature(getattr(importlib.import_module(module), name)).parameters if p != "self"]
    except (ImportError, AttributeError, TypeError, ValueError):
        return []  # the sentence does without the proposal
