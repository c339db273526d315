"""The page's results as HTML; pictures are data URLs."""

import base64
import html

import numpy as np

from common.image_files import png_bytes, psnr
from common.plotting import attention_overlay
from common.sizes import sides
from config.demo_options import WebDemoConfig
from flows import flow_of
from sampling.attention import shown_latents
from sampling.guidance_kinds import KINDS
from web.drawing import Comparison, Picture

SMALL = 128  # pixels, up to which pictures are shown as they are, without smoothing

CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
.web-title h1 { font-size: 1.5rem; margin: 0; } .web-title p { opacity: .7; margin: .2rem 0 0; }
.web-note { background: var(--background-fill-secondary); border-radius: 8px; padding: .6rem .8rem; }
.web-error { border: 1px solid #c0392b; border-left-width: 5px; border-radius: 8px; padding: .6rem .8rem; color: #c0392b; }
#status { min-height: 2.9rem; }
.web-cards { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 16px; }
.web-card { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 12px; margin: 0; }
.web-card img { width: 100%; border-radius: 6px; display: block; }
.web-blank { aspect-ratio: 1; border-radius: 6px; background: var(--background-fill-secondary); display: flex; align-items: center; justify-content: center; }
.web-card h3 { margin: 0; font-size: 1rem; } .web-card small { opacity: .7; }
.web-card header { margin-bottom: 8px; }
.web-pixels img { image-rendering: pixelated; }
.web-figures { display: grid; grid-template-columns: auto 1fr; gap: 5px 10px; align-items: center; margin-top: 10px; }
.web-figures b { font-variant-numeric: tabular-nums; white-space: nowrap; font-weight: 600; }
.web-less { margin-top: 10px; line-height: 1.5; }
.web-bar { height: 8px; border-radius: 4px; background: var(--background-fill-secondary); }
.web-bar i { display: block; height: 100%; border-radius: 4px; background: #2f6db5; }
.web-strip { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); gap: 10px; }
.web-strip figure { margin: 0; text-align: center; font-size: .75rem; } .web-strip img { width: 100%; border-radius: 6px; }
.web-strip figcaption b { display: block; } .web-strip figcaption { line-height: 1.25; margin-top: 3px; }
.web-strip .web-dropped { opacity: .35; }
.web-caption { opacity: .7; margin: 0 0 8px; }
@media (max-width: 720px) { .web-cards { grid-template-columns: 1fr; } .web-strip { grid-template-columns: repeat(4, 1fr); } }
"""


def data_url(image: np.ndarray) -> str:
    """Uint8 (H, W, 3) as a PNG in an URL."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(image, compress_level=1)).decode()


def message(text: str, *, is_error: bool = False) -> str:
    """A line for the user."""
    return f'<div class="{"web-error" if is_error else "web-note"}" role="status">{html.escape(text)}</div>'


def comparison(shown: Comparison, count: int) -> str:
    """The request's picture, the full budget's, and how they differ; `count`: J, 0 for a model without budgets."""
    config, picture, full = shown
    if not count:
        return _cards(config, _card("picture", config.model, pixels_of(config), picture, picture))
    k = round((config.inference_budget or 1.0) * count)
    return _cards(
        config,
        _card("picture", f"Budget {k / count:g}", f"{k} of {count} latents in each group", picture, full or picture),
        _card("full", "Full budget", f"all {count} latents, the same noise", full, full),
        _difference(picture, full),
    )


def pixels_of(config: WebDemoConfig) -> str:
    """The size of its images."""
    height, width = sides(config.resolution)
    return f"{width} × {height} pixels"


def _pixelated(config: WebDemoConfig) -> str:
    return " web-pixels" if max(sides(config.resolution)) <= SMALL else ""


def _cards(config: WebDemoConfig, *cards: str) -> str:
    return f'<div class="web-cards{_pixelated(config)}">{"".join(cards)}</div>'


def _card(name: str, title: str, below: str, picture: Picture | None, whole: Picture | None) -> str:
    head = f"<header><h3>{html.escape(title)}</h3><small>{html.escape(below)}</small></header>"
    if picture is None or whole is None:
        return f'<figure class="web-card">{head}<div class="web-blank">drawing …</div></figure>'
    lines = "".join(
        f'<b>{figure(value)} {unit}</b><div class="web-bar"><i style="width: {100 * min(1, value / most):.1f}%"></i></div>'
        for unit, value, most in (("GFLOPs", picture.gflops, whole.gflops), ("ms", picture.ms, whole.ms))
    )
    return (
        f'<figure class="web-card" id="{name}" data-gflops="{picture.gflops:.6g}" data-ms="{picture.ms:.6g}">{head}'
        f'<img src="{data_url(picture.image)}" alt="{html.escape(title)}"><div class="web-figures">{lines}</div></figure>'
    )


def _difference(picture: Picture, full: Picture | None) -> str:
    head = "<header><h3>Difference</h3><small>of the two pictures, absolute</small></header>"
    if full is None:
        return f'<figure class="web-card">{head}<div class="web-blank">drawing …</div></figure>'
    difference = np.abs(picture.image.astype(np.int16) - full.image).astype(np.uint8)
    decibels = psnr(picture.image, full.image)
    flops, time = (100 * (a / b - 1) for a, b in ((picture.gflops, full.gflops), (picture.ms, full.ms)))
    same = "the same picture" if decibels is None else f"mean {difference.mean():.2f} of 255; PSNR {decibels:.1f} dB"
    less = f"{flops:+.0f}% GFLOPs, {time:+.0f}% ms".replace("-", "−")
    return (
        f'<figure class="web-card" id="difference">{head}<img src="{data_url(difference)}" alt="Difference">'
        f'<div class="web-less"><b>{less}</b><br>{same}</div></figure>'
    )


def figure(value: float) -> str:
    """Three digits, or all of a whole number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def strip(config: WebDemoConfig, pictures: list[tuple[float, Picture]]) -> str:
    """Pictures at all budgets."""
    figures = "".join(
        f'<figure><img src="{data_url(p.image)}" alt="Budget {budget:g}"><figcaption><b>{budget:.4g}</b>'
        f"{figure(p.gflops)} GFLOPs<br>{figure(p.ms)} ms</figcaption></figure>"
        for budget, p in pictures
    )
    return f'<p class="web-caption">All budgets: {html.escape(describe(config))}.</p>{_strip(config, figures)}'


def attention(config: WebDemoConfig, picture: Picture, maps: np.ndarray) -> str:
    """What Read looks at, over the picture: the mean of the latents that the budget keeps, and single latents.

    maps: (J, h, w), in units of uniform attention.
    """
    J = len(maps)
    k = round((config.inference_budget or 1.0) * J)
    top = max(2.0, float(np.quantile(maps, 0.995)))
    chosen = [("mean of all kept", maps[:k].mean(axis=0), True)]
    chosen += [(f"latent {j}" + ("" if j < k else ", not kept"), maps[j], j < k) for j in shown_latents(J)]
    figures = "".join(
        f'<figure{"" if is_kept else " class=web-dropped"}><img src="{data_url(attention_overlay(picture.image, of, top))}" '
        f'alt="{title}"><figcaption>{title}</figcaption></figure>'
        for title, of, is_kept in chosen
    )
    caption = f"Read's attention at t = {config.attention_time:g}; bright: {top:.2g} times the uniform attention or more."
    return f'<p class="web-caption">{caption}</p>{_strip(config, figures)}'


def _strip(config: WebDemoConfig, figures: str) -> str:
    columns = min(8, figures.count("<figure"))
    return f'<div class="web-strip{_pixelated(config)}" style="--columns: {columns}">{figures}</div>'


def describe(config: WebDemoConfig) -> str:
    """A request in words."""
    what = f"“{config.prompt[0]}”" if config.prompt else f"class {config.class_label[0]}"
    guided = "no guidance" if config.cfg_scale == 1 else f"{KINDS[config.guidance_kind or 'CFG']} {config.cfg_scale:g}"
    return f"{what}, seed {config.seed}, {flow_of(config).total_steps} steps, {guided}"
