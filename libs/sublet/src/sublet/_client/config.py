"""Settings of a client: from arguments, from the environment (prefix ``SUBLET_``) and from ``.env`` files."""

from __future__ import annotations

import logging

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class ClientConfig(BaseSettings):
    """Arguments win over environment variables, those over ``.env.local``, ``.env.dev``, ``.env.sublet``, ``.env``."""

    model_config = SettingsConfigDict(
        env_prefix="SUBLET_",
        env_file=(".env", ".env.sublet", ".env.dev", ".env.local"),
        extra="ignore",
        arbitrary_types_allowed=True,
    )

    amqp_url: str = Field("amqp://guest:guest@127.0.0.1:5672/", repr=False)
    """Where RabbitMQ is; ``amqps://`` for TLS. The only address that clients and workers need."""
    namespace: str = ""
    """Put before the names of workflows, events and workers, so that several teams can share one Sublet."""
    logger: logging.Logger = Field(default_factory=lambda: logging.getLogger("sublet"))
    connect_timeout_s: float = Field(30.0, gt=0)
    """How long a call waits for the first connection before it raises."""
    publish_timeout_s: float = Field(60.0, gt=0)
    """How long a message is sent again and again, over reconnects, until the broker has confirmed it. Longer than it
    takes to notice that a connection has died without a word (half a minute)."""
    query_timeout_s: float = Field(15.0, gt=0)
    """How long questions (``runs.get`` and the like) wait for an answer."""

    @field_validator("namespace")
    @classmethod
    def _end_with_underscore(cls, namespace: str) -> str:
        namespace = namespace.lower()
        return namespace if not namespace or namespace.endswith("_") else f"{namespace}_"

    def apply_namespace(self, resource_name: str, namespace_override: str | None = None) -> str:
        """The name with its namespace in front, unless it already begins with it."""
        namespace = self.namespace if namespace_override is None else namespace_override
        return resource_name if resource_name.startswith(namespace) else namespace + resource_name
