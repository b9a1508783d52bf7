"""Imports only go down, and the two planes stay apart: read from the sources with `ast`, without importing anything.

A new module must be given its layer in LAYERS, or `test_every_module_has_a_layer` fails.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "batchinfer"

# From the top down. A module may import from its own layer and from those below it.
LAYERS = {
    "entry": "cli __main__",
    "programs": "job.launch worker.__main__ worker.replica worker.source worker.sink worker.progress report display profiling "
    "bench.command bench.task bench.results bench.table bench.conditions bench.ours bench.hf bench.vllm "
    "bench.ceilings worker.peers bench.points job.outlook worker.generations worker.environment worker.isolation worker.faults",
    "machines": "engine.engine job.placing job.node job.replica job.span job.left_out job.blame job.watchdog",
    "policy": "job.plan job.verify engine.scheduler engine.batch engine.channel engine.sampler engine.logprobs "
    "engine.grammar engine.inputs engine.cuda_graphs engine.kv_memory engine.model_runner model.decoder "
    "model.loader engine.rank_check job.demand job.layout job.site job.origins job.export",
    "mechanisms": "compose memory stats job.manifest job.claims job.logs model.parallel model.peer_exchange model.layers "
    "model.rope engine.block_manager engine.ring engine.ordering data.reader data.writer data.columns "
    "data.sampling data.grammar data.tokenizer_files data.tokenizer data.chat data.prompts bench.workloads "
    "bench.floor data.partials ops ops.compiled ops.elementwise ops.attention ops.attention_plan "
    "ops.attention_pieces ops.prefix_groups ops.fused_softmax_attention ops.sampling ops.logprobs ops.skinny "
    "ops.peer_memory model.safetensors_file model.checkpoint roofline prediction job.retry job.attempts job.failure",
    "values": "config stretches publish data.results engine.sequence model.config model.rope_config model.fields job.rundir "
    "job.process job.walltime job.requeues job.vitals job.narrowing job.room",
    "facts": "checks hardware timeline data.schema ops.precision ops.reference ops.reference_attention "
    "ops.reference_penalties ops.reference_sampling ops.reference_logprobs ops.reference_linear topology",
    # Nobody imports the scripts that made the shipped files, and they import nothing but themselves.
    "scripts": "tiny.corpus tiny.train tiny.make_sample",
}
LAYER_OF = {f"batchinfer.{name}": layer for layer, names in LAYERS.items() for name in names.split()}
RANK = {layer: rank for rank, layer in enumerate(LAYERS)}

CONTROL_PLANE = (
    "cli",
    "__main__",
    "compose",
    "checks",
    "config",
    "hardware",
    "topology",
    "timeline",
    "memory",
    "roofline",
    "prediction",
    "stats",
    "stretches",
    "report",
    "display",
    "bench.command",
    "bench.task",
    "bench.results",
    "bench.table",
    "bench.conditions",
    "bench.points",
    "bench.workloads",
    "bench.floor",
    "publish",
    "job",
    "data.schema",
    "data.reader",
    "data.writer",
    "model.config",
    "model.rope_config",
    "model.fields",
    "model.checkpoint",
)
DATA_PLANE = ("worker", "engine", "model", "ops", "bench.ours", "bench.hf", "bench.vllm", "bench.ceilings")
WITHOUT_TORCH = (
    *CONTROL_PLANE,
    "engine.scheduler",
    "engine.block_manager",
    "engine.ordering",
    "engine.sequence",
    "engine.ring",
)
TORCH = {"torch", "transformers", "safetensors.torch"}
LAUNCHING = {"hydra", "omegaconf", "submitit"}


def modules() -> dict[str, Path]:
    """Dotted name to file; an empty `__init__` is only a folder and is left out."""
    found: dict[str, Path] = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(("batchinfer", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        if path.name != "__init__.py" or path.read_text().strip():
            found[name] = path
    found.pop("batchinfer", None)  # says what the package is, and imports nothing (tested below)
    return found


MODULES = modules()


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def import_nodes(node: ast.AST, inside_functions: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif is_type_checking(child) or (not inside_functions and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)):
            continue
        else:
            yield from import_nodes(child, inside_functions)


def targets(node: ast.Import | ast.ImportFrom, importer: str) -> Iterator[str]:
    """The modules that an import statement names, in full: `from a import b` is a.b when that is a module of ours."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    package = importer.split(".") if MODULES[importer].name == "__init__.py" else importer.split(".")[:-1]
    above = package[: len(package) - node.level + 1] if node.level else []
    base = ".".join([*above, *filter(None, [node.module])])
    for alias in node.names:
        full = f"{base}.{alias.name}"
        yield full if full in MODULES or not base.startswith("batchinfer") else base


@cache
def imports(name: str, inside_functions: bool = True) -> frozenset[str]:
    tree = ast.parse(MODULES[name].read_text())
    return frozenset(t for node in import_nodes(tree, inside_functions) for t in targets(node, name))


def ours(names: frozenset[str]) -> set[str]:
    return {n for n in names if n in MODULES}


def chains_to(name: str, forbidden: set[str], inside_functions: bool, seen: set[str]) -> Iterator[str]:
    """Every way in which importing `name` brings a forbidden package in, as `a > b > torch`."""
    seen.add(name)
    for target in sorted(imports(name, inside_functions)):
        if any(target == f or target.startswith(f + ".") for f in forbidden):
            yield f"{name} > {target}"
        elif target in MODULES and target not in seen:
            yield from (f"{name} > {chain}" for chain in chains_to(target, forbidden, inside_functions, seen))


def members(prefixes: tuple[str, ...]) -> list[str]:
    wanted = [f"batchinfer.{p}" for p in prefixes]
    return [m for m in MODULES if any(m == w or m.startswith(w + ".") for w in wanted)]


def test_every_module_has_a_layer() -> None:
    assert sorted(set(MODULES) - set(LAYER_OF)) == [], "give these a layer in LAYERS"


def test_the_package_itself_imports_nothing() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text())
    assert [ast.unparse(n) for n in import_nodes(tree, inside_functions=True)] in ([], ["from __future__ import annotations"])


@pytest.mark.parametrize("name", sorted(LAYER_OF.keys() & MODULES.keys()))
def test_imports_only_go_down(name: str) -> None:
    def rank(module: str) -> int:
        return RANK[LAYER_OF[module]]

    upwards = [f"{LAYER_OF[t]}: {t}" for t in ours(imports(name)) if t in LAYER_OF and rank(t) < rank(name)]
    assert upwards == [], f"{name} is of the layer {LAYER_OF[name]}"


def test_nobody_imports_the_scripts() -> None:
    scripts = {m for m, layer in LAYER_OF.items() if layer == "scripts"}
    for name in set(MODULES) - scripts:
        assert imports(name).isdisjoint(scripts), name
    for name in scripts & set(MODULES):
        assert ours(imports(name)) <= scripts, name


def test_no_module_imports_itself_by_a_detour() -> None:
    sorter = TopologicalSorter({name: ours(imports(name)) - {name} for name in MODULES})
    sorter.prepare()  # raises CycleError, which names the cycle


@pytest.mark.parametrize("name", members(WITHOUT_TORCH))
def test_control_plane_starts_without_torch(name: str) -> None:
    assert list(chains_to(name, TORCH, inside_functions=False, seen=set())) == []


@pytest.mark.parametrize("name", members(DATA_PLANE))
def test_data_plane_knows_no_launcher(name: str) -> None:
    assert list(chains_to(name, LAUNCHING, inside_functions=True, seen=set())) == []


def test_the_reader_of_imports_sees_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "from __future__ import annotations\nimport torch.nn\nfrom .b import f\nfrom . import b\n"
        "from batchinfer.x import b as c\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import submitit\ndef g():\n    import hydra\n"
    )
    (tmp_path / "a.py").write_text(source)
    monkeypatch.setitem(MODULES, "batchinfer.x.a", tmp_path / "a.py")
    monkeypatch.setitem(MODULES, "batchinfer.x.b", tmp_path / "b.py")
    above = {"__future__.annotations", "torch.nn", "batchinfer.x.b", "typing.TYPE_CHECKING"}
    assert imports("batchinfer.x.a", inside_functions=False) == above
    assert imports("batchinfer.x.a", inside_functions=True) == above | {"hydra"}
