"""`reproduce` prints the paper's numbers beside ours, and tells a misprint from a difference."""

from __future__ import annotations

import pytest
import torch

from lightning_methods.cli import main, reproduce
from lightning_methods.geometric_scattering import class_subspaces, pca_dimensions, z_scores
from tests.support.datasets import write_tu


@pytest.fixture
def root(tmp_path):
    return str(write_tu(tmp_path, "ENZYMES", classes=6))


def test_tables_of_a_made_data_set_differ_and_say_so(root, capsys):
    assert main(["reproduce", "enzymes", "--root", root]) == 1
    printed = capsys.readouterr().out
    for title in ("Table 4", "Table 5", "Table 6: mean squared distance", "Table 6: which subspace"):
        assert title in printed
    assert "149.14" not in printed.partition("differ")[0]
    assert "49.14*" in printed
    assert "differ (!). Is this the data set" in printed
    assert "62 of 65" not in printed


def test_cells_are_what_the_functions_find(root):
    parser_args = type("Args", (), {"root": root, "download": False})
    z, labels = reproduce._features(parser_args)
    four, five, distances, nearest = reproduce._exact_tables(z, labels)
    assert [cell.ours for cell in four.rows["components"]] == list(map(str, pca_dimensions(z)))
    found = class_subspaces(z, labels)
    assert [cell.ours for cell in five.rows["components"]][1:] == list(map(str, found.dimensions.tolist()))
    assert distances.rows["EC-4, D"][5] == reproduce.Cell("49.14", f"{float(found.distances[3, 5]):.2f}", True)
    assert [cell.erratum for cell in distances.rows["EC-3, D"]] == [False] * 6
    assert nearest.rows["EC-1"][0].ours == f"{100 * float(found.nearest[0, 0]):.0f}"
    assert sum(len(row) for table in (four, five, distances, nearest) for row in table.rows.values()) == 65
    assert torch.allclose(z, z_scores(z))


def test_what_agrees_but_for_the_misprints_is_a_success(root, capsys, monkeypatch):
    def as_in_the_paper(z, labels):
        exact = [reproduce.Cell("3", "3"), reproduce.Cell("49.14", "149.14", True)]
        return [reproduce.Rows("Table 6", ["a", "b"], {"row": exact})]

    monkeypatch.setattr(reproduce, "_exact_tables", as_in_the_paper)
    assert main(["reproduce", "enzymes", "--root", root]) == 0
    printed = capsys.readouterr().out
    assert "1 of 2 cells agree" in printed
    assert "the first digit is missing in print" in printed


def test_accuracies_are_cross_validated(root, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "_SHARES", (0.5, 0.9))
    monkeypatch.setattr(reproduce, "_DIMENSIONS", [3, 16])
    monkeypatch.setattr(reproduce, "_ACCURACIES", [29.67, 50.67])
    monkeypatch.setattr(reproduce, "_GRID", {"gammas": (0.1,), "costs": (1.0, 10.0)})
    assert main(["reproduce", "enzymes", "--root", root, "--accuracies", "--seed", "1"]) == 1
    table = capsys.readouterr().out.partition("Table 4: accuracy")[2]
    assert "seed 1" in table
    assert "29.67" in table
    assert "!" not in table


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["enzymes", "--root", "nowhere"], "--root nowhere does not hold ENZYMES"),
        (["proteins"], "invalid choice: 'proteins'"),
        ([], "what"),
    ],
)
def test_bad_requests_are_one_line(argv, says, capsys):
    assert main(["reproduce", *argv]) == 2
    complaint = capsys.readouterr().err
    assert says in complaint
    assert complaint.count("\n") == 1


@pytest.mark.parametrize("settings", [{"classes": 2}, {"classes": 6, "labels": 2}])
def test_another_data_set_under_that_name(tmp_path, settings, capsys):
    write_tu(tmp_path, "ENZYMES", **settings)
    assert main(["reproduce", "enzymes", "--root", str(tmp_path)]) == 2
    assert "holds another data set" in capsys.readouterr().err
