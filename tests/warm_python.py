"""A Python that has imported torch: `python warm_python.py SOCKET` waits there and is copied for each script to be run.

`warm_python` gives an executable for the place of `sys.executable`. It takes a script and its arguments, and spares the
seconds that a fresh process takes to import torch.
"""

import importlib
import json
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLIENT = """import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({path!r})
socket.send_fds(server, [json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()], [0, 1, 2])
server.shutdown(socket.SHUT_WR)
lines = server.makefile()
pid = int(lines.readline())
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: os.kill(pid, number))
sys.exit(int(lines.readline()))
"""


@contextmanager
def warm_python(folder: Path) -> Iterator[str]:
    """The path of an executable, which is to be started as `python` is."""
    path, client, executable = folder / "socket", folder / "client.py", folder / "python"
    client.write_text(CLIENT.format(path=str(path)))
    executable.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -IS {shlex.quote(str(client))} "$@"\n')
    executable.chmod(0o755)
    with subprocess.Popen([sys.executable, __file__, str(path)]) as server:
        while not path.exists():
            assert server.poll() is None
            time.sleep(0.01)
        yield str(executable)
        server.terminate()


def serve(path: str) -> None:
    """Copies itself for each script, twice: one copy becomes the script, the other tells how it has ended."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the copies that tell
        while True:
            client, _ = server.accept()
            if os.fork() == 0:
                tell(client)
            client.close()


def tell(client: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    text, descriptors, _, _ = socket.recv_fds(client, 1 << 20, 3)
    while more := client.recv(1 << 20):
        text += more
    if (pid := os.fork()) == 0:
        client.close()
        become(*json.loads(text), descriptors)
    client.sendall(f"{pid}\n".encode())
    client.sendall(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) % 256}\n".encode())
    os._exit(0)


def become(words: list[str], folder: str, environment: dict[str, str], descriptors: list[int]) -> None:
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
    sys.stdout, sys.stderr = os.fdopen(1, "w", encoding="utf-8"), os.fdopen(2, "w", 1, encoding="utf-8")
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
    runpy.run_path(words[0], run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    for module in ("matplotlib.figure", "minari", "torch", "tyro"):
        importlib.import_module(module)
    serve(sys.argv[1])
