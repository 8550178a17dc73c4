// A port of RLoop's pure functions in JavaScript, without a package: node 18 or newer.
//
//     python -m golden.check node ports/js_port.mjs
//
// Written from golden/README.md. What needs a model, a tokenizer or numpy's generators is skipped.

import readline from "node:readline";

const sum = (values) => values.reduce((total, value) => total + value, 0);
const range = (count) => Array.from({ length: count }, (_, i) => i);

// Stage losses

function grpo_loss({ logp, old_logp, advantages, weights, clip_low, clip_high }) {
  const result = { loss: 0, gradient: weights.map(() => 0), tokens: 0, clip_low: 0, clip_high: 0 };
  weights.forEach((weight, i) => {
    if (weight === 0) return; // padding: its other values may be anything
    const advantage = advantages[i];
    const rho = Math.exp(logp[i] - old_logp[i]);
    const clipped = Math.min(Math.max(rho, 1 - clip_low), 1 + clip_high);
    result.loss -= weight * Math.min(rho * advantage, clipped * advantage);
    if (rho * advantage <= clipped * advantage) result.gradient[i] = -weight * rho * advantage;
    result.tokens += 1;
    result.clip_low += advantage < 0 && rho < 1 - clip_low ? 1 : 0;
    result.clip_high += advantage > 0 && rho > 1 + clip_high ? 1 : 0;
  });
  return result;
}

function kl_loss({ logp, ref_logp, weights }) {
  const result = { loss: 0, gradient: weights.map(() => 0) };
  weights.forEach((weight, i) => {
    if (weight === 0) return;
    const delta = ref_logp[i] - logp[i];
    result.loss += weight * (Math.expm1(delta) - delta);
    result.gradient[i] = -weight * Math.expm1(delta);
  });
  return result;
}

function sft_loss({ logp, weights }) {
  const terms = weights.map((weight, i) => (weight === 0 ? 0 : -weight * logp[i]));
  return { loss: sum(terms), gradient: weights.map((weight) => -weight) };
}

function token_weights({ lengths, aggregation, max_new_tokens }) {
  const count = lengths.length;
  return lengths.map((length) => {
    if (aggregation === "token") return 1 / sum(lengths);
    if (aggregation === "sequence") return 1 / (length * count);
    if (aggregation === "constant") return 1 / (count * max_new_tokens);
    throw new Error(`aggregation ${aggregation}`);
  });
}

function overlong_penalty({ length, max_new_tokens, buffer }) {
  if (buffer === 0) return 0;
  return -Math.max(0, (length - (max_new_tokens - buffer)) / buffer);
}

// Stage advantages

function group_advantages({ rewards, normalize_std }) {
  return rewards.map((row) => {
    if (row.every((reward) => reward === row[0])) return row.map(() => 0);
    const mean = sum(row) / row.length;
    const std = Math.sqrt(sum(row.map((reward) => (reward - mean) ** 2)) / row.length);
    return row.map((reward) => (reward - mean) / (normalize_std ? std + 1e-6 : 1));
  });
}

function step_advantages({ groups, normalize_std, max_new_tokens, overlong_buffer }) {
  const limits = { max_new_tokens, buffer: overlong_buffer };
  const total = ({ reward, length }) => reward + overlong_penalty({ length, ...limits });
  const rewards = groups.map(({ samples }) => samples.map(total));
  return group_advantages({ rewards, normalize_std });
}

function rl_learning_rates({ steps, lr, warmup_steps }) {
  return range(steps).map((step) => lr * Math.min(1, (step + 1) / (warmup_steps + 1)));
}

// Stage filter

function select_experts({ trajectories, max_success_rate, max_per_problem, min_reward }) {
  const places_of = new Map(); // in the order of first trajectories
  trajectories.forEach(({ problem }, place) => {
    places_of.set(problem, [...(places_of.get(problem) ?? []), place]);
  });
  return [...places_of.values()].flatMap((places) => {
    const successes = places.filter((place) => trajectories[place].reward >= min_reward);
    if (successes.length / places.length > max_success_rate) return [];
    const first = new Map(); // ids to the first success that has them
    for (const place of successes) {
      const ids = JSON.stringify(trajectories[place].ids);
      if (!first.has(ids)) first.set(ids, place);
    }
    return evenly_spaced([...first.values()], max_per_problem);
  });
}

function evenly_spaced(items, limit) {
  const count = Math.min(items.length, limit);
  if (count <= 1) return items.slice(0, count);
  return range(count).map((i) => items[half_to_even((i * (items.length - 1)) / (count - 1))]);
}

function half_to_even(x) {
  const rounded = Math.round(x); // halves up
  return rounded - x === 0.5 && rounded % 2 === 1 ? rounded - 1 : rounded;
}

// Stage evaluation

function pass_at_k({ num_samples, num_correct, k }) {
  const wrong = num_samples - num_correct;
  if (wrong < k) return 1;
  return 1 - range(num_correct).reduce((p, i) => p * (1 - k / (wrong + 1 + i)), 1);
}

function bootstrap_interval({ values, resamples }) {
  const means = resamples.map((places) => sum(places.map((i) => values[i])) / places.length);
  means.sort((a, b) => a - b);
  return [0.025, 0.975].map((q) => {
    const place = q * (means.length - 1);
    const low = Math.floor(place);
    const next = means[Math.min(low + 1, means.length - 1)];
    return means[low] + (place - low) * (next - means[low]);
  });
}

// Stage sampling

function log_softmax(logits) {
  const largest = Math.max(...logits);
  const total = sum(logits.map((logit) => Math.exp(logit - largest)));
  return logits.map((logit) => logit - largest - Math.log(total));
}

function sampled_logprobs({ logits, temperature, top_p, top_k }) {
  return logits.map((row) => row_logprobs(row.map(number), temperature, top_p, top_k));
}

function row_logprobs(logits, temperature, top_p, top_k) {
  if (temperature === 0) {
    const best = logits.indexOf(Math.max(...logits));
    return logits.map((_, id) => (id === best ? 0 : -Infinity));
  }
  const logp = log_softmax(logits.map((logit) => logit / temperature));
  if (top_k === 0 && top_p >= 1) return logp;
  const order = range(logp.length).sort((a, b) => logp[b] - logp[a] || a - b);
  let ranked = order.map((id) => logp[id]);
  if (top_k > 0) ranked = ranked.map((value, rank) => (rank < top_k ? value : -Infinity));
  if (top_p < 1) {
    let before = 0;
    ranked = log_softmax(ranked).map((value) => {
      const kept = before < top_p ? value : -Infinity;
      before += Math.exp(value);
      return kept;
    });
  }
  const result = [];
  log_softmax(ranked).forEach((value, rank) => (result[order[rank]] = value));
  return result;
}

function draw({ logprobs, uniforms }) {
  return logprobs.map((row, r) => {
    let total = 0;
    const cumulative = row.map((logp) => (total += Math.exp(number(logp))));
    const point = uniforms[r] * total;
    const id = cumulative.findIndex((value) => value > point);
    return id >= 0 ? id : cumulative.indexOf(total); // a point at the total: just below it
  });
}

// Stage verdicts. A value is a fraction of BigInts in lowest terms, as the text "3/4".

const gcd = (a, b) => (b === 0n ? a : gcd(b, a % b));

function fraction(top, bottom = 1n) {
  if (bottom === 0n) throw new Error("division by zero");
  const divisor = gcd(top, bottom); // of either sign
  const [a, b] = [top / divisor, bottom / divisor];
  return b < 0n ? `${-a}/${-b}` : `${a}/${b}`;
}

function combine(left, sign, right) {
  const [a, b] = left.split("/").map(BigInt);
  const [c, d] = right.split("/").map(BigInt);
  if (sign === "*") return fraction(a * c, b * d);
  if (sign === "/") return fraction(a * d, b * c);
  return fraction(sign === "+" ? a * d + c * b : a * d - c * b, b * d);
}

function verify_countdown({ response, numbers, target }) {
  try {
    const board = new Map();
    const put = (value, count) => board.set(value, (board.get(value) ?? 0) + count);
    numbers.forEach((value) => put(fraction(BigInt(value)), 1));
    for (const step of final_answer(response).split(/[,;\n]/)) {
      if (step.trim() !== "") take_step(step, board, put);
    }
    put(fraction(BigInt(target)), -1);
    return { correct: [...board.values()].every((count) => count === 0) };
  } catch {
    return { correct: false };
  }
}

function final_answer(response) {
  let text = response.split("</think>").at(-1);
  if (text.includes("<think>")) throw new Error("a thought without an end");
  text = text.split("<answer>").at(-1).split("</answer>")[0];
  const boxes = text.split("\\boxed{");
  if (boxes.length > 1) {
    if (!boxes.at(-1).includes("}")) throw new Error("a box without an end");
    text = boxes.at(-1).split("}")[0];
  }
  if (text.length > 1000) throw new Error("too long");
  return text.replaceAll(/×|\\times/g, "*").replaceAll(/÷|\\div/g, "/");
}

function take_step(step, board, put) {
  const sides = step.split("=").map(read_side);
  let played = sides[0];
  if (sides.length > 1 && played.is_number && !board.get(played.value)) played = sides[1];
  if (sides.some((side) => side.value !== played.value)) throw new Error("unequal sides");
  played.numbers.forEach((value) => put(value, -1));
  if ([...board.values()].some((count) => count < 0)) throw new Error("not on the board");
  put(played.value, 1);
}

function read_side(text) {
  const tokens = text.match(/[0-9]+|\S/g) ?? [];
  const numbers = [];
  let operations = 0;
  const next_is = (signs) => tokens.length > 0 && signs.includes(tokens[0]);

  function chain(signs, operand) {
    let value = operand();
    while (next_is(signs)) {
      operations += 1;
      value = combine(value, tokens.shift(), operand());
    }
    return value;
  }

  const product = () => chain(["*", "/"], factor);
  const total = () => chain(["+", "-"], product);

  function factor() {
    if (next_is(["("])) {
      tokens.shift();
      const value = total();
      if (tokens.shift() !== ")") throw new Error("no )");
      return value;
    }
    const sign = next_is(["-"]) ? tokens.shift() : "";
    const digits = tokens.shift() ?? "";
    if (!/^[0-9]+$/.test(digits)) throw new Error("no number");
    numbers.push(fraction(BigInt(sign + digits)));
    return numbers.at(-1);
  }

  const value = total();
  if (tokens.length > 0) throw new Error(`${tokens[0]} behind an expression`);
  return { value, numbers, is_number: operations === 0 };
}

// The protocol

const NOT_FINITE = { nan: NaN, inf: Infinity, "-inf": -Infinity };
const number = (value) => NOT_FINITE[value] ?? value;

function answer({ function: name, inputs }) {
  if (!(name in FUNCTIONS)) return { skip: "pure functions only" };
  try {
    return { output: FUNCTIONS[name](inputs) };
  } catch (error) {
    return { error: String(error) };
  }
}

const as_text = (key, value) =>
  typeof value !== "number" || Number.isFinite(value)
    ? value
    : Object.keys(NOT_FINITE).find((text) => Object.is(NOT_FINITE[text], value));

const FUNCTIONS = {
  ...{ grpo_loss, kl_loss, sft_loss, token_weights, overlong_penalty },
  ...{ group_advantages, step_advantages, rl_learning_rates, select_experts },
  ...{ pass_at_k, bootstrap_interval, sampled_logprobs, draw, verify_countdown },
};

for await (const line of readline.createInterface({ input: process.stdin })) {
  process.stdout.write(`${JSON.stringify(answer(JSON.parse(line)), as_text)}\n`);
}
