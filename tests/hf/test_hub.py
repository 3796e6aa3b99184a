"""Models found by name: a hub on this machine stands for the one on the network."""

import hashlib
import http.server
import json
import threading
import time
from types import SimpleNamespace

import pytest

import beacon_jax
from beacon_jax.cli import context
from beacon_jax.hf import hub
from beacon_jax.progress import Progress

SHA = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"the same again",
    "original/consolidated.00.pth": b"and again",
    "README.md": b"# A model",
}


class Hub(http.server.BaseHTTPRequestHandler):
    """The routes that a download uses."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.asked.append(path)  # type: ignore[attr-defined]
        if path.startswith("/api/models/org/name/tree/"):
            self.answer(json.dumps([self.entry(name) for name in FILES]).encode())
        elif path.startswith("/api/models/org/name"):
            about = {"id": "org/name", "sha": SHA}
            about["siblings"] = [{"rfilename": name} for name in FILES]  # type: ignore
            self.answer(json.dumps(about).encode())
        elif path.startswith(f"/org/name/resolve/{SHA}/"):
            self.answer(FILES[path.split(f"{SHA}/")[1]])
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def entry(self, name):
        size, oid = len(FILES[name]), hashlib.sha1(FILES[name]).hexdigest()
        return {"type": "file", "path": name, "size": size, "oid": oid}

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", SHA)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A hub at HF_ENDPOINT; `asked` has the paths that were asked for."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_of_the_hub_is_downloaded_once_and_only_what_is_needed(
    server, tmp_path
):
    folder = hub.download("org/name", cache=tmp_path)
    found = {p.name for p in folder.iterdir()}
    assert found == {
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "model.safetensors",
    }
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    before = [path for path in server.asked if "/resolve/" in path]
    assert hub.download("org/name", cache=tmp_path) == folder
    after = [path for path in server.asked if "/resolve/" in path]
    assert len(after) == len(before)


def test_what_was_downloaded_is_found_again_without_a_network(
    server, tmp_path, monkeypatch
):
    folder = hub.download("org/name", cache=tmp_path)
    server.shutdown()
    server.server_close()
    assert hub.download("org/name", cache=tmp_path) == folder
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub.download("org/name", cache=tmp_path) == folder


def test_a_model_that_the_hub_does_not_have_says_so(server, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such model.*hf auth login"):
        hub.download("org/nome", cache=tmp_path)


def test_without_a_network_the_command_is_shown_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    start = time.monotonic()
    said = r"--model=org/name is no folder.*`hf download org/name --local-dir name`"
    with pytest.raises(FileNotFoundError, match=said):
        hub.download("org/name", "--model", cache=tmp_path)
    assert time.monotonic() - start < 30  # a retry waits for minutes
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set.*hf download"):
        hub.find("org/another")


def test_a_path_is_not_taken_for_a_model_of_the_hub(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for path in ("out/model", "/nope", "./org/name", "a/b/c", "name", tmp_path / "x"):
        with pytest.raises(FileNotFoundError, match="path=.*there is no such folder"):
            hub.find(path)
    (tmp_path / "model.bin").write_bytes(b"PK")
    with pytest.raises(FileNotFoundError, match="model.bin is a file, and no GGUF fil"):
        hub.find("model.bin")
    with pytest.raises(FileNotFoundError, match="model=org/x.gguf: there is no such f"):
        hub.find("org/x.gguf", "--model")
    assert hub.find("out") == hub.find(tmp_path / "out").relative_to(tmp_path)
    assert not server.asked


def test_weights_are_not_downloaded_in_two_formats():
    sharded = ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    assert hub.needed_files([*sharded, "pytorch_model-1.bin"]) == sharded[::-1]
    torch = ["pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5"]
    assert hub.needed_files(torch) == torch[1::-1]


def test_load_and_the_commands_name_their_own_argument(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="^path=org/absent is no folder here"):
        beacon_jax.load("org/absent")
    with pytest.raises(FileNotFoundError, match="^--model=org/absent is no folder"):
        context.load_model(
            SimpleNamespace(model="org/absent", beacons=None),  # type: ignore
            Progress(),
        )


@pytest.mark.parametrize(
    "id",
    [
        "org/name.",
        "org/na--me",
        "org/na..me",
        "org/name.git",
        "org-/name",
        f"org/{'n' * 97}",
        f"{'o' * 300}/name",
    ],
)
def test_an_id_that_no_model_can_have_is_an_error_that_names_it(id, server):
    with pytest.raises(ValueError, match=f"^--model={id[:9]}.*no id of a model on"):
        hub.find(id, "--model")
    assert not server.asked
