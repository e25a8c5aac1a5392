"""Which runs a study consists of: seeds of every source for every replicate, derived and never consecutive."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Literal, NamedTuple

from lightning_methods.reproducibility.seeding import SOURCES

Design = Literal["all", "one_at_a_time", "sobol"]
DESIGNS = ("all", "one_at_a_time", "sobol")

# the replicate of what is not varied
_FIXED = -1


class Cell(NamedTuple):
    """One run of every pipeline: its part in the design, its replicate, and the seed of each source.

    `part` is `all`, the one source that varies, `A`, `B` or `AB:<source>` of the Sobol design, or `repeat`.
    """

    part: str
    replicate: int
    seeds: dict[str, int]


def derive_seed(root: int, source: str, replicate: int, column: str = "") -> int:
    """Return the seed of a source in a replicate: 31 bits of a hash, so that no two streams are neighbours.

    It depends on nothing else, such as the number of replicates: a larger study contains the smaller one. Consecutive
    seeds would be a trap: a distributed sampler shuffles by seed + epoch, so those of neighbours share their orders.

    Args:
        root: of the study.
        source: name of the source of variation.
        replicate: counted from 0.
        column: second column of a design that draws twice.

    Example:
        >>> derive_seed(0, "init", 0) == derive_seed(0, "init", 1)
        False
    """
    text = json.dumps([root, source, replicate, column]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") >> 1


def cells(
    *, vary: Sequence[str], design: Design, replicates: int, root_seed: int, check_repeat: bool = True
) -> list[Cell]:
    """Return the runs of each pipeline, in the order in which they are made: whole replicates first.

    Args:
        vary: sources that vary; the others keep one seed throughout.
        design: `all`, each replicate changes all of them; `one_at_a_time`, each source varies alone; `sobol`, two
            columns of seeds and their mixtures.
        replicates: how many of each.
        root_seed: from which all seeds are derived.
        check_repeat: repeat the first run, to see whether the pipeline is deterministic.

    Example:
        >>> [c.part for c in cells(vary=["init"], design="sobol", replicates=1, root_seed=0)]
        ['A', 'B', 'AB:init', 'repeat']
    """
    # the disturbance of numerical noise is there only if it is studied
    base = {s: derive_seed(root_seed, s, _FIXED) for s in SOURCES if s != "numerical" or s in vary}

    def drawn(replicate: int, column: str = "", sources: Sequence[str] = vary) -> dict[str, int]:
        return {**base, **{s: derive_seed(root_seed, s, replicate, column) for s in sources}}

    found: list[Cell] = []
    for i in range(replicates):
        if design == "all":
            found.append(Cell("all", i, drawn(i)))
        elif design == "one_at_a_time":
            found += [Cell(s, i, drawn(i, sources=[s])) for s in vary]
        else:
            first, second = drawn(i), drawn(i, "B")  # the first column is that of `all`, whose runs it shares
            found += [Cell("A", i, first), Cell("B", i, second)]
            found += [Cell(f"AB:{s}", i, {**first, s: second[s]}) for s in vary]
    if check_repeat and found:
        found.append(Cell("repeat", 0, found[0].seeds))
    return found


def run_id(pipeline_hash: str, cell: Cell) -> str:
    """Return the name of a run: a hash of the pipeline and the seeds, so that the same run is made once.

    Args:
        pipeline_hash: of the pipeline's resolved configuration or code.
        cell: of the design.

    Example:
        >>> run_id("a", Cell("all", 0, {"init": 1})) == run_id("a", Cell("A", 3, {"init": 1}))
        True
    """
    again = cell.part == "repeat"
    text = json.dumps([1, pipeline_hash, sorted(cell.seeds.items()), again])
    return hashlib.sha256(text.encode()).hexdigest()[:20]
