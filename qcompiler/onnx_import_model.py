# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Reading an ONNX file and checking its structure, before anything is converted.

Whatever a file holds, the answer is a checked `OnnxModel` or a `ModelError` with one sentence.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx
import onnx.checker
import onnx.inliner
import onnx.shape_inference
import onnx.version_converter
from google.protobuf.message import DecodeError  # type: ignore[import-untyped,unused-ignore]

from qcompiler.errors import ModelError
from qcompiler.onnx_import_tensors import file_inside

MIN_OPSET = 7
MAX_OPSET = 28
"""Opsets of the default domain whose operators the converters know."""
OLDEST_OPSET = 1
"""Opsets below MIN_OPSET that ONNX's own converter brings there."""
MAX_NODES = 500_000
"""Nodes with all functions inlined: a few calls of calls would make billions."""


@dataclass(frozen=True, slots=True)
class OnnxModel:
    """A model that has been read and is structurally sound.

    Attributes:
        proto: The model; local functions are inlined.
        folder: Folder of external data; None for a model that came from memory.
        digest: sha256 of the file's bytes (of the serialized model if it came from memory), hex.
        name: Name for messages: the file's path, or the graph's name.
    """

    proto: onnx.ModelProto
    folder: pathlib.Path | None
    digest: str
    name: str

    @property
    def opsets(self) -> dict[str, int]:
        """Domain -> version."""
        return {normal_domain(o.domain): int(o.version) for o in self.proto.opset_import}


def normal_domain(domain: str) -> str:
    """Return the domain with the long name of the default one shortened."""
    return "" if domain == "ai.onnx" else domain


def read_model(model: str | os.PathLike[str] | onnx.ModelProto) -> OnnxModel:
    """Read and check a model; the file is read once.

    Raises:
        ModelError: Not a readable ONNX file, or a model that breaks ONNX's rules.
    """
    if isinstance(model, onnx.ModelProto):
        name, folder, proto = model.graph.name or "model", None, model
        digest = hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
    else:
        path = pathlib.Path(model)
        data = _read_bytes(path)
        name, folder, proto = str(path), path.parent, _parse(data, path)
        digest = hashlib.sha256(data).hexdigest()
    _check_header(proto, name)
    if proto.functions:
        proto = _inlined(proto, name)
    _check_graph(proto.graph, name)
    read = OnnxModel(_of_today(proto), folder, digest, name)
    _check_opsets(read)
    return read


def _of_today(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model of an old opset (broadcasting by attribute, say) as one of MIN_OPSET.

    What cannot be converted stays as it is, to be refused for its opset.
    """
    versions = [int(o.version) for o in proto.opset_import if not normal_domain(o.domain)]
    stored = any(t.data_location == onnx.TensorProto.EXTERNAL for t in proto.graph.initializer)
    if len(versions) != 1 or not OLDEST_OPSET <= versions[0] < MIN_OPSET or stored:
        return proto
    try:
        onnx.checker.check_model(proto)
        made: onnx.ModelProto = onnx.version_converter.convert_version(proto, MIN_OPSET)
        _check_graph(made.graph, proto.graph.name)
    except (*_INLINER_ERRORS, onnx.version_converter.ConvertError, ModelError):
        return proto
    return made


def _read_bytes(path: pathlib.Path) -> bytes:
    if path.is_dir():
        raise ModelError(f"{path} is a directory, expected an .onnx file")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelError(f"cannot read {path}: {reason}") from None
    if not data:
        raise ModelError(f"{path} is empty, expected an ONNX model")
    if data.startswith(b"version https://git-lfs"):
        raise ModelError(
            f"{path} is a Git LFS pointer, not the model itself", hint="run: git lfs pull"
        )
    return data


def stored_bytes(model: str | os.PathLike[str]) -> int:
    """Return the size of a model's file and of the external data beside it, bytes."""
    path = pathlib.Path(model)
    proto = _parse(_read_bytes(path), path)
    named = {
        e.value
        for t in proto.graph.initializer
        if t.data_location == onnx.TensorProto.EXTERNAL
        for e in t.external_data
        if e.key == "location"
    }
    beside = [file_inside(path.parent.resolve(), name) for name in named]
    return sum(f.stat().st_size for f in (path, *beside) if f is not None and f.is_file())


def _parse(data: bytes, path: pathlib.Path) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError:
        raise ModelError(
            f"{path} is not an ONNX model, or it is truncated or damaged ({len(data)} bytes)"
        ) from None
    return proto


def _check_header(proto: onnx.ModelProto, name: str) -> None:
    if not proto.HasField("graph") or not proto.ir_version:
        raise ModelError(f"{name} is not an ONNX model: it holds no graph")
    if not proto.graph.output:
        raise ModelError(f"{name} is not a valid ONNX model: its graph has no outputs")
    if not proto.opset_import:
        raise ModelError(f"{name} is not a valid ONNX model: it names no opset")


_INLINER_ERRORS = (
    *(RuntimeError, ValueError, DecodeError),
    *(onnx.checker.ValidationError, onnx.shape_inference.InferenceError),
)


def _inlined(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    _check_functions(proto, name)
    try:
        try:
            inlined = onnx.inliner.inline_local_functions(proto, convert_version=True)
        except RuntimeError:  # converting a function of another opset takes the types around it
            inlined = onnx.inliner.inline_local_functions(_with_types(proto), convert_version=True)
    except _INLINER_ERRORS as error:
        raise ModelError(f"{name}: its functions cannot be inlined: {one_line(error)}") from None
    made: onnx.ModelProto = inlined
    return made


def _with_types(proto: onnx.ModelProto) -> onnx.ModelProto:
    typed = onnx.ModelProto()
    typed.CopyFrom(proto)
    known = {v.name for v in typed.graph.input}
    for t in typed.graph.initializer:
        if t.name not in known:
            info = onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims)
            typed.graph.value_info.append(info)
    inferred: onnx.ModelProto = onnx.shape_inference.infer_shapes(typed)
    return inferred


def _check_functions(proto: onnx.ModelProto, name: str) -> None:
    """Refuse functions that call themselves, and calls of calls that explode.

    Raises:
        ModelError: Naming the function.
    """
    bodies = {(f.domain, f.name): [(n.domain, n.op_type) for n in _nodes(f.node)]
              for f in proto.functions}  # fmt: skip
    sizes: dict[tuple[str, str], int] = {}
    # Callees first, without recursion: a chain of calls may be as long as the file.
    for root in bodies:
        stack, active = [root], set[tuple[str, str]]()
        while stack:
            at = stack[-1]
            open_calls = [c for c in bodies[at] if c in bodies and c not in sizes]
            if at not in sizes and open_calls:
                active.add(at)
                if open_calls[0] in active:
                    raise ModelError(f"{name}: function {at[1]!r} calls itself through others")
                stack.append(open_calls[0])
                continue
            sizes[at] = sum(sizes.get(c, 1) for c in bodies[at])
            active.discard(at)
            stack.pop()
    calls = [(n.domain, n.op_type) for n in _nodes(proto.graph.node)]
    total = sum(sizes.get(c, 1) for c in calls)
    if total > MAX_NODES:
        raise ModelError(
            f"{name}: with its functions inlined it has {total} nodes; up to {MAX_NODES} are read"
        )


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield nodes and those of their subgraphs."""
    for node in nodes:
        yield node
        for g in subgraphs(node):
            yield from _nodes(g.node)


def _check_opsets(model: OnnxModel) -> None:
    used = {normal_domain(n.domain) for n in model.proto.graph.node}
    opsets = model.opsets
    undeclared = sorted(used - set(opsets))
    if undeclared:
        listed = ", ".join(d or "ai.onnx" for d in undeclared)
        raise ModelError(
            f"{model.name} uses operators of domain {listed} without naming an opset of it"
        )
    version = opsets.get("", MAX_OPSET)
    if not MIN_OPSET <= version <= MAX_OPSET:
        raise ModelError(
            f"{model.name} uses opset {version}; opsets {MIN_OPSET} to {MAX_OPSET} are supported,"
            " and older ones where ONNX's own converter takes the model",
            hint="convert it with onnx.version_converter or export it again",
        )


def one_line(error: BaseException) -> str:
    """Return the first line of an error's text, without the library's own tags."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text.removeprefix("[ShapeInferenceError] ").removeprefix("[TypeInferenceError] ")


def label(node: onnx.NodeProto) -> str:
    """Return how messages call a node."""
    if node.name:
        return f"node {node.name!r} ({node.op_type})"
    first = next((o for o in node.output if o), "")
    return f"the {node.op_type} node that computes {first!r}"


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs among a node's attributes."""
    for a in node.attribute:
        if a.type == onnx.AttributeProto.GRAPH:
            yield a.g
        elif a.type == onnx.AttributeProto.GRAPHS:
            yield from a.graphs


def reads(node: onnx.NodeProto) -> list[str]:
    """Return the names a node reads, those that its subgraphs take from outside included."""
    names = [n for n in node.input if n]
    for g in subgraphs(node):
        own = {v.name for v in g.input} | {t.name for t in g.initializer}
        for inner in g.node:
            names += [n for n in reads(inner) if n not in own]
            own.update(inner.output)
        names += [o.name for o in g.output if o.name not in own]
    return names


_MOVES = frozenset(
    {
        *("Identity", "Transpose", "Reshape", "Slice", "Squeeze", "Unsqueeze", "Flatten"),
        *("Gather", "Expand", "Tile"),
    }
)
_SCALED = ("DequantizeLinear", "QGemm", "QLinear")


def plain_reads(nodes: Sequence[onnx.NodeProto], outputs: Iterable[str]) -> set[str]:
    """Return the names whose numbers something reads as they are, not by a scale given beside them.

    Args:
        nodes: Nodes of a graph, in running order; movement reads what its result is read as.
        outputs: Names that something outside reads as they are.
    """
    plain = set(outputs)
    for node in reversed(nodes):
        if node.op_type == "Concat":
            plain.update(() if plain.isdisjoint(node.output) else node.input)
        elif node.op_type in _MOVES:
            plain.update(node.input[1:] if plain.isdisjoint(node.output) else node.input)
        elif not node.op_type.startswith(_SCALED):
            plain.update(reads(node))
    return plain


def _names(graph: onnx.GraphProto) -> Iterator[object]:
    """Yield every name and text that the importer or the onnx package looks at."""
    yield graph.name
    for t in graph.initializer:
        yield t.name
    for info in (*graph.input, *graph.output):
        yield info.name
        yield from (d.dim_param for d in info.type.tensor_type.shape.dim)
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        for a in node.attribute:
            yield from (a.name, a.t.name, a.ref_attr_name)
        for g in subgraphs(node):
            yield from _names(g)


def _check_graph(graph: onnx.GraphProto, name: str) -> None:
    """Check that every name is defined once and that what nodes read is defined.

    Raises:
        ModelError: Naming the first offence.
    """
    if not all(isinstance(n, str) for n in _names(graph)):  # protobuf hands out bytes then
        raise ModelError(f"{name} holds names that are not UTF-8 text: the file is damaged")
    inputs = [v.name for v in graph.input]
    initializers = [t.name for t in graph.initializer]
    initializers += [t.values.name for t in graph.sparse_initializer]
    for kind, names in (("input", inputs), ("initializer", initializers)):
        twice = _duplicate(names)
        if twice is not None:
            raise ModelError(f"{name}: two {kind}s are named {twice!r}", value=twice)
    defined = set(inputs) | set(initializers)
    for node in graph.node:
        for output in node.output:
            if output and output in defined:
                raise ModelError(
                    f"{name}: {output!r}, computed by {label(node)}, is already defined",
                    node=node.name,
                    value=output,
                )
            defined.add(output)
    for node in graph.node:
        for read in reads(node):
            if read not in defined:
                raise ModelError(
                    f"{name}: {label(node)} reads {read!r}, which nothing defines",
                    node=node.name,
                    value=read,
                )
    results = [v.name for v in graph.output]
    twice = _duplicate(results)
    if twice is not None:
        raise ModelError(f"{name}: two outputs are named {twice!r}", value=twice)
    for result in results:
        if result not in defined:
            raise ModelError(f"{name}: nothing computes the output {result!r}", value=result)


def _duplicate(names: Sequence[str]) -> str | None:
    seen: set[str] = set()
    for n in names:
        if n in seen:
            return n
        seen.add(n)
    return None


def needed_nodes(graph: onnx.GraphProto, name: str) -> list[onnx.NodeProto]:
    """Return the nodes that outputs depend on, in topological order (stable).

    Raises:
        ModelError: The graph has a cycle.
    """
    producer = {o: i for i, node in enumerate(graph.node) for o in node.output if o}
    depends = [[producer[n] for n in reads(node) if n in producer] for node in graph.node]
    done: set[int] = set()
    order: list[int] = []
    roots = sorted({producer[o.name] for o in graph.output if o.name in producer})
    for root in roots:
        stack = [(root, iter(depends[root]))] if root not in done else []
        active = {root}
        while stack:
            at, rest = stack[-1]
            for i in rest:
                if i in active:
                    raise ModelError(
                        f"{name}: the graph has a cycle through {label(graph.node[i])}",
                        node=graph.node[i].name,
                    )
                if i not in done:
                    active.add(i)
                    stack.append((i, iter(depends[i])))
                    break
            else:
                stack.pop()
                active.discard(at)
                done.add(at)
                order.append(at)
    # A model in order keeps its order: names and reports then follow the file.
    position = {i: k for k, i in enumerate(order)}
    in_file = sorted(order)
    if all(p not in position or p < i for i in in_file for p in depends[i]):
        order = in_file
    return [graph.node[i] for i in order]


class NodeChecker:
    """Checks single nodes against the operator schemas of the model's opsets."""

    def __init__(self, opsets: dict[str, int], ir_version: int) -> None:
        self._context = type(onnx.checker.DEFAULT_CONTEXT)()
        self._context.ir_version = ir_version
        self._context.opset_imports = opsets

    def check(self, node: onnx.NodeProto) -> None:
        """Check operand and attribute counts, names and types.

        Raises:
            ModelError: The node breaks its schema.
        """
        if any(True for _ in subgraphs(node)):
            return
        try:
            onnx.checker.check_node(node, self._context)
        except onnx.checker.ValidationError as error:
            raise ModelError(
                f"{label(node)} is not valid: {one_line(error)}", node=node.name
            ) from None
