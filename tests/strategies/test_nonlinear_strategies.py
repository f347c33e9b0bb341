import numpy as np
import pytest
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg

from fedcore.engine import to_record
from fedcore.errors import ConfigurationError
from strategies import refuse_nonlinear
from strategies.linear import calling_strategy
from tests.strategies.federation import plain_app, play

LINEAR = {"FedAvg", "FedAvgM", "FedProx", "FedAdam", "FedYogi", "FedAdagrad"}
NO_STRATEGY = {"Strategy", "Result"}
NOISE = {"noise_multiplier": 1.0, "num_sampled_clients": 80}
NEEDS_ARGUMENTS = {
    "QFedAvg": lambda: flower.QFedAvg(client_learning_rate=0.1),
    "DifferentialPrivacyServerSideFixedClipping": lambda: (
        flower.DifferentialPrivacyServerSideFixedClipping(FedAvg(), **NOISE, clipping_norm=1.0)
    ),
    "DifferentialPrivacyServerSideAdaptiveClipping": lambda: (
        flower.DifferentialPrivacyServerSideAdaptiveClipping(FedAvg(), **NOISE)
    ),
    "DifferentialPrivacyClientSideFixedClipping": lambda: (
        flower.DifferentialPrivacyClientSideFixedClipping(FedAvg(), **NOISE, clipping_norm=1.0)
    ),
    "DifferentialPrivacyClientSideAdaptiveClipping": lambda: (
        flower.DifferentialPrivacyClientSideAdaptiveClipping(FedAvg(), **NOISE)
    ),
}
NONLINEAR = sorted(set(flower.__all__) - LINEAR - NO_STRATEGY)


def make(name):
    return NEEDS_ARGUMENTS.get(name, getattr(flower, name))()


@pytest.mark.parametrize("name", NONLINEAR)
def test_a_strategy_that_compares_updates_is_refused_with_its_reason(name):
    with pytest.raises(ConfigurationError, match=f"{name} cannot run.*: it .*only their sum"):
        refuse_nonlinear(make(name))


@pytest.mark.parametrize("name", sorted(LINEAR))
def test_a_strategy_that_takes_the_mean_is_not_refused(name):
    refuse_nonlinear(make(name))


@pytest.mark.parametrize("name", NONLINEAR)
def test_a_refused_strategy_has_sent_nothing(name):
    wires = []

    def keep(wire):
        wires.append(wire)
        return wire

    trees = to_record({"0": np.zeros(9, np.uint8)})  # the only model that all of them take
    with pytest.raises(ConfigurationError, match="cannot run under secure aggregation"):
        play(strategy=make(name), clients=4, wrap=keep, model=trees)
    (wire,) = wires
    assert wire.crossed == []


class Own(FedAvg):
    """Looks at single updates, and says so."""

    requires_individual_updates = True


def test_a_strategy_of_yours_can_declare_that_it_needs_single_updates():
    with pytest.raises(ConfigurationError, match=r"Own.*requires_individual_updates"):
        play(strategy=Own(fraction_evaluate=0.0), clients=4)


def test_the_same_strategy_runs_on_the_plain_grid():
    assert play(plain_app(), strategy=Own(fraction_evaluate=0.0), clients=4, secure=False).arrays


def test_a_subclass_is_refused_like_its_parent():
    class Mine(flower.FedMedian):
        pass

    with pytest.raises(ConfigurationError, match=r"Mine cannot run.*the median"):
        refuse_nonlinear(Mine())


def test_the_strategy_is_found_through_its_frame():
    def deeper():
        return calling_strategy()

    class Finder(FedAvg):
        def find(self):
            return deeper()

    strategy = Finder()
    assert strategy.find() is strategy
    assert calling_strategy() is None
