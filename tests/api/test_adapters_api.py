"""Adapters in, looked at, and forgotten."""

import pytest

from asking import ZERO, hub_files, make_named, pages, problem
from hub_server import HubServer
from making import make
from serving import Server


def test_an_upload_is_created_at_its_location(server: Server) -> None:
    answer = server.upload(make_named("org/located"))
    assert answer.status_code == 201
    assert server.http.get(answer.headers["location"]).json() == answer.json()


def test_the_view_tells_what_it_is(server: Server) -> None:
    made = make(70, r=3, base_model="org/told", ranks={"layers.0.q_proj": 5})
    view = server.upload(made).json()
    size_bytes = len(made.files["adapter_model.safetensors"])
    told = {"base_model": "org/told", "modules": 6, "rank": 5, "size_bytes": size_bytes, "source": "upload", "recipe": None}
    assert {key: view[key] for key in told} == told


def test_every_link_leads_somewhere(server: Server) -> None:
    links = server.upload(make_named("org/linked")).json()["links"]
    assert {server.http.get(link).status_code for link in links.values()} == {200}


def test_the_same_upload_twice_is_one_adapter(server: Server) -> None:
    made = make_named("org/twice")
    assert server.add(made) == server.add(made)


def test_the_same_factors_under_another_base_are_another_adapter(server: Server) -> None:
    assert server.add(make_named("org/one")) != server.add(make_named("org/two"))


def test_a_merge_tells_its_recipe_and_inputs(server: Server) -> None:
    inputs = [server.add(make_named("org/parents", seed)) for seed in (1, 2)]
    job = server.merge(*inputs)
    view = server.http.get(f"/adapters/{job['result']['id']}").json()
    assert (view["recipe"], view["inputs"], view["source"]) == (job["id"], inputs, "merge")


def test_an_upload_can_be_named(server: Server) -> None:
    view = server.upload(make_named("org/named"), name="adapters-api/named").json()
    assert server.merge("name:adapters-api/named")["certificate"]["inputs"][0]["id"] == view["id"]


def test_a_name_moves_to_the_adapter_that_got_it_last(server: Server) -> None:
    first, second = (server.upload(make_named("org/moving", n), name="adapters-api/moving").json()["id"] for n in (1, 2))
    assert server.http.get(f"/adapters/{second}").json()["name"] == "adapters-api/moving"
    assert server.http.get(f"/adapters/{first}").json()["name"] is None


def test_adapters_are_listed_newest_first_each_once(server: Server) -> None:
    added = [server.add(make_named("org/listed", seed)) for seed in (1, 2, 3)]
    listed = [adapter["id"] for page in pages(server, "/adapters", limit=2) for adapter in page]
    assert listed == [adapter["id"] for page in pages(server, "/adapters") for adapter in page]
    assert listed[:3] == added[::-1]
    assert len(listed) == len(set(listed))


def test_a_forgotten_adapter_is_gone(server: Server) -> None:
    adapter = server.add(make_named("org/forgotten"))
    assert server.http.delete(f"/adapters/{adapter}").status_code == 204
    problem(server.http.get(f"/adapters/{adapter}"), 404, "unknown-adapter")
    problem(server.http.get(f"/adapters/{adapter}/adapter_config.json"), 404, "unknown-adapter")
    problem(server.http.delete(f"/adapters/{adapter}"), 404, "unknown-adapter")


def test_a_forgotten_adapter_is_no_source(server: Server) -> None:
    adapter = server.upload(make_named("org/no-source"), name="adapters-api/no-source").json()["id"]
    server.http.delete(f"/adapters/{adapter}").raise_for_status()
    for source in (adapter, "name:adapters-api/no-source"):
        problem(server.http.post("/merge", json={"adapters": [{"source": source}]}), 404, "unknown-adapter")


def test_a_result_outlives_its_inputs(server: Server) -> None:
    adapter = server.add(make_named("org/outlived"))
    job = server.merge(adapter)
    server.http.delete(f"/adapters/{adapter}").raise_for_status()
    assert server.http.get(job["result"]["links"]["adapter_model.safetensors"]).status_code == 200


def test_a_forgotten_adapter_can_come_back(server: Server) -> None:
    made = make_named("org/back")
    adapter = server.add(made)
    server.http.delete(f"/adapters/{adapter}").raise_for_status()
    assert server.add(made) == adapter


def test_an_unknown_adapter_is_a_problem(server: Server) -> None:
    problem(server.http.get(f"/adapters/{ZERO}"), 404, "unknown-adapter")


@pytest.fixture(scope="module")
def commit(hub: HubServer) -> str:
    return hub.add_repo("org/imported", hub_files(make_named("org/imported")), card={"license": "apache-2.0"})


def test_an_import_is_pinned_to_its_commit(hub_service: Server, commit: str) -> None:
    answer = hub_service.http.post("/adapters", json={"source": "hub:org/imported"})
    assert (answer.status_code, answer.json()["source"]) == (201, f"hub:org/imported@{commit}")


def test_an_import_takes_over_the_licence(hub_service: Server, commit: str) -> None:
    assert hub_service.http.post("/adapters", json={"source": "hub:org/imported"}).json()["licence"] == "apache-2.0"


def test_the_same_commit_is_fetched_once(hub_service: Server, hub: HubServer, commit: str) -> None:
    first = hub_service.http.post("/adapters", json={"source": "hub:org/imported@main"}).json()
    fetched = len(hub.requests("GET", host="cdn"))
    second = hub_service.http.post("/adapters", json={"source": f"hub:org/imported@{commit}"}).json()
    assert (second["id"], len(hub.requests("GET", host="cdn"))) == (first["id"], fetched)


def test_an_import_can_be_named(hub_service: Server, commit: str) -> None:
    asked = {"source": "hub:org/imported", "name": "adapters-api/imported"}
    assert hub_service.http.post("/adapters", json=asked).json()["name"] == "adapters-api/imported"


def test_a_branch_that_moved_is_another_adapter(hub_service: Server, hub: HubServer) -> None:
    ids = []
    for seed in (1, 2):
        hub.add_repo("org/moved-on", hub_files(make_named("org/moved-on", seed)))
        ids.append(hub_service.http.post("/adapters", json={"source": "hub:org/moved-on"}).json()["id"])
    assert ids[0] != ids[1]


def test_only_the_files_needed_are_fetched(hub_service: Server, hub: HubServer) -> None:
    hub.add_repo("org/heavy", {**hub_files(make_named("org/heavy")), "optimizer.bin": b"x" * 1000, "README.md": b"# x"})
    hub_service.http.post("/adapters", json={"source": "hub:org/heavy"}).raise_for_status()
    fetched = {seen.path.rpartition("/")[2] for seen in hub.requests("GET", "org/heavy/resolve")}
    assert fetched == {"adapter_config.json", "adapter_model.safetensors"}
