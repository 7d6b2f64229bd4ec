"""What the tests of landscapes share: parameter trees, a plane that is not orthogonal, a loss."""

import jax
import jax.numpy as jnp
import numpy as np

from gradlab.analysis.landscape import Plane


def tree(seed, lead=()):
    """Parameters with a non-square kernel, a convolution, a bias and a neuron's leak per unit."""
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (5, 3), "bias": (3,)}
    return {
        "layer_0": {
            "connection": {name: jnp.asarray(rng.normal(size=lead + shape)) for name, shape in shapes.items()},
            "neuron": {"leak": jnp.asarray(rng.normal(size=(*lead, 3)))},
        },
        "layer_1": {"connection": {"kernel": jnp.asarray(rng.normal(size=(*lead, 2, 3, 4, 5)))}},
    }


def flat(params):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree_util.tree_leaves(params)])


def skew_plane():
    """Axes that are neither orthogonal nor of length one: y contains half of x."""
    x = jax.tree_util.tree_map(lambda leaf: 3.0 * leaf, tree(1))
    y = jax.tree_util.tree_map(lambda u, v: 0.5 * u + 0.7 * v, x, tree(2))
    return Plane(tree(0), x, y)


def wavy(params):
    kernel = params["layer_0"]["connection"]["kernel"]
    return jnp.sum(jnp.sin(kernel) ** 2) + jnp.sum(params["layer_1"]["connection"]["kernel"] ** 2)
