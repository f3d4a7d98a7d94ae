"""The law of imports: mathematics knows no ranks, sharding knows no Muon, hosts stay in their integrations, and nothing goes in circles."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
# What the modules of a room may import of ours; "optimizer" is the modules of muon_dist/ itself.
MATHEMATICS = {"polar", "rules", "sharding", "spectrum"}
ALLOWED = {
    "polar": {"polar"},
    "rules": {"rules", "polar"},
    "sharding": {"sharding"},
    "spectrum": {"spectrum", "polar"},
    "run": {"run"},
    "example": {"example"},
    "optimizer": MATHEMATICS | {"run", "optimizer"},
    "integrations": MATHEMATICS | {"run", "optimizer", "integrations"},
    "planner": MATHEMATICS | {"optimizer", "planner"},
    "show": MATHEMATICS | {"run", "optimizer", "planner", "show"},
    "bench": MATHEMATICS | {"run", "optimizer", "planner", "show", "example", "integrations", "bench"},
    "cli": MATHEMATICS | {"run", "optimizer", "planner", "show", "bench", "cli"},
    "launch": MATHEMATICS | {"run", "optimizer", "planner", "show", "example", "integrations"},
}
OPTIONAL = {"matplotlib", "wandb", "safetensors", "mpi4py", "triton"}  # imported only by the function that needs one
HOSTS = {"deepspeed", "megatron", "transformers", "accelerate", "lightning"}
# The rooms that know hosts, each with those that it may import.
KNOWING = {"bench": HOSTS, "example": {"megatron"}, "launch": HOSTS}
INTEGRATIONS = {"deepspeed": {"deepspeed"}, "megatron": {"megatron"}, "transformers": {"transformers"}}


def imported_as(path: Path) -> tuple[str, ...]:
    """What a file of ours is imported as; launch/ is a folder of scripts, which import each other by their names."""
    folder, *parts = path.relative_to(ROOT).with_suffix("").parts
    return {"integrations": ("muon_dist", "integrations", *parts), "launch": (*parts,)}.get(folder, (folder, *parts))


FILES = {
    ".".join(part for part in imported_as(path) if part != "__init__"): path
    for folder in ("muon_dist", "integrations", "launch")
    for path in (ROOT / folder).rglob("*.py")
}
ROOMS = {path.name for path in (ROOT / "muon_dist").iterdir() if path.is_dir() and path.name != "__pycache__"} | {"integrations"}


def room_of(name: str) -> str:
    """The room of a dotted name of ours."""
    parts = name.split(".")
    return "launch" if parts[0] != "muon_dist" else parts[1] if len(parts) > 1 and parts[1] in ROOMS else "optimizer"


def imports(path: Path) -> set[str]:
    """Absolute dotted names of everything a file imports."""
    package = imported_as(path)[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            names |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return names


def test_rooms_import_only_what_the_law_allows() -> None:
    assert len(FILES) > 100 and set(ALLOWED) == ROOMS | {"optimizer", "launch"}
    for name, path in FILES.items():
        room = room_of(name)
        ours = {room_of(other) for other in imports(path) if other.startswith("muon_dist.")}
        assert ours <= ALLOWED[room], f"{path} imports {ours - ALLOWED[room]}"
        if room != "integrations":
            hosts = {other.split(".")[0] for other in imports(path)} & HOSTS
            assert hosts <= KNOWING.get(room, set()), f"{path} imports {hosts}"


def test_no_file_imports_one_that_imports_it() -> None:
    """No circles, of any length, imports for types and inside functions included."""
    graph = {name: {other for other in imports(path) if other in FILES and other != name} for name, path in FILES.items()}
    # a package that gathers names from its files is no part of what these files need
    graph = {name: {other for other in needed if not name.startswith(f"{other}.")} for name, needed in graph.items()}
    while leaves := {name for name, needed in graph.items() if not needed}:
        graph = {name: needed - leaves for name, needed in graph.items() if name not in leaves}
    assert not graph, f"circles among {sorted(graph)}"


def test_integrations_import_their_own_host_only() -> None:
    rooms = {path.parent.name for path in (ROOT / "integrations").glob("*/__init__.py")}
    assert rooms == set(INTEGRATIONS)
    for path in (ROOT / "integrations").glob("*/*.py"):
        names = {name.split(".")[0] for name in imports(path)}
        assert names & HOSTS <= INTEGRATIONS[path.parent.name], f"{path} imports {names & HOSTS}"
    for path in (ROOT / "integrations").glob("*.py"):  # what they share
        assert not {name.split(".")[0] for name in imports(path)} & HOSTS, f"{path} imports a host framework"


def test_the_reference_imports_torch_only() -> None:
    assert {name.split(".")[0] for name in imports(ROOT / "tests" / "reference.py")} <= {"torch", "math"}
    assert len((ROOT / "tests" / "reference.py").read_text().splitlines()) <= 110


def test_the_library_needs_only_torch_and_numpy() -> None:
    import sys

    for path in (ROOT / "muon_dist").rglob("*.py"):
        outside = {name.split(".")[0] for name in imports(path)} - {"muon_dist", "torch", "numpy", *sys.stdlib_module_names}
        assert outside <= OPTIONAL | KNOWING.get(path.parent.name, set()), f"{path} imports {outside}"
        nodes = ast.parse(path.read_text()).body
        if path.name == "kernels.py":  # needs Triton as a whole, and is itself imported only by the function that needs it
            continue
        assert not [node for node in nodes if isinstance(node, ast.ImportFrom) and (node.module or "").endswith("kernels")]
        at_the_top = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        assert not at_the_top & (OPTIONAL | HOSTS), f"{path} needs {at_the_top & (OPTIONAL | HOSTS)} to be imported"
