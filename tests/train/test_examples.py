"""Stored examples come from the models that ship and can be read back."""

import shutil

import pytest

from medviz import Studio
from medviz.domains import get_domain
from medviz.errors import InputError
from medviz.export.examples import read_examples
from train.examples import main, write_examples


@pytest.mark.timeout(120)
def test_examples_are_the_domains_prompts_as_its_models_draw_them(model_root, tmp_path, monkeypatch) -> None:
    root = tmp_path / "models"
    shutil.copytree(model_root, root)
    stale = tmp_path / "examples" / "dermatology" / "99"
    stale.mkdir(parents=True)
    few = get_domain("dermatology").examples[:2]
    monkeypatch.setattr("train.examples.get_domain", lambda name: type("Few", (), {"examples": few}))
    write_examples(Studio(root), "dermatology", stale.parent)
    pairs = read_examples(stale.parent)
    assert [(p.prompt, p.seed) for p in pairs] == [(e.prompt, e.seed) for e in few]
    assert not stale.exists()


def test_a_domain_without_models_is_named() -> None:
    with pytest.raises(InputError, match="cardiology"):
        main(["cardiology"])
