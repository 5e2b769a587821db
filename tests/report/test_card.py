"""The model card, and its way to the Hub."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import BIN, SHORT
from huggingface_hub import HfApi, ModelCard

from forge_lib.errors import UserError
from forge_lib.report.card import make_card
from forge_lib.report.history import COLUMNS, History
from forge_lib.training.hub import check_hub, push_to_hub


class Hub(BaseHTTPRequestHandler):
    """A stand-in for the Hub: records what is uploaded, and answers as the Hub does."""

    files: dict[str, bytes]  # uploaded through git's large file storage, by sha256
    commits: list[dict]
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        base = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            name = json.loads(body)["name"]
            self.answer({"url": f"{base}/me/{name}", "name": f"me/{name}"})
        elif self.path == "/api/validate-yaml":
            content = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            good = content["pipeline_tag"] == "text-generation"
            self.answer({"errors": [] if good else [{"message": "wrong"}], "warnings": []}, 200 if good else 400)
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            kinds = {True: "lfs", False: "regular"}
            answer = [
                {
                    "path": f["path"],
                    "uploadMode": kinds[f["path"].endswith((".safetensors", ".png"))],
                    "shouldIgnore": False,
                }
                for f in files
            ]
            self.answer({"files": answer})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            uploads = [{**each, "actions": {"upload": {"href": f"{base}/upload/{each['oid']}"}}} for each in objects]
            self.answer({"transfer": "basic", "objects": uploads})
        elif "/commit/" in self.path:
            self.commits.append([json.loads(line) for line in body.splitlines()])
            self.answer({"commitUrl": f"{base}/me/x/commit/0", "commitOid": "0" * 40, "success": True})
        else:
            self.answer({"error": self.path}, 404)

    def do_PUT(self):
        self.files[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def do_GET(self):
        if self.path.startswith("/api/models/"):
            self.answer({"id": "me/x", "siblings": [], "sha": "0" * 40})
        else:
            self.answer({"name": "me", "type": "user", "orgs": []})

    def answer(self, content, status: int = 200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    handler = type("Handler", (Hub,), {"files": {}, "commits": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield handler, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


DESCRIPTION = {
    "config": {
        "model_name": "gpt2-x/base", "from_scratch": False, "dataset_path": "corpus/a.txt", "eval_dataset_path": "",
        "sequence_length": 64, "mask_documents": False, "optimizer": "adamw", "learning_rate": 1e-3,
        "lr_scheduler": "cosine", "seed": 0,
    },
    "run": {}, "data": {"num_tokens": 12_345, "fingerprint": "abc"}, "mixed_precision": "no",
    "batches": {"num_blocks": 50, "batch_size": 8, "num_steps": 100},
    "world": [{"host": "alder", "device_name": "cpu", "versions": {"torch": "2.13"}}] * 2,
}  # fmt: skip


def history(**config) -> History:
    columns = {name: np.zeros(0) for name in COLUMNS}
    return History(Path("runs/x"), columns, description=DESCRIPTION | {"config": DESCRIPTION["config"] | config})


def test_names_of_the_hub_are_told_from_files_also_of_other_machines():
    for name, expected in (("gpt2", "gpt2"), ("me/base", "me/base"), ("data/tiny_gpt2", None), ("a/b.gguf", None)):
        assert ModelCard(make_card("x", history(model_name=name), {}, False)).data.base_model == expected
    for path, expected in (("me/texts", ["me/texts"]), ("corpus/a.txt", None), ("corpus/a.jsonl.gz", None)):
        assert ModelCard(make_card("x", history(dataset_path=path), {}, False)).data.datasets == expected


def test_the_card_has_the_results_in_the_form_that_the_hub_reads():
    text = make_card("me/mine", history(), {"eval_loss": 2.5, "perplexity": 12.2, "steps": 100}, has_plot=True)
    card = ModelCard(text)
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.data.base_model == "gpt2-x/base" and 'model="me/mine"' in card.text
    results = {each.metric_type: each.metric_value for each in card.data.eval_results}
    assert results == {"loss": 2.5, "perplexity": 12.2}
    for words in ("12,345", "`abc`", "2 processes on cpu", "loss.png", "scripts/train.py", "learning rate 0.001"):
        assert words in card.text, words
    assert "None" not in card.text


def test_the_final_model_is_uploaded_with_a_valid_card(start, tmp_path, hub):
    """The stand-in gets the weights, byte for byte, and all other files in the commit."""
    handler, url = hub
    command = [BIN / "python", "scripts/train.py", *SHORT, "--max-steps", 2, "--output-dir", tmp_path / "run"]
    variables = {
        "HF_ENDPOINT": url,
        "HF_TOKEN": "hf_x",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "1",
    }
    ended = start([*command, "--push-to-hub", "me/x"], variables=variables).finish()
    assert ended.code == 0 and f"the model is at {url}/me/x" in ended.output, ended.output
    final = tmp_path / "run" / "final"
    assert (final / "model.safetensors").read_bytes() in handler.files.values()
    paths = {
        line["value"]["path"] for commit in handler.commits for line in commit if line["key"] in ("file", "lfsFile")
    }
    assert paths == {path.name for path in final.iterdir()}
    program = "import sys; from huggingface_hub import ModelCard; ModelCard.load(sys.argv[1]).validate()"
    ended = start(
        [BIN / "python", "-c", program, final / "README.md"], variables={"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0"}
    ).finish()
    assert ended.code == 0, ended.output


def test_a_name_or_a_token_that_cannot_work_is_reported_before_the_training(monkeypatch):
    with pytest.raises(UserError, match="--push-to-hub a/b/c: "):
        check_hub("a/b/c")
    monkeypatch.setattr("forge_lib.training.hub.get_token", lambda: None)
    with pytest.raises(UserError, match="--push-to-hub needs a token"):
        check_hub("me/x")


def test_an_upload_that_fails_is_logged_with_the_command_that_repeats_it(tmp_path, monkeypatch, caplog):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr("forge_lib.training.hub.HfApi", lambda: HfApi(address, token="hf_x"))
    push_to_hub(tmp_path / "final", "me/x")
    assert f"repeat it with `hf upload me/x {tmp_path / 'final'} .`" in caplog.text
