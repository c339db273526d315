"""The page in a headless Chromium: open it, move the slider, see another picture and smaller figures; no error in the console."""

import shutil
import threading

import pytest
from PIL import Image, ImageStat
from runs import free_port, make_checkpoint, make_vae

import web_demo
from web.page import serve

pytestmark = pytest.mark.browser

ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1280,1100",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    ckpt = make_checkpoint(folder / "0000007.pt", make_vae(folder / "vae"))
    page, config = web_demo.prepare(["--ckpt", str(ckpt), "--num-steps", "4", "--port", str(free_port())])
    url, stop = serve(page, config.host, config.port)
    yield page, url
    stop()


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """Chromium, which reaches nothing but this machine."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome")
    for argument in (*ARGUMENTS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def wait_for(driver, condition, seconds=30):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, seconds, poll_frequency=0.05).until(condition)


def card(driver, name):
    """The picture, GFLOPs and milliseconds of a card; None while it is not there."""
    return driver.execute_script(
        "const c = document.getElementById(arguments[0]);"
        "return c && {src: c.querySelector('img').src, gflops: +c.dataset.gflops, ms: +c.dataset.ms};",
        name,
    )


def errors(driver):
    return [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "ERROR")]


def test_move_the_slider(page, driver, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    drawer, url = page[0].drawer, page[1]
    driver.get(url)
    wait_for(driver, lambda d: card(d, "full"))
    slider = driver.find_element(By.CSS_SELECTOR, "#budget input[type=range]")
    start = card(driver, "picture")
    assert (slider.get_attribute("min"), slider.get_attribute("step"), slider.get_attribute("max")) == ("0.25", "0.25", "1")
    assert start["gflops"] < card(driver, "full")["gflops"] and start["src"] != card(driver, "full")["src"]

    seen = {slider.get_attribute("value"): start}
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_RIGHT):
        before = card(driver, "picture")
        slider.send_keys(key)
        wait_for(driver, lambda d, before=before: card(d, "picture")["src"] != before["src"])
        seen[slider.get_attribute("value")] = card(driver, "picture")
    assert list(seen) == ["0.25", "0.5", "0.75"]
    gflops = [c["gflops"] for c in seen.values()]
    assert gflops == sorted(gflops) and len({c["src"] for c in seen.values()}) == 3
    full = card(driver, "full")
    slider.send_keys(Keys.ARROW_LEFT)  # back: the picture that was drawn
    wait_for(driver, lambda d: card(d, "picture")["src"] == seen["0.5"]["src"])
    assert card(driver, "picture")["gflops"] < seen["0.75"]["gflops"] and card(driver, "full") == full

    driver.find_element(By.ID, "all-budgets").click()
    wait_for(driver, lambda d: len(d.find_elements(By.CSS_SELECTOR, "#strip img")) == len(drawer.budgets))
    driver.find_element(By.ID, "read").click()
    wait_for(driver, lambda d: len(d.find_elements(By.CSS_SELECTOR, "#attention img")) == 5)

    seed = driver.find_element(By.CSS_SELECTOR, "#seed input")
    seed.send_keys(Keys.CONTROL, "a")
    seed.send_keys("-4", Keys.ENTER)
    line = wait_for(driver, lambda d: d.find_elements(By.CSS_SELECTOR, "#status .web-error"))[0].text
    assert line == "--seed: -4 is out of range; it must be ≥ 0"

    assert not errors(driver)
    driver.save_screenshot(str(tmp_path / "page.png"))
    with Image.open(tmp_path / "page.png") as shot:
        assert shot.width >= 1000 and max(ImageStat.Stat(shot.convert("L")).stddev) > 10
    assert threading.active_count() < 60


def test_a_page_without_budgets(tmp_path, driver):
    from selenium.webdriver.common.by import By

    ckpt = make_checkpoint(tmp_path / "sit.pt", make_vae(tmp_path / "vae"), model="SiT-Ti/2")
    page, config = web_demo.prepare(["--ckpt", str(ckpt), "--num-steps", "2", "--port", str(free_port())])
    url, stop = serve(page, config.host, config.port)
    try:
        driver.get(url)
        wait_for(driver, lambda d: card(d, "picture"))
        assert driver.find_element(By.CSS_SELECTOR, "#budget input[type=range]").get_attribute("disabled")
        assert "SiT-Ti/2 has no budget: the slider is off" in driver.find_element(By.TAG_NAME, "body").text
        assert not errors(driver)
    finally:
        stop()
