"""The law of imports: mathematics knows no ranks, sharding knows no Muon, and hosts stay in their integrations."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
# What the modules of a room may import of ours. Everything else in muon_dist/ is the optimizer and may import all three.
ALLOWED = {"polar": {"polar"}, "sharding": {"sharding"}, "spectrum": {"spectrum", "polar"}, "run": {"run"}}
OPTIONAL = {"matplotlib", "wandb", "safetensors", "mpi4py", "triton"}  # imported only by the function that needs one
HOSTS = {"deepspeed", "megatron", "transformers", "accelerate", "lightning"}
# The rooms of integrations/, each with the hosts that it may import.
INTEGRATIONS = {"deepspeed": {"deepspeed"}, "megatron": {"megatron"}, "transformers": {"transformers"}}


def imports(path: Path) -> set[str]:
    """Absolute dotted names of everything a file imports."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
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
    files = list((ROOT / "muon_dist").rglob("*.py"))
    assert len(files) > 15
    for path in files:
        room = path.relative_to(ROOT / "muon_dist").parts[0]
        ours = {name.split(".")[1] for name in imports(path) if name.startswith("muon_dist.")}
        if room in ALLOWED:
            assert ours <= ALLOWED[room], f"{path} imports {ours - ALLOWED[room]}"
        elif room not in ("cli", "bench"):
            assert not ours & {"cli", "bench", "integrations"}, f"{path} imports {ours}"
        if room != "bench":
            assert not {name.split(".")[0] for name in imports(path)} & HOSTS, f"{path} imports a host framework"


def test_integrations_import_their_own_host_only() -> None:
    rooms = {path.parent.name for path in (ROOT / "integrations").glob("*/__init__.py")}
    assert rooms == set(INTEGRATIONS)
    for path in (ROOT / "integrations").glob("*/*.py"):
        names = {name.split(".")[0] for name in imports(path)}
        assert names & HOSTS <= INTEGRATIONS[path.parent.name], f"{path} imports {names & HOSTS}"
        assert not {name for name in imports(path) if name.startswith(("muon_dist.cli", "muon_dist.bench"))}
    for path in (ROOT / "integrations").glob("*.py"):  # what they share
        assert not {name.split(".")[0] for name in imports(path)} & HOSTS, f"{path} imports a host framework"


def test_the_reference_imports_torch_only() -> None:
    assert {name.split(".")[0] for name in imports(ROOT / "tests" / "reference.py")} <= {"torch", "math"}
    assert len((ROOT / "tests" / "reference.py").read_text().splitlines()) <= 110


def test_the_library_needs_only_torch_and_numpy() -> None:
    import sys

    for path in (ROOT / "muon_dist").rglob("*.py"):
        outside = {name.split(".")[0] for name in imports(path)} - {"muon_dist", "torch", "numpy", *sys.stdlib_module_names}
        measured = HOSTS if path.parent.name == "bench" else set()
        assert outside <= OPTIONAL | measured, f"{path} imports {outside}"
        nodes = ast.parse(path.read_text()).body
        if path.name == "kernels.py":  # needs Triton as a whole, and is itself imported only by the function that needs it
            continue
        assert not [node for node in nodes if isinstance(node, ast.ImportFrom) and (node.module or "").endswith("kernels")]
        at_the_top = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        assert not at_the_top & (OPTIONAL | HOSTS), f"{path} needs {at_the_top & (OPTIONAL | HOSTS)} to be imported"
