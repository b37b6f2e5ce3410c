"""A whole Sublet of its own: RabbitMQ, MongoDB and the services, each a real process that a test may kill."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from deploy.localstack.paths import command

from acceptance.processes import STOP_TIMEOUT_S, Process
from support.clusters import RabbitCluster
from support.servers import MongoServer, RabbitServer

SERVICES = ("scheduler", "timer", "event-ingest")


class Stack:
    """``processes`` holds everything that was started, workers too; servers are apart, because they restart alone."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.rabbit = RabbitServer(directory / "rabbitmq", directory)
        self.mongo = MongoServer(directory / "mongodb", directory)
        self.processes: list[Process] = []
        self._started = 0

    @property
    def broker(self) -> RabbitServer:
        """One that answers, to look at queues."""
        return self.rabbit

    @property
    def variables(self) -> dict[str, str]:
        """What tells services and workers where the servers are."""
        return {"SUBLET_AMQP_URL": self.rabbit.url, "SUBLET_MONGO_URL": self.mongo.url}

    # --- starting and stopping --------------------------------------------------------------------------------

    def start_servers(self) -> None:
        self.rabbit.start()
        self.mongo.start()

    def start(self) -> None:
        """Servers and one of each service; returns when all are ready."""
        self.start_servers()
        for service in SERVICES:
            self.launch(service)
        for process in self.processes:
            process.wait_until_ready()

    def launch(self, service: str, variables: dict[str, str] | None = None) -> Process:
        """One more process of this service; does not wait until it is ready."""
        return self.run(service, [command(f"sublet-{service}")], variables or {})

    def run(self, name: str, arguments: list[str], variables: dict[str, str]) -> Process:
        """A process that is stopped with the stack."""
        self._started += 1
        name = f"{name}-{self._started}"
        process = Process(name, arguments, self.variables | variables, self.directory / f"{name}.log")
        self.processes.append(process)
        process.start()
        return process

    def forget(self, process: Process, grace_s: float = STOP_TIMEOUT_S) -> None:
        """Stop it, and speak of it no more."""
        process.stop(grace_s)
        self.processes.remove(process)

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.stop()
        self.mongo.stop()
        self.rabbit.stop()

    # --- lookup -----------------------------------------------------------------------------------------------

    def of(self, service: str) -> list[Process]:
        """The running processes of a service."""
        return [process for process in self.processes if process.name.startswith(f"{service}-") and process.running]

    def the(self, service: str) -> Process:
        (process,) = self.of(service)
        return process

    def metric(self, service: str, name: str, **labels: str) -> float:
        """Summed over the running processes of the service."""
        return sum(process.metric(name, **labels) for process in self.of(service))

    def repair(self) -> None:
        """One running process of each service again, whatever a test has done; the servers too."""
        self.start_servers()
        for service in SERVICES:
            for surplus in self.of(service)[1:]:
                self.forget(surplus)
            process = next(iter(self.of(service)), None) or self.launch(service)
            process.resume()
            process.wait_until_ready()

    def show_logs(self) -> None:
        """The end of every log, for the report of a failed test."""
        for process in self.processes:
            print(process.last_words())


class Database(Protocol):
    """A MongoDB, of one member or several."""

    @property
    def url(self) -> str: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...


class ClusterStack(Stack):
    """Services, workers and clients know all nodes. The single broker of an ordinary stack is never started."""

    def __init__(self, directory: Path, cluster: RabbitCluster, database: Database | None = None) -> None:
        super().__init__(directory)
        self.cluster = cluster
        self._database: Database = database or self.mongo

    @property
    def broker(self) -> RabbitServer:
        return self.cluster.live_node

    @property
    def variables(self) -> dict[str, str]:
        return {"SUBLET_AMQP_URL": self.cluster.url, "SUBLET_MONGO_URL": self._database.url}

    def start_servers(self) -> None:
        self.cluster.start()
        self.cluster.create_vhost()
        self._database.start()

    def stop(self) -> None:
        super().stop()
        self._database.stop()
        self.cluster.stop()
