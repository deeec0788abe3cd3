"""python -m rawaudio.benchmark: times are right, and everything that README times is timed."""

import ctypes
import gc
import itertools
import json
import time
from pathlib import Path

import pytest
import torch
from commands import error_of, status

from cauchy_kernel.benchmark import peak_bytes
from rawaudio import benchmark
from rawaudio.benchmark import COLD, ROWS, SIZES, BenchmarkConfig, Case, main, measure, timings
from rawaudio.checkpoint import save_checkpoint
from rawaudio.engine import Engine
from rawaudio.errors import UserError
from rawaudio.families import FAMILIES, MODELS

README = Path(__file__).parents[1] / "README.md"
QUICK = dict(tiny=True, seconds=0.01, clips=[2], lengths=[8000])


@pytest.fixture
def engine():
    if not Engine.available(benchmark.network(BenchmarkConfig(**QUICK)))[0]:
        pytest.skip("no C++ compiler")


def test_the_first_time_and_the_times_after_it_are_told_apart():
    """A job of 0.2 s, then 0.02 s: to a few ms, which a busy machine may lengthen; repeated until
    its time is up, and once at least."""
    calls = []

    def job():
        calls.append(time.perf_counter())
        time.sleep(0.2 if len(calls) == 1 else 0.02)

    first, again = timings(job, 0.15)
    assert 0.2 <= first < 0.4 and 0.02 <= again < 0.1
    assert 2 <= len(calls) - 1 <= 8
    calls.clear()
    timings(job, 1e-9)
    assert len(calls) == 2


PARTS = [(name, "autoregressive") for name in ROWS if name != "cold_start"]
PARTS += itertools.product(
    ("generation", "guidance", "training"), ("diffwave", "wavenet", "diffwave_wavenet")
)


@pytest.mark.parametrize("name, model", PARTS)
def test_every_row_makes_what_it_says(name, model, request):
    """Each part of it runs; where it claims seconds of audio, its job has made them."""
    cfg = BenchmarkConfig(**QUICK, model=model)
    if name == "float16":
        request.getfixturevalue("engine")
    case, parts = ROWS[name]
    for part in parts(cfg):
        row = measure(cfg, name, part)
        assert row["first"] > 0 and row["again"] > 0 and row["mib"] > 50
        assert ("error" not in row) or row["error"] < (0.02 if name == "float16" else 1e-4)
        made = case(cfg, part)
        clips = made.job()
        if isinstance(clips, torch.Tensor) and made.audio is not None:
            assert made.audio == clips.numel() / 16000
        assert benchmark.table_line(row).count("|") == 7
        assert "2 clips" in row["what"] or name not in ("generation", "float16", "guidance")


def test_a_cold_start_is_a_new_python(monkeypatch, capfd):
    """Every time; the model and the device are named to it."""
    monkeypatch.setattr(benchmark, "COLD", "print({!r}, {!r})")
    case = ROWS["cold_start"][0](BenchmarkConfig(**QUICK), "sashimi_ar_digits")
    case.job()
    assert capfd.readouterr().out == "sashimi_ar_digits cpu\n"
    assert "load_named('a', device='cpu').stream" in COLD.format("a", "cpu")


def test_runs_are_kept_drawn_and_put_beside_each_other(tmp_path, capfd, engine):
    """The file has the machine and all rows; times as fast is earlier over now; nothing is written
    over, and other files are refused, in one line."""
    earlier, now = tmp_path / "a.json", tmp_path / "b.json"
    asked = ["tiny=true", "rows=[training]", "lengths=[9000]", "seconds=0.01"]
    main([*asked, f"out={earlier}"])
    run = json.loads(earlier.read_text())
    (row,) = run["rows"]
    row["again"] *= 1000
    earlier.write_text(json.dumps(run))
    main(["tiny=true", "rows=[training,first_chunk]", "lengths=[9000]", "seconds=0.01",
          f"compare={earlier}", f"out={now}"])  # fmt: skip
    lines = capfd.readouterr().out.splitlines()
    assert f"earlier: {run['machine']}" in "".join(lines) and " of " in run["machine"]
    *_, first, second = (line.split("|") for line in lines)
    assert first[-3].strip().endswith(" s") and float(first[-2]) > 50
    assert [cell.strip() for cell in second[-3:-1]] == ["", ""] and len(first) == len(second)
    kept = [row["what"] for row in json.loads(now.read_text())["rows"]]
    assert kept == [line[1].strip() for line in (first, second)]
    assert (tmp_path / "b.webp").read_bytes()[8:12] == b"WEBP"
    (tmp_path / "c.json").write_text('{"rows": []}')
    (tmp_path / "d.webp").write_bytes(b"a picture of mine")
    for argument, words in [
        (f"out={now}", "b.json is there"), ("out=x.txt", "end in .json"),
        (f"out={tmp_path}/d.json", "d.webp is there"),
        (f"compare={tmp_path}/none.json", "No such file"),
        (f"compare={tmp_path}/c.json", "no file that"),
    ]:  # fmt: skip
        assert words in error_of(main, [*asked, argument], capfd)


def test_the_likelihood_rows_are_of_models_that_step():
    """Of the others one line says so."""
    for name, (family, _) in MODELS.items():
        for row, method in (("plain", "engine"), ("first_chunk", "stream"), ("float16", "engine")):
            if not hasattr(family.module, method):
                with pytest.raises(UserError, match=f"model has no {method}"):
                    ROWS[row][0](BenchmarkConfig(**QUICK, model=name), 1)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_all_families_are_compared(family, monkeypatch):
    """At both sizes; samples of audio over seconds, of the parts of clips that are made."""
    names = [benchmark.sized(family, size) for size in SIZES]
    assert names[0] == family.kind and names[1] == f"{family.kind}_digits"
    cfg, jobs = BenchmarkConfig(**QUICK | {"clips": [1, 2]}), []
    monkeypatch.setattr(benchmark, "timings", lambda job, *_: (9.0, jobs.append(job) or 1e-3))
    for name in names:
        cells = [cell.strip() for cell in benchmark.compared(cfg, name).split("|")[1:-1]]
        assert cells[0] == name and cells[1].endswith("M") and cells[4] == "0.001 s"
        assert float(cells[5].removesuffix(" MiB").replace(",", "")) > 50
    made = jobs[-2]()
    passes = 20 if "steps" in family.module.SETTINGS else 1
    assert made.shape[0] == 2 and cells[3] == f"{made.numel() / passes / 1e-3:,.0f}"
    jobs[-1]()  # a step of every network


def test_weights_are_measured_in_place_of_untrained_ones(tmp_path):
    made = benchmark.network(BenchmarkConfig(**QUICK, model="diffwave"))
    made.config.clip_length = 9
    save_checkpoint(tmp_path / "w.safetensors", made)
    cfg = BenchmarkConfig(**QUICK, checkpoint=str(tmp_path / "w.safetensors"))
    assert ROWS["generation"][0](cfg, 2).job().shape == (2, 9)
    with pytest.raises(UserError, match="guidance=2.0: this model cannot be told anything"):
        ROWS["guidance"][0](cfg, 2)


def test_memory_is_what_the_job_held(monkeypatch):
    """100 MiB that it gives back before it ends."""
    job = {False: lambda: None, True: lambda: torch.ones(25 * 2**20)}
    monkeypatch.setitem(ROWS, "held", (lambda _, big: Case("held", job[big]), lambda _: [1]))
    gc.collect()  # what earlier tests have freed is given back, so that the peak can be seen
    ctypes.CDLL(None).malloc_trim(0)
    peak_bytes("cpu", reset=True)
    small, large = (measure(BenchmarkConfig(**QUICK), "held", big)["mib"] for big in (False, True))
    assert 90 < large - small < 150


# What stands in README's table of times -> the row that measures it.
MEASURED = {
    "generation, 4.8M": "generation",
    "float16 weights": "float16",
    "guidance": "guidance",
    "first 20 ms": "first_chunk",
    "from starting Python": "cold_start",
    "unconditional_generate(4)": "digits",
    "diffusion, 20 steps": "diffusion",
    "optimizer step, 4.8M": "training",
    "optimizer step, digits": "digits_training",
    "S4 kernel": None,  # python -m cauchy_kernel.benchmark
    "as plain PyTorch": None,  # the same rows with SASHIMI_KERNEL=torch
}


def test_everything_that_readme_times_has_a_row():
    """Every line of the table under "Fast", memory being that of the line before."""
    table, models = README.read_text().split("\n## Fast")[1].split("\n## ")[0].split("| model |")
    whats = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")][2:]
    assert len(whats) >= 6
    for what in whats:
        rows = {row for phrase, row in MEASURED.items() if phrase in what}
        assert rows or what.startswith("its memory"), what
        assert rows - {None} <= {*BenchmarkConfig().rows}
    assert all(phrase in table for phrase in MEASURED)
    assert "python -m rawaudio.benchmark" in table
    compared = {line.split("|")[1].strip() for line in models.splitlines()[2:] if "|" in line}
    assert compared == {benchmark.sized(f, size) for f in FAMILIES.values() for size in SIZES}


@pytest.mark.parametrize(
    ("argv", "row"),
    [(["rows=[training,float16]", "lengths=[9000]", "clips=[1]"],
      "| optimizer step, one clip of 9 samples | "),
     (["models=[wavegan_digits]", "clips=[1,3]"], "| wavegan_digits | ")],
)  # fmt: skip
def test_the_command_prints_a_markdown_table(argv, row, capfd, monkeypatch):
    """A line for each part, in the order asked for; what cannot be had says why. Or of models."""
    monkeypatch.setenv("SASHIMI_ENGINE", "off")
    assert status(main, ["tiny=true", "seconds=0.01", *argv]) == 0
    _, _, heads, rule, first, *more = capfd.readouterr().out.strip().splitlines()
    assert set(rule) <= set("|-: ") and first.startswith(row)
    if more:
        assert heads.startswith("| what | first | again |") and len(more) == 1
        assert more[0].startswith("| float16: not here, ") and "SASHIMI_ENGINE=off |" in more[0]
    else:
        assert "| 3 clips at once, samples/s |" in heads
    assert len({line.count("|") for line in (heads, rule, first, *more)}) == 1


@pytest.mark.parametrize(
    "argument",
    ["models=[wavenett]", "size=large", "clips=[0]", "lengths=[]", "seconds=0", "threads=0",
     "device=nonsense", "rows=[speed]", "model=sashimi", "checkpoint=none.safetensors"],
)  # fmt: skip
def test_bad_settings_are_one_line(argument, capsys):
    assert "" in error_of(main, [argument], capsys)
