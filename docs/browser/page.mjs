// What the page does: it loads the step beside it, and samples as often as it is asked to.

import * as ort from "./onnxruntime-web/ort.wasm.min.mjs";
import { sample } from "./sampler.mjs";

const [length, temperature, button, status, shown] = ["length", "temperature", "sample", "status", "ids"].map((id) =>
  document.getElementById(id),
);
ort.env.wasm.numThreads = 1; // a step is too small for more, which need headers of the server
try {
  const session = await ort.InferenceSession.create("step.onnx");
  button.onclick = async () => {
    button.disabled = true;
    const ids = [1]; // begin-of-sequence
    const start = performance.now();
    const options = { length: Number(length.value), temperature: Number(temperature.value) };
    for await (const id of sample(ort, session, options)) {
      ids.push(id);
      shown.textContent = JSON.stringify(ids);
    }
    const each = (performance.now() - start) / (ids.length - 1);
    status.textContent = `${ids.length - 1} tokens, ${each.toFixed(2)} ms each`;
    button.disabled = false;
  };
  status.textContent = "Ready.";
  button.disabled = false;
} catch (error) {
  status.textContent = `step.onnx cannot be loaded: ${error.message}`;
}
