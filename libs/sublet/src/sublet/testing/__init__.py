"""Test workflows without servers and without real waiting. See libs/sublet/docs/testing.md.

Needs ``pip install "sublet[testing]"``.
"""

from sublet.testing._driver import NothingWillHappen
from sublet.testing._environment import SubletTestEnvironment
from sublet.testing._export import aio_export_log, export_log
from sublet.testing._replay import Divergence, ReplayReport, replay
from sublet.testing._workers import EnvironmentWorker

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
