"""Processes for tests, forked from a server that has imported the libraries but nothing of this package.

A fresh interpreter takes six seconds of CPU time to import torch and diffusers; a fork takes none. The server has
computed nothing and has one thread, so its children behave like fresh interpreters.
"""

import gc
import importlib.util
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.multiprocessing

ROOT = Path(__file__).resolve().parents[1]
# An import that fails in the server is ignored: it is repeated, and fails, in the process that needs it.
LIBRARIES = [
    "torch",
    "torch.distributed.fsdp",
    "torch.profiler",
    "diffusers.models.unets.unet_2d",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "transformers.models.clip.modeling_clip",
    "pytest",
    "safetensors.torch",
]
# Read when triton is imported: processes run as a user starts them.
WITHOUT = "TRITON_INTERPRET"

_context = multiprocessing.get_context("forkserver")


def _ensure_server() -> None:
    interpreted = os.environ.pop(WITHOUT, None)
    try:
        multiprocessing.forkserver.set_forkserver_preload(LIBRARIES)
        multiprocessing.forkserver.ensure_running()
    finally:
        if interpreted is not None:
            os.environ[WITHOUT] = interpreted


def _work(command: list[str], environment: dict[str, str], folder: str, output: str, errors: str) -> None:
    """Does the work of ``python COMMAND`` in a fork of the server."""
    # The collector would look at all of the server's objects again, and copy their pages.
    gc.freeze()
    for path, number in ((output, 1), (errors, 2)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[0] = folder
    # Read by OpenMP when the server loaded it.
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    flag, name, *sys.argv[1:] = command
    # An exception is printed, and ends the process with status 1.
    if flag == "-m":
        sys.argv[0] = importlib.util.find_spec(name).origin
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv[0] = "-c"
        exec(compile(name, "<string>", "exec"), {"__name__": "__main__"})


class Process:
    """A process like ``subprocess.Popen([sys.executable, *command], stdout=PIPE, stderr=PIPE, text=True)``.

    Parameters
    ----------
    command : sequence of str
        ``-m MODULE ARGUMENTS`` or ``-c CODE ARGUMENTS``.
    env : mapping, optional
        The environment, ``os.environ`` by default; TRITON_INTERPRET is left out.
    cwd : path
        Its folder, which is also the first place that it imports from.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> None:
        _ensure_server()
        environment = {key: value for key, value in (os.environ if env is None else env).items() if key != WITHOUT}
        self.args = [*command]
        self._files = [tempfile.NamedTemporaryFile(prefix="pecker-fast-", suffix=".txt") for _ in range(2)]  # noqa: SIM115
        paths = [file.name for file in self._files]
        self._process = _context.Process(target=_work, args=(self.args, environment, str(cwd), *paths))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for the process to end and returns its stdout and stderr."""
        self.wait(timeout)
        output, errors = (Path(file.name).read_text() for file in self._files)
        return output, errors


def run(command: Sequence[str], timeout: float = 400, **options) -> subprocess.CompletedProcess:
    """Like ``subprocess.run([sys.executable, *command], capture_output=True, text=True)``; options of ``Process``."""
    process = Process(command, **options)
    try:
        output, errors = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def _spawned(rank: int, environment: dict[str, str], function: Callable, args: tuple) -> None:
    gc.freeze()
    os.environ.clear()
    os.environ.update(environment)
    function(rank, *args)


def spawn(function: Callable, args: tuple, nprocs: int) -> None:
    """``torch.multiprocessing.spawn``, forked from the server, in this process's environment."""
    _ensure_server()
    environment = {key: value for key, value in os.environ.items() if key != WITHOUT}
    torch.multiprocessing.start_processes(
        _spawned, (environment, function, args), nprocs=nprocs, start_method="forkserver"
    )
