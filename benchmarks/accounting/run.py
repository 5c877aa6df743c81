"""Do the stated epsilons hold, and would we notice if they did not?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parent
sys.path.insert(0, str(HOME.parents[1]))

from benchmarks.common import Result, parser_of, plain_settings  # noqa: E402
from cutlayer.audit.game import PLANTED, play, play_planted  # noqa: E402
from cutlayer.privacy.accountant import analytic_sigma, epsilon_of  # noqa: E402
from cutlayer.privacy.defenses import defense_of  # noqa: E402
from cutlayer.privacy.release import Release  # noqa: E402

DELTA = 1e-5
# Noise multiplier over the sensitivity and number of releases, to epsilon (PLD) at delta 1e-5.
GOLDEN = {(0.6, 1): 8.00, (0.6, 3): 15.87, (1.2, 1): 3.55, (1.2, 3): 6.73, (5.0, 1): 0.73}
# Sigma of the analytic Gaussian mechanism at sensitivity 1, by epsilon.
SIGMAS = {0.5: 7.03, 1.0: 3.73, 2.0: 1.99, 4.0: 1.08, 8.0: 0.600, 16.0: 0.344}


def golden() -> tuple[dict[str, float], int]:
    """Return the values as computed, and how many are off at the published digits."""
    figures, off = {}, 0
    for (noise, releases), expected in GOLDEN.items():
        release = Release("golden", "activations", "", 1.0, 2 * noise, noise)
        found = epsilon_of([release] * releases, DELTA).pld
        figures[f"epsilon_noise_{noise}_releases_{releases}"] = found
        off += abs(found - expected) > 0.011
    for epsilon, expected in SIGMAS.items():
        off += abs(analytic_sigma(epsilon, DELTA) - expected) > 0.006
    return figures, off


def main() -> None:
    """Play, and compare with published values."""
    parser = parser_of(__doc__)
    parser.add_argument("--trials", type=int, default=20_000)
    args = parser.parse_args()
    trials = 2_000 if args.quick else args.trials
    lower: dict[float, float] = {}
    for epsilon in (1.0, 8.0):
        honest = defense_of("ldp_sequence", clip=1.0, epsilon=epsilon, delta=DELTA)
        lower[epsilon] = play(honest, trials=trials).epsilon_lower
    caught = [
        play_planted(name, epsilon, trials=trials).refuted for name in PLANTED for epsilon in (1, 8)
    ]
    values, off = golden()
    figures: dict[str, Any] = {
        "epsilon_lower_over_claimed": max(bound / epsilon for epsilon, bound in lower.items()),
        "planted_faults_caught": sum(caught) / len(caught),
        "golden_values_off": off,
        "epsilon_lower_at_1": lower[1.0],
        "epsilon_lower_at_8": lower[8.0],
        **values,
    }
    settings = plain_settings(args, trials=trials, delta=DELTA, planted=sorted(PLANTED))
    Result(figures, settings).write(args, HOME)


if __name__ == "__main__":
    main()
