"""The pages are looked at in headless Chromium, where it is installed: drawn at every width, without complaint."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from tests.forked import ForkServer

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-headless-shell", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
WIDTHS = {"desktop": 1280, "phone": 390}
SCHEMES = {"light": [], "dark": ["--blink-settings=preferredColorScheme=0"]}


@pytest.fixture(scope="module")
def sweep(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cwd = tmp_path_factory.mktemp("sweep")
    more = ["trainer.max_steps=3", "recipe.max_length=128", "samples.max_new_tokens=4", "trainer.eval_on_start=true"]
    grid = ["recipe=dpo", "recipe.beta=0.05,0.5", "trainer.learning_rate=1e-3,4e-3", "tracker=none"]
    done = fork_server.run("-m", "sweep.name=grid", *grid, *more, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd / "multirun" / "grid"


def browse(page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    common = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000", "--enable-logging=stderr"]
    command = [BROWSER, *common, f"--user-data-dir={page.parent / '.browser'}", *flags, page.resolve().as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("device", WIDTHS)
def test_the_page_of_a_sweep_is_drawn_without_complaint(sweep: Path, device: str, scheme: str, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    size = f"--window-size={WIDTHS[device]},2400"
    done = browse(sweep / "report.html", size, f"--screenshot={picture}", *SCHEMES[scheme])
    assert "CONSOLE" not in done.stderr, done.stderr
    content = picture.read_bytes()
    assert struct.unpack(">II", content[16:24])[1] == 2400
    assert len(content) > 50_000  # an empty page of this size has a few thousand bytes


def test_every_chart_of_the_page_is_drawn(sweep: Path) -> None:
    done = browse(sweep / "report.html", "--dump-dom")
    assert done.stdout.count('class="main-svg"') >= 5
    assert "CONSOLE" not in done.stderr, done.stderr


def test_the_page_of_a_trial_opens(sweep: Path) -> None:
    page = next(sweep.glob("*/report.html"))
    done = browse(page, "--dump-dom")
    assert "<svg" in done.stdout
    assert "CONSOLE" not in done.stderr, done.stderr
