import pytest
import torch


@pytest.fixture(autouse=True)
def flags_may_be_set():
    """Once a test has imported torch.testing._internal, it forbids setting global flags in this process."""
    with torch.backends.__allow_nonbracketed_mutation():
        yield
