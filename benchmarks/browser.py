"""A headless Chromium for the page of web_demo.py: for its tests and its benchmark. Requires chromium and chromium-driver."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1280,1100",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip


def chromium(profile: str | Path) -> Any:
    """A driver of a new Chromium that reaches nothing but this machine; `profile`: an empty folder."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for argument in (*ARGUMENTS, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, Service(shutil.which("chromedriver")))


def wait_for(driver: Any, condition: Callable[[Any], Any], seconds: float = 60, poll: float = 0.05) -> Any:
    """What the condition of the driver gives, once that is true."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, seconds, poll_frequency=poll).until(condition)


def card(driver: Any, name: str) -> dict[str, Any] | None:
    """Picture, GFLOPs and milliseconds of a card of the page; None while it is not there."""
    return driver.execute_script(
        "const c = document.getElementById(arguments[0]);"
        "const i = c && c.querySelector('img');return i && {src: i.src, gflops: +c.dataset.gflops, ms: +c.dataset.ms};",
        name,
    )


def errors(driver: Any) -> list[dict[str, Any]]:
    """Errors in the browser's console."""
    return [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "ERROR")]
