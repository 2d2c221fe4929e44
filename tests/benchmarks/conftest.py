import pytest
import torch


@pytest.fixture(autouse=True)
def flags_may_be_set():
    """torch.testing._internal, once another test of the process has imported it, forbids to set torch's global flags."""
    with torch.backends.__allow_nonbracketed_mutation():
        yield
