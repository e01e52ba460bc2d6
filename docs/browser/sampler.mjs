// Samples tokens from a step that `midimamba.export_onnx` has written, with onnxruntime-web.

/**
 * The tokens that follow the first one, as they are sampled.
 *
 * @param ort the module onnxruntime-web
 * @param session an `ort.InferenceSession` of the exported step
 * @param options `first` and `last`: the ids that begin and end a piece; `length`: tokens at most; `temperature`: below
 *   1 safer, above 1 wilder, 0 for the most likely token; `random`: numbers from 0 to 1
 */
export async function* sample(ort, session, options = {}) {
  const { first = 1, last = 2, length = 512, temperature = 1, random = Math.random } = options;
  const states = {};
  for (const { name, shape } of session.inputMetadata) {
    if (name === "input_ids") continue;
    const sizes = [1, ...shape.slice(1)];
    const zeros = new Float32Array(sizes.reduce((product, size) => product * size));
    states[name] = new ort.Tensor("float32", zeros, sizes);
  }
  let token = first;
  for (let step = 0; step < length && token !== last; step++) {
    const input_ids = new ort.Tensor("int64", BigInt64Array.of(BigInt(token)), [1, 1]);
    const outputs = await session.run({ input_ids, ...states });
    for (const name in states) states[name] = outputs[`new_${name}`];
    token = draw(outputs.logits.data, temperature, random);
    yield token;
  }
}

/** An id by its logit. The largest of logits with Gumbel noise is a draw from their softmax. */
function draw(logits, temperature, random) {
  let best = 0;
  let highest = -Infinity;
  logits.forEach((logit, id) => {
    const value = temperature > 0 ? logit / temperature - Math.log(-Math.log(random())) : logit;
    if (value > highest) [best, highest] = [id, value];
  });
  return best;
}
