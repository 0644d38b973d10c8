"""Studies that several tests read."""

from pathlib import Path

import pytest

from medviz.study import Study
from medviz.study.protocol import Protocol
from tests.study.studies import make_study, real_folder_of


@pytest.fixture(scope="session")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A frozen study of all phases, 12 cases and 10 real images; read only: answers go into another database."""
    folder = tmp_path_factory.mktemp("study") / "dermatology"
    make_study(folder, cases=12, real=10)
    return folder


@pytest.fixture
def study(study_folder: Path, tmp_path: Path) -> Study:
    return Study(study_folder, real_folder_of(study_folder), tmp_path / "answers.sqlite")


@pytest.fixture
def protocol(study: Study) -> Protocol:
    return study.protocol
