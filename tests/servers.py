"""Real servers for tests: Redis and PostgreSQL on free ports, in temporary folders, killed and started at will."""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from tempfile import mkdtemp

import pytest

REDIS = shutil.which("redis-server")
POSTGRES_BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
POSTGRES = shutil.which("postgres") or (str(POSTGRES_BINARIES[-1]) if POSTGRES_BINARIES else None)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    for _ in range(600):
        with socket.socket() as caller:
            if caller.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None:
            raise RuntimeError(log.read_text()[-2000:])
        time.sleep(0.05)
    raise RuntimeError(f"nothing listens on {port}: {log.read_text()[-2000:]}")


class RedisServer:
    """A redis-server that keeps nothing: after a kill it comes back empty, on the same port."""

    def __init__(self, folder: Path) -> None:
        if REDIS is None:
            pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
        pytest.importorskip("redis", reason="the extra `scale` is not installed")
        self.folder, self.port = folder, free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        log = self.folder / "redis.log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [str(REDIS), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"],
                cwd=self.folder,
                stdout=output,
                stderr=output,
            )
        wait_for(self.port, self._process, log)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class PostgresServer:
    """A PostgreSQL server over a new cluster, run by an ordinary user."""

    def __init__(self) -> None:
        if POSTGRES is None:
            pytest.skip("postgresql is not installed (Debian: apt-get install postgresql)")
        pytest.importorskip("psycopg", reason="the extra `scale` is not installed")
        self.folder = Path(mkdtemp(prefix="postgres-"))  # not pytest's, whose parents belong to their owner alone
        self.binaries, self.data, self.port = Path(POSTGRES).parent, self.folder / "data", free_port()
        self.log = self.folder / "postgres.log"
        self._as = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        if self._as:
            shutil.chown(self.folder, "postgres")
        subprocess.run(
            [*self._as, self.binaries / "initdb", "-D", self.data, "-A", "trust", "-U", "trader", "--no-sync"],
            check=True,
            capture_output=True,
        )
        self.url = f"postgresql://trader:s3cret@127.0.0.1:{self.port}/postgres"
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [
                    *self._as,
                    self.binaries / "postgres",
                    "-D",
                    self.data,
                    "-p",
                    str(self.port),
                    "-h",
                    "127.0.0.1",
                    "-k",
                    "",
                ],
                stdout=output,
                stderr=output,
            )
        wait_for(self.port, self._process, self.log)
        self._await_ready()

    def _await_ready(self) -> None:
        import psycopg

        for _ in range(600):
            try:
                psycopg.connect(self.url).close()
                return
            except psycopg.OperationalError:
                time.sleep(0.05)
        raise RuntimeError(self.log.read_text()[-2000:])

    def kill(self) -> None:
        """As if the machine had died: the postmaster and its children, without a word."""
        leader = int((self.data / "postmaster.pid").read_text().splitlines()[0])
        children = Path(f"/proc/{leader}/task/{leader}/children").read_text().split()
        for number in (leader, *map(int, children)):
            os.kill(number, signal.SIGKILL)
        self._process.wait()
        for _ in range(600):
            if not any(Path(f"/proc/{number}").exists() for number in children):
                break
            time.sleep(0.01)
        (self.data / "postmaster.pid").unlink(missing_ok=True)

    def stop(self) -> None:
        if self._process.poll() is None:
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
