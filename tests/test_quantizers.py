"""How classes are made of audio: those of state-spaces/s4 beside ours."""

import pytest
import torch
from models import make, seeded
from training import RATE, rows

import train
from rawaudio import generate, likelihood
from rawaudio.autoregressive import bits_per_sample
from rawaudio.batches import GainSpeed
from rawaudio.checkpoint import load_checkpoint
from rawaudio.clips import read_sources
from rawaudio.data import Clip, ClipDataset, read_clip
from rawaudio.quantizers import QUANTIZERS, SILENCE
from rawaudio.request import GenerateConfig

PUBLISHED = ["mulaw-published", "linear"]
# Classes that mu_law_encode and linear_encode of src/dataloaders/audio.py, state-spaces/s4
# (Apache-2.0), give for 0.3 t / 24 sin(0.7 t) + 0.05, t = 0 .. 23.
RECORDED = {
    "mulaw-published": [48, 57, 107, 177, 71, 35, 20, 15, 20, 50, 224, 239, 238, 207, 20, 3, 0, 7,
                        56, 244, 255, 253, 225, 11],
    "linear": [113, 117, 127, 131, 122, 100, 75, 63, 76, 114, 160, 191, 187, 142, 76, 17, 0, 37,
               117, 204, 255, 241, 161, 49],
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_recordings_have_the_recorded_classes(name):
    t = torch.arange(24)
    wav = (t * 0.7).sin() * 0.3 * (t / 24) + 0.05
    chosen = QUANTIZERS[name]
    assert chosen.of_recording(wav).tolist() == RECORDED[name]
    stretched = chosen.stretch(wav)
    assert stretched.aminmax() == (-1, pytest.approx(1, abs=1e-4))
    assert (chosen.encode(stretched) - chosen.of_recording(wav)).abs().max() <= 1
    assert (chosen.decode(chosen.of_recording(wav)) - stretched).abs().max() < 0.06


@pytest.mark.parametrize("name", QUANTIZERS)
def test_classes_and_audio_are_each_others_inverse(name):
    """As far as 256 classes can be."""
    chosen, q = QUANTIZERS[name], torch.arange(256)
    assert torch.equal(chosen.encode(chosen.decode(q)), q)
    assert (chosen.decode(q).diff() > 0).all()
    assert chosen.encode(torch.tensor([-1.0, 0.0, 1.0])).tolist() == [0, SILENCE, 255]
    assert abs(chosen.decode(torch.tensor(SILENCE))) < (1e-9 if name in PUBLISHED else 1e-4)
    with pytest.raises(ValueError, match="prefix: expected audio in"):
        chosen.encode(torch.tensor([2.0]), name="prefix")
    with pytest.raises(ValueError, match=r"0\.\.255"):
        chosen.decode(torch.tensor([256]))


@pytest.mark.parametrize("name", PUBLISHED)
def test_data_sets_stretch_each_clip_or_piece(name, data, tmp_path):
    """Silence behind a clip stays silence; what augmentation does not change keeps its classes."""
    of_recording, csv = QUANTIZERS[name].of_recording, data / "train.csv"
    options = {"quantizer": name, "progress": False}
    whole = ClipDataset(csv, RATE, append_silence=7, **options)
    pieces = ClipDataset(csv, RATE, sample_len=80, cache=tmp_path, **options)
    ours = ClipDataset(csv, RATE, sample_len=80, cache=tmp_path, progress=False)
    wavs = [read_clip(clip, RATE).wav for clip in whole.clips]
    for clip, wav in zip(whole, wavs, strict=True):
        assert torch.equal(clip[:-7].long(), of_recording(wav)) and (clip[-7:] == SILENCE).all()
        assert clip.min() == 0 and clip.max() == 255
        same = GainSpeed(0.0, 0.0, quantizer=QUANTIZERS[name])(clip, torch.Generator())
        assert torch.equal(same, clip)
    parts = [of_recording(part) for wav in wavs for part in wav.split(80)]
    assert torch.equal(pieces.data.long(), torch.cat(parts))
    assert ours.data.shape == pieces.data.shape and not torch.equal(ours.data, pieces.data)


@pytest.mark.parametrize("name", PUBLISHED)
def test_clips_prefixes_and_likelihoods_have_the_models_classes(name):
    model = make("samplernn", told=True, quantizer=name)
    prefix = model.quantizer.decode(torch.randint(256, (2, 9), generator=seeded()))
    how = {"prefix": prefix, "label": ["a", "c"], "speaker": "x"}
    wavs, log_p = model.generate(2, 33, generator=seeded(), return_log_likelihood=True, **how)
    chunks = list(model.stream(2, 24, 7, generator=seeded(), **how))
    assert torch.equal(wavs, torch.cat([prefix, *chunks], 1))
    assert torch.equal(wavs, model.quantizer.decode(model.quantizer.encode(wavs)))
    nll = model.nll(wavs, label=["a", "c"], speaker="x")
    assert torch.allclose(log_p, -nll, atol=1e-5)


def test_the_commands_know_the_quantiser(data, tmp_path, capsys):
    """Training, validation and likelihood make the same classes; others are not scored."""
    tiny = {"frame_sizes": [4, 2], "d_hidden": 8, "d_embedding": 4, "sample_rate": RATE,
            "clip_length": 40, "quantizer": "linear"}  # fmt: skip
    train.main([
        f"train_csv={data / 'train.csv'}", f"valid_csv={data / 'valid.csv'}", "device=cpu",
        f"checkpoint_path={tmp_path / 'run'}", "model=samplernn", "batch_size=2", "max_steps=2",
        "gain_db=6", "n_listen=1",
        *(f"model.{key}={train.as_written(value)}" for key, value in tiny.items()),
    ])  # fmt: skip
    bits = [row["valid_bits"] for row in rows(tmp_path / "run") if "valid_bits" in row][-1]
    best = tmp_path / "run" / "best.safetensors"
    capsys.readouterr()
    assert likelihood.main([f"csv={data / 'valid.csv'}", f"checkpoint={best}", "device=cpu"]) == 0
    assert f"{bits:.4f}"[:5] in capsys.readouterr().out
    source = GenerateConfig(prefix=str(data / "1.wav"), l_prefix=30, length=40)
    stretch = QUANTIZERS["linear"].stretch
    wanted = stretch(read_clip(Clip(data / "1.wav"), RATE).wav)[:30]
    assert torch.equal(read_sources(source, RATE, stretch)[0][1], wanted)
    argv = [f"prefix={data / '1.wav'}", "l_prefix=30", f"checkpoint={best}", "device=cpu"]
    assert generate.main([*argv, f"out_dir={tmp_path / 'out'}", "n_reps=1"]) == 0
    made = read_clip(Clip(tmp_path / "out" / "0000.wav"), RATE).wav
    assert (made[:30] - wanted).abs().max() < 1 / 127
    with pytest.raises(ValueError, match="linear models cannot score mulaw classes"):
        bits_per_sample(load_checkpoint(best), ClipDataset(data / "valid.csv", RATE))
