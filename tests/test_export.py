"""The exported period is the recurrence."""

import io

import pytest
import torch
from models import make, seeded

from rawaudio.errors import UserError
from rawaudio.sampling import Plain
from sashimi.export import export_period, first_state
from sashimi.mulaw import SILENCE


@pytest.mark.parametrize(
    "shape, told, how",
    [
        ({"told": True}, {"label": "c", "speaker": "x"}, {"top_k": 50, "temperature": 0.8}),
        ({"unet": True, "tied": False, "glu": False}, {}, {"nucleus_p": 0.9}),
    ],
    ids=["told", "unet"],
)
def test_an_exported_period_is_the_recurrence_wherever_it_is_loaded(shape, told, how):
    """program == SashimiAR.step, class by class, over several periods; real numbers alone."""
    model, n, periods = make(**shape, pool=[2, 2]), 2, 4
    program = export_period(model, n, **how)
    kinds = [
        x.meta["val"] for x in program.graph.nodes if isinstance(x.meta.get("val"), torch.Tensor)
    ]
    assert kinds and not any(x.is_complex() for x in kinds)
    file = io.BytesIO()
    torch.export.save(program, file)
    run = torch.export.load(io.BytesIO(file.getvalue())).module()

    uniforms = torch.rand(periods * model.period, n, generator=seeded())
    plain, q = Plain(model, n, model.told.rows(n, told)), torch.full((n,), SILENCE)
    wanted = torch.empty(n, len(uniforms), 256)
    classes = plain.run(q, uniforms, **how, logits_out=wanted)
    state, parts = first_state(model, n, **told), []
    for u in uniforms.split(model.period):
        drawn, logits, state = run(q, u, state)
        parts.append((drawn, logits))
        q = drawn[:, -1]
    assert torch.equal(torch.cat([x for x, _ in parts], 1), classes)
    logits = torch.cat([x for _, x in parts], 1)
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=2e-5)
    assert "step" not in vars(model.backbone.center[0].layer), "the model stays as it was"


@pytest.mark.parametrize(
    "bad", [{"temperature": 0}, {"nucleus_p": 2}, {"top_k": 300}, {"n": 0}], ids=str
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        export_period(make(), **bad)
    with pytest.raises(UserError, match="a WaveNet: expected a SashimiAR"):
        export_period(make("wavenet"))
