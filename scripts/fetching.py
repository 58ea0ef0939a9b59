"""What the set-up scripts share: errors with a remedy, one run at a time, pip with its complaints put plainly.

Standard library and pip only, no venv module: this runs before anything else is set up.
"""

import contextlib
import fcntl
import importlib.util
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import threading

ROOT = pathlib.Path(__file__).resolve().parent.parent
ANOTHER_DISK = "free some space, or set XDG_CACHE_HOME to a folder on another disk"
WRITABLE = "set XDG_CACHE_HOME to a folder that you may write to"


class Trouble(Exception):
    """Something the user can act on: what happened, and the remedy."""

    def __init__(self, what, remedy):
        super().__init__(what)
        self.remedy = remedy


def say(text):
    name = pathlib.Path(sys.argv[0]).stem.replace("_", "-")
    print(f"{name}: {text}", file=sys.stderr, flush=True)


def run(main):
    """Run a script's main function; what the user can act on becomes two lines, not a traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it, too, ends pip and removes what is half made
    try:
        main()
    except Trouble as trouble:
        say(str(trouble))
        print(f"  remedy: {trouble.remedy}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)


def cache_folder():
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "skep"


def check_linux_x86_64(remedy):
    system, machine = platform.system(), platform.machine()
    if (system, machine) != ("Linux", "x86_64"):
        raise Trouble(f"no support for {system} {machine}, only for Linux x86_64", remedy)
    library, version = platform.libc_ver()
    if library != "glibc":
        raise Trouble(
            "the C library here is not glibc, which PyTorch's binaries need",
            "use a glibc system or container, such as debian:12",
        )
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 28):
        raise Trouble(
            f"glibc here is {version}, PyTorch's binaries need 2.28 or newer",
            "use a newer system (Debian 10, Ubuntu 18.10 or later)",
        )


def check_pip():
    if importlib.util.find_spec("pip") is None:
        raise Trouble(f"{sys.executable} has no pip", "apt-get install python3-pip   (or python3 -m ensurepip --user)")


@contextlib.contextmanager
def making(home):
    """Yield an empty folder beside `home`, holding a lock; the caller fills it and renames what it wants into place.

    Two builds may start at once, and the kernel drops the lock of a run that dies. Holding it, leftovers are nobody's.
    """
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        lock = open(home.with_name(home.name + ".lock"), "w")
    except OSError as error:
        raise Trouble(f"cannot write {home.parent}: {error.strerror}", WRITABLE) from error
    part = home.with_name(home.name + ".part")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another run is at it; waiting for that one")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if part.exists():
            say("removing what an interrupted run left behind")
            shutil.rmtree(part, ignore_errors=True)
        try:
            part.mkdir()
            yield part
        except OSError as error:
            raise Trouble(f"cannot write {part}: {error.strerror}", ANOTHER_DISK) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)


def check_disk(folder, needed_mb):
    """Call it inside `making`: before that, another run may be about to make what needs no more space."""
    free = shutil.disk_usage(folder).free // 10**6
    if free < needed_mb:
        raise Trouble(f"{folder} has {free} MB free, {needed_mb} MB are needed", ANOTHER_DISK)


def pip(arguments, scratch, **environment):
    """Leave downloads to pip: it knows the user's index, proxy and certificates. On a terminal it draws bars."""
    terminal = sys.stderr.isatty() and sys.stdout.isatty()
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    command += ["--no-cache-dir", "--retries", "3"] + ([] if terminal else ["--quiet"])
    # pip's temporary copies belong on the disk whose space was checked; /tmp may be small, or memory.
    environment = dict(os.environ, TMPDIR=str(scratch), PIP_ROOT_USER_ACTION="ignore", **environment)
    output = None if terminal else subprocess.DEVNULL
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE, text=True
    )
    complaints = []
    reader = threading.Thread(target=lambda: complaints.extend(process.stderr), daemon=True)
    reader.start()
    try:
        while True:
            try:
                status = process.wait(timeout=10)
                break
            except subprocess.TimeoutExpired:
                if not terminal:
                    say(f"{megabytes(scratch)} MB so far")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    reader.join(timeout=5)
    if status != 0:
        raise explain("".join(complaints))


def megabytes(folder):
    total = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # pip moves files meanwhile
                total += os.lstat(os.path.join(directory, name)).st_size
    return total // 10**6


CAUSES = (
    (("no space left",), "the disk filled up", ANOTHER_DISK),
    (
        ("certificate_verify_failed", "sslerror"),
        "the package index's certificate was not accepted",
        "set PIP_CERT to your network's certificate bundle",
    ),
    (
        ("do not match the hashes",),
        "what arrived is not the published file",
        "try again; if it stays, check the package index that pip is set to",
    ),
    (
        (
            "newconnectionerror",
            "timeout",
            "timed out",
            "proxyerror",
            "connection broken",
            "connection reset",
            "protocolerror",
            "incompleteread",
        ),
        "no connection to a package index",
        "check the network; behind a proxy set HTTPS_PROXY, for a mirror set PIP_INDEX_URL; then run this again",
    ),
    (
        ("no matching distribution", "404"),
        "the package index that pip is set to does not carry a needed version",
        "point PIP_INDEX_URL at a full mirror of the Python Package Index",
    ),
)


def explain(complaints):
    tail = "".join(f"\n    pip: {line[:160]}" for line in complaints.strip().splitlines()[-4:])
    for signs, what, remedy in CAUSES:
        if any(sign in complaints.lower() for sign in signs):
            return Trouble(what + tail, remedy)
    return Trouble("pip failed" + tail, "read pip's words above")
