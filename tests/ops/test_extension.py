"""The compiled kernels: why they cannot be used, in words that say nothing of where they are."""

from pecker_fast.ops import extension


def test_a_library_that_cannot_be_loaded(tmp_path, monkeypatch):
    path = tmp_path / "_C.so"
    path.write_bytes(b"no library")
    monkeypatch.setattr(extension, "library_path", lambda backend: path)
    # What earlier calls found is kept elsewhere.
    reason = extension.why_missing.__wrapped__("cpu")
    assert reason.startswith("_C.so cannot be loaded") and str(tmp_path) not in reason
