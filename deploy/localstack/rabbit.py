"""A private RabbitMQ with its own data, node name and ports. It needs no special rights."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .paths import ROOT, LocalError
from .ports import is_free, remembered_ports, speaks_amqp
from .process import ManagedProcess

# On Debian the commands on PATH are wrappers. They require the user root or rabbitmq, and use the system's data
# directory. The scripts behind them do neither.
DEBIAN_SCRIPTS = Path("/usr/lib/rabbitmq/bin")
SETTINGS = ROOT / "deploy" / "rabbitmq" / "sublet.conf"
SYSTEM_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin"


def find_script(name: str) -> str | None:
    debian = DEBIAN_SCRIPTS / name
    return str(debian) if debian.exists() else shutil.which(name, path=SYSTEM_PATH)


@dataclass(frozen=True)
class Node:
    """The configuration of one broker node. `tests/support/clusters.py` combines several into a cluster."""

    name: str = "sublet"
    address: str = "127.0.0.1"
    """The address that other nodes use. It is not a host name, because bare machines cannot resolve their own."""
    client_address: str = "127.0.0.1"
    vhost: str = "/"
    enter: tuple[str, ...] = ()
    """The command that runs a program in the network of the node."""
    settings: str = ""
    """Additional lines of its configuration."""
    erlang_arguments: str = ""

    @property
    def full_name(self) -> str:
        return f"{self.name}@{self.address}"


class PortMapper:
    """Erlang's port mapper (epmd), by which nodes find each other. If Erlang started it, it would remain as a daemon
    without a known process id."""

    def __init__(self, port: int, directory: Path, log_dir: Path, node: Node) -> None:
        self.port = port
        self._node = node
        self._process = ManagedProcess("epmd", directory, log_dir / "epmd.log")

    @property
    def running(self) -> bool:
        return self._process.pid is not None

    def start(self) -> None:
        if not self.running:
            arguments = [*self._node.enter, _required("epmd"), "-address", self._node.address, "-port", str(self.port)]
            self._process.start(arguments, os.environ | {"PATH": SYSTEM_PATH})

    def stop(self) -> None:
        self._process.stop()

    def kill(self) -> None:
        self._process.kill()


class RabbitServer:
    """A broker that keeps its state and port over stop, kill and start. It does not stop a given ``mapper``."""

    name = "rabbitmq"

    def __init__(
        self, base_dir: Path, log_dir: Path | None = None, *, node: Node | None = None, mapper: PortMapper | None = None
    ) -> None:
        self.base_dir = base_dir.resolve()
        self.node = node or Node()
        logs = log_dir or self.base_dir / "logs"
        self._ports = remembered_ports(self.base_dir / "ports.json", "amqp", "distribution", "epmd")
        self._broker = ManagedProcess(self.name, self.base_dir, logs / "rabbitmq.log")
        self._own_mapper = None if mapper else PortMapper(self._ports["epmd"], self.base_dir, logs, self.node)
        self._mapper_port = mapper.port if mapper else self._ports["epmd"]

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@{self.node.client_address}:{self.port}/{self.node.vhost.removeprefix('/')}"

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
        return "ok" if speaks_amqp(self.node.client_address, self.port) else "not ready: no answer"

    def start(self, timeout: float = 120.0) -> None:
        """Start the broker if it is not running, and wait until clients can connect."""
        if self.pid is None:
            self._check_ports()
            self._write_configuration()
            if self._own_mapper:
                self._own_mapper.start()
            self._broker.start([*self.node.enter, _required("rabbitmq-server")], self._environment())
        self._broker.wait_until_ready(lambda: speaks_amqp(self.node.client_address, self.port), timeout)

    def stop(self) -> None:
        self._broker.stop(grace=30)
        if self._own_mapper:
            self._own_mapper.stop()

    def kill(self) -> None:
        """Kill the broker, as a power failure would."""
        self._broker.kill()
        if self._own_mapper:
            self._own_mapper.kill()

    def restart(self) -> None:
        self.stop()
        self.start()

    def ctl(self, *arguments: str) -> str:
        """What `rabbitmqctl` of this broker answers."""
        done = subprocess.run(
            [*self.node.enter, _required("rabbitmqctl"), "--quiet", *arguments],
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
        ours = {"epmd"} if self._own_mapper is None or self._own_mapper.running else set()
        for name, port in self._ports.items():
            if name not in ours and not is_free(port):
                raise LocalError(
                    f"Another program has taken port {port} ({name}) of the RabbitMQ in {self.base_dir}: "
                    f"end it, or remove that directory to start afresh on another port."
                )

    def _write_configuration(self) -> None:
        (self.base_dir / "rabbitmq.conf").write_text(
            f"{SETTINGS.read_text()}\n"
            f"listeners.tcp.local = {self.node.client_address}:{self.port}\n"
            "log.file = false\n"
            "log.console = true\n"
            "log.console.level = info\n"
            "disk_free_limit.absolute = 50MB\n"
            f"{self.node.settings}\n"
        )
        (self.base_dir / "enabled_plugins").write_text("[].\n")
        # Empty, and named in the environment, so that the settings of the system's own broker are not read.
        (self.base_dir / "rabbitmq-env.conf").write_text("")

    def _environment(self) -> dict[str, str]:
        base = str(self.base_dir)
        interface = "{" + self.node.address.replace(".", ",") + "}"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RABBITMQ_")}
        return inherited | {
            "PATH": SYSTEM_PATH,
            "HOME": base,  # the Erlang cookie lives there
            "ERL_EPMD_ADDRESS": self.node.address,
            "ERL_EPMD_PORT": str(self._mapper_port),
            "RABBITMQ_USE_LONGNAME": "true",
            "RABBITMQ_NODENAME": self.node.full_name,
            "RABBITMQ_DIST_PORT": str(self._ports["distribution"]),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"-kernel inet_dist_use_interface {interface} "
            + self.node.erlang_arguments,
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
