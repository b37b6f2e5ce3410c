"""A private RabbitMQ: own data, own node, own ports, no rights needed."""

import os
import shutil
import subprocess
from pathlib import Path

from .places import ROOT, LocalError
from .ports import is_free, remembered_ports, speaks_amqp
from .process import ManagedProcess

# The commands on PATH are a wrapper on Debian, which insists on being root or rabbitmq and on the system's
# own data directory. The scripts behind it have neither habit.
DEBIAN_SCRIPTS = Path("/usr/lib/rabbitmq/bin")
SETTINGS = ROOT / "deploy" / "rabbitmq" / "sublet.conf"
SYSTEM_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin"


def find_script(name: str) -> str | None:
    debian = DEBIAN_SCRIPTS / name
    return str(debian) if debian.exists() else shutil.which(name, path=SYSTEM_PATH)


class RabbitServer:
    """Keeps its state and its port over stop, kill and start."""

    name = "rabbitmq"

    def __init__(self, base_dir: Path, log_dir: Path | None = None) -> None:
        self.base_dir = base_dir.resolve()
        logs = log_dir or self.base_dir / "logs"
        self._ports = remembered_ports(self.base_dir / "ports.json", "amqp", "distribution", "epmd")
        self._broker = ManagedProcess(self.name, self.base_dir, logs / "rabbitmq.log")
        self._epmd = ManagedProcess("epmd", self.base_dir, logs / "epmd.log")

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    @property
    def port(self) -> int:
        return self._ports["amqp"]

    @property
    def pid(self) -> int | None:
        return self._broker.pid

    @property
    def health(self) -> str:
        if self.pid is None:
            return "down"
        return "ok" if speaks_amqp("127.0.0.1", self.port) else "not ready: no answer"

    def start(self, timeout: float = 120.0) -> None:
        """Starts the broker and waits until clients can connect; does nothing if it runs."""
        if self.pid is None:
            self._check_ports()
            self._write_configuration()
            self._start_epmd()
            self._broker.start([_required("rabbitmq-server")], self._environment())
        self._broker.wait_until_ready(lambda: speaks_amqp("127.0.0.1", self.port), timeout)

    def stop(self) -> None:
        self._broker.stop(grace=30)
        self._epmd.stop()

    def kill(self) -> None:
        """Ends the broker as a power cut would."""
        self._broker.kill()
        self._epmd.kill()

    def restart(self) -> None:
        self.stop()
        self.start()

    def ctl(self, *arguments: str) -> str:
        """What `rabbitmqctl` of this broker answers."""
        done = subprocess.run(
            [_required("rabbitmqctl"), "--quiet", *arguments],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise LocalError(f"rabbitmqctl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def _check_ports(self) -> None:
        # A port mapper that an earlier broker left behind is no stranger.
        ours = {"epmd"} if self._epmd.pid else set()
        for name, port in self._ports.items():
            if name not in ours and not is_free(port):
                raise LocalError(
                    f"Another program has taken port {port} ({name}) of the RabbitMQ in {self.base_dir}: "
                    f"end it, or remove that directory to start afresh on another port."
                )

    def _write_configuration(self) -> None:
        (self.base_dir / "rabbitmq.conf").write_text(
            f"{SETTINGS.read_text()}\n"
            f"listeners.tcp.local = 127.0.0.1:{self.port}\n"
            "log.file = false\n"
            "log.console = true\n"
            "log.console.level = info\n"
            "disk_free_limit.absolute = 50MB\n"
        )
        (self.base_dir / "enabled_plugins").write_text("[].\n")
        # Empty, and named in the environment, so that the settings of the system's own broker are not read.
        (self.base_dir / "rabbitmq-env.conf").write_text("")

    def _start_epmd(self) -> None:
        # Erlang would start its port mapper itself, and leave it behind as a daemon that nobody can name.
        if self._epmd.pid is None:
            self._epmd.start([_required("epmd"), "-address", "127.0.0.1"], self._environment())

    def _environment(self) -> dict[str, str]:
        base = str(self.base_dir)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RABBITMQ_")}
        return inherited | {
            "PATH": SYSTEM_PATH,
            "HOME": base,  # the Erlang cookie lives there
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._ports["epmd"]),
            # An address instead of a host name: bare machines cannot resolve their own name.
            "RABBITMQ_USE_LONGNAME": "true",
            "RABBITMQ_NODENAME": "sublet@127.0.0.1",
            "RABBITMQ_DIST_PORT": str(self._ports["distribution"]),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_CONFIG_FILE": f"{base}/rabbitmq.conf",
            "RABBITMQ_CONF_ENV_FILE": f"{base}/rabbitmq-env.conf",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{base}/enabled_plugins",
            "RABBITMQ_MNESIA_BASE": f"{base}/data",
            "RABBITMQ_SCHEMA_DIR": f"{base}/schema",
            "RABBITMQ_LOG_BASE": f"{base}/logs",
            "RABBITMQ_LOGS": "-",
            # Makes the script become the Erlang machine, so that the pid that we know is the broker's.
            "RUNNING_UNDER_SYSTEMD": "true",
        }


def _required(name: str) -> str:
    script = find_script(name)
    if script is None:
        raise LocalError(f"{name} is missing: run `deploy/local install`.")
    return script
