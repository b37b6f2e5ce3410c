"""The workflows under test. They write into the ledger what they did, and work for as long as a gate is shut."""

from acceptance.workflows.base import *  # noqa: F403
from acceptance.workflows.dags import *  # noqa: F403
from acceptance.workflows.data import *  # noqa: F403
from acceptance.workflows.failing import *  # noqa: F403
from acceptance.workflows.families import *  # noqa: F403
from acceptance.workflows.listening import *  # noqa: F403
from acceptance.workflows.releasing import *  # noqa: F403
from acceptance.workflows.waiting import *  # noqa: F403
