"""Fetch libtorch from the PyPI wheels into the user's cache and link it as `.libtorch`.

Wheels, because PyTorch publishes no other archive of this build that package mirrors carry. Only the CPU half and the headers are kept;
the layout stays that of site-packages (torch/ beside nvidia/) because the libraries find each other by relative rpath.
Standard library and pip only: this runs before anything else is set up.
"""

import argparse
import contextlib
import fcntl
import importlib.util
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import threading
import time
import zipfile

VERSION = "2.11.0"  # what tch 0.24 binds; torch-sys compares it with torch/build-version
WHEELS = {
    "torch==2.11.0": None,
    # libtorch_cpu.so links these two with versioned symbols, CUDA in use or not.
    "nvidia-cuda-runtime==13.0.96": None,
    "nvidia-cuda-cupti==13.0.85": None,
}
DOWNLOAD_MB = 543
# pip holds a second copy of the wheels for a moment; after that the unpacked files (500 MB) take less than that copy did.
NEEDED_MB = 1200
LIBRARIES = (
    "torch/lib/libtorch_cpu.so",
    "torch/lib/libc10.so",
    "torch/lib/libgomp.so.1",
    "nvidia/cu13/lib/libcudart.so.13",
    "nvidia/cu13/lib/libcupti.so.13",
)
MARKER = "torch/build-version"  # written last: its presence means the directory is whole


class Trouble(Exception):
    """Something the user can act on: what happened, and the remedy."""

    def __init__(self, what, remedy):
        super().__init__(what)
        self.remedy = remedy


def say(text):
    print(f"libtorch: {text}", file=sys.stderr, flush=True)


def main():
    root = pathlib.Path(__file__).resolve().parent.parent
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "skep"
    parser = argparse.ArgumentParser(
        prog="scripts/libtorch",
        description=f"Fetch libtorch {VERSION} ({DOWNLOAD_MB} MB download, 500 MB on disk) into {cache} once, and link it as DIR/.libtorch. "
        "Does nothing when LIBTORCH already names a libtorch of yours.",
    )
    parser.add_argument("dir", nargs="?", type=pathlib.Path, help="project to link it into (default: this repository)")
    parser.add_argument("--print", action="store_true", help="print the path for LIBTORCH to standard output")
    arguments = parser.parse_args()

    project = (arguments.dir or root).resolve()
    own = os.environ.get("LIBTORCH")
    # cargo exports its own setting to tests, hence the comparison; a project named by hand always gets its link.
    if own and arguments.dir is None and pathlib.Path(own).absolute() != project / ".libtorch" / "torch":
        use_own(pathlib.Path(own))
        print_path(arguments, own)
        return
    if not project.is_dir():
        raise Trouble(f"{project} is not a directory", "name the folder of the project that should get the .libtorch link")

    home = cache / f"libtorch-{VERSION}"
    if not is_whole(home):
        check_platform()
        check_pip()
        make_directory(cache)
        with only_one(cache / f"libtorch-{VERSION}.lock"):
            if not is_whole(home):
                fetch(home)
    link(project / ".libtorch", home)
    print_path(arguments, project / ".libtorch" / "torch")


def print_path(arguments, path):
    if arguments.print:
        print(path)


def use_own(path):
    if not (path / "lib" / "libtorch_cpu.so").exists() and not (path / "lib" / "libtorch_cpu.dylib").exists():
        raise Trouble(f"LIBTORCH={path} holds no lib/libtorch_cpu.so", f"unset LIBTORCH to have libtorch {VERSION} fetched, or correct it")
    say(f"using yours, LIBTORCH={path}")


def is_whole(home):
    return (home / MARKER).exists() and all((home / name).exists() for name in LIBRARIES)


def check_platform():
    system, machine = platform.system(), platform.machine()
    if (system, machine) != ("Linux", "x86_64"):
        raise Trouble(
            f"no libtorch is prepared for {system} {machine}, only for Linux x86_64",
            f"install PyTorch {VERSION} yourself and set LIBTORCH to its torch folder (untested there); "
            "`cargo light` tests the crates that need no libtorch",
        )
    name, version = platform.libc_ver()
    if name == "glibc" and tuple(int(part) for part in version.split(".")[:2]) < (2, 28):
        raise Trouble(f"glibc is {version}, libtorch {VERSION} needs 2.28 or newer", "use a newer system (Debian 10, Ubuntu 18.10 or later)")
    if name != "glibc":
        raise Trouble("this system's C library is not glibc, which libtorch's binaries need", "use a glibc system or container, such as debian:12")


def check_pip():
    if importlib.util.find_spec("pip") is None:
        raise Trouble(f"{sys.executable} has no pip, which fetches the wheels", "apt-get install python3-pip   (or python3 -m ensurepip --user)")


def check_disk(directory):
    free = shutil.disk_usage(directory).free // 10**6
    if free < NEEDED_MB:
        raise Trouble(
            f"{directory} has {free} MB free, the fetch needs {NEEDED_MB} MB (500 MB of it stay in use)",
            "free some space, or set XDG_CACHE_HOME to a folder on another disk",
        )


def make_directory(directory):
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Trouble(f"cannot make {directory}: {error.strerror}", "set XDG_CACHE_HOME to a folder that you may write to") from error


@contextlib.contextmanager
def only_one(path):
    """Two builds may start at once; the kernel drops the lock of one that dies."""
    try:
        lock = open(path, "w")
    except OSError as error:
        raise Trouble(f"cannot write {path}: {error.strerror}", "set XDG_CACHE_HOME to a folder that you may write to") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another run is fetching it; waiting for that one")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fetch(home):
    part = home.with_name(home.name + ".part")  # holding the lock, so a leftover is nobody's
    if part.exists():
        say("removing what an interrupted run left behind")
    for leftover in (part, home):
        shutil.rmtree(leftover, ignore_errors=True)
    check_disk(home.parent)
    started = time.monotonic()
    try:
        wheels = part / "wheels"
        wheels.mkdir(parents=True)
        say(f"fetching {VERSION}, {DOWNLOAD_MB} MB, once for all clones")
        download(wheels)
        say("unpacking")
        tree = part / "tree"
        for wheel in sorted(wheels.glob("*.whl")):
            unpack(wheel, tree)
        missing = [name for name in LIBRARIES if not (tree / name).exists()]
        if missing:
            raise Trouble(f"the wheels do not hold {', '.join(missing)}", "the package index served something else; check pip's index settings")
        # The wheel's libtorch.so needs libtorch_cuda.so. Ours leaves CUDA to be loaded at run time.
        os.symlink("libtorch_cpu.so", tree / "torch/lib/libtorch.so")
        (tree / MARKER).write_text(VERSION + "\n")
        os.replace(tree, home)
    except OSError as error:
        raise Trouble(f"cannot unpack into {part}: {error.strerror}", "free some space, or set XDG_CACHE_HOME to a folder on another disk") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    say(f"ready in {home} after {time.monotonic() - started:.0f} s")


def download(wheels):
    """Leave the download to pip: it knows the user's index, proxy and certificates."""
    requirements = wheels / "requirements.txt"
    requirements.write_text("".join(f"{pin} --hash=sha256:{digest}\n" if digest else pin + "\n" for pin, digest in WHEELS.items()))
    terminal = sys.stderr.isatty() and sys.stdout.isatty()
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--no-deps", "--no-cache-dir", "--retries", "3"]
    command += ["--only-binary", ":all:", "--dest", str(wheels), "--requirement", str(requirements)]
    # Named in full so that the Python that runs this does not matter: the libraries are the same in every wheel of the release.
    command += ["--implementation", "cp", "--python-version", "311", "--abi", "cp311", "--abi", "none"]
    for tag in ("manylinux_2_28", "manylinux_2_25", "manylinux_2_17", "manylinux2014"):
        command += ["--platform", f"{tag}_x86_64"]
    if not terminal:
        command.append("--quiet")
    # pip's temporary copy belongs on the disk whose space was checked; /tmp may be small, or memory.
    environment = dict(os.environ, TMPDIR=str(wheels))
    pip = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=None if terminal else subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    complaints = []
    reader = threading.Thread(target=lambda: complaints.extend(pip.stderr), daemon=True)
    reader.start()
    try:
        while True:
            try:
                status = pip.wait(timeout=10)
                break
            except subprocess.TimeoutExpired:
                if not terminal:
                    say(f"{min(arrived_mb(wheels), DOWNLOAD_MB)} of {DOWNLOAD_MB} MB")
    finally:
        if pip.poll() is None:
            pip.kill()
            pip.wait()
    reader.join(timeout=5)
    if status != 0:
        raise explain("".join(complaints))


def arrived_mb(wheels):
    total = 0
    for directory, _, names in os.walk(wheels):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.path.getsize(os.path.join(directory, name))
    return total // 10**6


def explain(complaints):
    def among(*texts):
        return any(text.lower() in complaints.lower() for text in texts)

    tail = "\n".join("    pip: " + line for line in complaints.strip().splitlines()[-6:])
    if among("no space left"):
        return Trouble(f"the disk filled up during the download\n{tail}", "free some space, or set XDG_CACHE_HOME to a folder on another disk")
    if among("CERTIFICATE_VERIFY_FAILED", "SSLError"):
        return Trouble(f"the package index's certificate was not accepted\n{tail}", "set PIP_CERT to your network's certificate bundle")
    if among("DO NOT MATCH THE HASHES"):
        return Trouble(f"what arrived is not the published wheel\n{tail}", "try again; if it stays, check the package index that pip is set to")
    if among("NewConnectionError", "ConnectTimeout", "ReadTimeout", "ProxyError", "Retrying", "Connection broken", "Connection reset", "name resolution", "ProtocolError", "IncompleteRead"):
        return Trouble(
            f"no connection to a package index\n{tail}",
            "check the network; behind a proxy set HTTPS_PROXY, for a mirror set PIP_INDEX_URL, then run this again",
        )
    if among("No matching distribution", "404"):
        return Trouble(
            f"the package index that pip is set to does not carry PyTorch {VERSION}\n{tail}",
            "point PIP_INDEX_URL at a full index (https://pypi.org/simple), or set LIBTORCH to a libtorch of your own",
        )
    return Trouble(f"pip could not fetch the wheels\n{tail}", "read pip's words above; to bypass, set LIBTORCH to a libtorch of your own")


def unpack(wheel, tree):
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name in LIBRARIES or name.startswith("torch/include/"):
                archive.extract(name, tree)


def link(place, home):
    if place.is_symlink():
        if os.readlink(place) == str(home):
            return
    elif place.exists():
        if is_whole(place):
            return say(f"{place} is a folder of your own with libtorch in it; kept")
        raise Trouble(f"{place} is in the way: neither a link nor a libtorch", f"remove {place} and run this again")
    fresh = place.with_name(f"{place.name}.{os.getpid()}")
    try:
        os.symlink(home, fresh)
        os.replace(fresh, place)
    except OSError as error:
        raise Trouble(f"cannot link {place}: {error.strerror}", "make the project folder writable") from error
    say(f"linked {place}")


if __name__ == "__main__":
    try:
        main()
    except Trouble as trouble:
        say(str(trouble))
        print(f"  remedy: {trouble.remedy}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
