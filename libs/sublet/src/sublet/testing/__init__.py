"""Test your workflows without any server, and without waiting: see libs/sublet/docs/testing.md.

Needs ``pip install "sublet[testing]"``.
"""

from sublet.testing.driver import NothingWillHappen
from sublet.testing.environment import SubletTestEnvironment
from sublet.testing.exports import aio_export_log, export_log
from sublet.testing.replaying import Divergence, ReplayReport, replay
from sublet.testing.workers import EnvironmentWorker

__all__ = [
    "Divergence",
    "EnvironmentWorker",
    "NothingWillHappen",
    "ReplayReport",
    "SubletTestEnvironment",
    "aio_export_log",
    "export_log",
    "replay",
]
