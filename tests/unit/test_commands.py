"""Options of `train` that do not fit are refused with the cure, before anything is read or learned."""

from pathlib import Path

import pytest
import typer
from typer.main import get_command

from daemon.cli import app
from detectors.base import ArtifactError


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--detector", "efficientad_s"], "inspectd distill-teacher"),
        (["--detector", "efficientad_s", "--size", "128"], "256 px only"),
        (["--detector", "rd4ad", "--pdn", "x.pth"], "--pdn serves efficientad_s"),
        (["--detector", "rd4ad", "--skips", "3:2"], "--skips serves sk_rd4ad"),
        (["--epochs", "1", "--steps", "1"], "not both"),
        (["--detector", "patchcore", "--skips", ""], "--skips serves sk_rd4ad"),
        (["--detector", "efficientad_s", "--backbone", "resnet18"], "--backbone serves gsk_rd4ad"),
        (["--weight-unpicturable", "2"], "--weight-unpicturable serves puad"),
        (["--detector", "rd4ad", "--trained", "x.pth", "--steps", "3"], "--steps is for a training"),
        (["--detector", "rd4ad", "--trained", "x.pth", "--calibration-good", "x"], "leave --calibration-good out"),
        (["--tile-overlap", "64"], "give --tile"),
        (["--tile", "60"], "give 64 or more"),
        (["--tile", "512", "--tile-overlap", "512"], "give 0 to 256"),
    ],
)
def test_options_that_do_not_fit_are_refused_with_the_cure(options: list[str], says: str, tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.mkdir()
    for name in "abcd":
        (good / f"{name}.png").write_bytes(name.encode())
    command = ["train", "--good", str(good), "--out", str(tmp_path / "model"), *options]
    with pytest.raises((typer.BadParameter, ArtifactError)) as caught:
        get_command(app).main(command, standalone_mode=False)
    assert says in str(caught.value)
    assert not (tmp_path / "model").exists()
