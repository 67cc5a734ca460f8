"""The worker: the one place that holds bytes and maths together, and that touches a device."""

from streammerge.worker.job import (
    Job,
    TaskStoppedError,
    find_device,
    fingerprint,
    measure_process,
    one_thread_each,
    warm_up,
)
from streammerge.worker.lanes import Lanes
from streammerge.worker.receipt import Certificate, Receipt
from streammerge.worker.run import run_task

__all__ = [
    "Certificate",
    "Job",
    "Lanes",
    "Receipt",
    "TaskStoppedError",
    "find_device",
    "fingerprint",
    "measure_process",
    "one_thread_each",
    "run_task",
    "warm_up",
]
