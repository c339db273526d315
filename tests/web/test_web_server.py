"""The page's server: what it serves and what not, whom it talks to, and requests that wait for their turn."""

import json
import re
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest
import runs
from gradio import processing_utils
from runs import free_port, make_checkpoint, make_vae

import web_demo
from web.page import build, serve

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")
REQUEST = [3, 5, 4, "CFG", 1.5, 0.25]  # and a budget


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The page and its address; and all addresses that were connected to until it was up."""
    folder, connected = tmp_path_factory.mktemp("server"), []
    ckpt = make_checkpoint(folder / "0000007.pt", make_vae(folder / "vae"))
    port = free_port()
    page, config = web_demo.prepare(["--ckpt", str(ckpt), "--num-steps", "4", "--port", str(port)])
    original = socket.socket.connect

    def connect(self, address):
        connected.append(address)
        return original(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect)
        url, stop = serve(page, config.host, config.port)
        time.sleep(0.2)
    yield page, url, connected
    stop()


def get(url):
    try:
        with urllib.request.urlopen(url) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def port_of(url):
    return int(url.strip("/").rpartition(":")[2])


def test_nothing_but_this_machine_is_spoken_to(served):
    _, url, connected = served
    assert {address[0] for address in connected if isinstance(address, tuple)} <= {"127.0.0.1", "localhost"}
    assert url.startswith("http://127.0.0.1:")
    with pytest.raises(ConnectionRefusedError):  # the whole machine would answer here
        socket.create_connection(("127.0.0.2", port_of(url))).close()


def test_the_page_loads_nothing_from_elsewhere(served):
    _, url, _ = served
    status, text = get(url)
    assert status == 200
    loads = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"(https?:)?//[^\"]*", text)
    assert not loads
    _, theme = get(url + "theme.css")
    assert theme and "//fonts." not in theme and "@import" not in theme


@pytest.mark.parametrize("path", ["/etc/passwd", "README.md", "web_demo.py"])
def test_no_file_is_served(served, path):
    _, url, _ = served
    for route in ("gradio_api/file=", "file=", "gradio_api/file/", "static/..%2f..%2f", "assets/..%2f..%2f"):
        status, text = get(url + route + path)
        assert status == 403 if "file" in route else status in (403, 404), (route, status)
        assert "root:" not in text and "elastic" not in text.lower()


def test_nothing_is_fetched_for_others(served):
    _, url, _ = served
    for route in (f"gradio_api/file={url}theme.css", "gradio_api/proxy=https://x.hf.space/a"):
        assert get(url + route)[0] == 403


def test_no_file_is_taken(served):
    _, url, _ = served
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nhello\r\n--x--\r\n'
    request = urllib.request.Request(url + "gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"})
    assert get(request)[0] == 403


def test_requests_wait_for_their_turn_and_mistakes_are_lines(served, monkeypatch, capsys):
    from gradio_client import Client

    page, url, _ = served
    at_once, most, original = threading.Semaphore(1), [], page.drawer._draw

    def draw(config, progress):
        most.append(at_once.acquire(blocking=False))  # False where another one is drawing
        try:
            return original(config, progress)
        finally:
            at_once.release()

    monkeypatch.setattr(page.drawer, "_draw", draw)
    clients = [Client(url, verbose=False, httpx_kwargs={"timeout": 120}) for _ in range(2)]
    jobs = [client.submit(*REQUEST, budget, api_name="/slide") for client, budget in zip(clients, (0.25, 0.5), strict=True)]
    results = [job.result(timeout=60) for job in jobs]
    assert most == [True] * 3  # two budgets and the full one, which both compare with
    assert all("data:image/png" in str(result) for result in results) and str(results[0]) != str(results[1])
    said = str(clients[0].predict(*[99, *REQUEST[1:]], 0.5, api_name="/draw"))
    assert "web-error" in said and "--class-label 99: class ids of this model lie below 5" in said
    said = str(clients[0].predict(*REQUEST, 0.1, api_name="/draw"))
    assert "--inference-budget" in said and "valid values: 0.25, 0.5, 0.75, 1" in said
    assert "Traceback" not in capsys.readouterr().err


def test_the_port_is_taken_then(served, capsys):
    page, url, _ = served
    argv = ["--ckpt", page.drawer.config.ckpt, "--port", port_of(url)]
    assert f"--port {port_of(url)}: is in use" in runs.refused(web_demo.main, capsys, argv)


def test_no_file_of_another_server_is_fetched(served, monkeypatch):
    _, url, _ = served
    monkeypatch.setattr(processing_utils, "async_ssrf_protected_download", lambda *_, **__: pytest.fail("fetched"))
    elsewhere = {"path": "http://example.com/a.bin", "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [elsewhere, *REQUEST[1:], 0.25]}).encode()
    request = urllib.request.Request(url + "gradio_api/run/draw", body, {"Content-Type": "application/json"})
    assert get(request)[0] == 500 and "no files are served or taken here" in get(request)[1]


def test_a_model_of_one_budget(served, monkeypatch):
    page, _, _ = served
    monkeypatch.setattr(page.drawer, "budgets", [1.0])
    (slider,) = [block for block in build(page).blocks.values() if block.elem_id == "budget"]
    assert (slider.maximum, slider.interactive) == (1, False)
