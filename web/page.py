"""The page: controls, what each of them does, and its server. gradio is imported where it is needed."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common.errors import UserError
from config.demo_options import WebDemoConfig
from sampling.guidance_kinds import KINDS, kinds_of
from web import html
from web.choice import Chooser, sweep_dirs
from web.drawing import Drawer, Progress

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

    def draw(self, *values: Any, progress: Progress | None = None) -> Iterator[str]:
        """The pictures, as soon as there is one."""
        for comparison in self.drawer.compare(self.options(*values), progress):
            yield html.comparison(comparison, len(self.drawer.budgets))

    def within(self, ms: Any, *values: Any, progress: Progress | None = None) -> tuple[WebDemoConfig, str, str]:
        """The request that is as good as possible within a time, what is to be said of it, and its pictures."""
        config = self.options(*values)
        limit = self.drawer.options({"within_ms": ms}).within_ms
        choice = self.chooser.within(config, limit)
        *_, pictures = self.draw(*self.values(choice.config), progress=progress)
        taken = self.drawer.picture(choice.config).ms
        return choice.config, f"{choice.reason}; expected {choice.ms:.3g} ms, measured {taken:.3g} ms", pictures

    def strip(self, *values: Any, progress: Progress | None = None) -> str:
        """Pictures at all budgets."""
        config = self.options(*values)
        return html.strip(config, self.drawer.strip(config, progress))

    def attention(self, time: Any, *values: Any) -> str:
        """What Read looks at in the picture."""
        names = dict(zip(self.names, values, strict=True)) | {"attention_time": time}
        config = self.drawer.options(names)
        return html.attention(config, self.drawer.picture(config), self.drawer.attention(config))


def shown(value: Any) -> Any:
    """An option's value as a control shows it."""
    return (
        " ".join(map(str, value))
        if isinstance(value, list) and len(value) != 1
        else value[0]
        if isinstance(value, list)
        else value
    )


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
                within_ms = gr.Number(config.within_ms, label="Milliseconds that an image may take", elem_id="within-ms")
                within_button = gr.Button("As good as possible within this time", elem_id="within")
            with gr.Column(scale=3, min_width=480):
                if count:
                    controls.append(
                        gr.Slider(1 / count, 1, start[-1], step=1 / count, label=f"Budget: share of the {count} latents in each group",
                                  elem_id="budget")
                    )  # fmt: skip
                else:
                    gr.Slider(0, 1, 1, label="Budget", interactive=False, elem_id="budget")
                    gr.HTML(html.message(f"{config.model} has no budget: the slider is off; only ELIT models have one"))
                status = gr.HTML("", elem_id="status")
                pictures = gr.HTML("", elem_id="pictures")
                if count:
                    with gr.Row():
                        strip_button = gr.Button("Draw all budgets", elem_id="all-budgets")
                        read_button = gr.Button("What Read looks at", elem_id="read")
                        read_time = gr.Number(config.attention_time, label="at time t", elem_id="read-time", step=0.1)
                    read, strip = gr.HTML("", elem_id="attention"), gr.HTML("", elem_id="strip")

        # All that draws waits for its turn.
        turn = {"concurrency_limit": 1, "concurrency_id": "draw", "show_progress": "full", "show_progress_on": status}

        def draw(*values: Any, progress: Any = gr.Progress()) -> Iterator[tuple]:  # noqa: B008
            yield from _reported(lambda: ((*[gr.skip()] * len(controls), "", h) for h in page.draw(*values, progress=_throttled(progress))),
                                 len(controls) + 2, gr)  # fmt: skip

        def within(*values: Any, progress: Any = gr.Progress()) -> Iterator[tuple]:  # noqa: B008
            def chosen() -> Iterator[tuple]:
                progress(0, desc="measuring latencies, once")
                request, said, drawn = page.within(*values, progress=_throttled(progress))
                yield (*page.values(request), html.message(said), drawn)

            yield from _reported(chosen, len(controls) + 2, gr)

        outputs = [*controls, status, pictures]
        typed = [c for c in controls if isinstance(c, gr.Textbox | gr.Number)]
        chosen = [c for c in controls if isinstance(c, gr.Dropdown)]
        events = [draw_button.click, blocks.load, *(c.submit for c in typed), *(c.input for c in chosen)]
        gr.on(events, draw, controls, outputs, api_name="draw", **turn)
        gr.on([within_button.click, within_ms.submit], within, [within_ms, *controls], outputs, api_name="within", **turn)
        if count:
            gr.on([controls[-1].input], draw, controls, outputs, trigger_mode="always_last", api_name="slide", **turn)

            def all_budgets(*values: Any, progress: Any = gr.Progress()) -> Iterator[tuple]:  # noqa: B008
                yield from _reported(lambda: iter([("", page.strip(*values, progress=_throttled(progress)))]), 2, gr)

            def look(*values: Any) -> Iterator[tuple]:
                yield from _reported(lambda: iter([("", page.attention(*values))]), 2, gr)

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
    blocks = build(page)
    theme = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        _, url, _ = blocks.launch(
            server_name=host,
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            # No file is served, not even one of gradio's cache, and none is taken.
            allowed_paths=[],
            blocked_paths=["/"],
            max_file_size=1,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
            theme=theme,
            css=html.CSS,
        )
    except OSError as error:
        raise UserError(f"--port {port}: cannot be listened at on {host}: {error}") from None
    return url, blocks.close


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
        raise UserError("gradio is not installed: pip install -r requirements-demo.txt -c constraints.txt") from None
    return gradio


def _title(drawer: Drawer) -> str:
    config = drawer.config
    budgets = f"one checkpoint, {len(drawer.budgets)} budgets; " if drawer.budgets else ""
    name = Path(config.ckpt).name
    text = f"{budgets}{config.resolution} × {config.resolution} pixels; {name}"
    return f"<h1>{html.html.escape(config.model)}</h1><p>{html.html.escape(text)}</p>"


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
        label = f"Guiding budget of {KINDS['CCFG']} and {KINDS['AutoG']}"
        controls.append(gr.Dropdown(choices, value=start[5], label=label, elem_id="guiding-budget"))
    return controls


def _throttled(progress: Any) -> Progress:
    """Gradio's progress, told of a few times a second only."""
    last = time.perf_counter()

    def tell(done: int, count: int) -> None:
        nonlocal last
        if time.perf_counter() - last >= INTERVAL:
            last = time.perf_counter()
            progress((done, count), desc="drawing", unit="forwards")

    return tell


def _reported(outputs: Callable[[], Iterator[tuple]], count: int, gr: Any) -> Iterator[tuple]:
    """Outputs of a handler; a user's mistake becomes one line in the last but one, the status, and leaves the others."""
    status = count - 2
    try:
        yield from outputs()
    except UserError as error:
        text = " ".join(str(error).split())
        yield tuple(html.message(text, is_error=True) if i == status else gr.skip() for i in range(count))
