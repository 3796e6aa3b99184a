"""What the two generations of GPUs do differently in a Mosaic kernel.

A chip copies tiles from global into shared memory, multiplies what lies there, and
names the layouts of the results in registers. The kernels of `mosaic_gpu` are written
once, in these words: `Ampere` for sm_80 (cp.async, mma), `Hopper` for sm_90 (the tensor
memory accelerator, wgmma), `Plain` for anywhere (interpreted: no layouts, no waiting).
A program is one warpgroup of 128 threads on each of them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

# Tiles of 8 rows and 64 numbers of two bytes, swizzled over 128 bytes: what both kinds
# of products read without conflicts between the banks of shared memory.
SWIZZLE = 128
TRANSFORMS: Any = (
    plgpu.TilingTransform((8, 64)),  # pyright: ignore[reportAbstractUsage]
    plgpu.SwizzleTransform(SWIZZLE),  # pyright: ignore[reportAbstractUsage]
)


@dataclasses.dataclass(frozen=True)
class Plain:
    """A chip for the interpreter: copies at once, products in plain jax.

    dtype: of what is multiplied.
    """

    dtype: Any
    exact: ClassVar[bool] = True  # float32 and any head_dim, too
    rows: ClassVar[int] = 1  # S is a multiple of them

    @property
    def layout(self) -> Any:
        """The layout of a product in registers; None: none."""
        return None

    def tile(self, *shape: int) -> Any:
        """Makes the type of a tile in shared memory."""
        return plgpu.SMEM(shape, self.dtype)

    def barriers(self, count: int) -> list[Any]:
        """Makes the types of what `fetch` and `wait` need for `count` tiles."""
        del count
        return []

    def fetch(self, source: Any, tile: Any, barrier: Any, some: Any) -> None:
        """Begins to copy from global memory into a tile.

        some: whether the copy is wanted; if not, any may be made, from valid memory.
        """
        del barrier, some
        tile[...] = source[...]

    def wait(self, barrier: Any, behind: int) -> None:
        """Waits until a tile is there; `behind`: copies that were begun after it."""

    def full(
        self, shape: tuple[int, ...], value: float, axis: int | None = None
    ) -> Any:
        """Makes an array of one float32 number in the layout of products.

        axis: which of a product's axes it lacks; None: neither.
        """
        x = jnp.full(shape, value, jnp.float32)
        if self.layout is None:
            return x
        layout = self.layout if axis is None else self.layout.reduce(axis)
        return plgpu.layout_cast(x, layout)

    def iota(self, shape: tuple[int, ...], axis: int) -> Int[Array, "..."]:
        """Counts along an axis of a product, or its rows."""
        if self.layout is None:
            return lax.broadcasted_iota(jnp.int32, shape, axis)
        layout = self.layout if len(shape) == 2 else self.layout.reduce(1)
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)

    def keep_rows(self, tile: Any, live: Callable[[Array], Bool[Array, "_ _"]]) -> None:
        """Puts 0 into the rows of a tile that are not live: 0 * NaN would be NaN."""
        rows = lax.broadcasted_iota(jnp.int32, tile.shape, 0)
        tile[...] = jnp.where(live(rows), tile[...], jnp.zeros((), tile.dtype))

    def load(self, ref: Any, axis: int | None = None) -> Array:
        """Loads from either memory into the layout that `full` makes."""
        if self.layout is None:
            return ref[...]
        layout = self.layout if axis is None else self.layout.reduce(axis)
        return plgpu.load(ref, layout=layout, optimized=False)

    def store(self, x: Array, ref: Any, tile: Any) -> None:
        """Stores a product in global memory, by way of a tile no longer read."""
        del tile
        ref[...] = x.astype(ref.dtype)

    def product(
        self, a: Any, b: Any, add: Array | None = None, *, trans_b: bool = False
    ) -> Float[Array, "M N"]:
        """Multiplies a [M, K], a tile or a product in registers, and a tile b [K, N].

        In float32, onto `add`; trans_b: b is [N, K].
        """
        a, b = (x if isinstance(x, jax.Array) else x[...] for x in (a, b))
        out = jnp.dot(
            a,
            b.T if trans_b else b,
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        return out if add is None else add + out


@dataclasses.dataclass(frozen=True)
class Ampere(Plain):
    """sm_80: warps copy by cp.async and multiply by mma out of registers."""

    exact: ClassVar[bool] = False

    @property
    def layout(self) -> Any:
        return plgpu.Layout.MMA_ACC(self.dtype)

    def tile(self, *shape: int) -> Any:
        return plgpu.SMEM(shape, self.dtype, transforms=TRANSFORMS)

    def fetch(self, source: Any, tile: Any, barrier: Any, some: Any) -> None:
        # Also where it is not wanted: `wait` counts copies.
        del barrier, some
        inside = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
        plgpu.copy_gmem_to_smem(source, tile, oob_mode=inside)

    def wait(self, barrier: Any, behind: int) -> None:
        del barrier
        plgpu.wait_gmem_to_smem(behind)

    def keep_rows(self, tile: Any, live: Callable[[Array], Bool[Array, "_ _"]]) -> None:
        layout = self._wide(tile)
        rows = plgpu.broadcasted_iota(jnp.int32, tile.shape, 0, layout=layout)
        x = plgpu.load(tile, layout=layout)
        tile[...] = jnp.where(live(rows), x, jnp.zeros_like(x))
        self._commit()

    def _wide(self, tile: Any) -> Any:
        """The layout in which a thread has 16 bytes of a row."""
        return plgpu.Layout.SMEM_GMEM_COPY(tile.shape, tile.dtype, SWIZZLE)

    def _commit(self) -> None:
        """Makes what was stored in tiles visible to products."""

    def store(self, x: Array, ref: Any, tile: Any) -> None:
        if ref.dtype == jnp.float32:
            ref[...] = x
            return
        # A thread has 4 bytes of a row: the tile turns them into 16.
        tile[...] = x.astype(ref.dtype)
        ref[...] = plgpu.load(tile, layout=self._wide(tile))

    def product(
        self, a: Any, b: Any, add: Array | None = None, *, trans_b: bool = False
    ) -> Float[Array, "M N"]:
        left, right = (
            kind(self.dtype) for kind in (plgpu.Layout.MMA_LHS, plgpu.Layout.MMA_RHS)
        )
        shape = a.shape[0], b.shape[0 if trans_b else 1]
        total: Array = self.full(shape, 0.0) if add is None else add
        # By parts of what is summed over: every warp has all of b in its registers.
        in_registers = isinstance(a, jax.Array)
        part = 32 if in_registers else 64
        for first in range(0, a.shape[1], part):
            some = pl.ds(first, part)
            if in_registers:
                a_part = self._as_left(a, first, part)
            else:
                a_part = plgpu.load(a.at[:, some], layout=left, optimized=False)
            b_part = b.at[:, some].transpose((1, 0)) if trans_b else b.at[some]
            b_part = plgpu.load(b_part, layout=right, optimized=False)
            total = plgpu.mma(total, a_part, b_part)
        return total

    def _as_left(self, x: Array, first: int, columns: int) -> Array:
        """Takes columns of a product as the left operand of another.

        The registers are the same, which `layout_cast` does not know: two accumulators
        of 8 columns lie in a thread as an operand of 16.
        """
        layout = plgpu.Layout.MMA_LHS(self.dtype)
        shape = x.shape[0], columns

        relay: Any = plgpu.inline_mgpu(
            arg_types=(self.layout,),
            return_type=plgpu.ShapeDtypeStruct(shape, x.dtype, layout=layout),
        )

        def relaid(ctx: Any, x: Any) -> Any:
            del ctx
            new: Any = layout.to_mgpu()
            some = x[:, first : first + columns]
            registers = some.registers.reshape(new.registers_shape(shape))
            return mgpu.FragmentedArray(
                _registers=registers, _layout=new, _is_signed=None
            )

        return relay(relaid)(x)


@dataclasses.dataclass(frozen=True)
class Hopper(Ampere):
    """sm_90: one thread asks for copies of tiles, wgmma reads them where they lie."""

    rows: ClassVar[int] = 8

    @property
    def layout(self) -> Any:
        return plgpu.Layout.WGMMA

    def barriers(self, count: int) -> list[Any]:
        return [plgpu.Barrier(num_barriers=count)]

    def fetch(self, source: Any, tile: Any, barrier: Any, some: Any) -> None:
        copy = lambda: plgpu.copy_gmem_to_smem(source, tile, barrier)
        if some is True:
            copy()
        else:
            pl.when(some)(copy)

    def wait(self, barrier: Any, behind: int) -> None:
        del behind
        plgpu.barrier_wait(barrier)

    def _commit(self) -> None:
        plgpu.commit_smem()

    def product(
        self, a: Any, b: Any, add: Array | None = None, *, trans_b: bool = False
    ) -> Float[Array, "M N"]:
        b = b.transpose((1, 0)) if trans_b else b
        if add is not None:
            onto: Any = pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))
            return onto(plgpu.ACC.init(add))

        def fresh(ref: Any) -> Array:
            plgpu.wgmma(ref, a, b)
            return ref[...]

        shape = (a.shape[0], b.shape[1])
        return pl.run_scoped(fresh, plgpu.ACC(shape, jnp.float32))


class Ring:
    """Tiles of several arrays that are fetched `stages` blocks ahead, in turn.

    Attributes:
      chip: that copies.
      sources: of each array, the reference to block j in global memory.
      tiles: of each array, [stages, rows, width].
      barriers: of each array a list of one, or none, as the chip wants it.
    """

    def __init__(
        self,
        chip: Plain,
        stages: int,
        sources: Sequence[Callable[[Any], Any]],
        tiles: Sequence[Any],
        barriers: Sequence[Any],
    ):
        self.chip, self.stages = chip, stages
        self.sources, self.tiles, self.barriers = sources, tiles, barriers

    def start(self, first: Any, end: Any) -> int:
        """Fetches the first blocks of first ... end - 1; returns how many copies."""
        for ahead in range(self.stages - 1):
            self._fetch(first + ahead, end)
        return len(self.sources) * (self.stages - 1)

    def ahead(self, j: Any, end: Any) -> None:
        """Fetches behind block j, whose predecessor is no longer read."""
        self._fetch(j + self.stages - 1, end)

    def get(self, j: Any, which: int, behind: int = 0) -> Any:
        """Waits for an array's tile of block j and returns it; in order of arrays.

        behind: copies of others that were begun since `ahead`.
        """
        slot = self._slot(j)
        behind += len(self.sources) * self.stages - 1 - which
        self.chip.wait(self._barrier(which, slot), behind)
        return self.tiles[which].at[slot]

    def _slot(self, j: Any) -> Any:
        return 0 if self.stages == 1 else lax.rem(j, self.stages)

    def _fetch(self, j: Any, end: Any) -> None:
        slot, some = self._slot(j), j < end
        if not isinstance(j, int):
            # What is fetched in vain (cp.async) is the last block again: it is cached.
            j = jnp.minimum(j, jnp.maximum(end - 1, 0))
        for which, source in enumerate(self.sources):
            tile = self.tiles[which].at[slot]
            self.chip.fetch(source(j), tile, self._barrier(which, slot), some)

    def _barrier(self, which: int, slot: Any) -> Any:
        barriers = self.barriers[which]
        return barriers[0].at[slot] if barriers else None


def per_row(x: Array, shape: tuple[int, int]) -> Array:
    """Repeats a number per row along the columns."""
    return lax.broadcast_in_dim(x, shape, [0])


def per_column(x: Array, shape: tuple[int, int]) -> Array:
    """Repeats a number per column along the rows."""
    return lax.broadcast_in_dim(x, shape, [1])
