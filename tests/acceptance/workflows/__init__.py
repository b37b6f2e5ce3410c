"""The workflows under test. They write into the journal what they did, and work for as long as a gate is shut."""

from acceptance.workflows.base import *  # noqa: F403
from acceptance.workflows.children import *  # noqa: F403
from acceptance.workflows.dags import *  # noqa: F403
from acceptance.workflows.data import *  # noqa: F403
from acceptance.workflows.events import *  # noqa: F403
from acceptance.workflows.failures import *  # noqa: F403
from acceptance.workflows.slot_release import *  # noqa: F403
from acceptance.workflows.waits import *  # noqa: F403
