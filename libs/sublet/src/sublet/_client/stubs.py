"""``client.stubs``: run workflows and tasks whose code is in another program."""

from __future__ import annotations

from typing import Any, overload

from sublet._client.config import ClientConfig
from sublet._client.connection import Connection
from sublet._declare.base import WorkflowConfig
from sublet._declare.standalone import Standalone
from sublet._declare.types import JSON, EmptyModel, In, R
from sublet._declare.workflow import Workflow


class StubsClient:
    """Makes stubs: workflows and standalone tasks that can be run, but not registered with a worker."""

    def __init__(self, connection: Connection, config: ClientConfig) -> None:
        self._connection = connection
        self._config = config

    @overload
    def workflow(
        self, *, name: str, input_validator: None = ..., default_additional_metadata: JSON | None = ...
    ) -> Workflow[EmptyModel]: ...

    @overload
    def workflow(
        self, *, name: str, input_validator: type[In], default_additional_metadata: JSON | None = ...
    ) -> Workflow[In]: ...

    def workflow(
        self, *, name: str, input_validator: Any = None, default_additional_metadata: JSON | None = None
    ) -> Workflow[Any]:
        """A stub of the workflow with this name.

        Args:
            name: without namespace.
            input_validator: type of the input. None accepts any JSON object.
            default_additional_metadata: metadata of every run that is started by this stub.
        """
        return Workflow(_declared(name, input_validator, default_additional_metadata), self._connection, self._config)

    @overload
    def task(
        self,
        *,
        name: str,
        input_validator: None = ...,
        output_validator: None = ...,
        default_additional_metadata: JSON | None = ...,
    ) -> Standalone[EmptyModel, EmptyModel]: ...

    @overload
    def task(
        self,
        *,
        name: str,
        input_validator: type[In],
        output_validator: None = ...,
        default_additional_metadata: JSON | None = ...,
    ) -> Standalone[In, EmptyModel]: ...

    @overload
    def task(
        self,
        *,
        name: str,
        input_validator: None = ...,
        output_validator: type[R],
        default_additional_metadata: JSON | None = ...,
    ) -> Standalone[EmptyModel, R]: ...

    @overload
    def task(
        self,
        *,
        name: str,
        input_validator: type[In],
        output_validator: type[R],
        default_additional_metadata: JSON | None = ...,
    ) -> Standalone[In, R]: ...

    def task(
        self,
        *,
        name: str,
        input_validator: Any = None,
        output_validator: Any = None,
        default_additional_metadata: JSON | None = None,
    ) -> Standalone[Any, Any]:
        """A stub of the standalone task with this name.

        Args:
            name: without namespace.
            input_validator: type of the input. None accepts any JSON object.
            output_validator: type of the results. None: an `EmptyModel` with the fields of the output.
            default_additional_metadata: metadata of every run that is started by this stub.
        """
        declared = _declared(name, input_validator, default_additional_metadata)
        return Standalone(declared, self._connection, self._config, output_validator or EmptyModel)


def _declared(name: str, input_validator: Any, default_additional_metadata: JSON | None) -> WorkflowConfig:
    return WorkflowConfig(
        name=name,
        input_validator=input_validator or EmptyModel,
        default_additional_metadata=default_additional_metadata or {},
    )
