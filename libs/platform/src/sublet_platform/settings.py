"""Settings of the services: environment variables with the prefix ``SUBLET_``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from sublet_protocol import ids


class ServiceSettings(BaseSettings):
    """The defaults fit servers on this machine, as ``deploy/local up`` starts them."""

    model_config = SettingsConfigDict(env_prefix="SUBLET_", extra="ignore")

    amqp_url: str = "amqp://guest:guest@127.0.0.1:5672/"
    mongo_url: str = "mongodb://127.0.0.1:27017/?directConnection=true"
    mongo_database: str = "sublet"
    shards: int = Field(default=4, ge=1, le=ids.BUCKETS)
    """The number of shards. The first service that starts with an empty database fixes it."""
    http_host: str = "127.0.0.1"
    http_port: int = Field(default=8080, ge=0, le=65_535)
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["console", "json"] = "console"
