"""Whatever is wrong with a request is a problem that names it, and nothing has changed afterwards."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx2
import psutil
import pytest
import torch
from torch import Tensor

from asking import ZERO, count, make_named, preloaded, problem
from making import PREFIX, Made, make
from serving import Server

GOOD = make(80, base_model="org/bad-input")
OTHER_BASE = make(81, base_model="org/bad-input-2")
OTHER_SHAPE = make(82, base_model="org/bad-input", shapes={"layers.1.q_proj": (24, 8)})
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FIRST = f"{PREFIX}layers.0.q_proj.lora_A.weight"


@dataclass(frozen=True)
class Case:
    """A request, and the problem it must be answered with. mention: what its text must hold, so that people find the place."""

    name: str
    status: int
    slug: str
    mention: str
    ask: Callable[[Server, Mapping[str, str]], httpx2.Response]


@pytest.fixture(scope="module")
def ids(server: Server) -> dict[str, str]:
    return {"good": server.add(GOOD), "base": server.add(OTHER_BASE), "shape": server.add(OTHER_SHAPE)}


def merge(title: str, status: int, slug: str, mention: str, *sources: str, **body: Any) -> Case:
    """POST /merge of `good`, or of these sources, with more fields."""

    def ask(server: Server, ids: Mapping[str, str]) -> httpx2.Response:
        adapters = [{"source": ids.get(source, source)} for source in sources or ["good"]]
        return server.http.post("/merge", json={"adapters": adapters, **body})

    return Case(title, status, slug, mention, ask)


def item(name: str, status: int, slug: str, mention: str, *items: Mapping[str, Any]) -> Case:
    """POST /merge of `good` once per item, with these fields."""

    def ask(server: Server, ids: Mapping[str, str]) -> httpx2.Response:
        return server.http.post("/merge", json={"adapters": [{"source": ids["good"], **fields} for fields in items]})

    return Case(name, status, slug, mention, ask)


def pattern(name: str, mention: str, *patterns: str, slug: str = "invalid-field") -> Case:
    return item(name, 422, slug, mention, {"weight": 1, "weights_by_module": {p: n for n, p in enumerate(patterns)}})


def raw(name: str, status: int, slug: str, mention: str, text: str, path: str = "/merge", kind: str = "application/json") -> Case:
    """A body as it stands, GOOD replaced by an adapter's id."""

    def ask(server: Server, ids: Mapping[str, str]) -> httpx2.Response:
        return server.http.post(path, content=text.replace("GOOD", ids["good"]), headers={"content-type": kind})

    return Case(name, status, slug, mention, ask)


def upload(title: str, status: int, slug: str, mention: str, files: Mapping[str, bytes], **fields: str) -> Case:
    def ask(server: Server, ids: Mapping[str, str]) -> httpx2.Response:
        return server.http.post("/adapters", files={part: (part, data) for part, data in files.items()}, data=fields)

    return Case(title, status, slug, mention, ask)


def configured(name: str, mention: str, slug: str = "unsupported-adapter", **config: Any) -> Case:
    return upload(name, 422, slug, mention, Made(GOOD.tensors, {**GOOD.config, **config}).files)


def holding(name: str, mention: str, slug: str = "unsupported-adapter", **tensors: Tensor) -> Case:
    """An upload with more tensors, or others; `layers_1` in a name stands for `layers.1`."""
    return upload(name, 422, slug, mention, Made({**GOOD.tensors, **tensors}, GOOD.config).files)


def weights(name: str, mention: str, data: bytes) -> Case:
    return upload(name, 422, "invalid-tensor-file", mention, {**GOOD.files, WEIGHTS: data})


def spoiled(value: float) -> dict[str, Tensor]:
    tensor = GOOD.tensors[FIRST].clone()
    tensor[1, 2] = value
    return {FIRST: tensor}


def header(entries: Mapping[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def get(name: str, status: int, slug: str, mention: str, path: str, method: str = "GET") -> Case:
    return Case(name, status, slug, mention, lambda server, _ids: server.http.request(method, path))


def hub(name: str, source: str) -> Case:
    return merge(f"source {name}", 422, "bad-source", source[:6], f"hub:{source}")


F32 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
DATA = GOOD.files[WEIGHTS]
CASES = [
    # the recipe
    merge("unknown method", 422, "unknown-method", "task_arithmetic", method="ties-typo"),
    merge("unknown parameter", 422, "invalid-params", "parameters.density", parameters={"density": 0.5}),
    merge("parameters no object", 422, "invalid-request", "body.parameters", parameters=[1]),
    merge("unknown field", 422, "invalid-request", "body.ranks", ranks=4),
    merge("no adapters", 422, "invalid-request", "body.adapters", adapters=[]),
    merge("adapters null", 422, "invalid-request", "body.adapters", adapters=None),
    merge("257 adapters", 422, "invalid-request", "body.adapters", *["good"] * 257),
    merge("rank 0", 422, "invalid-request", "body.rank", rank=0),
    merge("rank -1", 422, "invalid-request", "body.rank", rank=-1),
    merge("rank too large", 422, "invalid-rank", "rank 4 at most", rank=5),
    merge("rank beyond 64 bits", 422, "invalid-rank", "rank 4 at most", rank=10**30),
    merge("rank true", 422, "invalid-request", "body.rank", rank=True),
    merge("rank text", 422, "invalid-request", "body.rank", rank="4"),
    merge("rank fraction", 422, "invalid-request", "body.rank", rank=2.5),
    merge("rank list", 422, "invalid-request", "body.rank", rank=[4]),
    merge("energy 0", 422, "invalid-request", "body.rank.energy", rank={"energy": 0}),
    merge("energy 2", 422, "invalid-request", "body.rank.energy", rank={"energy": 2}),
    merge("energy text", 422, "invalid-request", "body.rank.energy", rank={"energy": "0.9"}),
    merge("energy misspelt", 422, "invalid-request", "enrgy", rank={"enrgy": 0.9}),
    merge("energy max 0", 422, "invalid-request", "max", rank={"energy": 0.9, "max": 0}),
    merge("dtype", 422, "invalid-request", "body.dtype", dtype="int8"),
    merge("profile", 422, "invalid-request", "body.profile", profile="small"),
    merge("seed negative", 422, "invalid-request", "body.seed", seed=-1),
    merge("seed too large", 422, "invalid-request", "body.seed", seed=2**63),
    merge("seed true", 422, "invalid-request", "body.seed", seed=True),
    merge("allow_base_mismatch text", 422, "invalid-request", "body.allow_base_mismatch", allow_base_mismatch="yes"),
    merge("name without namespace", 422, "invalid-request", "body.name", name="merged"),
    merge("name a path", 422, "invalid-request", "body.name", name="../../etc"),
    merge("name hidden", 422, "invalid-request", "body.name", name="a/.b"),
    merge("name with newline", 422, "invalid-request", "body.name", name="a/b\n"),
    # the adapters of the recipe
    merge("different bases", 409, "base-model-mismatch", "org/bad-input-2", "good", "base"),
    merge("different shapes", 422, "shape-mismatch", "layers.1.q_proj", "good", "shape"),
    merge("source without kind", 422, "bad-source", "adapters.1.source", "good", "org/name"),
    merge("source empty", 422, "bad-source", "adapters.0.source", ""),
    merge("source of unknown kind", 422, "bad-source", "adapters.0.source", "http://127.0.0.1/x"),
    merge("source a file", 422, "bad-source", "adapters.0.source", "file:///etc/passwd"),
    merge("source too long", 422, "invalid-request", "body.adapters.0.source", "hub:" + "x" * 1000),
    merge("digest garbage", 422, "bad-digest", "sha256:xyz", "sha256:xyz"),
    merge("digest a path", 422, "bad-digest", "sha256:../", "sha256:../../index.sqlite"),
    merge("digest unknown", 404, "unknown-adapter", ZERO, ZERO),
    merge("name unknown", 404, "unknown-adapter", "name:no/body", "name:no/body"),
    merge("name source a path", 404, "unknown-adapter", "name:../x", "name:../x"),
    hub("with dots", "../../etc"),
    hub("with dots inside", "org/../name"),
    hub("absolute", "/etc/passwd"),
    hub("without name", "org"),
    hub("with dots in the folder", "org/name/../../x"),
    hub("with escapes in the folder", "org/name/%2e%2e"),
    hub("with a hidden folder", "org/name/.git"),
    hub("with a backslash", "org/na\\me"),
    hub("with NUL", "org/na\0me"),
    hub("with a revision of dots", "org/name@../main"),
    hub("with an empty revision", "org/name@"),
    hub("with a question", "org/name?x=1"),
    hub("with a host", "http://127.0.0.1/org/name"),
    item("unknown field of an adapter", 422, "invalid-request", "body.adapters.0.wieght", {"wieght": 1}),
    item("weight for some", 422, "invalid-field", "adapters.1.weight", {"weight": 1}, {}),
    item("weight text", 422, "invalid-request", "body.adapters.0.weight", {"weight": "1"}),
    item("weight true", 422, "invalid-request", "body.adapters.0.weight", {"weight": True}),
    item("two tasks of one name", 422, "invalid-field", "'math' is used twice", {"name": "math"}, {"name": "math"}),
    item("task name a path", 422, "invalid-request", "body.adapters.0.name", {"name": "../x"}),
    item("by module text", 422, "invalid-request", "weights_by_module", {"weight": 1, "weights_by_module": {"q_proj": "1"}}),
    pattern("pattern unmatched", "matches no module", "k_proj", slug="bad-pattern"),
    pattern("patterns ambiguous", "layers.0.q_proj", "q_proj", "layers", slug="bad-pattern"),
    pattern("pattern broken", "adapters.0.weights_by_module", "layers("),
    pattern("pattern hostile", "too long", "(?R)", slug="bad-pattern"),
    pattern("pattern exponential", "(.|.)*", "(.|.)*" * 20 + "X", slug="bad-pattern"),
    pattern("pattern too long", "at most 512", "x" * 513, slug="invalid-request"),
    pattern("pattern repeated too often", "adapters.0.weights_by_module", "a{99999999999}"),
    raw("weight NaN", 422, "invalid-request", "body.adapters.0.weight", '{"adapters":[{"source":"GOOD","weight":NaN}]}'),
    raw("weight Infinity", 422, "invalid-request", "adapters.0.weight", '{"adapters":[{"source":"GOOD","weight":-Infinity}]}'),
    raw("weight 1e999", 422, "invalid-request", "adapters.0.weight", '{"adapters":[{"source":"GOOD","weight":1e999}]}'),
    raw(
        "by module NaN",
        422,
        "invalid-request",
        "weights_by_module.q_proj",
        '{"adapters":[{"source":"GOOD","weight":1,"weights_by_module":{"q_proj":NaN}}]}',
    ),
    raw("energy NaN", 422, "invalid-request", "body.rank.energy", '{"adapters":[{"source":"GOOD"}],"rank":{"energy":NaN}}'),
    raw("parameter NaN", 422, "invalid-params", "parameters.x", '{"adapters":[{"source":"GOOD"}],"parameters":{"x":NaN}}'),
    raw("half a character", 422, "invalid-request", "body.method", '{"adapters":[{"source":"GOOD"}],"method":"\\ud800"}'),
    raw(
        "half a character in a key",
        422,
        "invalid-params",
        "parameters.",
        '{"adapters":[{"source":"GOOD"}],"parameters":{"\\ud800":1}}',
    ),
    raw(
        "half a character in a pattern",
        422,
        "invalid-request",
        "weights_by_module",
        '{"adapters":[{"source":"GOOD","weight":1,"weights_by_module":{"\\ud800|q_proj":1}}]}',
    ),
    # the body
    raw("malformed JSON", 400, "invalid-request", "JSON", '{"adapters": ['),
    raw("no body", 422, "invalid-request", "body", ""),
    raw("a list", 422, "invalid-request", "body", "[]"),
    raw("deep nesting", 400, "bad-request", "parsing", "[" * 200_000),
    raw("a number of 5000 digits", 400, "bad-request", "parsing", '{"adapters":[{"source":"GOOD"}],"seed":' + "1" * 5000 + "}"),
    raw("a form", 415, "unsupported-media-type", "application/json", "method=ties", kind="application/x-www-form-urlencoded"),
    raw("text", 415, "unsupported-media-type", "application/json", "{}", kind="text/plain"),
    raw("a body above 4 MiB", 413, "body-too-large", "4194304", " " * (4 * 2**20 + 1)),
    raw("import: malformed JSON", 400, "invalid-request", "JSON", "{", "/adapters"),
    raw("import: deep nesting", 400, "invalid-request", "JSON", "[" * 200_000, "/adapters"),
    raw("import: unknown field", 422, "invalid-request", "body.revision", '{"source":"hub:a/b","revision":"x"}', "/adapters"),
    raw("import: not from the Hub", 422, "bad-source", "only hub:", '{"source":"GOOD"}', "/adapters"),
    raw("import: a path", 422, "bad-source", "../", '{"source":"hub:a/b/../c"}', "/adapters"),
    raw("import: bad name", 422, "invalid-request", "body.name", '{"source":"hub:a/b","name":"x"}', "/adapters"),
    raw("import: text", 415, "unsupported-media-type", "multipart/form-data", "x", "/adapters", "text/plain"),
    raw("import: above 4 MiB", 413, "body-too-large", "4194304", " " * (4 * 2**20 + 1), "/adapters"),
    # the upload
    raw("upload: no boundary", 400, "bad-request", "boundary", "x", "/adapters", "multipart/form-data"),
    raw("upload: no multipart", 400, "bad-request", "multipart", "x", "/adapters", "multipart/form-data; boundary=b"),
    upload("upload: no weights", 400, "bad-upload", WEIGHTS, {CONFIG: b"{}"}),
    upload("upload: no config", 422, "unsupported-adapter", CONFIG, {WEIGHTS: DATA}),
    upload("upload: a base model beside a config", 422, "invalid-field", "base_model", GOOD.files, base_model="org/other"),
    upload("upload: an empty base model", 422, "invalid-request", "body.base_model", {WEIGHTS: DATA}, base_model=""),
    upload("upload: pickle by name", 400, "bad-upload", "adapter_model.bin", {CONFIG: b"{}", "adapter_model.bin": b"\x80\x04"}),
    upload("upload: misspelt field", 400, "bad-upload", "nmae", GOOD.files, nmae="a/b"),
    upload("upload: name a path", 422, "invalid-request", "body.name", GOOD.files, name="../x"),
    upload("upload: name a file", 400, "bad-request", "files", {**GOOD.files, "name": b"a/b"}),
    upload("upload: config above 4 MiB", 413, "blob-too-large", "4194304", {**GOOD.files, CONFIG: b" " * (4 * 2**20 + 1)}),
    upload("upload: config no JSON", 422, "unsupported-adapter", CONFIG, {**GOOD.files, CONFIG: b"{"}),
    upload("upload: config a list", 422, "unsupported-adapter", CONFIG, {**GOOD.files, CONFIG: b"[]"}),
    upload("upload: config too deep", 422, "unsupported-adapter", CONFIG, {**GOOD.files, CONFIG: b'{"r":' + b"[" * 100_000}),
    weights("weights: pickle", "header", b"\x80\x04\x95" + b"x" * 100),
    weights("weights: empty", "0 bytes", b""),
    weights("weights: truncated", "follow the header", DATA[:-1]),
    weights("weights: longer than announced", "follow the header", DATA + b"x"),
    weights("weights: half a header", "does not fit", DATA[:100]),
    weights("weights: a header of 2^60 bytes", "header", (2**60).to_bytes(8, "little") + b"{}"),
    weights("weights: overlap", "overlap", header({"a": F32, "b": F32}, bytes(32))),
    weights("weights: overflow", "overflow", header({"a": {**F32, "shape": [2**62, 2**62]}}, bytes(16))),
    weights("weights: a path as a name", "not plain", header({"../../x": F32}, bytes(16))),
    weights("weights: unknown dtype", "dtype", header({"a": {**F32, "dtype": "F3"}}, bytes(16))),
    # the adapter
    configured("DoRA", "use_dora", use_dora=True),
    configured("lora_bias", "lora_bias", lora_bias=True),
    configured("modules_to_save", "modules_to_save", modules_to_save=["head"]),
    configured("another kind", "IA3", peft_type="IA3"),
    configured("an initialisation that moves the base", "pissa", init_lora_weights="pissa_niter_4"),
    configured("an unknown flag", "use_magic", use_magic=True),
    configured("alpha infinite", "lora_alpha", slug="invalid-params", lora_alpha=float("inf")),
    configured("r text", "adapter_config.json: r", slug="invalid-params", r="4"),
    configured("r another", "layers.0.", slug="shape-mismatch", r=5),
    configured("r of 400 digits", "adapter_config.json: r", slug="invalid-params", r=10**400),
    configured("rank_pattern broken", "missing )", slug="bad-pattern", rank_pattern={"(": 4}),
    configured("half a character in a flag", "unknown", **{"\ud800": 1}),
    configured("half a character in a name", "base_model_name", slug="invalid-params", base_model_name_or_path="\ud800"),
    holding("NaN", FIRST, "non-finite-tensor", **spoiled(torch.nan)),
    holding("Inf", FIRST, "non-finite-tensor", **spoiled(torch.inf)),
    holding("a magnitude", "DoRA", **{f"{PREFIX}layers.0.q_proj.lora_magnitude_vector": torch.ones(24)}),
    holding("a bias of lora_B", "bias", **{f"{PREFIX}layers.0.q_proj.lora_B.bias": torch.ones(24)}),
    holding("a saved module", "head.weight", **{f"{PREFIX}head.weight": torch.ones(3, 3)}),
    holding("half a factor", "layers.7", **{f"{PREFIX}layers.7.lora_A.weight": torch.ones(4, 16)}),
    holding("integers", "I32", **{FIRST: torch.ones(4, 16, dtype=torch.int32)}),
    upload("no tensors", 422, "unsupported-adapter", "no tensors", Made({}, GOOD.config).files),
    # the address
    get("cursor garbage", 422, "invalid-field", "query.cursor", "/jobs?cursor=x"),
    get("cursor of adapters garbage", 422, "invalid-field", "query.cursor", "/adapters?cursor=1|2"),
    get("cursor not a number", 422, "invalid-field", "query.cursor", f"/jobs?cursor=nan|{ZERO}"),
    get("cursor only an id", 422, "invalid-field", "query.cursor", f"/jobs?cursor={ZERO}"),
    get("cursor too long", 422, "invalid-request", "query.cursor", f"/jobs?cursor={'1' * 300}"),
    get("limit 0", 422, "invalid-request", "query.limit", "/jobs?limit=0"),
    get("limit 201", 422, "invalid-request", "query.limit", "/adapters?limit=201"),
    get("job id garbage", 422, "bad-digest", "sha256:", "/jobs/latest"),
    get("job id in capitals", 422, "bad-digest", "lower-case", f"/jobs/sha256:{'A' * 64}"),
    get("job unknown", 404, "unknown-job", ZERO, f"/jobs/{ZERO}"),
    get("job to cancel unknown", 404, "unknown-job", ZERO, f"/jobs/{ZERO}", "DELETE"),
    get("adapter id garbage", 422, "bad-digest", "sha256:", "/adapters/mine"),
    get("adapter to forget unknown", 404, "unknown-adapter", ZERO, f"/adapters/{ZERO}", "DELETE"),
    get("method unknown", 404, "not-found", "task_arithmetic", "/methods/tie"),
    get("unknown route", 404, "not-found", "Not Found", "/merges"),
    get("dots", 404, "not-found", "Not Found", "/adapters/%2e%2e/%2e%2e/etc/passwd"),
    get("method not allowed", 405, "method-not-allowed", "Not Allowed", "/merge", "PUT"),
    get("jobs are not posted", 405, "method-not-allowed", "Not Allowed", "/jobs", "POST"),
]


@pytest.fixture(scope="module")
def before(server: Server, ids: dict[str, str]) -> tuple[int, int]:
    return count(server)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_a_problem_that_names_the_place(server: Server, ids: dict[str, str], before: tuple[int, int], case: Case) -> None:
    told = problem(case.ask(server, ids), case.status, case.slug)
    assert case.mention in told["detail"]


def test_no_job_and_no_adapter_came_of_it(server: Server, before: tuple[int, int]) -> None:
    assert count(server) == before


def test_the_service_is_still_ready(server: Server) -> None:
    assert server.http.get("/readyz").json() == {"status": "ok"}


def test_every_blob_is_still_whole(server: Server) -> None:
    verified = preloaded("store", "verify", data_dir=server.data_dir)
    assert (verified.returncode, verified.stderr) == (0, "")


# --- limits of size


@pytest.fixture
def full(lean: Server) -> Iterator[Server]:
    """The service while no file can grow beyond 1.2 MB."""
    process = lean.processes()["api"]
    before = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (1_200_000, before[1]))
    yield lean
    process.rlimit(psutil.RLIMIT_FSIZE, before)


def large(size_bytes: int) -> Made:
    return make(90, shapes={"layers.0.q_proj": (16, size_bytes // 4)}, r=1)


def multipart(made: Made, boundary: str = "b") -> bytes:
    """The upload as one body."""
    parts = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="x"\r\n\r\n'.encode() + data + b"\r\n"
        for name, data in made.files.items()
    )
    return b"".join(parts) + f"--{boundary}--\r\n".encode()


def chunked(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), 65536):
        yield data[start : start + 65536]


def test_an_upload_within_the_limit_is_taken(lean: Server) -> None:
    assert lean.upload(large(1_900_000)).status_code == 201


def test_weights_above_the_limit_are_refused(lean: Server) -> None:
    assert "2000000" in problem(lean.upload(large(2_100_000)), 413, "blob-too-large")["detail"]


def test_a_body_announced_as_too_large_is_refused(lean: Server) -> None:
    problem(lean.upload(large(12_000_000)), 413, "body-too-large")


def test_a_body_that_becomes_too_large_unannounced_is_refused(lean: Server) -> None:
    headers = {"content-type": "multipart/form-data; boundary=b"}
    answer = lean.http.post("/adapters", content=chunked(multipart(large(12_000_000))), headers=headers)
    problem(answer, 413, "body-too-large")


def test_json_that_becomes_too_large_unannounced_is_refused(lean: Server) -> None:
    headers = {"content-type": "application/json"}
    problem(lean.http.post("/merge", content=chunked(b" " * 5_000_000), headers=headers), 413, "body-too-large")


def test_what_was_refused_left_nothing(lean: Server) -> None:
    before = count(lean)
    lean.upload(large(2_100_000))
    assert (count(lean), list(lean.data_dir.rglob(".tmp-*"))) == (before, [])


def test_a_full_disk_is_a_problem_of_its_own(full: Server) -> None:
    problem(full.upload(large(1_500_000)), 507, "store-full")


def test_a_full_disk_leaves_nothing_behind(full: Server) -> None:
    before = count(full)
    full.upload(large(1_500_000))
    assert (count(full), list(full.data_dir.rglob(".tmp-*"))) == (before, [])


def test_the_service_outlives_a_full_disk(full: Server) -> None:
    full.upload(large(1_500_000))
    assert full.upload(make_named("org/after-full")).status_code == 201
