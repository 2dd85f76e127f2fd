"""The examples do what they say, and the code in the documentation runs."""

import ast
import json
import os
import re
import runpy
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import model_zoo  # noqa: F401  torchvision is importable after it
import pytest
import torch
from torch import nn

import fxcompress
from fxcompress.lower.features import has_int8_instructions
from fxcompress.passes import Lower

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES, DOCS = ROOT / "examples", ROOT / "docs"
PAGES_WITH_CODE = [
    "README.md",
    *(
        f"docs/{name}.md"
        for name in ("index", "passes", "training", "custom-passes", "groups", "cost", "quantization", "lowering")
    ),
]


# ---- quickstart ------------------------------------------------------------------------------------------------------


def test_quickstart() -> None:
    """With hardly any training. It fails if the removed network is not faster, or not equal to the masked one."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    settings = {"FXCOMPRESS_QUICK": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "COLUMNS": "100"}
    ran = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / "quickstart.py"],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "accuracies, so that they are not checked" in ran.stdout  # of a quick run only
    rows = {words[0]: words for line in ran.stdout.splitlines() if (words := line.split())}
    assert rows["dense"][2:4] == ["261,770", "5,497,120"]
    assert rows["removed"][2:4] == ["44,042", "910,144"]
    assert rows["removed"][1] == rows["masked,"][2], "masked and removed classify differently"


# ---- custom_pass -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file, name",
    [
        ("custom_pass", "DeviationPruner"),
        ("custom_pass", "drop_repeated_relus"),
        ("custom_schedule", "CosinePruner"),
    ],
)
def test_a_custom_pass_takes_less_than_ten_lines(file: str, name: str) -> None:
    tree = ast.parse((EXAMPLES / f"{file}.py").read_text())
    (found,) = [n for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and n.name == name]
    first = min([found.lineno, *(decorator.lineno for decorator in found.decorator_list)])
    assert found.end_lineno is not None
    assert found.end_lineno - first + 1 < 10


def test_custom_pass(capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(EXAMPLES / "custom_pass.py"))
    small = example["main"]()
    history = [(step.name, step.modified, step.difference is not None) for step in small.meta["history"]]
    expected = [("drop_repeated_relus", True, True), ("DeviationPruner", True, False), ("Speedup", True, True)]
    assert history == expected
    printed = capsys.readouterr().out
    assert all(name in printed for name, *_ in expected)

    kinds = [type(small.get_submodule(n.target)) for n in small.graph.nodes if n.op == "call_module"]
    assert kinds.count(nn.ReLU) == 5  # of 7: two blocks ended in a ReLU and were followed by one
    assert not any(a is b is nn.ReLU for a, b in pairwise(kinds))
    assert {m.out_channels for m in small.modules() if isinstance(m, nn.Conv2d)} == {16}
    x = torch.randn(5, 3, 9, 9)
    assert small(x).shape == (5, 10)


def test_custom_criterion_chooses_by_its_score() -> None:
    example = runpy.run_path(str(EXAMPLES / "custom_pass.py"))
    model, x = example["Network"]().eval(), torch.randn(2, 3, 8, 8)
    masked = fxcompress.compress(model, [example["DeviationPruner"](0.5)], example_inputs=x)
    deviation = model.get_parameter("2.conv1.weight").flatten(1).std(dim=1)
    kept = fxcompress.masks(masked)["2.conv1.bias"].nonzero().flatten()
    assert kept.tolist() == deviation.topk(16).indices.sort().values.tolist()


# ---- custom_criterion ------------------------------------------------------------------------------------------------


def test_a_criterion_that_looks_at_data_takes_less_than_ten_lines(capsys: pytest.CaptureFixture[str]) -> None:
    source = (EXAMPLES / "custom_criterion.py").read_text()
    (found,) = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef)]
    assert found.end_lineno is not None
    assert found.end_lineno - found.lineno + 1 < 10
    example = runpy.run_path(str(EXAMPLES / "custom_criterion.py"))
    small = example["main"]()
    assert [small.get_submodule(name).out_channels for name in "03"] == [16, 24]
    assert "of the parameters are gone" in capsys.readouterr().out

    torch.manual_seed(0)
    model, batches = example["network"](), [torch.randn(16, 3, 12, 12) for _ in range(2)]
    pruner = example["VariancePruner"](0.5)
    task = fxcompress.Task(batches=batches)
    masked = fxcompress.compress(model, [pruner], example_inputs=batches[0], task=task)
    with torch.no_grad():
        seen = [model[:3](x).transpose(0, 1).flatten(1) for x in batches]
    variance = torch.stack([x.var(1) for x in seen]).mean(0)
    kept = fxcompress.masks(masked)["0.bias"].nonzero().flatten()
    assert kept.tolist() == variance.topk(16).indices.sort().values.tolist()


def test_custom_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    small = runpy.run_path(str(EXAMPLES / "custom_schedule.py"))["main"]()
    assert [m.out_channels for m in small.modules() if isinstance(m, nn.Conv2d)] == [8, 16]
    printed = capsys.readouterr().out
    for t, sparsity in enumerate([0.109835, 0.375, 0.640165, 0.75], 1):  # 0.75 * (1 - cos(pi t/4)) / 2
        assert f"iteration {t} of 4: sparsity {sparsity}\n" in printed


# ---- benchmarks/pruners ---------------------------------------------------------------------------------------------


def test_pruners_are_measured_one_by_one_and_what_is_finished_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(EXAMPLES / "benchmarks/pruners.py"))["main"]
    results = tmp_path / "pruners.json"
    arguments = ["--quick", "--only", "L1FilterPruner", "--results", str(results), "--page", str(tmp_path / "page.md")]
    assert main(arguments) == 0
    rows = json.loads(results.read_text())
    assert list(rows) == ["L1FilterPruner | 0.5 | 0", "L1FilterPruner | 0.8 | 0"]
    assert 0 < rows["L1FilterPruner | 0.8 | 0"]["macs"] < rows["L1FilterPruner | 0.5 | 0"]["macs"] < 1
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(arguments) == 0
    assert not capsys.readouterr().out  # nothing was measured again
    assert not (tmp_path / "page.md").exists()


def test_quantizers_are_measured_one_by_one_and_what_is_finished_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = runpy.run_path(str(EXAMPLES / "benchmarks/quantizers.py"))
    results, page = tmp_path / "rows.json", tmp_path / "page.md"
    page.write_text("before\n" + "\nold\n".join(script["MARKS"]) + "\nafter\n")
    arguments = ["--quick", "--only", "PTQ", "--network", "CNN", "--seeds", "1"]
    arguments += ["--results", str(results), "--page", str(page)]
    assert script["main"](arguments) == 1  # not every row is there
    rows = json.loads(results.read_text())
    assert list(rows) == ["residual CNN | float | 1", "residual CNN | 8-bit PTQ | 1"]
    assert all(10 < value <= 100 for value in rows.values())
    assert len(capsys.readouterr().err.splitlines()) == 2
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert f"{rows['residual CNN | 8-bit PTQ | 1']:.1f}" in text
    assert script["main"](arguments) == 1
    assert not capsys.readouterr().err  # nothing was measured again


def test_the_quantization_page_shows_what_was_measured() -> None:
    script = runpy.run_path(str(EXAMPLES / "benchmarks/quantizers.py"))
    docs = EXAMPLES.parent / "docs"
    shown = (docs / "quantization.md").read_text().split(script["MARKS"][0])[1].split(script["MARKS"][1])[0]
    assert shown.strip() == script["table"](json.loads((docs / "quantization.json").read_text()))


def test_custom_quantizer() -> None:
    source = (EXAMPLES / "custom_quantizer.py").read_text()
    (found,) = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef)]
    assert found.end_lineno is not None
    assert found.end_lineno - found.lineno + 1 < 10
    quantized = runpy.run_path(str(EXAMPLES / "custom_quantizer.py"))["main"]()
    weight = quantized.get_parameter("3.weight")
    rounded = quantized.get_submodule("_quant.3.weight")(weight)
    steps = rounded * 2**7  # weights of 512 inputs are below 0.0443, and 7 steps of 2^-7 reach 0.055
    assert torch.equal(steps, steps.round())
    assert len(steps.unique()) == 13
    rounded.sum().backward()
    assert bool((weight.grad == 1).all())


@pytest.mark.skipif(not has_int8_instructions(), reason="no 8-bit multiply-accumulate instructions")
def test_what_the_custom_quantizer_gives_is_lowered() -> None:
    quantized = runpy.run_path(str(EXAMPLES / "custom_quantizer.py"))["main"]()
    lowered = fxcompress.compress(quantized, [Lower()], example_inputs=torch.randn(2, 3, 8, 8))
    assert lowered.meta["history"][-1].notes[0].startswith("2 of 2 layers run in int8")


# ---- documentation ---------------------------------------------------------------------------------------------------


def python_of(page: str) -> str:
    """The ```python blocks of a page, on the lines where they stand."""
    lines, inside = [], False
    for line in (ROOT / page).read_text().splitlines():
        fence = line.startswith("```")
        inside = line == "```python" or (inside and not fence)
        lines.append(line if inside and not fence else "")
    return "\n".join(lines)


@pytest.mark.parametrize("page", PAGES_WITH_CODE)
def test_python_code_on_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run one after the other; the files that they write are not left behind."""
    monkeypatch.chdir(tmp_path)
    source = python_of(page)
    assert source.strip()
    exec(compile(source, ROOT / page, "exec"), {"__name__": "page"})


@pytest.mark.parametrize("page", ["README.md", *(p.relative_to(ROOT).as_posix() for p in DOCS.glob("*.md"))])
def test_links_on_a_page_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text()):
        assert "://" in link or ((ROOT / page).parent / link).exists(), link


def test_groups_page_is_what_the_script_prints() -> None:
    printed = runpy.run_path(str(DOCS / "make_groups.py"))["page"]()
    assert printed in (DOCS / "groups.md").read_text(), "run: PYTHONPATH=tests python docs/make_groups.py"
    assert "Removable: 2,880 channels." in printed
