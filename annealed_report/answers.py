"""The answer, what was found, what to do: sentences that rest on claims, and are refused when those change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from annealed_report.claims import Row
from annealed_report.statistics import WORDS

#: What a word says of a claim.
KINDS = {
    **dict.fromkeys(("holds", "holds, size open"), "for"),
    **dict.fromkeys(("no difference", "gain excluded"), "none"),
    **dict.fromkeys(("opposite", "opposite, size open"), "against"),
    "undetermined": "open",
    "not tested": "not tested",
}
assert set(KINDS) == set(WORDS)


@dataclass(frozen=True)
class Rests:
    """A claim that a sentence rests on: its study, how its text begins, and what is said of it, one of `KINDS`."""

    study: str
    begins: str
    kind: str

    def row(self, rows: Sequence[Row]) -> Row:
        """The claim's row; ValueError where none is named so, or where the runs say something else."""
        found = [r for r in rows if r.claim.study == self.study and r.claim.text.startswith(self.begins)]
        if len(found) != 1:
            raise ValueError(f"{len(found)} claims of {self.study} begin with {self.begins!r}")
        if KINDS[found[0].word] != self.kind:
            raise ValueError(f"a sentence was written for {self.kind!r}, and {self.begins!r} is: {found[0].word}")
        return found[0]


_STARTED = Rests("initialisation", "Energy A: ELBO-trained HVI misses such modes also", "open")
_TUNED = Rests("tuned", "Energies, each method tuned: ELBO-trained HVI misses modes that AVO finds, at equal", "for")
_THEN = Rests("tuned", "… and AVO in the first half of training", "for")
_TOGETHER = Rests("tuned", "Energy F, tuned, at equal evaluations: AVO comes closer", "against")
_GATE = Rests("starts", "A gate that starts closed", "for")
_MNIST = Rests("mnist", "MNIST: AVO improves HVI", "not tested")
_WORKING = Rests("working", "MNIST, with kernels that earn their keep: AVO improves HVI", "not tested")
_ALONE = Rests(
    "posterior_alone",
    "MNIST, decoder fixed: AVO gives a better posterior than the ELBO; kernels with torch's weights, encoder learns "
    "(bound, 0.2 AVO",
    "for",
)
_QUARTER = Rests(
    "quarter",
    "Digits of which a quarter is seen: AVO keeps modes that the ELBO loses; T = 5, from the encoder's Gaussian (mode",
    "open",
)
_WARM_UP = Rests("schedules", "Warm-up gives the VAE a better likelihood", "for")
_RISEN = Rests("risen", "… also by fitted proposals", "for")
_COLLAPSE = Rests("collapse", "With an autoregressive decoder, warm-up", "for")
_SEES = Rests("chains", "MNIST: leapfrog kernels make HVI beat the VAE", "for")
_NOTHING = Rests("chains", "MNIST: gated kernels make HVI beat the VAE", "against")
_IWAE = Rests("mnist", "MNIST: training by more importance samples", "for")
_MENDS = Rests("folded_line", "… and AVO ends at such a model less often", "none")
_WEIGHED = Rests("folded_line", "… and importance weights mend it", "for")
_SAMPLES = Rests("agreement", "MNIST: 5,000 samples from the encoder", "for")
_SUM = Rests("anatomy", "MNIST, the earlier code's faults: a likelihood summed", "for")

#: The answer in at most 120 words, and what it rests on.
ANSWER = """**Letting β, the weight of the KL term, rise helps auto-encoders. Annealing along a chain of
kernels (AVO) helps where modes are apart and kernels start far from the identity.** On energies AVO keeps modes that
the ELBO loses, tuned at equal evaluations; where the mass hangs together it can do worse. Started near the identity,
the ELBO is not seen to lose any. Where a quarter of a digit is seen neither keeps the second mode; that AVO mends a
model learned with its posterior is not seen. On MNIST it mends part of what a bad start costs; the paper's
gain is *not tested*. Kernels along the target's gradient raise the bound; importance-weighted training raises the
likelihood."""
#: What its words mean.
MEANT = """*Energies*: densities in two dimensions whose modes and normalisers are known. *Near the identity*: kernels
that hardly move $z$ at first; with PyTorch's initial weights (*torch's weights*) their *gates* are half open, so that
they let go of it, and they add much noise. *A quarter of a digit*: the posterior of a VAE that sees its top left
quarter, which leaves several answers open."""
_OF_ENERGIES, _OF_MODELS = (_TUNED, _TOGETHER, _GATE, _STARTED), (_QUARTER, _MENDS)
ANSWER_RESTS = (*_OF_ENERGIES, *_OF_MODELS, _ALONE, _MNIST, _WORKING, _NOTHING, _SEES, _WARM_UP, _RISEN, _IWAE)

#: The findings: what each rests on, and its sentence, in which {d} is the difference with its interval.
FINDINGS = {
    _TUNED: """**AVO keeps modes that the ELBO loses**, from torch's initial weights, each tuned and with as many
        evaluations of the target: AVO − ELBO in the share of samples that are in a wrong mode is {d}, the mean of
        three energies whose modes are apart; on one of them alone it stays undetermined""",
    _MENDS: """**That AVO mends a model learned with its posterior is not seen**: with it 10 small models of ten end
        with a one-mode posterior, with the ELBO 7 (AVO − ELBO of the shares, drawn towards 0: {d}); whether
        AVO's lose less likelihood is undetermined""",
    _RISEN: """**A slow rise of β helps an auto-encoder**: after ten short epochs the NLL of a VAE with a rise, less
        that without, is {d} nats, by an estimator that agrees with annealing; after 25 whole epochs it is half a nat by
        another, and the bound gains nothing""",
    _SAMPLES: """**5,000 samples from the encoder are not enough for a likelihood**: what they make of log p(x), less
        what annealed importance sampling makes of it, is {d} nats""",
    _SUM: """**A likelihood summed over the batch, where all else was a mean, ruins training**: added to the other
        faults of an earlier reproduction's code it raises the NLL by {d} nats; why that report has 108.67
        is not found""",
}

_OF_MODES, _OF_GATES = "mode-mass error, this − ELBO", "mode-mass error, closed − open"
SHARES = (_OF_MODES, _OF_GATES)  # measures that are no nats
#: What to do: for whom, what, the measure and the claim that this rests on, and on what it was tested.
ADVICE = (
    (
        "a posterior with separated modes",
        "train the kernels by AVO, and in the second half by the ELBO",
        *(_OF_MODES, _THEN, "three energies; on two a spline flow does it by the ELBO; not on digits seen in part"),
    ),
    (
        "… and kernels with gates",
        "start with the gates closed: the ELBO too then keeps its samples near all modes",
        *(_OF_GATES, _GATE, "two of these energies, by the ELBO; AVO keeps all from any start"),
    ),
    (
        "a VAE on images",
        "let β rise slowly from 0.2 or less; one rise is enough",
        *("NLL, a rise − none", _RISEN, "MNIST, ten epochs of 20,000 images; half a nat after 25 of all"),
    ),
    (
        "… and time to spend",
        "train by more importance samples (IWAE)",
        *("NLL, IWAE − VAE", _IWAE, "MNIST, 25 epochs each, K = 50, at three to four times the time"),
    ),
    (
        "a decoder that can do without z",
        "one slow rise of β over half of training",
        *(
            "KL kept, one rise − none",
            _COLLAPSE,
            "MNIST, a masked network; cycles keep more than a rise over a quarter",
        ),
    ),
    (
        "a model learned with its posterior",
        "weigh draws (IWAE), for the model and for the kernels",
        *("likelihood lost, IWAE − ELBO", _WEIGHED, "one latent, two mirrored modes"),
    ),
    (
        "need of log p(x)",
        "fit a proposal to each image, or use annealed importance sampling (AIS)",
        *("log p(x), encoder's samples − AIS", _SAMPLES, "a VAE on MNIST, 100 images"),
    ),
    (
        "stochastic kernels in an auto-encoder",
        "let them see the target (`Leapfrog`); gated ones are of no use there",
        *("bound, HVI − VAE", _SEES, "MNIST, ten short epochs; on the validation images that chose the kernel"),
    ),
)


def answer(rows: Sequence[Row]) -> str:
    """The answer as a quotation in Markdown; ValueError where what it rests on has changed."""
    for each in ANSWER_RESTS:
        each.row(rows)
    return f"> {' '.join(ANSWER.split())}"


def meant() -> str:
    """What the words of the answer mean, in Markdown."""
    return " ".join(MEANT.split())


def findings(rows: Sequence[Row]) -> str:
    """The five findings as a list in Markdown, each with its number and a link to where it is shown."""
    lines = []
    for rests, sentence in FINDINGS.items():
        row = rests.row(rows)
        assert row.difference is not None
        lines.append(f"- {' '.join(sentence.split()).format(d=row.difference.text())} ({row.claim.link}).")
    return "\n".join(lines)


#: Groups of claims by the beginning of their section, each a panel of the picture of all claims.
GROUPS = {
    "energies": ("02", "05_verdict#Tuned", "05_verdict#What makes"),
    "MNIST": (
        *("03", "06", "07"),
        *(
            f"05_verdict#{begins}"
            for begins in ("Kernels", "Which warm-up", "The posterior", "Truly", "What was tried")
        ),
    ),
    "warm-up and cycles": ("04",),
    "a model learned with its posterior": ("08", "05_verdict#The small"),
    "other systems": ("10",),
    "relatives of AVO": ("11",),
}


def grouped(rows: Sequence[Row], ours: bool) -> dict[str, list[Row]]:
    """The claims by group: those of the paper and of the earlier report, or our own checks of them."""
    some = [row for row in rows if (row.claim.source == "ours") is ours]
    found = {name: [r for r in some if r.claim.section.startswith(begins)] for name, begins in GROUPS.items()}
    assert sum(map(len, found.values())) == len(some)
    return {name: rows_of for name, rows_of in found.items() if rows_of}


def advice(rows: Sequence[Row]) -> list[dict[str, str]]:
    """What to do, a row for each situation, with the evidence and where it was tested."""
    found = []
    for situation, do, measure, rests, scope in ADVICE:
        row = rests.row(rows)
        stem, _, section = row.claim.section.partition("#")
        unit = "" if measure in SHARES else " nats"
        number = f"{measure}: {row.difference.text()}{unit}, " if row.difference and row.tested else ""
        evidence = f"[{number}{row.word}]({stem}.ipynb#{section.replace(' ', '-')})"
        found.append({"you have": situation, "do": do, "evidence": evidence, "tested on": scope})
    return found
