"""A real server that speaks S3, on loopback."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from runs import reset_accelerate

import train
from common import tensor_files


@contextmanager
def serving() -> Iterator[None]:
    """moto's S3 server, and the environment that S3 clients read."""
    import s3fs
    from moto.server import ThreadedMotoServer

    s3fs.S3FileSystem.clear_instance_cache()  # clients of tests before, which had no credentials
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "NO_PROXY": host,
        }.items():
            patch.setenv(name, value)
        yield
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def trained(url: str, folder: Path, tmp_path: Path, steps: int, more: str) -> list[dict[str, Any]]:
    """The last states of two runs with equal options, on remote data with a cache and on their local copy."""
    for name, data_dir in (("remote", url), ("local", folder)):
        train.main(
            f"--model SiT-Ti/4 --exp-name {name} --output-dir {tmp_path} --data-dir {data_dir} --cache-dir {tmp_path}/cache "
            f"--resolution 32 --num-classes 5 --batch-size 5 --max-train-steps {steps} --sampling-steps 0 --num-workers 1 "
            f"--mixed-precision no --report-to none {more}".split()
        )
        reset_accelerate()
    return [tensor_files.load(tmp_path / name / f"checkpoints/{steps:07d}.pt") for name in ("remote", "local")]
