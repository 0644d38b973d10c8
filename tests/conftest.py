"""What every test shares: one thread, no network, and model folders at tiny size."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library of the Hub is imported

from pathlib import Path

import pytest
import torch

from tests import tiny

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like assets/models with both domains at tiny size; read only: copy what a test changes."""
    root = tmp_path_factory.mktemp("models")
    for seed, domain in enumerate(tiny.CLASSES):
        tiny.make_domain_folder(root / domain, domain, seed=seed)
    return root
