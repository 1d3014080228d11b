"""Prefect on a real PostgreSQL, which is restarted in the middle of a run.

make test-postgres
"""

import asyncio

import asyncpg
import pytest

from flows.outputs import problems_of
from flows.store import Store
from tests.postgres_cluster import PROGRAMS, USER, cluster
from tests.prefect_server import Prefect, until

pytestmark = pytest.mark.skipif(
    PROGRAMS is None, reason="no PostgreSQL here: make test-postgres installs it"
)
SMALL = ["legs={}", "world.num_source=12", "world.num_target=2"]
NUM_INSTANCES = 12


@pytest.fixture(scope="module")
def database():
    with cluster() as made:
        yield made


def ask(database, question: str, *, password: str | None = None):
    """The first value of a query's answer."""

    async def connect_and_ask():
        connection = await asyncpg.connect(
            host="127.0.0.1",
            port=database.port,
            user=USER,
            password=password or database.password,
            database="postgres",
        )
        try:
            return await connection.fetchval(question)
        finally:
            await connection.close()

    return asyncio.run(connect_and_ask())


def test_a_power_cut_loses_no_committed_row_and_nobody_enters_without_the_password(database):
    ask(database, "CREATE TABLE kept AS SELECT 7 AS number")
    database.stop("immediate")
    database.start()
    assert ask(database, "SELECT number FROM kept") == 7
    with pytest.raises(asyncpg.InvalidPasswordError):
        ask(database, "SELECT 1", password="guessed")
    assert ask(database, "SHOW listen_addresses") == "127.0.0.1"


@pytest.fixture(scope="module")
def prefect(database, tmp_path_factory):
    made = Prefect(tmp_path_factory.mktemp("prefect"), database=database.url)
    try:
        made.serve()
        made.deploy()
        made.work()
        yield made
    finally:
        made.stop()


def is_training(folder) -> bool:
    return any(folder.glob("train_source/.staging-*/state/*.json"))


@pytest.mark.postgres
def test_the_database_restarts_in_the_middle_of_a_run_and_nothing_is_lost(
    database, prefect, tmp_path
):
    given = {"recipe": "tiny", "artifacts": str(tmp_path), "overrides": SMALL}
    run_id = prefect.deploy_and_run("whole", **given)
    until(lambda: is_training(tmp_path), timeout_s=600)
    database.stop("immediate")
    database.start()
    run = prefect.finished(run_id, timeout_s=1200)
    assert run["state"]["type"] == "COMPLETED", run["state"]["message"]
    assert f"{NUM_INSTANCES} made, 0 done before" in run["state"]["message"]
    store = Store(tmp_path)
    assert all(not problems_of(f, store.manifest(f), full=True) for f in store.artifacts())
    tasks = prefect.tasks(run_id, count=NUM_INSTANCES)
    assert {task["state_name"] for task in tasks.values()} == {"Completed"}
    assert "clouds-summary" in prefect.artifacts(run_id)
    assert ask(database, f"SELECT state_type FROM flow_run WHERE id = '{run_id}'") == "COMPLETED"

    again = prefect.deploy_and_run("whole", **given)
    message = prefect.finished(again, timeout_s=600)["state"]["message"]
    assert f"0 made, {NUM_INSTANCES} done before" in message


@pytest.mark.postgres
def test_the_databases_password_is_in_no_log_or_record(database, prefect, tmp_path):
    run_id = prefect.deploy_and_run(
        "stage", recipe="tiny", artifacts=str(tmp_path), stage="render_world", overrides=SMALL
    )
    assert prefect.finished(run_id)["state"]["type"] == "COMPLETED"
    secret = database.password.encode()
    places = [*tmp_path.rglob("*"), *prefect.home.rglob("*.log")]
    assert not [path for path in places if path.is_file() and secret in path.read_bytes()]
