"""The engine: a graph forward in its order and backward in reverse, on one device's blocks.

    r_v = F_{W_v}(r of the in-neighbours)
    g_v = sum over the out-neighbours v' of (d F_{v'} / d r_v)^T g_{v'}
    dW_v = (d F_v / d W_v)^T g_v

Every operation states both directions (tpmlp.graph.rules); this module says when they happen, what
is kept between them, and what is built again. An r_v is kept only where a backward pass reads it
and it cannot be built again from what is kept without a collective; as in the chain of dense layers
(tpmlp.kernels.backprop), a gather is made again. What is built again is there from its last reader
back to the operation itself.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tpmlp.collectives import all_gather, all_reduce, reduce_scatter, transpose
from tpmlp.graph.kinds import Activation, ActivityL1, LayerNorm, Source, Sum
from tpmlp.graph.placement import GATHER, WHOLE, GraphPlacement, Node
from tpmlp.graph.rules import RULES, Given, Gradients, Rule
from tpmlp.graph.rules.elementwise import activity_value
from tpmlp.kernels.execution import Execution, execution
from tpmlp.kernels.network import param_dtype
from tpmlp.xla import after, axis_size, differs_over, hold, on_cpu, settled

Params = Mapping[str, Mapping[str, jax.Array]]
Arrays = dict[str, jax.Array]


class Kept(NamedTuple):
    """What the forward pass leaves for the backward pass.

    Attributes:
        values: r by node, in the compute type.
        residues: what rules keep beside it.
    """

    values: Arrays
    residues: dict[str, Any]


class Forward(NamedTuple):
    """What the forward pass gives.

    Attributes:
        output: r of the output vertex, in the parameters' type.
        activity: what vertices add to the objective for this device's samples, "+d"; None if
            nothing.
        values: r of every node; what nothing reads is freed.
        kept: for the backward pass.
    """

    output: jax.Array
    activity: jax.Array | None
    values: Arrays
    kept: Kept


class Backward(NamedTuple):
    """What the backward pass gives.

    Attributes:
        grads: laid out as the parameters; sums over this device's samples if not reduced.
        g: of every vertex, laid out as r, in the total type.
        inputs: of the graph's inputs of features, "F/s/g B/d"; free when not used.
    """

    grads: Params
    g: Arrays
    inputs: Arrays


def rule_of(node: Node) -> Rule:
    """Return the rule of a node that is no source."""
    return RULES[type(node.kind)]


def reads(node: Node) -> tuple[str, ...]:
    """Return the nodes that the backward pass of a node reads."""
    positions = rule_of(node).reads
    return node.inputs if positions is None else tuple(node.inputs[i] for i in positions)


def is_rebuilt(node: Node, placement: GraphPlacement) -> bool:
    """Return whether r of a node that is read is built again, rather than kept."""
    if isinstance(node.kind, Source):
        return True  # from the samples themselves
    if node.kind in (GATHER, WHOLE):
        return placement.strategy.keep != "gathered"
    return rule_of(node).rebuild is not None


def kept_names(placement: GraphPlacement) -> frozenset[str]:
    """Return the nodes whose r is kept for the backward pass, recomputation not considered."""
    nodes = placement.nodes
    return frozenset(n for n in read_names(placement) if not is_rebuilt(nodes[n], placement))


def read_names(placement: GraphPlacement) -> frozenset[str]:
    """Return the nodes whose r the backward pass reads, kept or built again."""
    program = [node for node in placement.program if not isinstance(node.kind, Source)]
    needed = {name for node in program for name in reads(node)}
    for node in reversed(program):
        if node.name in needed and is_rebuilt(node, placement):
            needed |= set(node.inputs)
    return frozenset(needed)


def held_names(placement: GraphPlacement) -> frozenset[str]:
    """Return the nodes whose r stays from the forward pass to the backward pass."""
    stays, leaves = _segments(placement)
    return (kept_names(placement) | leaves) & stays


def kept_specs(placement: GraphPlacement) -> Any:
    """Return the PartitionSpecs of what a forward pass keeps."""
    nodes, names, residues = placement.nodes, held_names(placement), {}
    values: dict[str, Any] = {
        name: placement.sharding(placement.result_layout(name), name).spec
        for name in nodes
        if name in names and not isinstance(nodes[name].kind, Source)
    }
    for node in placement.program:
        layout = None if isinstance(node.kind, Source) else rule_of(node).residue
        if layout and node.segment is None:
            residues[node.name] = placement.sharding(layout, node.name).spec
    return Kept(values, residues)


def forward(params: Params, inputs: Arrays, given: Given, placement: GraphPlacement) -> Forward:
    """Compute every r_v.

    Args:
        params: local blocks of {vertex: {parameter: array}}.
        inputs: local blocks by source: "B/d F/s/g", "B/d T F/s/g", or ids "B/d T".
        given: types, key and shares.
        placement: the graph on its mesh.
    """
    values: Arrays = {}
    residues: dict[str, Any] = {}
    activity = []
    for node in placement.program:
        values[node.name], residues[node.name] = _compute(
            node, values, params, inputs, given, placement
        )
        if isinstance(node.kind, ActivityL1) and given.share is not None:
            activity.append(activity_value(node, _total(values[node.name], given.run), given))
    dtype = param_dtype(params)
    output = values[placement.graph.output].astype(dtype)
    total = sum(activity[1:], activity[0]) if activity else None
    return Forward(output, total, values, _kept(values, residues, placement))


def backward(
    params: Params,
    inputs: Arrays,
    kept: Kept,
    g: jax.Array,
    given: Given,
    placement: GraphPlacement,
    *,
    reduce: bool = True,
) -> Backward:
    """Walk back from the gradient of the output: `forward`, transposed, last node first.

    Args:
        params: as in `forward`.
        inputs: as in `forward`.
        kept: what `forward` left.
        g: of the output vertex, "F/s/g B/d".
        given: as in `forward`.
        placement: the graph on its mesh.
        reduce: whether gradients are summed over the data axis here.
    """
    return _Walk(params, inputs, kept, given, placement, reduce).run(g.astype(given.run.total))


def backward_inputs(
    params: Params,
    inputs: Arrays,
    kept: Kept,
    g: jax.Array,
    given: Given,
    placement: GraphPlacement,
) -> Backward:
    """Walk back as `backward` does, and leave gradients of parameters to `parameter_gradients`."""
    walk = _Walk(params, inputs, kept, given, placement, reduce=False, trains=False)
    return walk.run(g.astype(given.run.total))


def parameter_gradients(
    params: Params,
    inputs: Arrays,
    kept: Kept,
    g: Arrays,
    given: Given,
    placement: GraphPlacement,
    *,
    reduce: bool,
) -> Params:
    """Return what `backward_inputs` left out, from the g by node that it found."""
    return _Walk(params, inputs, kept, given, placement, reduce).train(g)


def reduce_gradients(grads: Params, placement: GraphPlacement) -> Params:
    """Sum gradients over the data axis, where the parameters are."""
    run = execution(placement, param_dtype(grads))
    return {
        owner: {name: _reduced(placement, owner, name, dw, run) for name, dw in mine.items()}
        for owner, mine in grads.items()
    }


class _Walk:
    """One backward pass: gradients that wait to be added up, and what was built again."""

    def __init__(
        self,
        params: Params,
        inputs: Arrays,
        kept: Kept,
        given: Given,
        placement: GraphPlacement,
        reduce: bool,
        trains: bool = True,
    ) -> None:
        self.params, self.inputs, self.given, self.placement = params, inputs, given, placement
        self.values, self.residues = dict(kept.values), dict(kept.residues)
        self.reduce, self.trains = reduce, trains
        self.parts: dict[str, list[jax.Array]] = {}
        self.rebuilt: Arrays = {}
        self.g: Arrays = {}
        self.later: list[tuple[Node, jax.Array, Callable[[Any], Arrays]]] = []
        self.grads: dict[str, Arrays] = {owner: {} for owner in params}
        self.done: list[jax.Array] = []
        self.summed: list[jax.Array] = []
        self.turns: dict[int, tuple[jax.Array, jax.Array]] = {}
        self.trained = trained_nodes(placement)
        self.activated = activated_names(placement)
        users = Counter(node.owner for node in placement.program)
        self.uses = {(owner, name): users[owner] for owner, mine in params.items() for name in mine}

    def run(self, g: jax.Array) -> Backward:
        """Walk back from g of the output."""
        self.parts[self.placement.graph.output] = [g]
        segment = None
        for node in reversed(self.placement.program):
            if node.segment is not None and node.segment != segment:
                self.recompute(node.segment)
            segment = node.segment
            rebuilt = self.rebuilt
            if node.name not in self.trained:
                # What is built again after a g that nobody may want is not for others to read.
                self.rebuilt = dict(rebuilt)
            self.step(node)
            self.rebuilt = rebuilt
            self.rebuilt.pop(node.name, None)
        sources = {vertex.name for vertex in self.placement.graph.sources}
        return Backward(self.grads, self.g, {n: g for n, g in self.g.items() if n in sources})

    def step(self, node: Node) -> None:
        """Take the gradient of a node back to what it reads and to its parameters."""
        parts = self.parts.pop(node.name, None)
        if parts is None:
            return  # of ids
        g = sum(parts[1:], parts[0])
        if len(parts) > 1 or node.name in self.activated:
            # Several read it. Were it computed anew by each, the compiler would write out what is
            # costly in sigma' for all of them: up to four arrays.
            g = settled(g)
        if node.kind not in (GATHER, WHOLE):
            g = self.in_turn(g)
            self.g[node.name] = g
        if isinstance(node.kind, Source):
            return
        result = self.gradients(node, g)
        for name, part in zip(node.inputs, result.inputs, strict=True):
            if part is not None:
                self.parts.setdefault(name, []).append(part)
        if self.trains:
            self.add(node, result.params)
            if result.later is not None:
                self.later.append((node, g, result.later))
            self.catch_up(node, result.inputs[0])

    def gradients(self, node: Node, g: jax.Array) -> Gradients:
        """Apply the backward rule of a node; what is not used of it is not computed."""
        params, _ = hold((dict(self.params.get(node.owner, {})), g))
        params, residue = _anew(node, params, self.residues.get(node.name), g)
        params = _whole(node, params, g, self.given.run, self.placement)
        return rule_of(node).backward(node, params, self.reader(node, g), residue, g, self.given)

    def train(self, g: Arrays) -> Params:
        """Return the gradients of parameters, from g of all nodes that use some."""
        for node in reversed(self.placement.program):
            if node.owner in self.grads:
                result = self.gradients(node, g[node.name])
                self.add(node, result.params)
                if result.later is not None:
                    self.add(node, result.later(g[node.name]))
            self.rebuilt.pop(node.name, None)
        return self.grads

    def in_turn(self, g: jax.Array) -> jax.Array:
        """Return g, not there before the gradients of parameters so far are.

        They free what was gathered for them. A g that a sum hands to several vertices stays one
        array: what they gather of it is gathered once.
        """
        if id(g) not in self.turns:
            later = g
            for dw in self.summed:
                later = after(later, dw)
            later, _ = hold((later, self.done))
            self.turns[id(g)] = (g, later)  # with g itself, so that no other has its id
            self.summed, self.done = self.summed[-1:], []
        return self.turns[id(g)][1]

    def catch_up(self, node: Node, ready: jax.Array | None) -> None:
        """Compute the gradients that waited for the one which goes back to where their input is.

        Nobody may want that one, and to wait for it would be to want it.
        """
        nodes, waiting = self.placement.nodes, self.later
        self.later = []
        for of, g, later in waiting:
            source = nodes[of.inputs[0]]
            if node is not (source if source.kind in (GATHER, WHOLE) else of):
                self.later.append((of, g, later))
                continue
            self.add(of, later(ready if node.inputs[0] in self.trained else g))

    def add(self, node: Node, params: Arrays) -> None:
        """Add to the gradients of parameters, and sum those over data that are complete."""
        for name, dw in params.items():
            mine = self.grads[node.owner]
            mine[name] = mine[name] + dw if name in mine else dw
            self.uses[node.owner, name] -= 1
            if not self.uses[node.owner, name]:
                self.done.append(mine[name])
                if self.reduce:
                    mine[name] = self.reduced(node.owner, name, mine[name])
                self.summed.append(mine[name])

    def reduced(self, owner: str, name: str, dw: jax.Array) -> jax.Array:
        """Sum a gradient over data once the one before is; XLA would join them, and keep all."""
        if self.given.sizes["data"] > 1 and self.summed:
            dw, _ = hold((dw, self.summed[-1]))
        return _reduced(self.placement, owner, name, dw, self.given.run)

    def reader(self, node: Node, g: jax.Array) -> Callable[..., jax.Array]:
        """Return the function by which a rule reads the inputs of its node."""

        def read(position: int, ready: jax.Array = g) -> jax.Array:
            return _total(self.value(node.inputs[position], ready), self.given.run)

        return read

    def value(self, name: str, ready: jax.Array) -> jax.Array:
        """Return r of a node, kept or built again, not there before another array is."""
        if name in self.values:
            return _tied(self.values[name], ready)
        if name not in self.rebuilt:
            node = self.placement.nodes[name]
            if isinstance(node.kind, Source):
                value = _source(node, _tied(self.inputs[name], ready), self.given.run)
            else:
                value = self.rebuild(node, ready)
            self.rebuilt[name] = value
        return self.rebuilt[name]

    def rebuild(self, node: Node, ready: jax.Array) -> jax.Array:
        """Compute r of a node again from what it reads."""
        run, rule = self.given.run, rule_of(node)
        inputs = tuple(_total(self.value(name, ready), run) for name in node.inputs)
        mine = self.params.get(node.owner, {})
        params, residue = _anew(node, mine, self.residues.get(node.name), ready)
        params = _whole(node, params, inputs[0], run, self.placement)
        if rule.rebuild is None:
            assert node.kind in (GATHER, WHOLE)
            return rule.forward(node, params, inputs, self.given)[0]
        return run.to_compute(rule.rebuild(node, params, inputs, residue, self.given))

    def recompute(self, segment: tuple[str, int]) -> None:
        """Run the nodes of a segment forward again, from what is kept before it."""
        wanted = [parts for name, parts in self.parts.items() if name in self.trained]
        ready = (wanted or list(self.parts.values()))[0][0]
        nodes = recomputed_nodes(self.placement, segment)
        inside = {node.name for node in nodes}
        outside = {name for node in nodes for name in node.inputs if name not in inside}
        rebuilt = dict(self.rebuilt)
        values = {name: self.value(name, ready) for name in sorted(outside)}
        # Read again later they are built again, or the gathers from them would be these.
        self.rebuilt = rebuilt
        residues: dict[str, Any] = {}
        for node in nodes:
            values[node.name], residues[node.name] = _compute(
                node, values, self.params, self.inputs, self.given, self.placement
            )
        kept = kept_names(self.placement)
        self.values |= {name: values[name] for name in inside & kept if name not in self.values}
        self.residues |= residues


def recomputed_nodes(placement: GraphPlacement, segment: tuple[str, int]) -> list[Node]:
    """Return the nodes of a segment that are computed again: all that some r to be read needs."""
    _, leaves = _segments(placement)
    inside = [node for node in placement.program if node.segment == segment]
    read = kept_names(placement) - leaves
    needed = {node.name for node in inside if rule_of(node).residue or node.name in read}
    for node in reversed(inside):
        needed |= set(node.inputs) if node.name in needed else set()
    return [node for node in inside if node.name in needed]


def trained_nodes(placement: GraphPlacement) -> set[str]:
    """Return the nodes whose gradient some parameter needs."""
    trained: set[str] = set()
    for node in placement.program:
        if node.owner in placement.graph.arrays or trained.intersection(node.inputs):
            trained.add(node.name)
    return trained


def activated_names(placement: GraphPlacement) -> set[str]:
    """Return the nodes that an activation reads."""
    return {node.inputs[0] for node in placement.program if isinstance(node.kind, Activation)}


def _compute(
    node: Node,
    values: Arrays,
    params: Params,
    inputs: Arrays,
    given: Given,
    placement: GraphPlacement,
) -> tuple[jax.Array, Any]:
    """Return r of a node, in the compute type, and its residue."""
    run = given.run
    if isinstance(node.kind, Source):
        return _source(node, inputs[node.name], run), None
    read = tuple(_total(values[name], run) for name in node.inputs)
    mine, _ = _anew(node, params.get(node.owner, {}), None, read[0])
    whole = _whole(node, mine, read[0], run, placement)
    r, residue = rule_of(node).forward(node, whole, read, given)
    r = settled(r) if isinstance(node.kind, Sum) else r
    is_output = node.name == placement.graph.output
    return (r if is_output else run.to_compute(r)), residue


def _source(node: Node, array: jax.Array, run: Execution) -> jax.Array:
    """Return samples as the program reads them: "F/s/g B/d", or ids "B/d"."""
    if node.shape.width is None:
        return array.reshape(-1)
    rows = run.to_compute(array).reshape(-1, array.shape[-1])
    return transpose("B/d F/s/g -> F/s/g B/d", rows, **node.axes)


def _kept(values: Arrays, residues: dict[str, Any], placement: GraphPlacement) -> Kept:
    """Return what stays, as the strategy says."""
    nodes, names = placement.nodes, held_names(placement)
    return Kept(
        {name: r for name, r in values.items() if name in names},
        {name: r for name, r in residues.items() if r is not None and not nodes[name].segment},
    )


def _segments(placement: GraphPlacement) -> tuple[set[str], set[str]]:
    """Return the nodes that are not computed again, and those of them that a segment ends with."""
    nodes = placement.nodes
    leaves = {
        name
        for node in placement.program
        for name in node.inputs
        if nodes[name].segment is not None and nodes[name].segment != node.segment
    }
    return {name for name in nodes if nodes[name].segment is None} | leaves, leaves


def _total(array: jax.Array, run: Execution) -> jax.Array:
    return array.astype(run.total) if _is_floating(array) else array


def _is_floating(array: jax.Array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


def _tied(array: jax.Array, ready: jax.Array) -> jax.Array:
    """Return a kept array as a new value that is not there before another is.

    One that is equal on devices where the other differs is as it was: it would count as different.
    """
    if not differs_over(ready) <= differs_over(array):
        return array
    return after(array, ready) if on_cpu() else hold((array, ready))[0]


def _anew(
    node: Node, params: Mapping[str, jax.Array], residue: Any, ready: jax.Array
) -> tuple[Arrays, Any]:
    """Return vectors of parameters and a residue as new values that wait for another array.

    Where sums over features need no other device, the compiler writes both spread over the whole
    batch, and would keep that from the forward pass to the backward pass if it were the same. Not
    for a LayerNorm: it would be rounded otherwise than in the forward pass.
    """
    if node.num_tensor_devices > 1 or isinstance(node.kind, LayerNorm):
        return dict(params), residue
    used = {name: a if name == "W" else after(a, ready) for name, a in params.items()}
    return used, jax.tree.map(lambda row: after(row, ready), residue)


def _whole(
    node: Node,
    params: Mapping[str, jax.Array],
    ready: jax.Array,
    run: Execution,
    placement: GraphPlacement,
) -> Arrays:
    """Return parameters as a rule uses them; those that are gathered, anew at each use."""
    used = {}
    for name, array in params.items():
        if run.splits_data:
            layouts = [placement.layout(node.owner, name, held=held) for held in (True, False)]
            moved = run.compute if name == "W" else array.dtype
            # At each use: gathered parameters are not to be there from the first to the last.
            array = (after(array, ready) if _is_floating(ready) else array).astype(moved)
            array = all_gather(" -> ".join(layouts), array, **node.axes)
        # The product converts W, when and where it needs it.
        used[name] = array if name == "W" else array.astype(run.total)
    return used


def _reduced(
    placement: GraphPlacement, owner: str, name: str, dw: jax.Array, run: Execution
) -> jax.Array:
    """Sum the gradient of a parameter over the samples of all devices, where the parameter is."""
    axes = placement.nodes[owner].axes
    held, used = (placement.layout(owner, name, held=held) for held in (True, False))
    dw = dw.astype(run.reduce if axis_size("data") > 1 else run.total)
    if run.splits_data:
        return reduce_scatter(f"{used} +d -> {held}", dw, **axes).astype(run.total)
    return all_reduce(f"{used} +d -> {used}", dw, **axes).astype(run.total)
