"""What every test shares: no network, reproducible draws, and where the real adapters lie."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Read when the libraries are imported, so they are set here and not in a fixture.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

settings.register_profile("streammerge", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("streammerge")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_adapters() -> Path:
    """The folder of adapters by many authors: $STREAMMERGE_ADAPTERS, or beside the checkout."""
    beside = REPOSITORY.parent / "shared" / "adapters"
    folder = Path(os.environ.get("STREAMMERGE_ADAPTERS", beside))
    if not folder.is_dir():
        pytest.skip(f"no folder of real adapters at {folder} (set STREAMMERGE_ADAPTERS)")
    return folder


@pytest.fixture(autouse=True)
def small_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is reserved for this process does not grow with the tests that it has run.

    It is measured in steps, so that two plans made one after the other may differ where a test
    that ran before has brought the process near to the next step. Merges in processes of their
    own measure them.
    """
    from streammerge import worker  # reads the environment that is set above
    from streammerge.budget import PROCESS_BYTES

    measure = worker.measure_process
    monkeypatch.setattr(worker, "measure_process", lambda *rules: measure(*rules) and PROCESS_BYTES)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_cuda():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))


def _has_cuda() -> bool:
    import torch  # seconds that a run without gpu tests need not pay

    return torch.cuda.is_available()
