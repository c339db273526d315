"""The budget slider in a browser: a page that draws from one checkpoint.

`python web_demo.py [--ckpt …] [--port …]`. Class or prompt, seed, steps, guidance and budget; the picture beside the full budget's from
the same noise, GFLOPs and measured milliseconds of both; all budgets in a row; what Read looks at; as good as possible within a time.
"""

from pathlib import Path

from common.errors import UserError, cli_main
from common.logging import warn
from config.demo_options import QUICKSTART, WebDemoConfig
from sampling import checks, session
from web import drawing
from web.choice import sweep_dirs
from web.drawing import Drawer
from web.page import Page, check_port, serve, wait


@cli_main
def main(argv: list[str] | None = None) -> None:
    """The command: options → a page, until Ctrl-C."""
    page, config = prepare(argv)
    url, stop = serve(page, config.host, config.port)
    print(f"{config.model} of {config.ckpt}: {url} (Ctrl-C ends it)", flush=True)
    wait(stop)


def prepare(argv: list[str] | None = None) -> tuple[Page, WebDemoConfig]:
    """The page of the options, its checkpoint loaded."""
    config, _, weights = session.from_command_line(WebDemoConfig, argv, "web_demo.py", check_options)
    drawing.check(config)
    checks.warn_of_budgets(config)
    if config.host not in ("127.0.0.1", "::1", "localhost"):
        warn(f"--host {config.host}: whoever reaches this machine can use the page")
    drawer = Drawer(config, weights)
    drawer.warm_up()
    return Page(drawer), config


def check_options(config: WebDemoConfig) -> None:
    """Refuse what no checkpoint can be sampled with, and addresses that are taken; nothing is read before."""
    drawing.check_options(config)
    sweep_dirs(Path(config.ckpt), config.sweep_dir)
    check_port(config.host, config.port)
    if config.ckpt == QUICKSTART and not Path(QUICKSTART).exists():
        raise UserError(f"--ckpt: the quick start's, {QUICKSTART}, does not exist; run make quickstart, or give another")


if __name__ == "__main__":
    main()
