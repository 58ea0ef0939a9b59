"""Ends whatever still runs of an interop run and says so; exit code 1 if there was anything.

torch_shm_manager is not counted: PyTorch starts it in a session of its own, and it stays when its users are killed.
"""

import contextlib
import os
import signal
import sys


def of_this_run():
    mark = f"SKEP_INTEROP_RUN={os.environ['SKEP_INTEROP_RUN']}".encode()
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) in (os.getpid(), os.getppid()):
            continue
        try:
            with open(f"/proc/{entry}/environ", "rb") as environ, open(f"/proc/{entry}/cmdline", "rb") as cmdline:
                if mark in environ.read().split(b"\0"):
                    yield int(entry), cmdline.read().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue  # it ended meanwhile, or is not ours


if __name__ == "__main__":
    counted = 0
    for pid, command in list(of_this_run()):
        if "torch_shm_manager" not in command:
            counted += 1
            print(f"interop: left running: {pid} {command[:120]}", file=sys.stderr)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    sys.exit(counted > 0)
