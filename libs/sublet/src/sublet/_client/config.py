"""Settings of clients and workers."""

from __future__ import annotations

import logging

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class ClientConfig(BaseSettings):
    """Settings from arguments, environment variables (prefix ``SUBLET_``) and files.

    In order of precedence: arguments, environment variables, ``.env.local``, ``.env.dev``, ``.env.sublet``, ``.env``.
    """

    model_config = SettingsConfigDict(
        env_prefix="SUBLET_",
        env_file=(".env", ".env.sublet", ".env.dev", ".env.local"),
        extra="ignore",
        arbitrary_types_allowed=True,
    )

    amqp_url: str = Field("amqp://guest:guest@127.0.0.1:5672/", repr=False)
    """Address of RabbitMQ; ``amqps://`` for TLS. Several addresses are separated by commas and tried in turn."""
    namespace: str = ""
    """Prefix for the names of workflows, events and workers, so that several teams can share one installation."""
    logger: logging.Logger = Field(default_factory=lambda: logging.getLogger("sublet"))
    connect_timeout_s: float = Field(30.0, gt=0)
    """Seconds that a call waits for the first connection before it raises `TransportUnavailable`."""
    publish_timeout_s: float = Field(60.0, gt=0)
    """Seconds for which publishing a message is retried, also after reconnects, until RabbitMQ has confirmed it. The
    default is longer than the 30 s after which a dead connection is noticed."""
    query_timeout_s: float = Field(15.0, gt=0)
    """Seconds that ``runs.get`` and other queries wait for an answer before they raise `TransportUnavailable`."""

    @field_validator("namespace")
    @classmethod
    def _end_with_underscore(cls, namespace: str) -> str:
        namespace = namespace.lower()
        return namespace if not namespace or namespace.endswith("_") else f"{namespace}_"

    def apply_namespace(self, resource_name: str, namespace_override: str | None = None) -> str:
        """The name with the namespace as prefix. A name that has the prefix already is returned unchanged."""
        namespace = self.namespace if namespace_override is None else namespace_override
        return resource_name if resource_name.startswith(namespace) else namespace + resource_name
