"""The worker: the one place that holds bytes and maths together, and that touches a device."""

from streammerge.worker.census import count_task
from streammerge.worker.compared import MeasuredPair, measure_pair
from streammerge.worker.factors import held_window
from streammerge.worker.job import (
    Job,
    TaskStoppedError,
    find_device,
    fingerprint,
    measure_process,
    one_thread_each,
    rule_problem,
    warm_up,
)
from streammerge.worker.lanes import Lanes
from streammerge.worker.member import Errand, Member, packed, unpacked
from streammerge.worker.receipt import Certificate, Receipt
from streammerge.worker.run import Perform, run_task
from streammerge.worker.spectra import Spectrum, spectra_of
from streammerge.worker.work import Part

__all__ = [
    "Certificate",
    "Errand",
    "Job",
    "Lanes",
    "MeasuredPair",
    "Member",
    "Part",
    "Perform",
    "Receipt",
    "Spectrum",
    "TaskStoppedError",
    "count_task",
    "find_device",
    "fingerprint",
    "held_window",
    "measure_pair",
    "measure_process",
    "one_thread_each",
    "packed",
    "rule_problem",
    "run_task",
    "spectra_of",
    "unpacked",
    "warm_up",
]
