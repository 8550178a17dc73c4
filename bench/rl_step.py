"""A whole RL step against TRL's GRPOTrainer: sample, score, update.

    pip install transformers==5.23.0 trl==1.16.0
    python -m bench.rl_step --model models/SmolLM2-135M-Instruct --new-tokens 64

Same weights, prompts, group size, lengths, precision and threads: both sample --new-tokens tokens
from 8 prompts x 8, with float32 weights and AdamW, --groups groups in a micro-batch. Rewards are
the parity of a response's length in characters, so hardly a group is flat. TRL's trainer drives:
one of our steps follows each of its own.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch

import rloop
from bench.common import DTYPES, finish_work, options, report, set_up
from config import load_config
from data import Problem
from data.tokenizer import Tokenizer
from run import Run
from sampler import sampling_copy

# about 54 tokens each in SmolLM2's chat template
QUESTION = "What is {} plus {}? Think step by step and end with the sum in \\boxed{{}}."
QUESTIONS = [QUESTION.format(37 + 11 * i, 58 + 7 * i) for i in range(8)]


def build_ours(args: argparse.Namespace, run_dir: str) -> Callable[[], None]:
    tokens = args.groups * (64 + 8 * args.new_tokens)
    overrides = (
        f"--run_dir {run_dir} --model.path {args.model} --data.prompt {{problem}}"
        f" --sampling.max_new_tokens {args.new_tokens} --compute.micro_batch_tokens {tokens}"
        f" --compute.dtype {DTYPES[args.dtype]} --compute.threads {args.threads}"
        f" --compute.compile {str(args.compile).lower()} --compute.max_rows 64"
    )
    cfg = load_config("configs/smollm2-chain-sum.toml", overrides.split())
    run, tokenizer = Run(cfg), Tokenizer(args.model, chat=True)
    tokenizer.stop_ids = set()
    policy = rloop.load_policy(cfg)
    optimizer = rloop.new_optimizer(run, policy, resume=False)
    problems = [Problem(id=q, prompt=q, answer="1", kind="math") for q in QUESTIONS]
    seeds = iter(range(10**6))

    def step() -> None:
        model = sampling_copy(policy, cfg.compute.dtype, cfg.compute.compile)
        place, sampling = {"iteration": 0, "step": 1}, {"num_samples": 8, "temperature": 1.0}
        groups, _ = rloop.respond(model, tokenizer, problems, cfg, next(seeds), place, **sampling)
        del model
        for trajectory in (t for group in groups for t in group):
            trajectory.reward = float(len(trajectory.response) % 2)
        rloop.update(run, policy, optimizer, groups, None, cfg.rl.lr)

    return step


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--groups", type=int, default=2, help="of 8 responses in a micro-batch")
    args = parser.parse_args()
    set_up(args)
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    with tempfile.TemporaryDirectory() as scratch:
        step, seconds = build_ours(args, f"{scratch}/ours"), {"ours": [], "trl.GRPOTrainer": []}

        class Alternate(TrainerCallback):
            def on_step_begin(self, *_, **__):
                self.start = time.perf_counter()

            def on_step_end(self, *_, **__):
                finish_work()
                middle = time.perf_counter()
                step()
                finish_work()
                seconds["trl.GRPOTrainer"].append(middle - self.start)
                seconds["ours"].append(time.perf_counter() - middle)
                print({name: round(values[-1], 2) for name, values in seconds.items()}, flush=True)

        # fmt: off
        settings = GRPOConfig(
            output_dir=f"{scratch}/trl", use_cpu=not torch.cuda.is_available(), report_to="none",
            bf16=args.dtype == "bf16", max_steps=args.rounds + 1, disable_tqdm=True,
            save_strategy="no", num_generations=8,
            per_device_train_batch_size=8 * args.groups, gradient_checkpointing=False,
            gradient_accumulation_steps=8 // args.groups, max_completion_length=args.new_tokens,
            generation_kwargs={"min_new_tokens": args.new_tokens}, temperature=1.0, beta=0.0,
            epsilon=0.2, epsilon_high=0.28, loss_type="dapo", learning_rate=1e-6,
            lr_scheduler_type="constant",
        )
        # fmt: on
        load = AutoModelForCausalLM.from_pretrained
        prompts = [{"prompt": [{"role": "user", "content": q}]} for q in QUESTIONS]
        GRPOTrainer(
            model=load(args.model, dtype=torch.float32, attn_implementation="sdpa"),
            reward_funcs=lambda completions, **_: [len(c[0]["content"]) % 2.0 for c in completions],
            args=settings,
            train_dataset=Dataset.from_list(prompts),
            processing_class=AutoTokenizer.from_pretrained(args.model),
            callbacks=[Alternate()],
        ).train()
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    rates = {name: 3600 / value for name, value in median.items()}
    facts = {"median_s": {name: round(value, 2) for name, value in median.items()}}
    work = f"8 x 8 x {args.new_tokens} tokens, {args.groups} groups a micro-batch"
    report(args, f"RL step {args.model}, {work}", rates, "steps/h", **facts)


if __name__ == "__main__":
    main()
