"""Words of the field: what each means, and a page's prose with the meaning at hand where a section first uses one."""

from __future__ import annotations

import re
from html import escape

MEANINGS = {
    "active units": "latents whose posterior mean varies from image to image",
    "AIS": "annealed importance sampling: weighted particles are moved along a path of densities by Markov moves",
    "amortisation gap": "what the encoder's posterior loses against the best of its family for each image",
    "AVO": "annealed variational objective: each kernel is trained towards a target of its own on the way",
    "effective sample size": "how many equally weighted samples the weighted ones are worth",
    "ELBO": "evidence lower bound: what variational inference maximises, at most log p(x)",
    "ESS": "effective sample size: how many equally weighted samples the weighted ones are worth",
    "gated": "a kernel with a learned gate for each coordinate: how far to leave the old value",
    "HVI": "hierarchical variational inference: a chain of Gaussian kernels as posterior",
    "HVI-AVO": "a chain of Gaussian kernels, trained by the annealed variational objective",
    "IAF": "inverse autoregressive flow: a kernel that can be inverted, each coordinate shifted by those before it",
    "IWAE": "importance-weighted auto-encoder: trained by the log of the mean of several weights",
    "leapfrog": "a step of Hamiltonian dynamics along the gradient of the target",
    "loss-calibrated": "a mixture of AVO and the ELBO, such as a fifth of the one and four fifths of the other",
    "mode-mass error": "the share of samples that would have to change modes for each to hold what it should",
    "nats": "units of the natural logarithm: one nat is a factor of e in probability",
    "near the identity": "a start at which kernels hardly move z",
    "NLL": "negative log-likelihood: the lower, the better the model fits",
    "Pareto k": "how heavy the tail of weights is: above 0.7 their mean is not to be relied on",
    "quadrature": "integration on a grid, exact to the digits shown",
    "total variation": "distance of two distributions, from 0 (the same) to 1 (apart)",
    "warm-up": "the weight of the KL term, beta, rises to 1 in the first part of training",
}
_TERM = re.compile(rf"(?<![\w-])(?:{'|'.join(sorted(map(re.escape, MEANINGS), key=len, reverse=True))})(?![\w-])")
_PLAIN = ("a", "abbr", "cite", "code", "h1", "h2", "h3", "h4", "pre", "table", "em")  # in which nothing is marked


def marked(html: str, seen: set[str]) -> str:
    """Prose with `abbr` about the first use of each word in a section; `seen` are those that the section has had."""
    found, inside = [], list[str]()
    for piece in re.split(r"(<[^>]+>)", html):
        if tag := re.match(r"<(/?)(\w+)", piece):
            name = tag[2]
            if name in ("h1", "h2") and not tag[1]:
                seen.clear()
            if name in _PLAIN or (name == "span" and (inside or 'class="math"' in piece)):
                if not tag[1]:
                    inside.append(name)
                elif inside:
                    inside.pop()
        elif not inside:
            piece = _TERM.sub(lambda match: _abbr(match[0], seen), piece)
        found.append(piece)
    return "".join(found)


def _abbr(term: str, seen: set[str]) -> str:
    if term in seen:
        return term
    seen.add(term)
    return f'<abbr tabindex="0" data-meaning="{escape(MEANINGS[term])}">{term}</abbr>'
