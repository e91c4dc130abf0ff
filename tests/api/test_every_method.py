"""Every registered method and post-step through `POST /merge` and `braid merge`: both ship what the library computes."""

from pathlib import Path

import pytest
import torch

from asking import preloaded
from making import SHAPES, Made, dense_directory, make
from merge_algos import Adapter, formats, merge, methods, post
from merge_algos.merge import build_post
from serving import Server

INPUTS = (make(1), make(2, alpha=3, use_rslora=True))
RANK = 4


@pytest.fixture(scope="module")
def stored(server: Server) -> tuple[str, ...]:
    return tuple(server.add(made) for made in INPUTS)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return tuple(made.write(tmp_path_factory.mktemp("adapter")) for made in INPUTS)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.mark.parametrize("method", methods.registry())
def test_a_method_gives_over_http_what_it_gives_in_python(
    server: Server, stored: tuple[str, ...], tmp_path: Path, method: str
) -> None:
    job = server.merge(*stored, weights=[0.7, -0.4], method=method, rank=RANK)
    assert job["state"] == "succeeded", job["error"]
    agrees(server.download(job["result"]["id"], tmp_path), method=method)


@pytest.mark.parametrize("method", methods.registry())
def test_a_method_gives_on_the_command_line_what_it_gives_in_python(
    directories: tuple[Path, ...], data_dir: Path, tmp_path: Path, method: str
) -> None:
    agrees(typed(*directories, "--method", method, output=tmp_path / "merged", data_dir=data_dir), method=method)


@pytest.mark.parametrize("step", post.registry())
def test_a_post_step_gives_on_the_command_line_what_it_gives_in_python(
    directories: tuple[Path, ...], data_dir: Path, tmp_path: Path, step: str
) -> None:
    agrees(typed(*directories, "--post", step, output=tmp_path / "merged", data_dir=data_dir), post_steps=[build_post(step, {})])


def test_a_method_that_surveys_the_model_gives_over_http_what_it_gives_in_python(
    server: Server, stored: tuple[str, ...], tmp_path: Path
) -> None:
    asked = {"method": "ties", "parameters": {"trim": "model", "density": 0.4}}
    job = server.merge(*stored, weights=[0.7, -0.4], rank=RANK, **asked)
    assert job["state"] == "succeeded", job["error"]
    agrees(server.download(job["result"]["id"], tmp_path), **asked)


@pytest.mark.parametrize("step", post.registry())
def test_a_post_step_gives_over_http_what_it_gives_in_python(
    server: Server, stored: tuple[str, ...], tmp_path: Path, step: str
) -> None:
    job = server.merge(*stored, weights=[0.7, -0.4], rank=RANK, post=[{"name": step}])
    agrees(server.download(job["result"]["id"], tmp_path), post_steps=[build_post(step, {})])


def test_lego_averages_where_no_weight_is_given(server: Server, stored: tuple[str, ...]) -> None:
    asked = {"method": "lego", "adapters": [{"source": adapter} for adapter in stored]}
    answer = server.http.post("/merge", json=asked, headers={"prefer": "wait=60"}).json()
    assert [item["weight"] for item in answer["certificate"]["recipe"]["adapters"]] == [1.0, 1.0]


def test_a_method_of_full_rank_needs_a_rank(server: Server, stored: tuple[str, ...]) -> None:
    answer = server.http.post("/merge", json={"method": "ties", "adapters": [{"source": adapter} for adapter in stored]})
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:braid:problem:invalid-rank")


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({"method": "ties", "parameters": {"density": 0.0}}, "parameters.density"),
        ({"method": "ties", "parameters": {"density": "much"}}, "parameters.density"),
        ({"method": "ties", "parameters": {"trim": "paper"}}, "parameters.trim"),
        ({"post": [{"name": "nothing"}]}, "nothing"),
        ({"post": [{"name": "svc", "parameters": {"beta": 1}}]}, "post.0.parameters.beta"),
    ],
)
def test_a_wrong_parameter_is_refused_by_name(
    server: Server, stored: tuple[str, ...], body: dict[str, object], detail: str
) -> None:
    answer = server.http.post("/merge", json={"rank": 2, "adapters": [{"source": a} for a in stored], **body})
    assert answer.status_code == 422
    assert detail in answer.json()["detail"]


def typed(*arguments: str | Path, output: Path, data_dir: Path) -> Path:
    """What `braid merge` saved."""
    ran = preloaded("merge", *arguments, "-w", "0.7", "-w", "-0.4", "--rank", str(RANK), "-o", output, data_dir=data_dir)
    assert ran.returncode == 0, ran.stderr
    return output


def agrees(saved: Path, **options: object) -> None:
    result = merge([adapter(made) for made in INPUTS], weights=[0.7, -0.4], rank=RANK, **options)  # type: ignore[arg-type]
    shipped = dense_directory(saved)
    assert shipped.keys() == SHAPES.keys()
    for module, delta in result.adapter.deltas.items():
        expected = delta.to_dense().double()
        assert (shipped[module] - expected).norm() <= 1e-4 * (1 + expected.norm())


def adapter(made: Made) -> Adapter:
    read = formats.read(made.config, made.tensors)
    assert all(delta.A.dtype == torch.float32 for delta in read.deltas.values())
    return read
