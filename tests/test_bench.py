"""The benchmark measures what it says: the grid, its sums, and peers that compute the same thing."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from torch import nn

import fastrnn
from bench import (
    chart,
    crowded,
    crowded_calls,
    features,
    gradient_penalty,
    half,
    keras_dropout,
    keras_layers,
    memory,
    record,
    report,
    roofline,
    run,
    stream,
    timing,
)
from bench.grid import GRID, Case, Point, cases
from bench.subjects import Subject, onnx_model
from fastrnn.timing import difference

FEW = Point("few", 1, 64, 100)
STEP = Point("apart", 1, 64, 1)


def result(point: Point, cell: str, mode: str, **ratios: float) -> dict:
    """A handmade result in which fastrnn takes 10 ms."""
    case = Case(point, cell, mode)
    times = {name: {"median": 0.01 * ratio} for name, ratio in {"fastrnn": 1.0, **ratios}.items()}
    fields = {"name": case.name, "cell": cell, "mode": mode, "faults": []}
    return json.loads(json.dumps({**fields, "point": asdict(point), "ratios": ratios, "times": times}))


def test_grid_is_the_agreed_one():
    plain = {(p.group, p.batch, p.hidden, p.steps) for p in GRID if p == Point(p.group, p.batch, p.hidden, p.steps)}
    few = {(1, 64, 100), (1, 128, 100), (1, 256, 100), (1, 512, 50), (1, 1024, 50)}
    few |= {(batch, hidden, 100) for batch in (4, 8) for hidden in (128, 256)}
    middle = {(32, 64, 100), (32, 128, 100), (32, 256, 100), (32, 512, 50), (64, 512, 100)}
    large = {(128, 256, 50), (128, 512, 50), (128, 1024, 25), (32, 1024, 25), (32, 2048, 10)}
    step = {(batch, hidden, 1) for batch in (1, 8) for hidden in (64, 256)}
    groups = {"few": few, "middle": middle, "large": large, "apart": step}
    assert plain == {(group, *sizes) for group, points in groups.items() for sizes in points}
    assert {p for p in GRID if p != Point(p.group, p.batch, p.hidden, p.steps)} == {
        Point("apart", 1, 64, 100, layers=2),
        Point("apart", 16, 256, 64, layers=2, directions=2),
        Point("apart", 32, 256, 100, fill=0.57),
        Point("apart", 1, 200, 15, input=250, modes=("infer",)),
        Point("apart", 128, 1024, 50, modes=("train",)),
    }
    assert len(GRID) == len({p.name for p in GRID}) == 28
    assert len(list(cases())) == 3 * (2 * 26 + 2)
    assert [case.name for case in cases("lstm train B1 T100 H64$")] == ["few lstm train B1 T100 H64"]


def test_packed_lengths_fill_what_they_say():
    lengths = Point("apart", 32, 256, 100, fill=0.57).lengths()
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == 100
    assert min(lengths) > 0
    assert sum(lengths) / (32 * 100) == pytest.approx(0.57, abs=0.002)


@pytest.mark.parametrize("point", [Point("few", 2, 5, 4, input=3), Point("apart", 3, 4, 9, 0, 2, 2, 0.57)])
@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_subjects_agree_and_a_wrong_one_is_caught(cell, mode, point):
    case = Case(point, cell, mode)
    subject, truth = Subject(case, fastrnn), Subject(case, nn)
    assert run.wrong(subject, truth) == []
    names = subject.results().keys()
    assert {"y", "h_n"} <= names
    assert ("c_n" in names) == (cell == "lstm")
    assert ({"grad x", "grad weight_hh_l0", "grad bias_ih_l0"} <= names) == (mode == "train")
    with torch.no_grad():
        subject.module.weight_hh_l0 += 0.1
    assert run.wrong(subject, truth)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_onnx_model_equals_torch(cell):
    onnxruntime = pytest.importorskip("onnxruntime")
    subject = Subject(Case(Point("few", 3, 17, 5, input=4), cell, "infer"), nn)
    session = onnxruntime.InferenceSession(onnx_model(subject.module, 5, 3), providers=["CPUExecutionProvider"])
    y, *states = session.run(None, {"x": subject.x.numpy()})
    expected = subject.results()
    assert difference(torch.from_numpy(y[:, 0]), expected["y"]) < 1e-5
    for name, state in zip(("h_n", "c_n"), states, strict=False):
        assert difference(torch.from_numpy(state), expected[name]) < 1e-5


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_half_is_checked_and_told(mode):
    found = half.measure(Case(Point("few", 1, 18, 5, input=4), "gru", mode), seconds=0.01, most=2)
    assert found["ratios"]["fastrnn"] == 1
    assert ("fastrnn compressed" in found["ratios"]) == (mode == "infer")
    assert found["errors"]["fastrnn float32"] == 0 < found["errors"]["fastrnn"] < found["errors"]["torch"]
    wrong = half.measure(Case(Point("few", 1, 18, 5, input=4), "gru", mode), seconds=0.01, most=2, tolerance=1e-5)
    assert "times" not in wrong


@pytest.mark.parametrize("point", [Point("few", 2, 5, 4, input=3), Point("apart", 3, 4, 9, 0, 2, 2, 0.57)])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_a_gradient_penalty_is_checked_and_told(cell, point):
    case = Case(point, cell, "train")
    found = gradient_penalty.measure(case, seconds=0.01, most=2)
    assert found["faults"] == [] and found["ratios"].keys() == {"torch"}
    wrong = gradient_penalty.measure(case, seconds=0.01, most=2, tolerance=0)
    assert wrong["faults"] and "times" not in wrong
    plain, penalised = Subject(case, fastrnn).results(), gradient_penalty.Critic(case, fastrnn).results()
    assert difference(penalised["grad weight_hh_l0"], plain["grad weight_hh_l0"]) > 0.01
    other = "gru" if cell == "lstm" else "lstm"
    row = report.penalty({"cases": [found, {**wrong, "cell": other}]}).splitlines()[-1]
    assert row.startswith(f"| {case.point.name} | ") and row.count("x |") == 1


@pytest.fixture(scope="module")
def keras_on_torch():
    backend = keras_layers.Backend("torch", 1)
    yield backend
    backend.close()


# Keras' variables do not know numpy 2's `copy` keyword.
without_copy = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")


@without_copy
@pytest.mark.parametrize("mode", ["infer", "train", "fit"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_keras_layers_are_checked_and_told(cell, mode, keras_on_torch, monkeypatch):
    monkeypatch.setattr(keras_layers, "EPOCH", 6)
    case = Case(Point("few", 3, 5, 4, input=2), cell, mode)
    found = keras_layers.measure(case, 0.01, 2, [keras_on_torch])
    assert found["faults"] == [] and found["ratios"].keys() == {"torch"} | ({"module"} if mode != "fit" else set())
    wrong = keras_layers.measure(case, 0.01, 2, [keras_on_torch], tolerance=-1)
    assert len(wrong["faults"]) == len(found["ratios"]) and "times" not in wrong
    row = report.keras({"cases": [found]}).splitlines()[-1]
    assert row.startswith(f"| {case.point.name} {mode} | ")
    assert sum(figure not in ("", "-") for cells in row.split("|")[2:] for figure in cells.strip().split(", ")) == len(
        found["ratios"]
    )


@pytest.mark.parametrize("train", [True, False])
def test_features_are_timed_beside_plain_layers_and_told(train):
    found = features.measure("GRU", "num_heads=4", (3, 2, 16), train, seconds=0.01, most=2)
    assert found["ratio"] == found["times"]["with"]["median"] / found["times"]["without"]["median"]
    (row,) = (line for line in report.features({"cases": [found]}).splitlines() if "num_heads" in line)
    assert row == f"| `num_heads=4`, 3 steps, B 2, H 16 |  | {found['ratio']:.2f}x |  |"


@without_copy
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_recurrent_dropout_of_keras_is_checked(cell, keras_on_torch, monkeypatch):
    found = keras_dropout.measure(cell, (2, 8), 0.01, 2, steps=3)
    assert not found["faults"] and found["ratios"]["torch"] > 0
    told = report.dropout({"cases": [found | {"cell": each} for each in ("lstm", "gru")]})
    assert told.count(f" {found['ratios']['torch']:.2f} |") == 2
    monkeypatch.setattr(keras_dropout, "TOLERANCE", -1)
    assert keras_dropout.measure(cell, (2, 8), 0.01, 2, steps=3)["faults"]


def test_a_backend_of_keras_that_fails_says_how():
    backend = keras_layers.Backend("torch", 1)
    with pytest.raises(RuntimeError, match=r"(?s)keras.layers on torch failed:\n.*no/such/file"):
        backend.ask(cell="gru", mode="infer", hidden=3, batch=1, data="no/such/file", result="")
    backend.close()


def test_difference_is_relative_where_it_can_be():
    zero, two = torch.zeros(3), torch.full((3,), 2.0)
    assert difference(two + 0.02, two) == pytest.approx(0.01, rel=1e-4)
    assert difference(zero, zero) == 0
    assert difference(two, zero) == pytest.approx(12**0.5)
    assert not difference(two * math.nan, two) <= run.TOLERANCE


def test_interleave_counts_and_takes_turns():
    calls: list[str] = []
    rivals = {name: (lambda loops, name=name: calls.append(name)) for name in ("a", "b")}
    times = timing.interleave(rivals, seconds=1e9, most=7)
    assert all(len(taken["seconds"]) == 7 for taken in times.values())
    assert all(taken["p20"] <= taken["median"] <= taken["p80"] for taken in times.values())
    assert calls.count("a") == calls.count("b")
    assert calls[6:] != sorted(calls[6:])


def test_report_sums():
    assert report.geomean([2, 8]) == pytest.approx(4)
    packed = Point("apart", 32, 256, 100, fill=0.57)
    results = [
        result(FEW, "lstm", "train", torch=2.0),
        result(Point("few", 1, 128, 100), "lstm", "train", torch=8.0),
        result(FEW, "gru", "infer", torch=0.8, onnxruntime=0.5, openvino=0.7, **{"fastrnn frozen": 0.25}),
        result(STEP, "rnn", "infer", torch=3.0),
        result(packed, "gru", "train", torch=2.0, **{"fastrnn padded": 1.6, "torch padded": 0.8}),
    ]
    assert report.ratios(results, group="few", cell="lstm", mode="train") == [2.0, 8.0]
    assert "| few rows | 4.00x |  |  |  | 0.80x |  |" in report.class_table(results)
    assert "| B1 T1 H64 |  |  |  |  |  | 3.00x |" in report.apart_table(results)
    assert "| onnxruntime, few rows |  | 2.00x |  |" in report.peer_table(results)
    assert "| the fastest of three, few rows |  | 2.00x |  |" in report.peer_table(results)
    assert report.worst(results).startswith(
        "fastrnn is slower than torch.nn at 1 of 5 sizes. It gains least at these: GRU infer B1 T100 H64 (0.80x)"
    )
    assert (
        "57% full takes this share of the time that the padded batch takes in training: GRU 0.62 (torch.nn 2.50)"
        in report.packed(results)
    )


def test_report_names_wrong_results():
    broken = result(FEW, "lstm", "train", torch=2.0) | {"faults": ["y differs by 1"]}
    del broken["ratios"]
    results = [broken, result(STEP, "lstm", "train", torch=1.0)]
    assert "Results that were wrong, so that no time was taken: few lstm train B1 T100 H64" in report.worst(results)
    assert "x" not in report.class_table(results).splitlines()[4]


def test_memory_sums():
    megabyte = 2**20
    same = dict.fromkeys(memory.STEPS, 40 * megabyte)
    less = dict.fromkeys(memory.STEPS, 10 * megabyte)
    cases = [
        {"name": "one", "median": {"fastrnn": less, "torch": same}},
        {"name": "two", "median": {"fastrnn": same | {"first": 41 * megabyte}, "torch": same}},
    ]
    assert [memory.above(case) for case in cases] == [False, True]
    text = report.memory({"cases": cases, "settings": {"resolution": memory.RESOLUTION}})
    assert "0.50 of torch.nn's" in text
    assert text.endswith("It is higher than torch.nn's at two.")


def test_roofline_sums(tmp_path):
    """Handmade: a case takes 10 ms, torch.nn twice that."""
    point = Point("middle", 32, 256, 100)
    operations = 2 * 100 * 32 * 4 * 256 * 512
    assert roofline.forward_operations(point, "lstm") == operations
    assert roofline.weight_bytes(point, "lstm") == 2**20
    rates = {"operations_per_second": operations / 0.004, "bytes_per_second": {"256": 1e12, "1024": 2**20 * 100 / 0.005}}
    assert roofline.least_seconds(point, "lstm", "infer", rates) == pytest.approx(0.002 + 0.005)  # reading takes longer
    assert roofline.least_seconds(point, "lstm", "train", rates) == pytest.approx(0.008 + 2 * 0.005)
    results = [result(point, "lstm", mode, torch=2.0) for mode in ("infer", "train")]
    assert report.reached(results, rates, "infer") == [pytest.approx(0.7)]
    text = report.roofline(results, rates)
    assert "inference 70% (least 70%), training 180%" in text
    assert "| middle | 1.11x (180%) |  |  | 2.86x (70%) |  |  |" in text
    report.draw_roofline(
        results, rates | {"bytes_per_second": dict.fromkeys(("1024", "16384", "65536"), 1e11)}, tmp_path / "p.png"
    )
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_a_stream_is_checked_and_told(cell):
    pytest.importorskip("onnxruntime")
    found = stream.measure(cell, 17, 1, seconds=0.01, most=2)
    assert {"torch", "onnxruntime", "fastrnn frozen step", "fastrnn cell"} <= found["times"].keys()
    assert 0 < found["errors"]["fastrnn"] and found["errors"]["torch"] == 0
    assert "times" not in stream.measure(cell, 17, 1, seconds=0.01, most=2, tolerance=1e-12)
    (row,) = report.stream({"cases": [found]}).splitlines()[4:]
    assert row.startswith(f"| {report.WORDS[cell]} H 17 | ") and row.count("|") == 10


@pytest.mark.parametrize("kind", ["quiet", "neighbour", "after", "bursts", "python threads", "smaller team"])
def test_crowded_calls_are_timed(kind, monkeypatch):
    """In this process: a call of each mode, beside a neighbour that ends with the block."""
    monkeypatch.setattr(crowded_calls, "SETTLE", 0.01)
    started = []
    popen = crowded_calls.subprocess.Popen
    monkeypatch.setattr(
        crowded_calls.subprocess, "Popen", lambda *args, **kwargs: started.append(popen(*args, **kwargs)) or started[-1]
    )
    before = torch.get_num_threads()
    try:
        modes = ("infer",) if kind == "python threads" else ("infer", "train")
        jobs = [(("GRU", 5, 2, 3), mode) for mode in modes]
        found = crowded_calls.measure("fastrnn", kind, 2, 0.02, jobs)
    finally:
        torch.set_num_threads(before)
    names = {"python threads": {"calls a second"}, "smaller team": {"longest ms"}}.get(kind, {"p50", "p90", "p99", "mean"})
    assert [one.keys() for one in found] == [names] * len(modes)
    assert kind == "smaller team" or all(value > 0 for one in found for value in one.values())
    assert len(started) == (kind in ("neighbour", "after", "bursts"))
    assert all(process.poll() is not None for process in started)


def test_crowded_goals_are_checked():
    """Handmade: each goal is missed by a little more, and kept by a little less, than it allows."""
    point = crowded.point_name(crowded.POINTS[3])
    for goal in crowded.GOALS:
        rate, mode, bound = goal.figure == "calls a second", goal.modes[0], 1000.0
        limit = goal.times * bound + goal.plus
        other = {"runs": [{}], "median": {goal.other_figure or goal.figure: bound}}
        for found, misses in ((0.99 * limit, rate), (1.01 * limit, not rate)):
            case = {"runs": [{}], "median": {goal.figure: found}}
            cases = {(goal.situation, "now", point, mode): case, (goal.other, goal.who, point, mode): other}
            if goal.situation != goal.other or goal.who != "now":
                told = [
                    words
                    for words in crowded.missed(cases)
                    if words.startswith(f"{goal.situation}, {point} {mode}: {goal.figure}")
                ]
                assert len(told) == misses, goal
        assert not list(crowded.missed({(goal.situation, "now", point, mode): other}))  # nothing to compare with
    longest = {("smaller team", "now", point, "infer"): {"runs": [{"longest ms": 3}, {"longest ms": 101}], "median": {}}}
    assert list(crowded.missed(longest)) == [f"smaller team, {point} infer: 101 ms, the goal 100"]
    known = {situation.name for situation in crowded.SITUATIONS}
    assert {goal.situation for goal in crowded.GOALS} | {goal.other for goal in crowded.GOALS} <= known


def test_crowded_calls_are_told():
    def case(situation, who, **figures):
        return {"situation": situation, "who": who, "point": "GRU H5 B1 T2", "mode": "infer", "median": figures}

    cases = [
        case("quiet", "now", p50=1234, mean=9),
        case("quiet", "torch.nn", p50=5600, mean=9),
        case("bursts", "now", p50=9, mean=78),
    ]
    cases += [case("quiet", "before", p50=9, mean=9), case("smaller team", "now", **{"longest ms": 9})]
    origin = {"machine": {"name": "Zen 9", "cores": 2}, "versions": {"torch": "2"}, "date": "2026-01-01T00", "commit": "abc"}
    head, _, row = report.crowded(origin | {"cases": cases}).split("\n\n")[1].splitlines()
    assert head == "| ms | quiet | bursts |"
    assert row == "| GRU H5 B1 T2 infer | 1.23, 5.6 | 0.078 |"


def test_crowded_runs_processes_and_keeps_what_was_there(tmp_path, capsys):
    output, small = tmp_path / "crowded.json", ["--points", "GRU H96 B1 ", "--runs", "1", "--seconds", "0.01"]
    assert crowded.main(["--only", "^one CPU, one thread infer", *small, "--output", str(output)]) == 0
    assert (
        crowded.main(["--only", "^one CPU infer", *small, "--output", str(output), "--keep", "--before", sys.executable]) == 0
    )
    content = json.loads(output.read_text())
    assert {"machine", "versions", "commit", "date", "settings"} <= content.keys()
    names = [(case["situation"], case["who"]) for case in content["cases"]]
    assert names == [("one CPU, one thread", "now"), ("one CPU", "now"), ("one CPU", "before")]
    assert all(case["median"]["p50"] == case["runs"][0]["p50"] > 0 for case in content["cases"])
    assert "goals missed" in capsys.readouterr().out


def test_rates_are_rates(monkeypatch):
    monkeypatch.setattr(roofline, "MATRIX", 64)
    monkeypatch.setattr(roofline, "KIB", (4,))
    rates = roofline.measure(seconds=0.01, most=2)
    assert rates["operations_per_second"] > 1e6 and rates["bytes_per_second"]["4"] > 1e6


def written_results(folder, name: str, date: str, ratio: float) -> None:
    """A grid of one point, as bench.run writes it on a processor of this name."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = {"name": name, "processor": "Other", "vectors": 256, "caches": {"L2": "512K"}, "torch": "AVX2"}
    header = {"machine": machine, "versions": dict.fromkeys(("torch", "onnxruntime", "openvino"), "1"), "date": date}
    results = [result(Point("large", 128, 256, 50), "gru", "train", torch=ratio)]
    content = header | {"settings": {"threads": 2, "dtype": "float32"}, "commit": "abc", "cases": results}
    record.write(folder / f"grid-{record.slug(name)}.json", content)


def test_every_processor_has_its_tables_wherever_the_markers_are(tmp_path):
    results = tmp_path / "bench" / "results"
    written_results(results, "Zen 9", "2000-01-01", 3.0)
    written_results(results, "Old Rapids", "1999-01-01", 0.5)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("no table here\n")
    for name, block in (("figures", "bench"), ("log", "roofline")):
        (tmp_path / "docs" / f"{name}.md").write_text(f"before\n<!-- {block}:begin -->\nold\n<!-- {block}:end -->\nafter\n")
    report.main(["--root", str(tmp_path)])
    assert (tmp_path / "README.md").read_text() == "no table here\n"
    page = (tmp_path / "docs" / "figures.md").read_text()
    assert page.startswith("before\n<!-- bench:begin -->\n") and page.endswith("<!-- bench:end -->\nafter\n")
    assert "| Zen 9 (Other) | 256 bits | 512K | 0 of 1 | 3.00x | 2000-01-01, abc |" in page
    assert "| Old Rapids (Other) | 256 bits | 512K | 1 of 1 | 0.50x | 1999-01-01, abc |" in page
    newest, older = page.index("### Zen 9"), page.index("### Old Rapids")
    assert newest < page.index("| large |  | 3.00x |") < older < page.index("| large |  | 0.50x |")
    assert "(../bench/results/heatmap-zen-9.png)" in page
    assert (results / "heatmap-zen-9.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "docs" / "figures.md").unlink()
    with pytest.raises(ValueError, match=r"neither README\.md nor"):
        report.main(["--root", str(tmp_path)])


def test_processors_are_named_by_their_numbers():
    def cpuinfo(vendor, family, model):
        first = f"vendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: a virtual one\n"
        return f"processor\t: 0\n{first}\nprocessor\t: 1\n{first}"

    assert record.processor_name(cpuinfo("AuthenticAMD", 25, 17)) == "Zen 4"
    assert record.processor_name(cpuinfo("AuthenticAMD", 25, 1)) == "Zen 3"
    assert record.processor_name(cpuinfo("GenuineIntel", 6, 207)) == "Emerald Rapids"
    assert record.slug(record.processor_name(cpuinfo("GenuineIntel", 6, 300))) == "genuineintel-family-6-model-300"
    assert record.processor_name("") != ""


def test_committed_results_are_named_by_their_processor():
    for path in record.RESULTS.glob("*-*.json"):
        name = json.loads(path.read_text())["machine"]["name"]
        assert path.stem in {f"{benchmark}-{record.slug(name)}" for benchmark in report.BENCHMARKS}


def test_a_gpu_has_a_table_of_its_own():
    def point(number, ratio, faults=()):
        timed = {"forward": {"ratio": ratio}, "train": {"ratio": 2 * ratio}}
        sizes = {"cell": "GRU", "T": 9, "B": 3, "H": 100, "directions": 1, "layers": 1, "fill": 1}
        its = sizes | {"group": "odd", "format": number}
        return {"name": f"odd {number}", "point": its, "faults": list(faults), **timed}

    content = {
        "points": [point("fp16", 0.9), point("fp16", 1.6), point("tf32", 3.0), point("bf16", 9.0, ["y"])],
        "device": {"name": "A GPU", "cuda": "1", "cudnn": 2},
        "versions": {"torch": "3", "triton": "4"},
        "date": "2000-01-01",
        "commit": "",
    }
    text = report.gpu(content)
    assert "| odd | 1.20x | 2.40x |  |  | 3.00x | 6.00x |" in text
    assert "slower than cuDNN in 1 of 6 figures." in text
    assert "4 figures: their geometric mean is 1.70x, and 1 of them are below 1x: forward odd fp16 (0.90x)." in text
    assert "no time was taken: odd bf16." in text and "A GPU, CUDA 1, cuDNN 2, torch 3, triton 4" in text


def test_report_goes_between_the_markers():
    begin, end = "<!-- bench:begin -->", "<!-- bench:end -->"
    page = f"before\n{begin}\nold\n{end}\nafter\n"
    assert report.insert("new", page) == f"before\n{begin}\nnew\n{end}\nafter\n"
    with pytest.raises(ValueError, match="no <!-- bench:begin"):
        report.insert("new", "a page without")


def test_heatmap_and_record_are_written(tmp_path):
    results = [result(FEW, "lstm", "train", torch=2.0), result(STEP, "gru", "infer", torch=0.5)]
    report.heatmap(results, tmp_path / "new" / "map.png")
    assert (tmp_path / "new" / "map.png").read_bytes().startswith(b"\x89PNG")
    record.write(tmp_path / "new.json", {"a": [1.5, math.pi], "cases": results, "none": None, "empty": {}})
    read = json.loads((tmp_path / "new.json").read_text())
    assert read["a"] == pytest.approx([1.5, math.pi], rel=1e-5)
    assert read["cases"][0]["ratios"] == {"torch": 2.0}
    assert {"machine", "versions", "commit", "date", "settings"} <= record.header(threads=1).keys()
    record.one_tree()


def test_the_chart_shows_plain_points_of_the_newest_grid(tmp_path):
    plain, packed = Point("middle", 32, 256, 100), Point("middle", 32, 512, 50, fill=0.57)
    results = [
        result(plain, "gru", "train", torch=3.0),
        result(Point("middle", 32, 64, 100), "gru", "train", torch=5.0),
        result(packed, "gru", "train", torch=7.0),
        result(STEP, "gru", "train", torch=9.0),
        result(plain, "gru", "infer", torch=2.0),
    ]
    assert chart.speed_ups(results, "gru", "train", 32) == {64: 5.0, 256: 3.0}
    assert chart.speed_ups(results, "gru", "infer", 32) == {256: 2.0}
    assert chart.speed_ups(results, "lstm", "train", 32) == chart.speed_ups(results, "gru", "train", 1) == {}
    machine = {"processor": "Other", "torch": "AVX2", "caches": {"L2": "1K"}}
    header = {"machine": machine, "versions": {"torch": "1.2+cpu"}, "settings": {"threads": 2}, "cases": results}
    for name, date in (("grid", "2000-01-02T00:00:00"), ("grid-other", "2000-01-01T00:00:00")):
        record.write(tmp_path / f"{name}.json", header | {"date": date})
    content = chart.newest(tmp_path)
    assert content["date"].startswith("2000-01-02")
    assert chart.chart(content).startswith(b"\x89PNG")
    caption = chart.origin(content)
    assert "on 2000-01-02 with 2 threads of Other (AVX2, 1K of L2 cache a core)" in caption and "torch 1.2." in caption
    with pytest.raises(FileNotFoundError, match=r"python -m bench\.run makes one"):
        chart.newest(tmp_path / "empty")


@pytest.mark.skipif(not (record.ROOT / "README.md").exists(), reason="reads the README, which a source tree has")
def test_the_readme_shows_the_chart_of_the_committed_results():
    """Whoever commits newer results draws the chart anew."""
    text = (record.ROOT / "README.md").read_text()
    assert chart.block(chart.newest(record.RESULTS)) in text and chart.PICTURE.exists()


def test_several_numbers_of_threads():
    assert run.counts("1,2,16") == [1, 2, 16]
    for text in ("0", "1,", "two", "-1"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected numbers above 0, such as 1,2,4"):
            run.counts(text)
    results = [
        {
            "name": name,
            "faults": faults,
            "threads": threads,
            "times": {"fastrnn": {"median": 8 / threads}, "torch": {"median": 6}},
        }
        for threads in (1, 4)
        for name, faults in (("a", []), ("b", ["y differs"]))
    ]
    (line,) = run.scaling(results)
    assert line.split() == "a fastrnn 1: 1.00x 4: 4.00x torch 1: 1.00x 4: 1.00x".split()


def test_a_visit_to_a_gpu_has_these_stages():
    """What else is named is refused before anything runs."""
    script = record.RESULTS.parent / "gpu.sh"
    found = subprocess.run(["bash", str(script), "grids"], capture_output=True, text=True)
    assert found.returncode == 2
    assert "expected tests, selftest, host, worst, stacks, threads, grid, peers or sanitizer, got grids" in found.stderr
