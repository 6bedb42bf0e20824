"""What reading cannot keep: the seam between families and the rest, and the size of files."""

import ast
from pathlib import Path

import pytest

import cola_train
from cola_train.families.registry import families

PACKAGE = Path(cola_train.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# Longer than this, a file mostly holds two ideas.
MOST_LINES = 300
FOLDERS = tuple(
    f"cola_train.families.{name}"
    for name in ("cola", "transformer", "autoregressive", "masked_diffusion")
)


def classes_of_families() -> set[str]:
    """Every class that the families' own folders define."""
    trees = [ast.parse(path.read_text()) for path in FILES if path.parent.parent.name == "families"]
    return {
        node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    }


def test_no_family_is_asked_for_by_its_class_or_name_outside_its_folder() -> None:
    own = classes_of_families()
    assert {"JointRunConfig", "ColaCheckpoint", "TransformerCheckpoint", "Stage2Objective"} <= own
    found = []
    for path in FILES:
        inside = path.relative_to(PACKAGE).parts
        if inside[0] == "families" and len(inside) > 2:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            # The package's own names point at all that is public.
            if (
                path != PACKAGE / "__init__.py"
                and isinstance(node, ast.ImportFrom)
                and (node.module or "").startswith(FOLDERS)
            ):
                found.append(f"{path}: imports {node.module}")
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                asked = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
                if asked & own or any(name.endswith(("RunConfig", "Checkpoint")) for name in asked):
                    found.append(f"{path}: {ast.unparse(node)}")
            if isinstance(node, ast.Compare) and isinstance(node.comparators[0], ast.Constant):
                names = {
                    part.attr for part in ast.walk(node.left) if isinstance(part, ast.Attribute)
                }
                if node.comparators[0].value in families() and names & {"stage", "family", "name"}:
                    found.append(f"{path}: {ast.unparse(node)}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES
