"""Few-shot learning: one harness for iMAML and for what it is compared with."""

from .job import Job, make_job
from .learners import LEARNERS, Learner
from .run import Accuracy, Watcher, held_out_accuracy, run
from .settings import Settings

__all__ = [
    "LEARNERS",
    "Accuracy",
    "Job",
    "Learner",
    "Settings",
    "Watcher",
    "held_out_accuracy",
    "make_job",
    "run",
]
