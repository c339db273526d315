"""The page: controls, what each of them does, and its server. gradio is imported where it is needed."""

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from common.errors import UserError
from config.demo_options import WebDemoConfig
from sampling.guidance_kinds import kinds_of
from sampling.session import device_name
from web import html
from web.choice import Chooser, sweep_dirs
from web.drawing import Drawer, Progress

GUIDED_LOW = ("CCFG", "AutoG")  # kinds whose guiding pass has a budget of its own
INTERVAL = 0.1  # seconds between two messages of progress, at least


class Page:
    """What the page's controls do, on plain values: each method takes those of `names`, in this order, and gives HTML.

    Attributes:
        names: the options that the controls set, in their order.
    """

    def __init__(self, drawer: Drawer):
        config = drawer.config
        self.drawer = drawer
        self.chooser = Chooser(drawer, sweep_dirs(Path(config.ckpt), config.sweep_dir))
        condition = "prompt" if drawer.takes_text else "class_label"
        self.names = [condition, "seed", drawer.steps_option, "guidance_kind", "cfg_scale"]
        if drawer.budgets:
            self.names += ["unconditional_inference_budget", "inference_budget"]

    def values(self, config: WebDemoConfig) -> list[Any]:
        """What the controls show for a request."""
        return [shown(getattr(config, name)) for name in self.names]

    def options(self, *values: Any) -> WebDemoConfig:
        """The request that the controls ask for. Raises UserError."""
        return self.drawer.options(dict(zip(self.names, values, strict=True)))

    def draw(self, *values: Any, progress: Progress | None = None) -> Iterator[tuple[str, str]]:
        """What is drawn, and the pictures as soon as there is one."""
        for comparison in self.drawer.compare(self.options(*values), progress):
            yield html.message(html.describe(comparison.config)), html.comparison(comparison, len(self.drawer.budgets))

    def within(self, ms: Any, *values: Any, progress: Progress | None = None) -> tuple[WebDemoConfig, str, str]:
        """The request that is as good as possible within a time, what is to be said of it, and its pictures."""
        config = self.options(*values)
        limit = self.drawer.options({"within_ms": ms}).within_ms
        choice = self.chooser.within(config, limit)
        *_, (_, pictures) = self.draw(*self.values(choice.config), progress=progress)
        taken = self.drawer.picture(choice.config).ms
        said = f"{choice.reason}; expected {html.figure(choice.ms)} ms, measured {html.figure(taken)} ms"
        return choice.config, html.message(said), pictures

    def strip(self, *values: Any, progress: Progress | None = None) -> tuple[str, str]:
        """What is drawn, and pictures at all budgets."""
        config = self.options(*values)
        return html.message(html.describe(config)), html.strip(config, self.drawer.strip(config, progress))

    def attention(self, time: Any, *values: Any) -> tuple[str, str]:
        """What is drawn, and what Read looks at in it."""
        names = dict(zip(self.names, values, strict=True)) | {"attention_time": time}
        config = self.drawer.options(names)
        shown = html.attention(config, self.drawer.picture(config), self.drawer.attention(config))
        return html.message(html.describe(config)), shown


def shown(value: Any) -> Any:
    """An option's value as a control shows it."""
    if not isinstance(value, list):
        return value
    return value[0] if len(value) == 1 else " ".join(map(str, value))


def build(page: Page) -> Any:
    """The page as gradio's Blocks."""
    gr = _gradio()
    drawer, config = page.drawer, page.drawer.config
    count, start = len(drawer.budgets), page.values(config)
    with gr.Blocks(title=f"{config.model}: budget slider", analytics_enabled=False) as blocks:
        gr.HTML(_title(drawer), elem_classes="web-title")
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=260):
                controls = _controls(gr, page, start)
                draw_button = gr.Button("Draw", variant="primary", elem_id="draw")
                within_ms = gr.Number(config.within_ms, label="As good as possible within … milliseconds", elem_id="within-ms")
                within_button = gr.Button("Choose budget and steps", elem_id="within")
            with gr.Column(scale=3, min_width=480):
                if count:
                    low = 1 / count if count > 1 else 0.0  # gradio has no slider of one value
                    label = f"Budget: share of the {count} latents in each group"
                    options = {"step": 1 / count, "interactive": count > 1, "elem_id": "budget"}
                    controls.append(gr.Slider(low, 1, start[-1], label=label, **options))
                else:
                    gr.Slider(0, 1, 1, label="Budget", interactive=False, elem_id="budget")
                    gr.HTML(html.message(f"{config.model} has no budget: the slider is off; only ELIT models have one"))
                status = gr.HTML("", elem_id="status")
                pictures = gr.HTML("", elem_id="pictures")
                if count:
                    with gr.Row():
                        strip_button = gr.Button("Draw all budgets", elem_id="all-budgets")
                        read_button = gr.Button("What Read looks at, at time", elem_id="read")
                        read_time = gr.Number(
                            config.attention_time, container=False, step=0.1, scale=0, min_width=90, elem_id="read-time"
                        )
                    read, strip = gr.HTML("", elem_id="attention"), gr.HTML("", elem_id="strip")

        # All that draws waits for its turn.
        turn = {"concurrency_limit": 1, "concurrency_id": "draw", "show_progress": "full", "show_progress_on": status}

        def draw(*values: Any, progress: Any = gr.Progress()) -> Iterator[tuple]:  # noqa: B008
            yield from _reported(gr, 2, lambda: page.draw(*values, progress=_throttled(progress)))

        def within(*values: Any, progress: Any = gr.Progress()) -> Iterator[tuple]:  # noqa: B008
            def choose() -> Iterator[tuple]:
                progress(0, desc="measuring latencies, once")
                request, *shown = page.within(*values, progress=_throttled(progress))
                yield *page.values(request), *shown

            yield from _reported(gr, len(controls) + 2, choose)

        def all_budgets(*values: Any, progress: Any = gr.Progress()) -> Iterator[tuple]:  # noqa: B008
            yield from _reported(gr, 2, lambda: iter([page.strip(*values, progress=_throttled(progress))]))

        def look(*values: Any) -> Iterator[tuple]:
            yield from _reported(gr, 2, lambda: iter([page.attention(*values)]))

        for control in [*controls, within_ms, *([read_time] if count else [])]:
            control.preprocess = _as_given
        typed = [c.submit for c in controls if isinstance(c, gr.Textbox | gr.Number)]
        picked = [c.input for c in controls if isinstance(c, gr.Dropdown)]
        gr.on([draw_button.click, blocks.load, *typed, *picked], draw, controls, [status, pictures], api_name="draw", **turn)
        asked = [within_button.click, within_ms.submit]
        gr.on(asked, within, [within_ms, *controls], [*controls, status, pictures], api_name="within", **turn)
        if count:
            controls[-1].input(draw, controls, [status, pictures], trigger_mode="always_last", api_name="slide", **turn)
            strip_button.click(all_budgets, controls, [status, strip], api_name="all_budgets", **turn)
            gr.on(
                [read_button.click, read_time.submit],
                look,
                [read_time, *controls],
                [status, read],
                api_name="attention",
                **turn,
            )
    return blocks.queue(default_concurrency_limit=1, max_size=64)


def serve(page: Page, host: str, port: int) -> tuple[str, Callable[[], None]]:
    """Serve the page from threads. Returns its address, and what ends it.

    Raises:
        UserError: the port is in use.
    """
    gr = _gradio()
    from gradio.blocks import Block
    from starlette.middleware import Middleware

    Block.async_move_resource_to_block_cache = _no_resource  # pyright: ignore[reportAttributeAccessIssue]
    blocks = build(page)
    theme = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        _, url, _ = blocks.launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            app_kwargs={"middleware": [Middleware(NoFiles)]},
            allowed_paths=[],
            blocked_paths=["/"],
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
            theme=theme,
            css=html.CSS,
        )
    except OSError:
        raise UserError(f"--port {port}: is in use or cannot be listened at on {host}; give another") from None
    return url, partial(blocks.close, verbose=False)


class NoFiles:
    """ASGI middleware that refuses gradio's routes for files of the disk, uploads and other hosts' files: the page has none of them."""

    ROUTES = re.compile(r"/(file[=/]|proxy=|upload|stream/|custom_component|deep_link|component_server|dev/)")

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer 403, or pass on."""
        if scope["type"] == "http" and self.ROUTES.search(scope["path"]):
            from starlette.responses import PlainTextResponse

            await PlainTextResponse("no files are served or taken here", 403)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def check_port(host: str, port: int) -> None:
    """Refuse an address that cannot be listened at, before long work."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as error:
        raise UserError(f"--host {host}: no address of this machine: {error.strerror}") from None
    except OSError as error:
        what = f"--port {port}: is in use or" if error.errno in (98, 48, 10048) else f"--host {host}:"
        raise UserError(f"{what} cannot be listened at on {host}: {error.strerror}; give another") from None


def wait(stop: Callable[[], None]) -> None:
    """Until Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    stop()


def _gradio() -> Any:
    """The module, which reports nothing to anyone."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except ImportError:
        raise UserError("gradio is not installed: pip install --no-deps -r requirements-demo.txt -c constraints.txt") from None
    return gradio


def _title(drawer: Drawer) -> str:
    config = drawer.config
    budgets = f"one checkpoint, {len(drawer.budgets)} budgets; " if drawer.budgets else ""
    name = Path(config.ckpt).name
    text = f"{budgets}{html.pixels_of(config)}; {name}, {device_name(drawer.loaded.device)}"
    return f"<h1>{escape(config.model)}</h1><p>{escape(text)}</p>"


def _controls(gr: Any, page: Page, start: list[Any]) -> list[Any]:
    """All controls but the slider, in the order of the page's `names`."""
    drawer, config = page.drawer, page.drawer.config
    count = len(drawer.budgets)
    condition, seed, steps, kind, scale = start[:5]
    if drawer.takes_text:
        controls = [gr.Textbox(condition, label="Prompt", lines=2, elem_id="prompt")]
    else:
        controls = [gr.Number(condition, label=f"Class, 0 … {config.num_classes - 1}", elem_id="class")]
    with gr.Row():
        controls.append(gr.Number(seed, label="Seed", elem_id="seed", min_width=100))
        if drawer.steps_option == "num_steps":
            controls.append(gr.Number(steps, label="Steps", elem_id="steps", min_width=100))
        else:
            controls.append(gr.Textbox(steps, label="Steps of each stage", elem_id="steps", min_width=100))
    with gr.Row():
        choices = [(title, name) for name, title in kinds_of(config).items()]
        controls.append(gr.Dropdown(choices, value=kind, label="Guidance", elem_id="kind", min_width=130))
        controls.append(gr.Number(scale, label="Scale; 1: none", elem_id="scale", step=0.5, min_width=100))
    if count:
        choices = [(f"{budget:.4g}", budget) for budget in drawer.budgets]
        label = "Budget of the guiding pass"
        is_used = kind in GUIDED_LOW
        controls.append(gr.Dropdown(choices, value=start[5], label=label, visible=is_used, elem_id="guiding-budget"))
        controls[3].change(
            lambda kind: gr.update(visible=kind in GUIDED_LOW), controls[3], controls[5], queue=False, api_name=False
        )
    return controls


def _as_given(value: Any) -> Any:
    """In place of gradio's own checks of a control, whose messages are others than the command line's."""
    return value


async def _no_resource(block: Any, address: Any) -> None:
    """In place of what fetches a value that a request says to be a file elsewhere."""
    raise _gradio().Error("no files are served or taken here", print_exception=False)


def _throttled(progress: Any) -> Progress:
    """Gradio's progress, told of a few times a second only."""
    last = time.perf_counter()

    def tell(done: int, count: int) -> None:
        nonlocal last
        if time.perf_counter() - last >= INTERVAL:
            last = time.perf_counter()
            progress((done, count), desc="drawing", unit="forwards")

    return tell


def _reported(gr: Any, count: int, outputs: Callable[[], Iterator[tuple]]) -> Iterator[tuple]:
    """The `count` outputs of a handler; a user's mistake becomes one line in the last but one, the status, and leaves the others."""
    try:
        yield from outputs()
    except UserError as error:
        line = html.message(" ".join(str(error).split()), is_error=True)
        yield tuple(line if i == count - 2 else gr.skip() for i in range(count))
