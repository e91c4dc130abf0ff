"""The description and the service say the same: whatever is sent, only what /openapi.json announces comes back."""

from contextlib import suppress

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import CheckFunction, not_a_server_error
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

from app.main import create_app
from app.settings import Settings
from asking import make_named
from serving import Server

DESCRIPTION = create_app(Settings()).openapi()
OPERATIONS = [found.ok() for found in schemathesis.openapi.from_dict(DESCRIPTION).get_all_operations()]
CHECKS: list[CheckFunction] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


def test_the_service_describes_itself(server: Server) -> None:
    assert server.http.get("/openapi.json").json() == DESCRIPTION


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_only_announced_answers_come_back(server: Server, operation: APIOperation, mode: GenerationMode) -> None:
    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    def send(case: Case) -> None:
        case.call_and_validate(base_url=server.url, checks=CHECKS)

    with suppress(Unsatisfiable):  # nothing can be wrong with a request that takes nothing
        send()


@pytest.fixture(scope="module")
def existing(server: Server) -> dict[str, str]:
    source = server.add(make_named("org/openapi"))
    job = server.merge(source)
    basis = server.merge(source, method="rmm", parameters={"codec": "lossless"}, adapters=[{"source": source, "name": "math"}])
    ids = {"job_id": job["id"], "adapter_id": job["result"]["id"], "basis_id": basis["result"]["id"]}
    ids["data_id"] = server.http.post("/data", files={"file": ("x", b'{"text": "a"}')}).json()["id"]
    return {**ids, "task": "math", "part": "report.json", "name": "task_arithmetic"}


@pytest.mark.parametrize(
    "operation", [o for o in OPERATIONS if o.method in {"get", "head"}], ids=lambda operation: operation.label
)
def test_what_exists_is_answered_as_announced(server: Server, existing: dict[str, str], operation: APIOperation) -> None:
    wanted = {parameter.name: existing[parameter.name] for parameter in operation.path_parameters}
    answer = operation.Case(path_parameters=wanted).call_and_validate(base_url=server.url, checks=CHECKS)
    assert answer.status_code == (404 if operation.path.endswith("/curve.svg") else 200)  # this job has learned nothing


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_every_operation_says_what_it_does(operation: APIOperation) -> None:
    assert operation.definition.raw.get("description") or operation.definition.raw.get("summary")
