"""Starts and ends servers: skep's, or hivemind's under the same command line."""

import contextlib
import json
import os
import pathlib
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
HIVEMIND = [sys.executable, str(HERE / "hivemind_host.py")]
HIVEMIND_STANDS_IN = os.environ.get("SKEP_INTEROP_HOST", "skep") == "hivemind"
SKEP = HIVEMIND if HIVEMIND_STANDS_IN else [os.environ.get("SKEP_BIN", "target/debug/skep")]

running = []  # for the failure report


class Host:
    """A server process, ready once it has printed its listen addresses."""

    def __init__(self, program, arguments, log, ready_within=60):
        self.name = " ".join([pathlib.Path(program[-1]).stem, *arguments])
        self.log = log
        self._errors = open(log, "wb")
        # A session of its own, so that everything the server starts ends with it.
        self.process = subprocess.Popen(
            [*program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )
        self.lines = []  # all of standard output
        self._queue = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        running.append(self)
        self.addresses = []
        if ready_within:
            self.wait_ready(ready_within)

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            self._queue.put(line.rstrip("\n"))
        self._queue.put(None)

    def wait_ready(self, seconds):
        """All addresses are printed at once, so a short silence ends the list."""
        deadline = time.monotonic() + seconds
        while True:
            patience = 0.2 if self.addresses else deadline - time.monotonic()
            try:
                line = self._queue.get(timeout=max(patience, 0.01))
            except queue.Empty:
                if self.addresses:
                    return
                self.kill()
                raise AssertionError(f"{self.name} was not ready after {seconds} s:\n{self.errors()}") from None
            if line is None:
                raise AssertionError(
                    f"{self.name} ended with {self.process.wait()} instead of getting ready:\n{self.errors()}"
                )
            self.addresses.append(line)

    @property
    def address(self):
        return self.addresses[0]

    @property
    def peer_id(self):
        return self.address.rpartition("/p2p/")[2]

    @property
    def port(self):
        parts = self.address.split("/")
        return int(parts[parts.index("tcp") + 1])

    def errors(self):
        return self.log.read_text(errors="replace")

    def is_running(self):
        return self.process.poll() is None

    def signal(self, number):
        self.process.send_signal(number)

    def stop(self, within=5):
        """Ask it to end; returns its exit code."""
        self.signal(signal.SIGTERM)
        return self.process.wait(timeout=within)

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._errors.close()
        if self in running:
            running.remove(self)


def toml(value):
    """JSON but for tables in a line."""
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {toml(each)}' for key, each in value.items())} }}"
    return json.dumps(value)


class Hosts:
    """Makes hosts and ends them all, whatever happened in between."""

    def __init__(self, folder):
        self.folder, self.made = folder, []

    def skep(self, *arguments, **options):
        return self._start(SKEP, arguments, options)

    def hivemind(self, *arguments, **options):
        return self._start(HIVEMIND, arguments, options)

    def program(self, program, *arguments, **options):
        """Any program with skep's command line."""
        return self._start(program, arguments, options)

    def groups(self, kind, groups, *arguments, **options):
        """A server of kind "skep" or "hivemind" that hosts groups of experts, described by skep's keys."""
        flag = {"skep": "--config", "hivemind": "--groups"}[kind]
        return getattr(self, kind)("serve", flag, self.describe(kind, groups), *arguments, **options)

    def describe(self, kind, groups):
        """The file that tells a server of this kind which groups of experts to host."""
        file = self.folder / f"groups-{len(self.made)}.{kind}"
        if kind == "hivemind":
            file.write_text(json.dumps(groups))
        else:
            sections = ["\n".join(f"{key} = {toml(value)}" for key, value in group.items()) for group in groups]
            file.write_text("".join(f"[[experts]]\n{section}\n" for section in sections))
        return file

    def _start(self, program, arguments, options):
        log = self.folder / f"{pathlib.Path(program[-1]).stem}-{len(self.made)}.log"
        host = Host.__new__(Host)
        self.made.append(host)
        host.__init__(program, [str(argument) for argument in arguments], log, **options)
        return host

    def end(self):
        for host in self.made:
            if hasattr(host, "process"):
                host.kill()


class Counted:
    """A server of skep whose status can be asked for."""

    def __init__(self, start, groups, *arguments, sections=""):
        file = start.describe("skep", groups)
        file.write_text(f'{file.read_text()}{sections}\n[http]\nenabled = true\nlisten = "127.0.0.1:0"\n')
        self.host = start.skep("serve", "--config", file, *arguments)
        self.page = re.search(r"status page at (http://[0-9.:]+)", self.host.errors()).group(1)

    def experts(self):
        with urllib.request.urlopen(f"{self.page}/status", timeout=10) as page:
            return json.load(page)["experts"]


def run_skep(*arguments, program=None, within=30):
    """Run one of skep's commands to its end."""
    command = [*(program or SKEP), *map(str, arguments)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=within)
