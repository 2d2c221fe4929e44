"""The compiled kernels: the reason why they cannot be used, without paths."""

from pecker_fast.ops import extension


def test_a_library_that_cannot_be_loaded(tmp_path, monkeypatch):
    path = tmp_path / "_C.so"
    path.write_bytes(b"no library")
    monkeypatch.setattr(extension, "library_path", lambda backend: path)
    # Bypasses the cache of earlier calls.
    reason = extension.why_missing.__wrapped__("cpu")
    assert reason.startswith("_C.so cannot be loaded") and str(tmp_path) not in reason
