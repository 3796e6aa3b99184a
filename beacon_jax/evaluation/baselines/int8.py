"""Memories of int8 keys and values (`model.quantize`), with and without beacons.

Their bytes are those of int8 slots (a byte per element and a float32 scale per slot and
head), whatever other methods of the same ratio keep; tables show them.
"""

import jax.numpy as jnp

from beacon_jax.evaluation.methods import Beacon, Full


class Int8(Full):
    """The whole past, uncompressed, in int8."""

    family, dtype = "int8", jnp.int8


class BeaconInt8(Beacon):
    """Beacons in int8: as many slots as beacons of this ratio, of fewer bytes."""

    family, dtype = "beacon_int8", jnp.int8
