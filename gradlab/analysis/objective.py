"""The loss as a function of the parameters, evaluated at many points by one compiled program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradlab import plan
from gradlab.analysis.trees import Params
from gradlab.checks import check
from gradlab.losses import Batch, Loss
from gradlab.modules import is_hashable
from gradlab.network import Network

LossOfParams = Callable[[Params], jax.Array]

MOST_AT_ONCE = 256
SHARE_OF_MEMORY = 0.25
UNKNOWN_MEMORY = 2**30  # bytes taken to be free where the device does not say


@dataclass(frozen=True, eq=False)
class NetworkLoss:
    """The loss of a network on one batch as a function of its parameters; make it with `loss_function`.

        (1)  L(params) = loss(net(params, batch.inputs), batch)

    It is a JAX pytree whose leaves are the batch, so that one compiled program serves all batches of one shape.
    """

    net: Network
    batch: Batch
    loss: Loss

    def __call__(self, params: Params) -> jax.Array:
        params, batch = check(self.net, params, self.batch, self.loss)
        _, layers = plan.run(self.net, params, batch.inputs)
        return self.loss(layers[-1].output, batch)


jax.tree_util.register_dataclass(NetworkLoss, data_fields=["batch"], meta_fields=["net", "loss"])


def loss_function(net: Network, batch: Batch, loss: Loss) -> NetworkLoss:
    """The loss on a batch as a function of the parameters, for landscapes, lines and curvature.

    Args:
        net: the network.
        batch: inputs [time, batch, features...], targets, and perhaps a mask.
        loss: `gl.PerStep(...)` or `gl.Accumulated(...)`.

    Raises:
        TypeError: for a batch or a loss of another type. What does not fit the network is refused (ValueError) when
            the function is called.
    """
    if not isinstance(batch, Batch):
        raise TypeError(f"batch is a {type(batch).__name__}: give gl.Batch(inputs, targets, mask=None)")
    if not isinstance(loss, Loss):
        raise TypeError(f"loss is {loss!r}: wrap it, gl.PerStep(optax.softmax_cross_entropy)")
    return NetworkLoss(net, jax.tree.map(jnp.asarray, batch), loss)


def compiled(function: Callable[..., Any], loss_of_params: LossOfParams, **static: Any) -> Callable[..., Any]:
    """`function(loss_of_params, ..., **static)`, compiled; hold it while it is in use.

    Args:
        function: a function of a module. With the loss of a network it is compiled once for all calls with that
            network, loss and shapes, whatever the batch; with any other function once per call of `compiled`.
        loss_of_params: its first argument.
        static: further arguments by name, hashable.
    """
    if isinstance(loss_of_params, NetworkLoss) and is_hashable(loss_of_params.net, loss_of_params.loss):
        return partial(_kept(function, tuple(static)), loss_of_params, **static)
    return jax.jit(partial(function, loss_of_params, **static))


def executable(
    function: Callable[..., Any], loss_of_params: LossOfParams, *arguments: Any, **static: Any
) -> Callable[..., Any]:
    """As `compiled`, but compiled now, for arguments of these shapes: other threads can call it and compile nothing."""
    run: Any = compiled(function, loss_of_params, **static)
    if not isinstance(run, partial):
        return run.lower(*arguments).compile()  # type: ignore[no-any-return]
    jitted: Any = run.func
    return partial(jitted.lower(*run.args, *arguments, **run.keywords).compile(), *run.args)


@cache
def _kept(function: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    return jax.jit(function, static_argnames=names)


def scalar(loss: jax.Array) -> jax.Array:
    """The loss itself, or a ValueError if it is no scalar."""
    if jnp.shape(loss) != ():
        raise ValueError(f"loss_of_params must return a scalar, it returned the shape {jnp.shape(loss)}")
    return loss


def losses_along(loss_of_params: LossOfParams, trajectory: Params, batch_size: int | None = None) -> np.ndarray:
    """The true loss at each checkpoint of a trajectory (one leading axis): [checkpoints], float64.

    `batch_size` is as in `gradlab.analysis.landscape.surface`.
    """
    run = jax.tree.map(jnp.asarray, trajectory)
    leaves = jax.tree.leaves(run)
    if len({leaf.shape[:1] for leaf in leaves}) != 1 or not leaves[0].shape[:1]:
        raise ValueError("a trajectory has one leading axis (checkpoints), of one length in all parameters")
    size = points_at_once(loss_of_params, jax.tree.map(lambda leaf: leaf[0], run), leaves[0].shape[0], batch_size)
    return np.asarray(compiled(_along, loss_of_params, batch_size=size)(run), dtype=np.float64)


def _along(loss_of_params: LossOfParams, run: Params, batch_size: int | None) -> jax.Array:
    return jax.lax.map(lambda params: scalar(loss_of_params(params)), run, batch_size=batch_size)


def points_at_once(
    loss_of_params: LossOfParams, params: Params, points: int, batch_size: int | None = None
) -> int | None:
    """How many points are evaluated together; None: one after the other.

    A batch size that is given is taken. Otherwise the answer is None on a CPU, which gains nothing from several at
    once; on an accelerator as many as fit into a quarter of its free memory, by what the compiler says one point
    takes, 256 at most.
    """
    require_batch_size(batch_size)
    if batch_size is not None:
        return batch_size
    if jax.default_backend() == "cpu":
        return None
    analysis = jax.jit(lambda p: loss_of_params(p)).lower(params).compile().memory_analysis()
    own = sum(int(leaf.nbytes) for leaf in jax.tree.leaves(params))
    each = own + int(getattr(analysis, "temp_size_in_bytes", 0) or 16 * own)
    return max(1, min(points, MOST_AT_ONCE, memory_to_use() // each))


def require_batch_size(batch_size: int | None) -> None:
    """Raise ValueError unless the batch size is None or a whole number above 0."""
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size is {batch_size!r}: give a whole number above 0, or None")


def memory_to_use() -> int:
    """Bytes of the device that points may fill: a share of what is free."""
    return int(SHARE_OF_MEMORY * _free_bytes())


def _free_bytes() -> int:
    # Not every device tells its memory.
    told = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in told:
        return UNKNOWN_MEMORY
    return int(told["bytes_limit"]) - int(told.get("bytes_in_use", 0))
