"""tools/bench.py with --quick: every contestant is in every race, and the report follows from the data.

tools/bench_quality.py with --quick: every contestant trains, draws and is measured.
"""
import json

import pytest
import torch
from scripts import TOOLS, run_script

from ddpm_tutorial.data import load_sample, to_float

pytest.importorskip("denoising_diffusion_pytorch")
NETWORKS = {"ours", "diffusers, 1 layer", "diffusers, 2 layers", "lucidrains"}
RACES = {"training": NETWORKS, "forward": NETWORKS, "guided samples": NETWORKS - {"lucidrains"},
         "batches": {"ours", "torchvision, DataLoader"}}

@pytest.fixture
def bench(monkeypatch):
    "The script as a module."
    monkeypatch.syspath_prepend(TOOLS)
    import bench
    return bench

def test_quick(tmp_path):
    "The bundled images, no network: a row for each contestant, right ratios, the same numbers in the table."
    said = run_script("bench.py", "--quick", "--output_dir", tmp_path/"out", cwd=tmp_path)
    result = json.loads((tmp_path/"out"/"bench.json").read_text())
    text = (tmp_path/"out"/"bench.md").read_text(encoding="utf-8")
    assert said.split() == text.split()
    assert (tmp_path/"out"/"bench.png").read_bytes().startswith(b"\x89PNG")
    lines = text.splitlines()
    for what, names in RACES.items():
        rows = {row["contestant"]: row for row in result["rows"] if row["what"] == what}
        assert rows.keys() == names
        head = next(i for i, line in enumerate(lines) if line.startswith(f"**{what.capitalize()}, "))
        below = lines[head + 4:head + 4 + len(rows)]
        told = {line.split(" | ")[0].removeprefix("| "): line for line in below}
        assert told.keys() == names and rows["ours"]["ratio"] == 1
        for name, row in rows.items():
            speed = row["images_per_second"]
            assert 0 < row["low"] <= speed <= row["high"]
            assert all(speed >= other for other in row["others"].values())
            assert row["ratio"] == pytest.approx(rows["ours"]["images_per_second"]/speed)
            assert f"| {row['variant']} | {speed:,.0f} (" in told[name]
            assert f"| {row['ratio']:.2f} (" in told[name]
            if what != "batches": assert {row["variant"], *row["others"]} == {"fp32", "bf16"}
            if what in ("training", "forward"):
                assert row["peak_share"] == pytest.approx(speed*row["flops"]/row["peak_flops"])
            if what == "training": assert row["flops"] > 2*row["parameters"] and row["memory_mib"] >= 0

def test_ratios_are_of_medians(bench):
    """Known speeds of three rounds: the variant with the higher median counts.

    A single fast round changes nothing.
    """
    speeds = {("ours", "fp32"): [1, 900, 2], ("ours", "bf16"): [30, 20, 40], ("theirs", "fp32"): [10, 5, 12]}
    ours, theirs = bench.rows_of(speeds, what="test")
    assert (ours["variant"], ours["images_per_second"], ours["others"]) == ("bf16", 30, {"fp32": 2})
    assert (theirs["ratio"], theirs["ratio_low"], theirs["ratio_high"]) == (3, 3, 4)

def test_loaders_hand_out_the_same(bench, tmp_path):
    "Each loader goes through every image once, and a pixel has the same value in both."
    data = load_sample()
    bench.write_raw(data, tmp_path)
    works = bench.loading(data, tmp_path)
    assert [work() for (_, workers), work in works.items() if workers == "no workers"] == [len(data)]*2
    dataset = works["torchvision, DataLoader", "no workers"].args[0].dataset
    for i in (0, 7, len(data) - 1):
        x, label = dataset[i]
        assert label == data.labels[i]
        torch.testing.assert_close(x, to_float(data.images[i]))

def test_quality(tmp_path):
    """Each contestant is trained and judged, and each program leaves its pictures.

    A second call measures nothing again.
    """
    command = ["bench_quality.py", "--quick", "--output_dir", "out"]
    said = run_script(*command, cwd=tmp_path)
    result = json.loads((tmp_path/"out"/"bench_quality.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert rows.keys() == {"ours", "diffusers", "lucidrains", "diffusers, our learning rate"}
    assert all(row["steps"] == 2 and row["training_seconds"] > 0 and row["frechet_distance"] > 0
               for row in rows.values())
    assert 0 <= rows["ours"]["class_agreement"] <= 1 and "class_agreement" not in rows["lucidrains"]
    assert len(result["first_pictures"]) == 4
    assert all(seconds > 0 for (seconds,) in result["first_pictures"].values())
    assert said.count("to the first 16 pictures") == 4 and "diffusers: 2 steps" in said
    assert "2 steps in" not in run_script(*command, cwd=tmp_path)
    assert json.loads((tmp_path/"out"/"bench_quality.json").read_text()) == result
