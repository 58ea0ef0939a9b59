"""Child processes that end with us, each in a session of its own."""

import atexit
import contextlib
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SKEP = os.environ["SKEP_BIN"]
PATIENCE = 240  # seconds for one answer of a process

running = set()


class Child:
    def __init__(self, *command):
        self.name = " ".join(pathlib.Path(part).name for part in command[:4])
        self.log = tempfile.TemporaryFile()
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, start_new_session=True
        )
        running.add(self)
        self._lines = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            self._lines.put(line.strip())
        self._lines.put(None)

    def line(self, seconds=PATIENCE):
        """The next line of standard output."""
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            line = None
        if line is None:
            self.log.seek(0)
            tail = self.log.read().decode(errors="replace")[-3000:]
            self.end()
            raise RuntimeError(f"{self.name} gave no answer; its log ends with:\n{tail}")
        return line

    def tell(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def end(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        running.discard(self)

    def group(self):
        """Number of processes of its session, and the bytes that they hold: shared pages counted once."""
        count, held = 0, 0
        for entry in pathlib.Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError, ValueError):
                if os.getsid(int(entry.name)) == self.process.pid:
                    count += 1
                    rollup = (entry / "smaps_rollup").read_text()
                    held += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) * 1024
        return count, held


def end_all(*_):
    for child in list(running):
        child.end()


def end_with_us():
    atexit.register(end_all)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def skep(*arguments):
    """One benchmark of skep; what it reports."""
    child = Child(SKEP, "bench", *map(str, arguments), "--json")
    try:
        lines = [child.line()]
        while lines[-1] != "}" or not complete(lines):
            lines.append(child.line())
        return json.loads("\n".join(lines))
    finally:
        child.end()


def complete(lines):
    try:
        json.loads("\n".join(lines))
    except ValueError:
        return False
    return True


def host(kind, *arguments):
    """A server, ready, and its address."""
    program = {"skep": [SKEP], "hivemind": [sys.executable, str(ROOT / "tests" / "interop" / "hivemind_host.py")]}[kind]
    child = Child(*program, "serve", *map(str, arguments))
    return child, child.line()


def peer(role, **job):
    """A process of peers.py, prepared; `tell("go")` starts it."""
    child = Child(sys.executable, "-B", str(HERE / "peers.py"), role, json.dumps(job))
    return child


def together(children):
    """Starts prepared processes at the same moment; what they report."""
    try:
        for child in children:
            line = child.line()
            assert line == "ready", line
        for child in children:
            child.tell("go")
        return [json.loads(child.line()) for child in children]
    finally:
        for child in children:
            child.end()
