"""Coefficients (a, b, c) of Newton–Schulz steps as they were published, each with its source and its names."""

from __future__ import annotations

from dataclasses import dataclass

Coefficients = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A list of steps.

    Attributes:
        source: where it is from.
        steps: one (a, b, c) each; a schedule of k steps is the first k, whatever k is.
        then: what follows the last of them: "cycle", the first again, or "last", the last again.
        name: what `polynomial=` calls it; None: it has a generated family of that name instead (`polynomials`), made for its step count.
        megatron: what Megatron's `muon_coefficient_type` calls it (Emerging-Optimizers 0.3.0, muon_utils.py); None: it has not got it.
    """

    source: str
    steps: tuple[Coefficients, ...]
    then: str
    name: str | None = None
    megatron: str | None = None

    def first(self, count: int) -> tuple[Coefficients, ...]:
        """The first `count` steps."""
        given = self.steps
        return tuple(given[k % len(given)] if self.then == "cycle" else given[min(k, len(given) - 1)] for k in range(count))


# Repeated, it oscillates in about [.68, 1.13] and does not converge.
JORDAN: Coefficients = (3.4445, -4.7750, 2.0315)
# The last two of DeepSeek-V4's ten steps; the eight before them are JORDAN.
DEEPSEEK_V4_LAST: Coefficients = (2.0, -1.5, 0.5)

PUBLISHED = (
    Published(
        source='Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024)',
        steps=(JORDAN,),
        then="cycle",
        name="jordan",
        megatron="simple",
    ),
    Published(
        source="You Jiacheng, modded-nanogpt's train_gpt_medium.py",
        steps=(
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        then="cycle",
        name="quintic",
        megatron="quintic",
    ),
    Published(
        source="Polar Express, arXiv 2505.16932; every step divided by its safety factor of 1.01",
        steps=(
            (8.2051, -22.9019, 16.4607),
            (4.0664, -2.8612, 0.5184),
            (3.9096, -2.8234, 0.5250),
            (3.2856, -2.4153, 0.4853),
            (2.2779, -1.6198, 0.3985),
            (1.8726, -1.2307, 0.3585),
            (1.8564, -1.2132, 0.3568),
            (1.8750, -1.2500, 0.3750),
        ),
        then="last",
        megatron="polar_express",
    ),
    Published(
        source="CANS, arXiv 2506.10935",
        steps=(
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
        then="last",
        megatron="cans",
    ),
    Published(
        source="thib-s/flash-newton-schulz",
        steps=((4.0098, -7.0585, 2.4635), (3.4585, -5.5479, 2.5959), (2.7573, -3.2939, 1.4254), (2.7215, -3.0494, 1.3169)),
        then="cycle",
        name="aol",
        megatron="aol",
    ),
    Published(source="DeepSeek-V4's report", steps=(JORDAN,) * 8 + (DEEPSEEK_V4_LAST,) * 2, then="last", megatron="deepseekv4"),
)
