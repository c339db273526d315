"""The page in a headless Chromium: open it, move the slider, see another picture and smaller figures; no error in the console."""

import threading

import pytest
from PIL import Image, ImageStat
from runs import free_port, make_checkpoint, make_vae

import web_demo
from benchmarks.browser import card, chromium, errors, wait_for
from web.page import serve

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")]


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
    driver = chromium(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


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
