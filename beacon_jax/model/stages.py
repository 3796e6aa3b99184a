"""Layers in stages: of S devices along the mesh axis "stage" each holds L / S layers.

It holds their memory, too, and nothing of another stage's. Hidden states go from stage
to stage by `ppermute`. Here a window goes through all stages in turn, one of which is
at work at a time: that is enough for decoding, whose next token needs the last one.
Many windows go in a pipeline (`core.pipeline`, `core.stage_vjp`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int

from beacon_jax.model.net import Net

AXIS = "stage"
LAYERS = PartitionSpec(AXIS)  # of what has layers in front
WHOLE = PartitionSpec()

# One layer: (variables, x, k, v, place, number) -> (x, what is kept, k, v).
type LayerCall = Callable[..., tuple[Any, Any, Any, Any]]


def count(net: Net) -> int:
    """Returns S, the number of stages; 1 without a mesh."""
    return net.partition.mesh.shape.get(AXIS, 1) if net.partition else 1


def on_stages(net: Net, f: Callable[..., Any], given: Any, returned: Any) -> Any:
    """Makes f run on every stage with what it holds, by `jax.shard_map`.

    The compiler goes on splitting over the other axes of the mesh, if one is larger
    than 1.

    Args:
      given, returned: of each argument and result `LAYERS` or `WHOLE`.
    """
    assert net.partition is not None
    mesh = net.partition.mesh
    apart = all(size == 1 for name, size in mesh.shape.items() if name != AXIS)
    return jax.shard_map(
        f,
        mesh=mesh,
        in_specs=given,
        out_specs=returned,
        axis_names=set(mesh.axis_names) if apart else {AXIS},
        check_vma=False,
    )


def unsplit(net: Net, outer: Any) -> Any:
    """Returns the variables that are not of layers, whole on every device.

    XLA (jax 0.12.0) ends the process with a failed check when it splits the look-up of
    an embedding over the rest of a mesh inside of a stage (`PartitionGather`).
    """
    assert net.partition is not None
    whole = jax.NamedSharding(net.partition.mesh, WHOLE)
    return jax.tree.map(lambda x: lax.with_sharding_constraint(x, whole), outer)


def inside(net: Net) -> Net:
    """Returns the net of one stage; call it in a function of `on_stages`."""
    assert net.partition is not None
    rest = net.partition.without(AXIS, jax.sharding.get_abstract_mesh())
    return dataclasses.replace(net, partition=rest if rest.free_axes else None)


def index() -> Int[Array, ""]:
    """Returns the number of this stage."""
    return lax.axis_index(AXIS)


def passed_on(x: Any, by: int = 1) -> Any:
    """Hands a tree of arrays to the next stage (by=-1: the one before), in a ring."""
    size = lax.axis_size(AXIS)
    ring = [(i, (i + by) % size) for i in range(size)]
    return jax.tree.map(lambda a: lax.ppermute(a, AXIS, ring), x)


def handed_out(x: Any, source: int) -> Any:
    """Hands a tree of arrays that one stage has to all.

    As many have it twice after each step, so it takes log2(S) of them, and no sum.
    """
    size, have = lax.axis_size(AXIS), 1
    behind = (index() - source) % size
    while have < size:
        pairs = [
            ((source + i) % size, (source + i + have) % size)
            for i in range(min(have, size - have))
        ]
        here = (behind >= have) & (behind < 2 * have)

        def hand(a: Array, pairs: Any = pairs, here: Any = here) -> Array:
            return jnp.where(here, lax.ppermute(a, AXIS, pairs), a)

        x = jax.tree.map(hand, x)
        have *= 2
    return x


def over_layers(
    layer: LayerCall, variables: Any, x: Any, k: Any, v: Any, place: Any
) -> tuple[Any, Any, Any, Any]:
    """Runs stacked layers one after the other: (x, what each kept, k, v)."""

    def step(carry: Any, per_layer: Any) -> Any:
        x, k, v = carry
        one, number = per_layer
        x, kept, k, v = layer(one, x, k, v, place, number)
        return (x, k, v), kept

    numbers = jnp.arange(len(jax.tree.leaves(variables)[0]))
    (x, k, v), kept = lax.scan(step, (x, k, v), (variables, numbers))
    return x, kept, k, v


def through(
    net: Net,
    make: Callable[[Net], LayerCall],
    variables: Any,
    x: Any,
    k: Any,
    v: Any,
    place: Any,
) -> tuple[Any, Any, Any, Any]:
    """Runs all layers, in stages if the mesh has any: (x, what each kept, k, v).

    Args:
      make: makes the layer of a net.
      variables: of all layers, stacked; k and v likewise [L, ...].
    """
    size = count(net)
    if size == 1:
        return over_layers(make(net), variables, x, k, v, place)

    def local(variables: Any, x: Any, k: Any, v: Any, place: Any) -> Any:
        layer, me = make(inside(net)), index()
        run = lambda x, k, v: over_layers(layer, variables, x, k, v, place)
        shape = jax.eval_shape(run, x, k, v)[1]
        nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shape)

        def turn(carry: Any, number: Any) -> Any:
            mine = lambda x, kept, k, v: run(x, k, v)
            x, *rest = lax.cond(number == me, mine, lambda *same: same, *carry)
            return (passed_on(x), *rest), None

        numbers = jnp.arange(size)
        (x, kept, k, v), _ = lax.scan(turn, (x, nothing, k, v), numbers)
        return handed_out(x, 0), kept, k, v  # it has gone round

    given = (LAYERS, WHOLE, LAYERS, LAYERS, WHOLE)
    returned = (WHOLE, LAYERS, LAYERS, LAYERS)
    return on_stages(net, local, given, returned)(variables, x, k, v, place)
