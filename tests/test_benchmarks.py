"""The benchmarks at tiny sizes: every line runs and passes its own checks, and the table has its form. No times."""

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import (
    BENCHMARKS,
    COLUMNS,
    Benchmark,
    Measurement,
    Settings,
    Skipped,
    check_equal,
    measure,
    peak_megabytes,
    run_all,
)
from benchmarks.loss import prepare_loss
from benchmarks.run import GROUPS, choose, main


QUICK = Settings(rounds=1, quick=True)


@pytest.mark.parametrize("group", GROUPS)
def test_every_line_runs(group, tmp_path, capsys):
    lines = choose([group], "cpu")
    main(["--quick", "--rounds", "1", "--only", group, "--markdown", str(tmp_path / "table.md")])
    table = (tmp_path / "table.md").read_text()
    assert capsys.readouterr().out == table
    _, empty, columns, _, *rows = table.splitlines()
    assert empty == ""
    assert columns == f"| {' | '.join(COLUMNS)} |"
    rows = [row.strip("| ").split(" | ") for row in rows]
    assert [row[0] for row in rows] == [line.name for line in lines]
    for line, (_, compared, goal, measured, spread, floor, *remark) in zip(lines, rows):
        assert compared == line.compared
        remark = "".join(remark)
        if remark.startswith("skipped: "):
            assert measured == spread == floor == "-"
            continue
        value = float(measured.split()[0])
        assert ("falls short" in remark) == (goal != "-" and value > float(goal.split()[1]))


def test_lines_belong_to_groups_in_order():
    assert {line.group for line in BENCHMARKS.values()} == set(GROUPS)
    names = [line.name for line in choose(None, "cpu")]
    assert names.index("step-1") < names.index("step-32") < names.index("step-160") < names.index("checkpointing")
    assert not any(name.startswith("graph") for name in names)
    assert "graph-1" in [line.name for line in choose(["gpu"], "cuda")]
    with pytest.raises(SystemExit):
        main(["--only", "no-such-line"])


def test_where_the_time_goes(tmp_path):
    """A file for each line, and not that of an earlier run."""
    for _ in range(2):
        main(["--quick", "--rounds", "1", "--only", "gru-256", "step-1", "--profile", str(tmp_path / "profiles")])
    assert {path.name for path in (tmp_path / "profiles").iterdir()} == {"gru-256.txt", "step-1.txt"}
    text = (tmp_path / "profiles" / "gru-256.txt").read_text()
    baseline, ours = text.split("ours: operations")
    for part, function in ((baseline, "torch.gru"), (ours, "modeling_rnn.py")):
        assert "aten::" in part
        assert part.count("functions of Python") == 1
        assert function in part


def line_of(result, goal=0.5, unit=""):
    def run(settings):
        if isinstance(result, Exception):
            raise result
        return result

    (cells,) = run_all([Benchmark("name", "this / that", {"cpu": goal}, unit, run)], QUICK)
    return dict(zip(COLUMNS, cells, strict=True))


def test_a_missed_goal_falls_short():
    missed = line_of(Measurement(0.51, 0.4, 0.6, 0.1, "a note"))
    assert missed["remark"] == "falls short; a note"
    assert (missed["goal"], missed["measured"], missed["spread"], missed["floor"]) == (
        "<= 0.5",
        "0.51",
        "0.40 to 0.60",
        "0.10",
    )
    assert line_of(Measurement(0.5))["remark"] == ""
    assert line_of(Measurement(9.0), goal=None)["remark"] == ""
    assert line_of(Measurement(120.0), goal=100, unit="us")["measured"] == "120.00 us"
    assert line_of(Skipped("there is no such thing"))["remark"] == "skipped: there is no such thing"


def test_ratios_are_medians_of_rounds(monkeypatch):
    rounds = {"ours": [9, 9, 1, 3, 8], "baseline": [9, 9, 10, 10, 10], "floor": [9, 9, 0.5, 1, 2]}  # two to warm up
    times = {name: iter(values) for name, values in rounds.items()}
    monkeypatch.setattr(harness, "seconds", lambda function, settings, calls=1, *_: next(times[function]))
    result = measure(Settings(rounds=3), baseline="baseline", ours="ours", floor="floor")
    assert result.value == pytest.approx(0.3)
    assert (result.low, result.high) == (pytest.approx(0.2), pytest.approx(0.55))
    assert result.floor == pytest.approx(0.1)
    assert result.note == "3e+03 of 1e+04 ms"


def test_variants_take_turns():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = harness.interleave(functions, Settings(rounds=6, quick=True))
    assert all(len(values) == 6 for values in times.values())
    turns = ["".join(calls[start : start + 3]) for start in range(6, len(calls), 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len(set(turns)) > 1


def test_what_differs_is_not_compared():
    numbers = torch.tensor([1.0, -2.0])
    check_equal("numbers", [numbers, numbers], [numbers + 1e-6, numbers])
    with pytest.raises(AssertionError, match=r"^numbers differ by 0\.1"):
        check_equal("numbers", [numbers, numbers + 0.1], [numbers, numbers])
    with pytest.raises(ValueError, match="zip"):
        check_equal("numbers", [numbers], [])


@pytest.mark.slow
def test_peak_of_a_process():
    sizes = {"vocab_size": 20_000, "rows": 1_000, "hidden_size": 16, "ignored": 0.0}
    logits = sizes["vocab_size"] * sizes["rows"] * 4 / 2**20
    # Logits, their normalisation, and their gradient.
    assert 2 * logits < peak_megabytes(prepare_loss, Settings(), variant="plain", **sizes) < 4.5 * logits
