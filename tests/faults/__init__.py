"""Faults, overload and hostile clients against real servers, with figures: `python -m tests.faults` (`make faults`).

Not collected by pytest: what it shows takes minutes and is measured. Every scenario also fails loudly, by a row whose
figure is out of bounds; the exit status says whether any was.
"""

from tests.faults.bench import Scenario
from tests.faults.leavers import disconnect, slow_readers, storm
from tests.faults.neighbours import fairness, pictures, uploads
from tests.faults.overload import overload
from tests.faults.truth import metrics

SCENARIOS: dict[str, Scenario] = {
    "overload": overload,
    "fairness": fairness,
    "pictures": pictures,
    "uploads": uploads,
    "disconnect": disconnect,
    "storm": storm,
    "slow_readers": slow_readers,
    "metrics": metrics,
}
