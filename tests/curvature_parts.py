"""What the tests of curvature share: a tiny network's loss, dense matrices, a quadratic known by hand."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from gradlab.analysis.curvature import loss_function
from gradlab.testing.networks import case, feed_forward, lif


@cache
def network(surrogate=None, **settings):
    """A tiny network's loss as a function of its parameters, and parameters under which it is alive."""
    neuron = lif(**settings) if surrogate is None else lif(surrogate=surrogate, **settings)
    net, params, batch, loss = case(feed_forward(neuron, (4, 3)), n_steps=6)
    return loss_function(net, batch, loss), params


def dense(product, params):
    """The matrix of a product of trees, column by column."""
    vector, tree = ravel_pytree(params)
    return np.stack([np.asarray(ravel_pytree(product(tree(column)))[0]) for column in jnp.eye(vector.size)], axis=1)


QUADRATIC = {"layer_0": {"w": np.array([5.0, 3.0, -2.0])}, "layer_1": {"w": np.array([0.0, 1.0])}}


def quadratic(params):
    """1/2 sum c w^2: the second derivative is diagonal, with entries 5, 3, -2, 0, 1."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(QUADRATIC), strict=True)
    return sum(0.5 * jnp.sum(c * w**2) for w, c in pairs)


def ones():
    return jax.tree.map(lambda leaf: jnp.asarray(np.ones_like(leaf)), QUADRATIC)
