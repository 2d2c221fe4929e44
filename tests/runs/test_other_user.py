"""A run as a user who may write nothing but the run's folder."""

import os
import traceback
from pathlib import Path

import pytest

import pecker_fast
from pecker_fast.diffusion import NoiseSchedule
from pecker_fast.models import save_network
from tests.diffusion.toy import tiny_unet

pytest.importorskip("sklearn")
NOBODY = 65534


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_run_writes_into_its_folder_alone(tmp_path, monkeypatch):
    """The package belongs to root here; home and the current folder cannot be written to."""
    # Python itself need not be readable for that user, so all is imported before.
    import encodings.unicode_escape  # noqa: F401 -- of model cards

    import matplotlib.backends.backend_agg
    import matplotlib.pyplot  # noqa: F401

    from pecker_fast.runs.task import unlearn_arguments
    from pecker_fast.runs.unlearn import unlearn

    save_network(tmp_path / "network", tiny_unet(), NoiseSchedule.linear())
    (tmp_path / "runs").mkdir()
    os.chown(tmp_path / "runs", NOBODY, NOBODY)
    # Those that pytest made, one more if there are workers.
    made = [folder for folder in tmp_path.parents[:3] if folder.name.startswith(("pytest-", "popen-"))]
    for folder in (tmp_path, *made):
        os.chmod(folder, 0o755)
    package = Path(pecker_fast.__file__).parent
    before = files(package)
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "runs" / "matplotlib"))
    options = {"max_train_steps": 2, "train_batch_size": 2, "forget_batch_size": 2, "saliency_batch_size": 2}
    place = {"pretrained_model_name_or_path": str(tmp_path / "network"), "output_dir": str(tmp_path / "runs" / "a")}
    args = unlearn_arguments("digits", "pecker", {**options, **place, "evaluate": False, "progress_bar": False})
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.chdir("/")
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            unlearn(args)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert (tmp_path / "runs" / "a" / "report.md").is_file() and not (tmp_path / "runs" / "a" / ".lock").exists()
    assert files(package) == before and sorted(os.listdir(tmp_path)) == ["network", "runs"]
