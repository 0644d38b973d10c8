"""The house's rules, read from the code itself: arrows run one way, names say something, no file can run a pickle."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Rooms from the door inwards. A room may import rooms that stand below it, and those on its own level that are named.
LEVELS: dict[str, int] = {
    "app": 7,
    "medviz.ui": 6,
    "medviz": 5,  # the package's own __init__, which only re-exports
    "medviz.studio": 5,
    "medviz.workbench": 4,
    "medviz.generation": 3,
    "medviz.grounding": 3,
    "medviz.rewards": 3,
    "medviz.evidence": 3,
    "medviz.audit": 3,
    "medviz.export": 3,
    "medviz.study": 3,
    "medviz.results": 2,
    "medviz.rendering": 2,
    "medviz.models": 2,
    "medviz.domains": 2,
    "medviz.images": 1,
    "medviz.dicom": 1,
    "medviz.limits": 1,
    "medviz.serving": 1,
    "medviz.errors": 0,
}
SAME_LEVEL = {
    ("medviz", "medviz.studio"),
    ("medviz.images", "medviz.limits"),
    ("medviz.images", "medviz.dicom"),
    ("medviz.dicom", "medviz.limits"),
    ("medviz.generation", "medviz.grounding"),
    ("medviz.export", "medviz.audit"),
}
# Rooms the UI may know beside the studio: plain words, limits and drawing, but nothing that computes with a model.
UI_MAY_IMPORT = {
    "medviz.studio",
    "medviz.results",
    "medviz.rendering",
    "medviz.domains",
    "medviz.study",
    "medviz.export",
    "medviz.limits",
    "medviz.errors",
    "medviz.images",
    "medviz.ui",
    "medviz",
}
FORBIDDEN_WORDS = {"data", "tmp", "util", "utils", "helper", "helpers", "manager", "process", "misc", "common", "stuff"}
MAX_LINES = 400


@cache
def sources(*folders: str) -> tuple[Path, ...]:
    """Python files of the program, app.py included when no folder is named."""
    chosen = folders or ("medviz", "train")
    files = [path for folder in chosen for path in sorted((ROOT / folder).rglob("*.py"))]
    if not folders and (ROOT / "app.py").exists():
        files.append(ROOT / "app.py")
    return tuple(files)


def name_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def imports_of(path: Path) -> tuple[tuple[str, int], ...]:
    """(dotted name, line) of every import that runs, also those inside functions; type-checking blocks do not run."""
    return tuple(_imports_of(path))


def _imports_of(path: Path) -> Iterator[tuple[str, int]]:
    skipped = {
        id(inner)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree_of(path)):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name_of(path).split(".")
                if path.name != "__init__.py":
                    package = package[:-1]
                package = package[: len(package) - (node.level - 1)]
                base = ".".join([*package, base] if base else package)
            for alias in node.names:
                dotted = f"{base}.{alias.name}"
                yield (dotted if is_module(dotted) else base), node.lineno


def is_module(dotted: str) -> bool:
    place = ROOT / dotted.replace(".", "/")
    return place.with_suffix(".py").exists() or (place / "__init__.py").exists()


def room_of(dotted: str) -> str:
    """The room a module stands in: `medviz.NAME`, or the whole of `train`, `app` or a library."""
    parts = dotted.split(".")
    if parts[0] == "train":
        return "train"
    return ".".join(parts[:2]) if parts[0] == "medviz" else parts[0]


def arrows() -> Iterator[tuple[str, str, str]]:
    for path in sources():
        here = name_of(path)
        for there, line in imports_of(path):
            if there.split(".")[0] in ("medviz", "train", "app"):
                yield room_of(here), room_of(there), f"{path.relative_to(ROOT)}:{line} imports {there}"


def test_every_module_stands_in_a_known_room() -> None:
    rooms = {room_of(name_of(path)) for path in sources()}
    assert rooms - {"train"} <= set(LEVELS), "a new room needs its place in LEVELS and in ARCHITECTURE.md"


def test_arrows_run_one_way() -> None:
    wrong = []
    for here, there, where in arrows():
        if here == "train" or here == there:
            continue
        if there == "medviz" or here not in LEVELS:
            continue
        if there not in LEVELS or (LEVELS[there] >= LEVELS[here] and (here, there) not in SAME_LEVEL):
            wrong.append(where)
    assert not wrong, "\n".join(dict.fromkeys(wrong))


def test_ui_reaches_models_only_through_the_studio() -> None:
    wrong = [where for here, there, where in arrows() if here == "medviz.ui" and there not in UI_MAY_IMPORT]
    assert not wrong, "\n".join(wrong)


def test_the_door_opens_only_the_studio_and_the_ui() -> None:
    allowed = {"medviz", "medviz.studio", "medviz.ui", "medviz.serving", "medviz.limits", "medviz.errors"}
    wrong = [where for here, there, where in arrows() if here == "app" and there not in allowed]
    assert not wrong, "\n".join(wrong)


def test_only_the_ui_and_the_door_know_gradio() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sources()
        for there, line in imports_of(path)
        if there.split(".")[0] in ("gradio", "gradio_client") and room_of(name_of(path)) not in ("medviz.ui", "app")
    ]
    assert not wrong, "\n".join(wrong)


def test_inference_knows_no_training_library() -> None:
    training_only = {"accelerate", "datasets", "tyro", "tensorboard", "torchmetrics", "pyarrow", "yaml"}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {there}"
        for path in sources("medviz")
        for there, line in imports_of(path)
        if there.split(".")[0] in training_only
    ]
    assert not wrong, "\n".join(wrong)


def test_no_two_rooms_import_each_other() -> None:
    pairs = {(here, there) for here, there, _ in arrows() if here != there and there != "medviz"}
    both = sorted((a, b) for a, b in pairs if (b, a) in pairs and a < b)
    assert not both


def test_importing_medviz_is_light() -> None:
    """In a fresh interpreter, so that what other tests imported does not count."""
    question = (
        "import sys, medviz; "
        "print(sorted({m.split('.')[0] for m in sys.modules} & "
        "{'gradio', 'train', 'accelerate', 'torch', 'diffusers', 'transformers', 'matplotlib', 'pydicom'}))"
    )
    answer = subprocess.run([sys.executable, "-c", question], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


@pytest.mark.skipif(not (ROOT / "medviz" / "studio.py").exists(), reason="medviz/studio.py does not exist")
def test_importing_the_studio_needs_neither_gradio_nor_training() -> None:
    question = (
        "import sys, medviz.studio, medviz.images; "
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'gradio', 'train', 'torchmetrics', 'tyro', 'pydicom'}))"
    )
    answer = subprocess.run([sys.executable, "-c", question], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def words_of(name: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def test_files_and_folders_have_names_that_say_something() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for path in sources()
        if FORBIDDEN_WORDS & {word for part in path.relative_to(ROOT).with_suffix("").parts for word in words_of(part)}
    ]
    assert not wrong, wrong


def test_classes_functions_and_variables_have_names_that_say_something() -> None:
    """A class may not contain such a word (`ModelManager`), a function or variable may not be called one.

    A dataclass field may: it is read with its owner's name (`objective.process`, the diffusion process it replays).
    """
    wrong = []
    for path in sources():
        fields = {
            id(line.target)
            for node in ast.walk(tree_of(path))
            if isinstance(node, ast.ClassDef)
            for line in node.body
            if isinstance(line, ast.AnnAssign)
        }
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef):
                bad = FORBIDDEN_WORDS & words_of(node.name)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                bad = FORBIDDEN_WORDS & {node.name.lower().strip("_")}
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and id(node) not in fields:
                bad = FORBIDDEN_WORDS & {node.id.lower()}
            elif isinstance(node, ast.arg):
                bad = FORBIDDEN_WORDS & {node.arg.lower()}
            else:
                continue
            if bad:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {sorted(bad)}")
    assert not wrong, "\n".join(wrong)


def test_no_pickle_is_ever_loaded() -> None:
    wrong = []
    for path in sources():
        where = path.relative_to(ROOT)
        for there, line in imports_of(path):
            if there.split(".")[0] in ("pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"):
                wrong.append(f"{where}:{line} imports {there}")
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called == "torch.load" and keywords.get("weights_only") != "True":
                wrong.append(f"{where}:{node.lineno} torch.load without weights_only=True")
            if called in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False":
                wrong.append(f"{where}:{node.lineno} {called} with allow_pickle")
            if keywords.get("use_safetensors", "True") not in ("True",):
                wrong.append(f"{where}:{node.lineno} {called} with use_safetensors={keywords['use_safetensors']}")
            if keywords.get("safe_serialization", "True") not in ("True",):
                wrong.append(f"{where}:{node.lineno} {called} with safe_serialization off")
            if keywords.get("trust_remote_code", "False") != "False":
                wrong.append(f"{where}:{node.lineno} {called} with trust_remote_code")
            if called in ("eval", "exec", "yaml.load", "yaml.unsafe_load"):
                wrong.append(f"{where}:{node.lineno} {called}")
    assert not wrong, "\n".join(wrong)


def test_no_section_divider_comments() -> None:
    wrong = []
    for path in sources():
        for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
            if token.type == tokenize.COMMENT and re.search(r"[-=#*~]{4,}", token.string):
                wrong.append(f"{path.relative_to(ROOT)}:{token.start[0]}")
    assert not wrong, "\n".join(wrong)


def test_files_stay_short_enough_to_read() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for path in sources()
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert not long


def test_inference_has_no_assert_on_input_and_no_print() -> None:
    wrong = []
    for path in sources():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Assert) or (isinstance(node, ast.Call) and ast.unparse(node.func) == "print"):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong, "\n".join(wrong)


def test_shipped_model_folders_hold_no_pickle() -> None:
    suffixes = {".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle", ".joblib"}
    assert not [str(path) for path in (ROOT / "assets").rglob("*") if path.suffix in suffixes]


def test_the_rules_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks above, held against a house that breaks each of them."""
    broken = {
        "medviz/__init__.py": "",
        "medviz/errors.py": "from medviz.models import library\n",
        "medviz/models/__init__.py": "",
        "medviz/models/library.py": "import torch\nimport gradio\nimport pickle\nweights = torch.load('x')\n",
        "medviz/ui/__init__.py": "from ..models import library\n",
        "medviz/generation/__init__.py": "def f():\n    import train.loop\n",
        "medviz/utils.py": "class ModelManager:\n    pass\n",
        "train/__init__.py": "",
        "train/loop.py": "data = 1\n# ---- part ----\nassert data\n",
    }
    for name, text in broken.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    sources.cache_clear()
    try:
        for rule in (
            test_every_module_stands_in_a_known_room,
            test_only_the_ui_and_the_door_know_gradio,
            test_ui_reaches_models_only_through_the_studio,
            test_no_two_rooms_import_each_other,
            test_files_and_folders_have_names_that_say_something,
            test_classes_functions_and_variables_have_names_that_say_something,
            test_no_pickle_is_ever_loaded,
            test_no_section_divider_comments,
            test_inference_has_no_assert_on_input_and_no_print,
        ):
            if rule is test_no_two_rooms_import_each_other:
                (tmp_path / "medviz/models/__init__.py").write_text("import medviz.errors\n")
                tree_of.cache_clear()
                imports_of.cache_clear()
            with pytest.raises(AssertionError):
                rule()
        (tmp_path / "medviz/utils.py").unlink()
        sources.cache_clear()
        with pytest.raises(AssertionError) as caught:
            test_arrows_run_one_way()
        assert "medviz/errors.py:1" in str(caught.value)
        assert "medviz/generation/__init__.py:2" in str(caught.value)
    finally:
        for cached in (sources, tree_of, imports_of):
            cached.cache_clear()
