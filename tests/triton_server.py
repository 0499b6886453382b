"""The real Triton Inference Server, without a container: out of the wheel `nvidia-pytriton`.

    python -m tests.triton_server FOLDER     installs it

The wheel's Python backend was built before numpy 2. So the server's Python is an environment of its
own with an older numpy, that sees everything else in this one: the server finds it by PATH, as it
finds an activated environment of a user's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import venv
from dataclasses import dataclass, field
from pathlib import Path

import httpx

WHEELS = ("nvidia-pytriton==0.7.0", "numpy==1.26.4")


def site(folder: Path) -> Path:
    """Where the packages of the server's environment are."""
    return (
        folder
        / "lib"
        / f"python{sys.version_info.major}.{sys.version_info.minor}"
        / "site-packages"
    )


def install(folder: Path) -> None:
    """Make the server's environment, whole or not at all."""
    ready = folder / ".ready"
    if ready.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=False)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    subprocess.run([*pip, "--target", str(site(folder)), *WHEELS], check=True)
    (site(folder) / "anyflow.pth").write_text(
        f"import site; site.addsitedir({str(sysconfig.get_path('purelib'))!r})\n"
    )
    root = site(folder) / "pytriton" / "tritonserver"
    stub = (
        root
        / "python_backend_stubs"
        / f"{sys.version_info.major}.{sys.version_info.minor}"
        / "triton_python_backend_stub"
    )
    (root / "backends" / "python" / stub.name).write_bytes(stub.read_bytes())
    for program in (root / "backends" / "python" / stub.name, root / "bin" / "tritonserver"):
        program.chmod(0o755)
    ready.touch()


@dataclass
class TritonServer:
    """A running server.

    Attributes:
        environment: from `install`.
        repository: of models.
        log: file that it writes.
        python: folder of the `python` that the model runs in; the environment's own unless told
            otherwise.
    """

    environment: Path
    repository: Path
    log: Path
    python: Path | None = None
    grpc: str = field(init=False)
    http: str = field(init=False)
    metrics: str = field(init=False)
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        """Start it; does not wait."""
        packages = site(self.environment)
        root = packages / "pytriton" / "tritonserver"
        ports = [_free_port() for _ in range(3)]
        self.http, self.grpc, self.metrics = (f"127.0.0.1:{port}" for port in ports)
        words = [
            str(root / "bin" / "tritonserver"),
            "--model-repository",
            str(self.repository),
            "--backend-directory",
            str(root / "backends"),
            "--http-address",
            "127.0.0.1",
            "--grpc-address",
            "127.0.0.1",
            "--http-port",
            str(ports[0]),
            "--grpc-port",
            str(ports[1]),
            "--metrics-port",
            str(ports[2]),
            "--metrics-address",
            "127.0.0.1",
            "--exit-timeout-secs",
            "60",
            "--exit-on-error",
            "false",
        ]
        libraries = [
            str(sysconfig.get_config_var("LIBDIR")),
            str(packages / "nvidia_pytriton.libs"),
        ]
        python = self.environment / "bin" if self.python is None else self.python
        surroundings = {
            **os.environ,
            "PATH": os.pathsep.join([str(python), os.environ["PATH"]]),
            "LD_LIBRARY_PATH": os.pathsep.join(libraries),
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": (
                "1"
            ),  # or glibc keeps freed memory for each thread, and growth could not be told from it
        }
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                words, env=surroundings, stdout=file, stderr=file, start_new_session=True
            )

    def wait_ready(self, model: str, seconds: float = 600) -> None:
        """Wait until a model is ready (and warm), or is known to have failed."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if (
                    httpx.get(f"http://{self.http}/v2/models/{model}/ready", timeout=5).status_code
                    == 200
                ):
                    return
            if f"failed to load '{model}'" in self.text:
                break
            time.sleep(0.1)
        raise AssertionError(f"{model} is not ready:\n{self.text[-4000:]}")

    @property
    def text(self) -> str:
        """What it logged so far."""
        return self.log.read_text(errors="replace")

    def value(self, metric: str, **labels: str) -> float:
        """Sum of a metric's values over the lines that have these labels."""
        lines = httpx.get(f"http://{self.metrics}/metrics", timeout=10).text.splitlines()
        ours = [line for line in lines if line.startswith((f"{metric}{{", f"{metric} "))]
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in ours
            if all(f'{k}="{v}"' in line for k, v in labels.items())
        )

    def memory(self) -> int:
        """Resident bytes of the server and all its models."""
        total = 0
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if os.getpgid(int(process.name)) == self.process.pid:
                    total += int((process / "statm").read_text().split()[1]) * os.sysconf(
                        "SC_PAGE_SIZE"
                    )
            except (OSError, ProcessLookupError):
                continue
        return total

    def stop(self) -> int:
        """Ask it to stop, as a supervisor does; returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(90)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill the server and its models at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    install(Path(sys.argv[1]).resolve())
