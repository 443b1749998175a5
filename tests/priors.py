"""Normal priors, for which score and posterior are known in closed form."""

import numpy as np

from helpers.sde import VPSDE, GaussianPrior

#: Noise levels of the chain that the priors are for.
ALPHAS = VPSDE().alphas_cumprod


def gaussian(d=4, seed=0):
    """A normal prior of variance 1 with random correlations."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(d, d))
    cov = root @ root.T + 0.1 * np.eye(d)
    scale = np.sqrt(np.diag(cov))
    return GaussianPrior(rng.normal(size=d) * 0.3, cov / np.outer(scale, scale), ALPHAS)
