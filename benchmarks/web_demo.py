"""A slider move in Chromium against sampling without the page: `python -m benchmarks.web_demo [CHECKPOINT]`.

Both sides in turns, round after round, each budget and each seed anew, so that no picture is one that was kept. Of the page: from the
key press that moves the slider until the browser shows another picture. Without it: from noise to the decoded picture. Printed are the
medians at each budget, and the median and quartiles of the ratio of the same round. Requires chromium and chromium-driver.
"""

import argparse
import io
import statistics
import tempfile
import time
from pathlib import Path

from PIL import Image

import web_demo
from benchmarks.browser import card, chromium, wait_for
from common.errors import UserError, cli_main
from config.demo_options import QUICKSTART
from web.page import check_port, serve

BOUND = 1.3
PICTURE = ("--class-label", "3", "--seed", "7")


# The browser itself takes the time: a driver that asks again and again would take the processor from what is measured.
CLOCK = """
window.taken = null;
const shown = () => document.querySelector('#picture img')?.src, before = shown();
addEventListener('keydown', () => { window.begun = performance.now(); }, {once: true, capture: true});
new MutationObserver((_, self) => {
    if (shown() && shown() !== before) { window.taken = performance.now() - window.begun; self.disconnect(); }
}).observe(document.body, {subtree: true, childList: true, attributes: true, attributeFilter: ['src']});
"""


def move(driver, slider, key) -> float:
    """Milliseconds from a key press until another picture is shown."""
    driver.execute_script(CLOCK)
    slider.send_keys(key)
    return wait_for(driver, lambda d: d.execute_script("return window.taken"), poll=0.5)


@cli_main
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ckpt", nargs="?", default=QUICKSTART)
    parser.add_argument("--rounds", type=int, default=7, help="the first does not count")
    parser.add_argument("--moves", type=int, default=5, help="of a round, from the lowest budget on")
    parser.add_argument("--port", type=int, default=7869)
    parser.add_argument("--screenshot", type=Path)
    args = parser.parse_args(argv)
    if args.rounds in (1, 2):
        raise UserError(f"--rounds {args.rounds}: must be at least 3, or 0 for the screenshot alone")
    check_port("127.0.0.1", args.port)
    config = "experiments_updated/generation/quickstart.yaml"
    page, _ = web_demo.prepare(["--config", config, "--ckpt", args.ckpt, "--port", str(args.port), *PICTURE])
    url, stop = serve(page, "127.0.0.1", args.port)
    with tempfile.TemporaryDirectory() as profile:
        driver = chromium(profile)
        try:
            if args.rounds:
                report(measure(page.drawer, driver, url, args.rounds, args.moves))
            if args.screenshot:
                screenshot(driver, url, len(page.drawer.budgets), args.screenshot)
        finally:
            driver.quit()
            stop()


def measure(drawer, driver, url, rounds, moves) -> dict[float, list[tuple[float, float]]]:
    """Budget → (page, without it) in milliseconds, of each round but the first."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    times: dict[float, list[tuple[float, float]]] = {}
    driver.get(url)
    wait_for(driver, lambda d: card(d, "full"))
    slider = driver.find_element(By.CSS_SELECTOR, "#budget input[type=range]")
    for turn in range(rounds):
        seed = driver.find_element(By.CSS_SELECTOR, "#seed input")
        slider.send_keys(Keys.HOME)
        old = card(driver, "full")["src"]
        seed.send_keys(Keys.CONTROL, "a")
        seed.send_keys(str(1000 + turn), Keys.ENTER)
        wait_for(driver, lambda d, old=old: (full := card(d, "full")) and full["src"] != old)
        for budget in drawer.budgets[1:-1][:moves]:
            shown = move(driver, slider, Keys.ARROW_RIGHT)
            request = drawer.options({"seed": 5000 + turn, "inference_budget": budget})
            begin = time.perf_counter()
            drawer._draw(request, None)
            alone = 1000 * (time.perf_counter() - begin)
            if turn:
                times.setdefault(budget, []).append((shown, alone))
    return times


def screenshot(driver, url, budgets, path: Path) -> None:
    """The whole page with all budgets and what Read looks at."""
    from selenium.webdriver.common.by import By

    driver.get(url)
    wait_for(driver, lambda d: card(d, "difference"))
    for button, pictures, count in (("read", "#attention img", 7), ("all-budgets", "#strip img", budgets)):
        driver.find_element(By.ID, button).click()
        wait_for(driver, lambda d, css=pictures, count=count: len(d.find_elements(By.CSS_SELECTOR, css)) == count, 300)
    bottom = driver.execute_script("return document.querySelector('#strip').getBoundingClientRect().bottom + scrollY")
    inner = driver.execute_script("return innerHeight")
    driver.set_window_size(1280, round(bottom) + 40 + driver.get_window_size()["height"] - inner)
    time.sleep(0.5)
    with Image.open(io.BytesIO(driver.get_screenshot_as_png())) as shot:
        shot.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def report(times: dict[float, list[tuple[float, float]]]) -> None:
    print(f"{'budget':>8} {'page, ms':>10} {'alone, ms':>10} {'ratio':>7}")
    for budget, pairs in times.items():
        page, alone = (statistics.median(side) for side in zip(*pairs, strict=True))
        print(f"{budget:8.4g} {page:10.1f} {alone:10.1f} {statistics.median(a / b for a, b in pairs):7.3f}")
    ratios = [a / b for pairs in times.values() for a, b in pairs]
    low, median, high = statistics.quantiles(ratios, n=4)
    print(
        f"page / alone: median {median:.3f}, quartiles {low:.3f}–{high:.3f}; bound {BOUND}: {'holds' if median <= BOUND else 'MISSED'}"
    )


if __name__ == "__main__":
    main()
