"""The scenarios by name, in the order in which they run."""

from tests.faults.bench import Scenario
from tests.faults.engines import first_request, hang_engine, kill_engine
from tests.faults.leavers import disconnect, slow_readers, storm
from tests.faults.leaving import second_signal, sigterm
from tests.faults.neighbours import fairness, pictures, uploads
from tests.faults.overload import overload
from tests.faults.replicas import one_dead_one_hung, rolling_restart, same_seed
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
    "kill_engine": kill_engine,
    "hang_engine": hang_engine,
    "first_request": first_request,
    "sigterm": sigterm,
    "second_signal": second_signal,
    "rolling_restart": rolling_restart,
    "one_dead_one_hung": one_dead_one_hung,
    "same_seed": same_seed,
}
