"""The same two apps, on either engine.

`run_in_process` and `run_on_ray` take one ServerApp and one ClientApp, unmodified, and
return the ServerApp's Context: what `main` put into `context.state` is the result.

Flower's own way to simulate from Python, `run_simulation`, starts Ray actors and passes
no run configuration. `run_on_ray` adds it on both sides by wrapping the apps, and lets
the server begin when all nodes have registered: on its own, Flower races, and the first
round may miss some. Two things differ between the engines, and an app that
wants equal bytes must depend on neither: run and node ids are random on Ray (use
`partition-id`), and replies arrive there in the order in which clients finish (sum
integers, or sort before adding floats).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedcore.engine.flower_private import SUPERLINK_NODE_ID, Identity, quiet_simulation
from fedcore.engine.grid import RUN_ID, SERVER_TASK_ID, InProcessGrid
from fedcore.engine.nodes import Config, checked
from fedcore.errors import ConfigurationError

_POLL_SECONDS = 0.05
_REGISTRATION_POLLS = 1200  # a minute; a server that wants more nodes waits by itself


def run_in_process(
    server_app: ServerApp,
    client_app: ClientApp,
    *,
    node_configs: Sequence[Config] | None = None,
    num_nodes: int | None = None,
    run_config: Config | None = None,
    workers: int = 0,
) -> Context:
    """Run both apps in this process and return the server's Context.

    Args:
        server_app: Any Message-API ServerApp.
        client_app: Any Message-API ClientApp.
        node_configs: One mapping for each node; or else
        num_nodes: how many nodes, which then have a `partition-id` only.
        run_config: What both apps see as `context.run_config`.
        workers: Forked processes for the clients; 0 for none.

    Raises:
        ConfigurationError: Not exactly one of `node_configs` and `num_nodes`, no nodes, or
            a nested configuration.
    """
    if (node_configs is None) == (num_nodes is None):
        msg = "exactly one of node_configs and num_nodes must be given: drop the other"
        raise ConfigurationError(msg)
    configs = node_configs if node_configs is not None else [{}] * (num_nodes or 0)
    config = checked(run_config or {}, "run_config")
    with InProcessGrid(client_app, configs, config, workers) as grid:
        context = Context(RUN_ID, SUPERLINK_NODE_ID, {}, RecordDict(), config)
        server_app(grid=grid, context=context)
    return context


def run_on_ray(
    server_app: ServerApp,
    client_app: ClientApp,
    num_nodes: int,
    run_config: Config | None = None,
    *,
    cpus_per_client: float = 1.0,
) -> Context:
    """Run both apps on Flower's simulation engine and return the server's Context.

    Ray is started and shut down; neither Ray nor Flower report usage. The apps are pickled
    into Ray's actors, so define them in an importable module or without references to
    what cannot be pickled.

    Args:
        server_app: Any Message-API ServerApp.
        client_app: Any Message-API ClientApp.
        num_nodes: At least 1.
        run_config: What both apps see as `context.run_config`.
        cpus_per_client: As many actors run at once as fit into the cores.

    Raises:
        ConfigurationError: Ray is not installed, or `num_nodes` or `run_config` is invalid.
    """
    if num_nodes < 1:
        msg = f"num_nodes must be >= 1, got {num_nodes}: a run needs clients"
        raise ConfigurationError(msg)
    if find_spec("ray") is None:
        msg = 'the Ray engine is not installed: pip install "fedcore[simulation]"'
        raise ConfigurationError(msg)
    config = checked(run_config or {}, "run_config")
    configured_server, finished = _configured_server(server_app, num_nodes, config)
    with quiet_simulation():
        from flwr.simulation import run_simulation  # noqa: PLC0415 - a second and Ray's imports

        run_simulation(
            configured_server,
            _ConfiguredClientApp(client_app, config),
            num_supernodes=num_nodes,
            backend_config={
                "client_resources": {"num_cpus": cpus_per_client, "num_gpus": 0.0},
                "init_args": {"log_to_driver": False, "logging_level": 40},
            },
        )
    return finished[0]


def on_grid(server_app: ServerApp, wrap: Callable[[Grid], Grid]) -> ServerApp:
    """Return a ServerApp that runs `server_app` on a wrapped grid, on any engine.

    For example ``on_grid(app, lambda grid: DroppingGrid(grid, drops, describe))``.
    """
    wrapped = ServerApp()

    @wrapped.main()
    def main(grid: Grid, context: Context) -> None:
        server_app(grid=wrap(grid), context=context)

    return wrapped


def _configured_server(
    server_app: ServerApp, num_nodes: int, config: Config
) -> tuple[ServerApp, list[Context]]:
    """Return the app with a run configuration, and where its Context will be in the end."""
    configured = ServerApp()
    finished: list[Context] = []

    @configured.main()
    def main(grid: Grid, context: Context) -> None:
        # Flower starts the server while nodes still register: round 1 would miss some.
        for _ in range(_REGISTRATION_POLLS):
            if len(list(grid.get_node_ids())) >= num_nodes:
                break
            time.sleep(_POLL_SECONDS)
        context.run_config = dict(config)
        server_app(grid=grid, context=context)
        finished.append(context)

    return configured, finished


class _ConfiguredClientApp(ClientApp):
    """A ClientApp that sees the run configuration and identity that Ray's engine leaves out."""

    def __init__(self, app: ClientApp, config: Config) -> None:
        super().__init__()
        self._app = app
        self._config = dict(config)

    def __call__(self, message: Message, context: Context) -> Message:
        """Run the app; the engine's own Context gets the state, and only the state."""
        inner = Context(
            context.run_id,
            context.node_id,
            context.node_config,
            context.state,
            dict(self._config),
            context.series_id,
        )
        # A SuperNode sets this, Ray's actors do not: without it an app cannot make messages.
        with Identity(SERVER_TASK_ID, context.run_id, context.node_id).assumed():
            reply = self._app(message, inner)
        context.state = inner.state
        return reply
