"""An exported step in a real browser: the page of the docs samples what the model samples.

onnxruntime-web comes from npm: `npm install onnxruntime-web`. `MIDIMAMBA_ONNXRUNTIME_WEB` names its folder in
`node_modules`; without it, the test is skipped.
"""

import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from app_support import chromium

import midimamba
from midimamba import MidiMambaForCausalLM
from support import make_generator

PAGE = Path(__file__).parents[1] / "docs" / "browser"
_GREEDY = """async (length) => {
  const ort = await import("./onnxruntime-web/ort.wasm.min.mjs");
  const { sample } = await import("./sampler.mjs");
  const session = await ort.InferenceSession.create("step.onnx");
  const ids = [];
  for await (const id of sample(ort, session, { length, temperature: 0, last: -1 })) ids.push(id);
  return ids;
}"""


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def model() -> MidiMambaForCausalLM:
    """One that does not follow every token by the same one, whatever came before."""
    model = make_generator(layout="moe-mamba")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@pytest.fixture
def address(model: MidiMambaForCausalLM, tmp_path: Path) -> Iterator[str]:
    """The page, with the step and onnxruntime-web beside it."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install -e '.[onnx]'")
    if not (package := os.environ.get("MIDIMAMBA_ONNXRUNTIME_WEB")):
        pytest.skip("MIDIMAMBA_ONNXRUNTIME_WEB does not name onnxruntime-web: npm install onnxruntime-web")
    shutil.copytree(PAGE, tmp_path, dirs_exist_ok=True)
    (tmp_path / "onnxruntime-web").symlink_to(Path(package) / "dist")
    midimamba.export_onnx(model, tmp_path / "step.onnx")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.slow
def test_the_page_samples_what_the_model_samples(address: str, model: MidiMambaForCausalLM) -> None:
    program = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page()
        hosts: set[str] = set()
        page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
        page.goto(address)
        page.wait_for_selector("#sample:enabled")
        page.fill("#length", "40")
        page.click("#sample")
        page.wait_for_selector("#status >> text=ms each")
        sampled = json.loads(page.inner_text("#ids"))
        greedy = page.evaluate(_GREEDY, 100)
        browser.close()
    assert sampled[0] == 1
    assert 2 <= len(sampled) <= 41
    assert all(0 <= id < model.config.vocab_size for id in sampled)
    expected = model.generate(torch.tensor([[1]]), max_new_tokens=100, do_sample=False, eos_token_id=None)
    assert isinstance(expected, torch.Tensor)
    assert len(set(greedy)) > 3
    assert greedy == expected[0, 1:].tolist()
    assert hosts == {address.split("/")[2]}
