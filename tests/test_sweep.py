"""The sweep over real models: a fast subset keeps its floors, and the table keeps its own rules."""

from pathlib import Path

import pytest

from zoo import table
from zoo.catalogue import LIBRARIES, names
from zoo.measure import measure

TABLE = Path(__file__).parents[1] / "docs" / "zoo.csv"
QUICK = (
    "torchvision/shufflenet_v2_x0_5",
    "timm/vit_tiny_patch16_224",
    "transformers/segformer",
    "transformers/llama",
)


@pytest.mark.parametrize("name", QUICK)
def test_a_model_of_the_table_is_as_good_as_it_was(name: str) -> None:
    found = measure(name)
    assert not found.error
    assert found.traced
    assert found.macs > 0
    assert found.difference <= table.EXACT
    assert found.removable >= float(table.read(TABLE)[name]["floor"])


def test_the_table_has_every_model_of_the_sweep() -> None:
    assert set(table.read(TABLE)) == {name for library in LIBRARIES for name in names(library)}


def test_what_the_table_must_show() -> None:
    rows = table.read(TABLE)
    assert [name for name, row in rows.items() if not table.right(row)] == []
    free = [name for name, row in rows.items() if float(row["removable"]) >= 0.95]
    assert len(free) >= 0.9 * len(rows)
    beside = {name: row for name, row in rows.items() if row["peer works"] == "yes" and table.works(row)}
    assert [name for name, row in beside.items() if float(row["peer macs"]) > float(row["macs"]) + 0.002] == []


def test_every_family_of_timm_is_in_the_sweep() -> None:
    from timm.models import _registry

    from zoo.timm_models import SMALLEST

    assert set(SMALLEST) == set(_registry._module_to_models)


def record(share: float) -> dict[str, object]:
    return {
        "name": "a/b",
        "params": 7,
        "traced": True,
        "removable": share,
        "macs": 0.5,
        "difference": 1e-16,
        "seconds": 1,
    }


def test_floors_only_go_up(tmp_path: Path) -> None:
    path = tmp_path / "zoo.csv"
    for share, floor, fallen in ((0.5, "0.500", []), (0.75, "0.750", []), (0.625, "0.750", ["a/b"])):
        rows = table.merged(table.read(path), {"a/b": record(share)}, {})
        assert table.below(rows) == fallen
        table.write(rows, path)
        assert table.read(path)["a/b"]["floor"] == floor
        assert float(table.read(path)["a/b"]["removable"]) == share


def test_what_was_not_measured_again_stays(tmp_path: Path) -> None:
    path = tmp_path / "zoo.csv"
    peer = {"name": "a/b", "works": True, "exact": False, "macs": 0.25, "seconds": 2.0}
    table.write(table.merged({}, {"a/b": record(0.5)}, {}), path)
    table.write(table.merged(table.read(path), {}, {"a/b": peer}), path)
    (row,) = table.read(path).values()
    assert (row["macs"], row["peer macs"], row["peer exact"]) == ("0.500", "0.250", "no")
    assert "| a | 1 | 1 | 1 | 1 | 0 | 0.500 | 0.250 | 1 | 2 |" in path.with_suffix(".md").read_text()


def test_models_that_fail_say_so() -> None:
    failed = {"name": "a/b", "error": "took more than 300 s"}
    rows = table.merged({}, {"a/b": failed}, {})
    assert not table.works(rows["a/b"])
    assert not table.right(rows["a/b"])
    assert "| a | 1 | 0 | - | 0 | - | - | - | - | - |" in table.page(rows)
    assert rows["a/b"]["remark"] == "took more than 300 s"
