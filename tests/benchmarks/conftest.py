import pytest
import torch


@pytest.fixture(autouse=True)
def flags_may_be_set():
    """torch.testing._internal, once a test of this process has imported it, forbids to set global flags."""
    with torch.backends.__allow_nonbracketed_mutation():
        yield
