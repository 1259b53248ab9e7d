"""A real JupyterLab and a real Chromium for the tests here.

The lab runs in a folder of its own with settings of its own, so that nothing of the person who
runs the tests is read or changed, on a port that the system gives.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pantheraml as pm
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools" / "chaos"))
from reap import at_end  # noqa: E402

at_end()  # tests that are killed leave no lab, no browser and no run behind
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Seconds. Nothing that works takes so long, also where a machine builds something else beside the
# tests; no test asserts a time.
PATIENCE = 240
expect.set_options(timeout=PATIENCE * 1000)
AXE = ROOT / "widgets" / "js" / "node_modules" / "axe-core" / "axe.min.js"


@dataclass(frozen=True)
class Lab:
    """A running server.

    Attributes
    ----------
    url : str
        Its base.
    token : str
        Its token.
    folder : Path
        The folder that it shows.
    """

    url: str
    token: str
    folder: Path


def _settings(folder: Path) -> None:
    # The news toast covers the lower right corner, where it would take clicks.
    plugin = folder / "@jupyterlab" / "apputils-extension"
    plugin.mkdir(parents=True)
    quiet = {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}
    (plugin / "notification.jupyterlab-settings").write_text(json.dumps(quiet), "utf-8")


def _started(process: subprocess.Popen[bytes], runtime: Path, log: Path) -> str:
    """The server's address, from the file that it writes when it listens."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        for found in runtime.glob("jpserver-*.json"):
            try:
                url = str(json.loads(found.read_text("utf-8"))["url"])
                urllib.request.urlopen(f"{url}api", timeout=PATIENCE).close()
                return url
            except (ValueError, OSError):
                pass  # half written, or not listening yet
        time.sleep(0.1)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text('utf-8')[-4000:]}")


def _stop_runs(folder: Path) -> None:
    """A run outlives its kernel and its page on purpose; it must not outlive a failed test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PANTHERAML_RUNS", str(folder))
        for info in pm.runs():
            if info.state in ("starting", "running", "paused"):
                pm.attach(info.name).stop(wait=True)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """JupyterLab on an empty folder."""
    base = tmp_path_factory.mktemp("lab")
    work = base / "work"
    work.mkdir()
    _settings(base / "settings")
    token = secrets.token_hex(16)
    log = base / "lab.log"
    environment = {
        **os.environ,
        "HOME": str(base),
        "IPYTHONDIR": str(base / "ipython"),
        "JUPYTER_CONFIG_DIR": str(base / "config"),
        "JUPYTER_DATA_DIR": str(base / "data"),
        "JUPYTER_RUNTIME_DIR": str(base / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(base / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(base / "workspaces"),
        "JUPYTER_TOKEN": token,
        "PANTHERAML_RUNS": str(work / "runs"),
        # A run is there for as long as a test is, and has no more steps than its curve has points,
        # however fast this machine trains and however slowly it draws.
        "PANTHERAML_LESSON_STEPS": os.environ.get("PANTHERAML_LESSON_STEPS", str(10**6)),
        "PML_WORKER": str(ROOT / "build" / "release" / "tests" / "fault" / "slow_worker"),
        "PML_SLOW": str(work),
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--ServerApp.ip=127.0.0.1", "--ServerApp.port=0", f"--ServerApp.root_dir={work}"]
    # Lets a test run Lab's own commands (change the theme) without its menus.
    command += ["--LabApp.expose_app_in_browser=True"]
    with log.open("wb") as out:
        server = subprocess.Popen(
            command, cwd=work, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )
    try:
        yield Lab(_started(server, base / "runtime", log), token, work)
    finally:
        _stop_runs(work / "runs")
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@pytest.fixture(autouse=True)
def no_kernel_is_left(lab: Lab) -> Iterator[None]:
    """A kernel outlives its page on purpose; its run must not slow the tests that follow."""
    yield
    sessions = f"{lab.url}api/sessions"
    headers = {"Authorization": f"token {lab.token}"}

    def asked(url: str, method: str) -> bytes:
        request = urllib.request.Request(url, headers=headers, method=method)
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return bytes(answer.read())

    for session in json.loads(asked(sessions, "GET")):
        asked(f"{sessions}/{session['id']}", "DELETE")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The system's Chromium, headless."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.fail(
            f"none of {', '.join(BROWSERS)} is installed; tools/bootstrap test installs one"
        )
    arguments = ["--disable-gpu", "--disable-dev-shm-usage"]
    if os.geteuid() == 0:  # Chromium's own sandbox refuses to work for root
        arguments.append("--no-sandbox")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A fresh page of the size of a laptop's screen, at twice its pixels."""
    context = browser.new_context(
        viewport={"width": 1280, "height": 1000}, device_scale_factor=2, color_scheme="light"
    )
    context.set_default_timeout(PATIENCE * 1000)
    yield context.new_page()
    context.close()
