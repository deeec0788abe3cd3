"""python -m sashimi.benchmark: the rows are what they say."""

import pytest
import torch

from sashimi.autoregressive import SashimiAR
from sashimi.benchmark import BenchmarkConfig, main, measure, plot
from sashimi.checkpoint import save_checkpoint
from sashimi.config import AutoregressiveConfig, DiffusionConfig
from sashimi.diffusion import SashimiDiffWave
from sashimi.realtime import Engine


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("SASHIMI_ENGINE", "")  # `measure` turns it off in its own process
    torch.manual_seed(0)
    path = tmp_path / "tiny.safetensors"
    save_checkpoint(path, SashimiAR(AutoregressiveConfig(d_model=8, n_layers=1, l_max=64)))
    return str(path)


def test_rows_are_rates_and_make_a_plot(checkpoint, tmp_path):
    """Samples per second of every kind, the engine's logits beside the plain ones, a PNG."""
    threads = torch.get_num_threads()
    cfg = BenchmarkConfig(checkpoint=checkpoint, seconds=0.05, plain_steps=5)
    kinds = ["float32", "bfloat16"] if Engine.available(SashimiAR())[0] else []
    rows = [measure(cfg, kind, n, 1) for kind in [*kinds, "graph", "plain"] for n in (1, 2)]
    torch.set_num_threads(threads)
    assert all(row["rate"] > 0 and row["sample_rate"] == 16000 for row in rows)
    assert all(row["error"] < 1e-4 for row in rows if row["kind"] in ("float32", "graph"))
    assert [("first_chunk" in row) for row in rows[-2:]] == [True, False]
    plot(rows, str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_diffusion_rows_are_passes(tmp_path):
    """20 passes of a clip at the measured seconds make the rate."""
    path, clip = tmp_path / "tiny.safetensors", 64
    config = DiffusionConfig(d_model=8, n_layers=1, l_max=clip, clip_length=clip)
    save_checkpoint(path, SashimiDiffWave(config))
    cfg = BenchmarkConfig(model="sashimi_diffwave_sc09", checkpoint=str(path), seconds=0.01)
    threads = torch.get_num_threads()
    row = measure(cfg, "diffusion", 3, 1)
    torch.set_num_threads(threads)
    assert row["rate"] * row["seconds"] == pytest.approx(3 * clip / 20)
    plot([row], str(tmp_path / "plot.png"))


@pytest.mark.parametrize(
    "argument",
    ["batches=[0]", "seconds=0", "plain_steps=0", "threads=[0]", "device=nonsense", "config=big"],
)
def test_bad_settings_are_one_line(argument, capsys):
    """Exit status 2 and one line on stderr."""
    with pytest.raises(SystemExit) as ended:
        main([argument])
    said = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and said.startswith("error: ") and "\n" not in said
