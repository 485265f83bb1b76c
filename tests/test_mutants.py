"""The suite kills every fault that this kind of program is known to have, and says by which test.

Each mutant is one edit of the package; its killer is a test of the suite that passes without it
(the suite runs that too) and must fail with it. A surviving mutant means that the numbers could be
wrong in that way and nobody would notice.

Some mutants never give a number: JAX's check_vma or tpmlp.layout refuses them while the step is
traced. Which these are is part of the table, and held against what the killer prints.
docs/mutants.md is this table: `python -m tests.test_mutants > docs/mutants.md` writes it.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        file: in tpmlp/.
        old: text that occurs there once.
        new: what replaces it.
        killer: the test that must fail.
        refused: what the static refusal that fails it says; None where a wrong number does, or a
            wrong count.
    """

    file: str
    old: str
    new: str
    killer: str
    refused: str | None = None


# What every static refusal says: of check_vma at the end of a shard_map, and of a signature.
CHECK_VMA = "out_specs which require replication which can't be statically inferred"
LAYOUT = "tpmlp.layout.LayoutError"
REFUSALS = {CHECK_VMA: "by JAX's check_vma", LAYOUT: "by the layout's signature"}

BACKPROP = "tests/kernels/test_backprop.py"
RECURSION = f"{BACKPROP}::test_float64_tensor_equals_the_reference_and_is_zero_where_padded"
INTEGERS = f"{BACKPROP}::test_integer_tensor_equals_the_reference_bit_for_bit"
CURVATURE = "tests/inspection/test_curvature.py"
PRODUCT = f"{CURVATURE}::test_a_product_under_a_strategy_with_another_objective_is_jaxs"
STRATEGIES = (
    "tests/test_strategies.py::test_a_strategy_is_the_reference_and_moves_what_is_predicted"
)
FIELDS = "tests/test_strategy_fields.py"
EXECUTOR = "tests/pipeline/test_executor.py::test_a_step_is_the_references"
RECOMPUTED = "interleaved, 2x2x2x1, 13 layers, m=2, auto, cross_entropy, recompute2, split weights"
INVARIANT = "tests/test_invariant.py::test_a_whole_training_run_has_the_same_bits_on_every_mesh"
SMALL = "tests/test_invariant.py::test_a_batch_of_a_few_samples_has_the_same_bits_on_every_mesh"
RING = "tests/kernels/test_dense.py::test_float64_tensor_equals_numpy[ring-1x3x1"
# The rows of tests.strategies.FLOAT64_ROWS that the mutants name.
SPLIT = "8x1x1-column-gathered-none-split-3-float64-None-None"
PER_EXAMPLE = "tests/inspection/test_per_example.py"
ENGINE = "tests/graph/test_engine.py"
RULES = "tests/graph/test_rules.py::test_an_output_is_that_of_the_plain_function"
VOLUMES = "tests/kernels/test_cost.py::test_a_step_moves_what_the_docstrings_say"

MUTANTS = {
    "an order that accelerators are not given": Mutant(
        "xla.py",
        "return jax.tree.unflatten(structure, held)",
        "return arrays",
        "tests/test_xla.py::test_every_layer_of_the_backward_pass_waits_at_a_barrier",
    ),
    "a dropped reduction over data": Mutant(
        "kernels/dense.py",
        'return all_reduce("O/g I/s +d -> O/g I/s", dW, **axes).astype(run.total)',
        "return dW",
        f"{RECURSION}[2x1x2-column-dW_1]",
        refused=CHECK_VMA,
    ),
    "an all-reduce left out": Mutant(
        "collectives.py",
        "return lax.psum(x, names)",
        "return x",
        f"{RECURSION}[2x1x1-column-loss]",
        refused=CHECK_VMA,
    ),
    "a partial sum that is not said to be one": Mutant(
        "kernels/dense.py",
        'einsum("O/g I/s, I/s B/d -> O/g B/d +s", W, h,',
        'einsum("O/g I/s, I/s B/d -> O/g B/d", W, h,',
        f"{RECURSION}[1x2x1-row-z_1]",
        refused=LAYOUT,
    ),
    "a dropped sum in dh": Mutant(
        "kernels/dense.py",
        'return reduce_scatter("I/s B/d +g -> I/s/g B/d", dh, **axes).astype(run.total)',
        "return dh[: dh.shape[0] // 2]",
        f"{RECURSION}[1x2x1-column-g_1]",
    ),
    "a doubled reduction": Mutant(
        "collectives.py",
        "return lax.psum(x, names)",
        "return lax.psum(lax.pcast(lax.psum(x, names), names, to='varying'), names)",
        # Doubled weights of a mean halve g and hide it: the killer has a loss that is a sum.
        f"{INTEGERS}[2x1x1-column-dW_1]",
    ),
    "a bias added on every device": Mutant(
        "kernels/dense.py",
        "z + b[:, None]",
        'z + b[:, None] * jax.lax.axis_size(axes["s"])',
        f"{RECURSION}[1x2x1-row-z_1]",
    ),
    "a wrong scatter dim": Mutant(
        "collectives.py",
        "scatter_dimension=dim, tiled=True)",
        "scatter_dimension=1 - dim, tiled=True).reshape(x.shape[0] // _size(names), x.shape[1])",
        f"{RECURSION}[1x2x1-row-z_1]",
    ),
    "a stale sigma'": Mutant(
        "kernels/backprop.py",
        "return chain.activation.sigma_prime(z)",
        "return chain.activation.sigma_prime(activate(chain.activation, z))",
        f"{RECURSION}[1x1x1-column-g_1]",
    ),
    "padded columns leaking": Mutant(
        "activations.py",
        "fixes_zero=False,\n            largest_slope=0.25",
        "fixes_zero=True,\n            largest_slope=0.25",
        f"{RECURSION}[1x8x1-column-dW_2]",
    ),
    "a transposed W": Mutant(
        "kernels/dense.py",
        'return einsum("O/g I/s, O/g B/d -> I/s B/d +g", W, g, dtype=dtype, **axes)',
        'return einsum("O/g I/s, O/g B/d -> I/s B/d +g", '
        "W.T if W.shape[0] == W.shape[1] else W, g, dtype=dtype, **axes)",
        f"{BACKPROP}::test_square_layers_equal_the_reference[1x1x1-column-g_1]",
    ),
    "a mean over the padded batch": Mutant(
        "kernels/terms.py",
        'return all_reduce("+d -> ", einsum("B/d -> +d", weight, **axes), **axes)',
        'return jnp.zeros((), weight.dtype) + weight.shape[0] * jax.lax.axis_size(axes["d"])',
        f"{RECURSION}[4x2x1-column-loss]",
    ),
    "a softmax over padded logits": Mutant(
        "losses.py",
        "        a, num_outputs = self.label_smoothing, head.num_outputs\n",
        "        a, num_outputs = self.label_smoothing, 16\n",
        f"{RECURSION}[1x8x1-column-loss]",
    ),
    "smoothing over padded logits": Mutant(
        "losses.py",
        "target = jnp.where(onehot, 1 - a, 0) + a / num_outputs",
        "target = jnp.where(onehot, 1 - a, 0) + a / 16",
        "tests/test_losses.py::test_smoothing_spreads_over_logical_classes_only",
    ),
    "R's gradient once a data shard": Mutant(
        "kernels/terms.py",
        "grad + penalty.gradient(array)",
        'grad + penalty.gradient(array) * jax.lax.axis_size("data")',
        "tests/test_regularizers.py::"
        "test_tensor_with_a_regularizer_is_that_of_the_data_plus_r_once[l2-2x2x2-dW_1]",
    ),
    "weights left out of g": Mutant(
        "kernels/terms.py",
        'scale = weight / total if loss.reduction == "mean" else weight',
        "scale = 1 / total * jnp.ones_like(weight)",
        "tests/test_losses.py::test_weights_equal_repeating_the_samples",
    ),
    "a NaN at a sample of weight 0": Mutant(
        "kernels/terms.py",
        "jnp.where(weight[None] != 0, sample.gradient * scale[None], 0)",
        "sample.gradient * scale[None]",
        "tests/test_losses.py::"
        "test_a_sample_of_weight_zero_counts_nowhere_even_if_its_gradient_is_infinite",
    ),
    "weights drawn at padded shapes": Mutant(
        "model.py",
        "jax.random.fold_in(key, l), (d_out, d_in), dtype)",
        "jax.random.fold_in(key, l), padded_widths[l - 1 : l + 1][::-1], dtype)[:d_out, :d_in]",
        "tests/test_model.py::test_init_draws_the_same_bits_on_every_mesh[1x5x1-row-column]",
    ),
    "a second gather merged with the first": Mutant(
        "xla.py",
        "return lax.select(any_of, lax.full_like(array, 0), array)",
        "return array",
        f"{VOLUMES}[1x8x1-column]",
    ),
    "a barrier over arrays that differ over other axes": Mutant(
        "xla.py",
        "if others <= mine]",
        "]",
        "tests/test_xla.py::test_hold_leaves_every_array_the_axes_it_differs_over",
        refused=CHECK_VMA,
    ),
    "a ring that skips its last hop": Mutant(
        "kernels/ring.py",
        "for k in range(ahead, 0, -1):",
        "for k in range(ahead - 1, 0, -1):",
        f"{RING}-gather-y-z]",
    ),
    "a ring the wrong way round": Mutant(
        "collectives.py",
        "place[name] = (place[name] + by) % sizes[name]",
        "place[name] = (place[name] - by) % sizes[name]",
        f"{RING}-gather-x-dW]",
    ),
    "hops in twice the bytes": Mutant(
        "collectives.py",
        "_moved(lambda x: lax.ppermute(x, names, pairs), x)",
        "lax.ppermute(x, names, pairs)",
        f"{FIELDS}::test_sums_of_bfloat16_are_hops_of_bfloat16",
    ),
    "split weights gathered once and kept": Mutant(
        "kernels/backprop.py",
        "dense.gather_weights(after(W, ready) if run.splits_data else W, run, **axes)",
        "dense.gather_weights(W, run, **axes)",
        f"{STRATEGIES}[{SPLIT}-counts]",
    ),
    "split gradients that are not summed": Mutant(
        "kernels/dense.py",
        'return reduce_scatter("O/g I/s +d -> O/g/d I/s", dW, **axes).astype(run.total)',
        'rows = dW.shape[0] // jax.lax.axis_size(axes["d"])\n'
        '        first = jax.lax.axis_index(axes["d"]) * rows\n'
        "        return jax.lax.dynamic_slice_in_dim(dW, first, rows).astype(run.total)",
        f"{STRATEGIES}[{SPLIT}-dW_2]",
    ),
    "only the last microbatch": Mutant(
        "kernels/objective.py",
        "return added(carry, one_pass(part, of_part, splits)), None",
        "return one_pass(part, of_part, splits), None",
        f"{STRATEGIES}[{SPLIT}-dW_1]",
    ),
    "each microbatch divided by its own weight": Mutant(
        "kernels/objective.py",
        "sums, grads, _ = _one_pass(params, part, total, network=of, loss=loss, reduce=reduce)",
        "total = terms_of(of).total_weight(part.weight, of)\n"
        "        sums, grads, _ = _one_pass(params, part, total, network=of, loss=loss, "
        "reduce=reduce)",
        f"{STRATEGIES}[{SPLIT}-dW_3]",
    ),
    "layers computed again by those before them": Mutant(
        "kernels/backprop.py",
        "_forward(again, after(before, g), s + 1, l - 1, run, chain)",
        "_forward(again, after(before, g), max(s, 1), l - 1 - (s > 0), run, chain)",
        f"{FIELDS}::test_layers_computed_again_start_from_the_last_that_was_kept[2-none]",
    ),
    "biases left out of the norms of samples": Mutant(
        "kernels/per_example.py",
        "biases = layers[0][1] is not None",
        "biases = False",
        f"{PER_EXAMPLE}::test_norms_alone_equal_vmap_of_grad[1x3x1]",
    ),
    "norms of samples times their weights": Mutant(
        "kernels/per_example.py",
        "jnp.where(weight[None] != 0, sample.gradient, 0)",
        "jnp.where(weight[None] != 0, sample.gradient * weight[None], 0)",
        f"{PER_EXAMPLE}::test_a_weight_of_zero_leaves_a_sample_out_and_others_play_no_part",
    ),
    "one factor for the batch, that of its longest gradient": Mutant(
        "kernels/per_example.py",
        "max_norm.astype(run.norms.dtype) / run.norms",
        "max_norm.astype(run.norms.dtype) / run.norms.max(keepdims=True)",
        f"{PER_EXAMPLE}::test_norms_losses_and_the_clipped_sum_equal_vmap_of_grad[1x1x1-column]",
    ),
    "copies of a gradient counted in its norm": Mutant(
        "kernels/terms.py",
        "jnp.sum(squares), p=",
        'jnp.sum(squares) * jax.lax.axis_size("data"), p=',
        "tests/test_norms.py::"
        "test_clipped_gradients_have_the_norm_of_the_bound_and_the_same_direction[2x1x1-column]",
    ),
    "an out-neighbour left out": Mutant(
        "graph/engine.py",
        "g = sum(parts[1:], parts[0])",
        "g = parts[0]",
        f"{ENGINE}::test_gradients_under_a_strategy_are_jax_grads[row]",
    ),
    "random bits of all dropouts drawn first thing": Mutant(
        "graph/rules/elementwise.py",
        "after(vary_like(words, like), like)",
        "vary_like(words, like)",
        "tests/graph/test_memory.py::test_temporaries_are_what_was_predicted"
        "[dropout-1x4x1-keep=recompute-float32]",
    ),
    "shared parameters with the gradient of one user": Mutant(
        "graph/engine.py",
        "mine[name] + dw if name in mine else dw",
        "dw",
        f"{ENGINE}::test_gradients_under_a_strategy_are_jax_grads[row]",
    ),
    "an array that is not turned": Mutant(
        "collectives.py",
        "divmod(block, sizes[minor])",
        "place[major], place[minor]",
        f"{ENGINE}::test_a_residual_over_one_dense_vertex_is_turned[sizes0]",
    ),
    "padding counted in a mean over features": Mutant(
        "graph/rules/norms.py",
        "jax.lax.rsqrt(squares / node.width + node.kind.epsilon)\n    return",
        "jax.lax.rsqrt(squares / node.padded_width + node.kind.epsilon)\n    return",
        f"{RULES}[1x2x3-rms norm]",
    ),
    "products before a start counted as meanwhile": Mutant(
        "inspection/hlo/collectives.py",
        "in itertools.dropwhile(lambda line: line is not start.instruction, lines):",
        "in lines:",
        "tests/inspection/hlo/test_programs.py::"
        "test_each_collective_is_found_once_with_what_runs_meanwhile[tpu_ring]",
    ),
    "a tangent dropped where bits move": Mutant(
        "xla.py",
        "moved.defjvp(lambda x, dx: (moved(*x), moved(*dx)))",
        "moved.defjvp(lambda x, dx: (moved(*x), jnp.zeros_like(moved(*dx))))",
        f"{PRODUCT}[ring, recompute-hessian]",
    ),
    "R's Hessian forgotten": Mutant(
        "kernels/curvature.py",
        "if penalty is None:",
        "if penalty is not chain:",
        f"{PRODUCT}[ring, gathered, split-gauss_newton]",
    ),
    "the loss's Hessian without the weights of samples": Mutant(
        "kernels/curvature.py",
        "at_outputs(z, y, weight, total, chain, loss)",
        "at_outputs(z, y, jax.numpy.ones_like(weight), total, chain, loss)",
        f"{PRODUCT}[split, microbatches-gauss_newton]",
    ),
    "a sum over devices that starts at another": Mutant(
        "collectives.py",
        "return tree_sum(lax.all_to_all(parts, names, dim, dim, tiled=True), axis=dim)",
        "parts = lax.all_to_all(parts, names, dim, dim, tiled=True)\n"
        "    return tree_sum(jnp.roll(parts, 1, dim), dim)",
        f"{INVARIANT}[float32-1x8x1]",
    ),
    "products of whatever a device holds": Mutant(
        "kernels/blocks.py",
        "return einsum(signature, a, b, dtype=dtype, product=product, **axes)",
        "return einsum(signature, a, b, dtype=dtype, **axes)",
        f"{INVARIANT}[float32-1x2x4]",
    ),
    "a product of one term joined to the sum of two": Mutant(
        "kernels/as_written.py",
        '"copy",',
        '"copy", "dot_general",',
        f"{SMALL}[8x1x1]",
    ),
    "a loop over one block that is taken apart": Mutant(
        "kernels/blocks.py",
        "if num_blocks == 1:",
        "if num_blocks == 0:",
        f"{PER_EXAMPLE}::test_gradients_of_samples_have_the_same_bits_on_every_mesh[8x1x1]",
    ),
    "updates of whatever a device holds": Mutant(
        "train/optimizer.py",
        "update = self._update_in_blocks if self.placement.is_invariant else self.masked.update",
        "update = self.masked.update",
        f"{INVARIANT}[float32-1x2x4]",
    ),
    "a stage that sends g the wrong way": Mutant(
        "pipeline/executor.py",
        "partial(body.moved_g, by=by)",
        "partial(body.moved_g, by=-by)",
        f"{EXECUTOR}[1f1b, 1x4x2x1, 9 layers, m=8, auto, cross_entropy]",
    ),
    "g not turned at the bend of a v": Mutant(
        "pipeline/executor.py",
        "came_g[0] = jnp.where((row.task - 1) % 3 == 0, g, came_g[0])",
        "came_g[0] = g",
        f"{EXECUTOR}[zb-v, 1x2x2x2, 5 layers, m=2, auto, cross_entropy]",
    ),
    "a ring of two that moves for one way only": Mutant(
        "pipeline/buffers.py",
        "ticks[places] | due if places in ticks else due",
        "due",
        f"{EXECUTOR}[zb-v, 1x2x2x2, 8 layers, m=3, auto, logistic]",
    ),
    "g sent before its W where the two are one": Mutant(
        "pipeline/executor.py",
        "g_out = jnp.where(is_W & (row.task > 0), leaving, g_out)",
        "g_out = done.g_out",
        f"{EXECUTOR}[1f1b, 1x4x2x1, 9 layers, m=8, auto, cross_entropy]",
    ),
    "a buffer with a slot too few": Mutant(
        "pipeline/buffers.py",
        "slot = next((slot for slot, end in enumerate(ends) if end < first), len(ends))",
        "slot = next((slot for slot, end in enumerate(ends) if end < first + 3), len(ends))",
        f"{EXECUTOR}[zb-h1, 2x2x2x1, 5 layers, m=4, row, cross_entropy]",
    ),
    "a message that is not turned": Mutant(
        "pipeline/on_stage.py",
        "if self.stages.slots_per_chunk % 2:",
        "if self.stages.slots_per_chunk % 2 > 1:",
        f"{EXECUTOR}[1f1b, 1x2x2x2, 7 layers, m=4, auto, mse]",
    ),
    "gradients of empty slots": Mutant(
        "pipeline/executor.py",
        "due = (row.task == 3 * c + W) & body.has(c, k)",
        "due = row.task == 3 * c + W",
        "tests/pipeline/test_executor.py::test_gradients_of_padding_and_of_empty_slots_are_zero",
    ),
    "z computed again by the layer after": Mutant(
        "pipeline/chunk.py",
        "again[k], _ = slot_forward(z, k - 1, chunk)",
        "again[k], _ = slot_forward(z, k, chunk)",
        f"{EXECUTOR}[{RECOMPUTED}]",
    ),
    "ends summed over the stages but one": Mutant(
        "pipeline/executor.py",
        "return (row.task == 3 * place[1] + kind) & (body.stage == place[0])",
        "return row.task == 3 * place[1] + kind",
        f"{EXECUTOR}[gpipe, 2x3x1x1, 5 layers, m=2, auto, output]",
    ),
    "blocks gathered from the wrong axis": Mutant(
        "placement.py",
        '"column": {"g": main, "s": other, "d": "data"},',
        '"column": {"g": other, "s": main, "d": "data"},',
        "tests/test_placement.py::test_a_word_binds_the_roles_of_its_layer[sizes0-column-roles0]",
    ),
}


# Their killers train for a hundred steps on two meshes: tests/every_mutant.py has these.
SLOW = (
    "a sum over devices that starts at another",
    "products of whatever a device holds",
    "a product of one term joined to the sum of two",
    "a loop over one block that is taken apart",
    "updates of whatever a device holds",
)


@pytest.mark.parametrize("name", [name for name in MUTANTS if name not in SLOW])
def test_mutant_is_killed(name, tmp_path):
    kill(MUTANTS[name], tmp_path)


def kill(mutant: Mutant, tmp_path: Path) -> None:
    """Run the killer of a mutant on a copy of the package, and see it fail."""
    for folder in ("tpmlp", "tests"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    for file in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / file, tmp_path)
    source = tmp_path / "tpmlp" / mutant.file
    text = source.read_text()
    assert text.count(mutant.old) == 1
    source.write_text(text.replace(mutant.old, mutant.new))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", mutant.killer],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    # 1 is "some tests failed"; a test that does not exist is 4, one that passes 0.
    assert run.returncode == 1, run.stdout
    assert f"FAILED {mutant.killer}" in run.stdout
    assert [said for said in REFUSALS if said in run.stdout] == [*filter(None, [mutant.refused])]


def table() -> str:
    """Return the mutants as docs/mutants.md has them."""
    refused = sum(mutant.refused is not None for mutant in MUTANTS.values())
    lines = [
        "# Faults that the suite finds",
        "",
        f"{len(MUTANTS)} edits of the package, each found by the test beside it; {refused} are",
        "refused while the step is traced, before there is a number. `tests/test_mutants.py` has",
        "the edits, and holds this table.",
        "",
        "| fault | in | found by | refused statically |",
        "| --- | --- | --- | --- |",
    ]
    for name, mutant in MUTANTS.items():
        file, _, test = mutant.killer.partition("[")[0].partition("::")
        where = f"`{test}` of `{file}`"
        by = REFUSALS[mutant.refused] if mutant.refused else "no"
        lines.append(f"| {name} | `tpmlp/{mutant.file}` | {where} | {by} |")
    return "\n".join(lines)


def test_the_table_in_the_docs_is_this_one():
    assert (ROOT / "docs" / "mutants.md").read_text() == table() + "\n"


if __name__ == "__main__":
    print(table())
