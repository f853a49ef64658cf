"""What is true of the posterior of `annealed_report.logistic`: NUTS of NumPyro, and bridge sampling for log Z.

uv pip install numpyro
python bench/reference.py               # writes data/breast_cancer/reference.json and draws.npy: some five minutes
python bench/reference.py --draws 500   # shorter
"""

import argparse
import json
import math
import platform
import time

import jax
import numpy as np
import numpyro
import torch
from jax import numpy as jnp
from numpyro.diagnostics import effective_sample_size, gelman_rubin
from numpyro.infer import MCMC, NUTS
from torch.distributions import MultivariateNormal

from annealed_core.energies import LogisticRegression
from annealed_core.evidence import log_mean_weight
from annealed_report.logistic import FOLDER, data
from annealed_report.results import machine

CHAINS, WARM_UP, KEPT = 4, 1000, 2000
SAMPLES = 200_000  # of the Gaussian


def nuts(draws):
    """Draws (chains, draws, 31) of the posterior, and the seconds that compiling and sampling took."""
    features, labels = (jnp.array(each.numpy()) for each in data())

    def energy(z):
        return 0.5 * jnp.sum(z**2) + jnp.sum(jax.nn.softplus((1 - 2 * labels) * (features @ z)))

    sampler = MCMC(
        NUTS(potential_fn=energy), num_warmup=WARM_UP, num_samples=draws, num_chains=CHAINS, chain_method="sequential",
        progress_bar=False,
    )  # fmt: skip
    begun = time.perf_counter()
    sampler.run(jax.random.PRNGKey(0), init_params=jnp.zeros((CHAINS, features.shape[1])))
    found = np.asarray(sampler.get_samples(group_by_chain=True))
    return found, time.perf_counter() - begun


def evidence(exact):
    """Log Z by bridge sampling (Meng & Wong 1996) between the draws and the Gaussian with their mean and covariance.

    And by importance sampling from that Gaussian, which errs downwards, and backwards from the draws, upwards.
    """
    target, generator = LogisticRegression(*data()), torch.Generator().manual_seed(0)
    factor = torch.linalg.cholesky(exact.T.cov())
    gaussian = MultivariateNormal(exact.mean(0), scale_tril=factor)
    z = exact.mean(0) + torch.randn(SAMPLES, exact.shape[1], generator=generator, dtype=exact.dtype) @ factor.T
    ours, theirs = (target(each) - gaussian.log_prob(each) for each in (z, exact))
    below, above = log_mean_weight(ours)[0], -log_mean_weight(-theirs)[0]
    bridge, shares = below, (torch.tensor([len(z), len(exact)]) / (len(z) + len(exact))).double().log()
    for _ in range(100):
        first, second = (torch.logaddexp(shares[1] + each - bridge, shares[0]) for each in (ours, theirs))
        bridge = torch.logsumexp(ours - first, 0) - torch.logsumexp(-second, 0) + math.log(len(exact) / len(z))
    return [round(float(each), 4) for each in (bridge, below, above)]


def main():
    numpyro.enable_x64()
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=10_000, help="of each of the four chains")
    asked = parser.parse_args()
    found, seconds = nuts(asked.draws)
    flat = found.reshape(-1, found.shape[-1])
    thinned = found[:, :: max(1, asked.draws * CHAINS // KEPT)].reshape(-1, found.shape[-1])
    log_z, below, above = evidence(torch.from_numpy(flat.copy()))
    known = {
        "mean": flat.mean(0).round(5).tolist(),
        "sd": flat.std(0).round(5).tolist(),
        "log_z": log_z,
        "log_z_below": below,
        "log_z_above": above,
        "r_hat": float(gelman_rubin(found).max()),
        "ess": float(effective_sample_size(found).min()),
        "chains": CHAINS,
        "draws": asked.draws,
        "seconds": round(seconds, 1),
        "machine": machine(),
        "versions": {"python": platform.python_version(), "numpyro": numpyro.__version__, "jax": jax.__version__},
    }
    print({name: value for name, value in known.items() if name not in ("mean", "sd")})
    np.save(FOLDER / "draws.npy", thinned.astype(np.float32))
    (FOLDER / "reference.json").write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
