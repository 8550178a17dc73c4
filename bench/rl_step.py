"""A whole RL step against TRL's GRPOTrainer: sample, score, update. Same weights, prompts, group size, lengths, precision and threads.

    pip install transformers==5.23.0 trl==1.16.0
    python -m bench.rl_step --model models/SmolLM2-135M-Instruct --new-tokens 64

Both sample exactly --new-tokens tokens from 8 prompts x 8, with float32 master weights and AdamW, --groups groups in a micro-batch. Rewards
are the parity of a response's length in characters, so that no group is flat. TRL's trainer drives: after each of its steps comes one of
ours.
"""

import statistics
import tempfile
import time

import torch

import rloop
from bench.common import options, report, set_up, setting
from config import load_config
from data import Problem
from data.tokenizer import Tokenizer
from rundir import RunDir

PROMPTS = 8


def questions() -> list[str]:
    """About 54 tokens each in SmolLM2's chat template."""
    return [
        f"What is {37 + 11 * i} plus {58 + 7 * i}? Think step by step and end with the sum in \\boxed{{}}."
        for i in range(PROMPTS)
    ]


def build_ours(args, scratch: str):
    cfg = load_config("configs/smollm2-chain-sum.toml", [
        *("--run_dir", scratch, "--model.path", args.model, "--data.prompt", "{problem}", "--rl.minibatches", "1"),
        *("--compute.dtype", {"bf16": "bfloat16", "fp32": "float32"}[args.dtype], "--compute.threads", str(args.threads)),
        *("--sampling.max_new_tokens", str(args.new_tokens), "--compute.max_rows", str(8 * PROMPTS)),
        *("--compute.compile", str(args.compile).lower(), "--compute.micro_batch_tokens", str(args.groups * (64 + 8 * args.new_tokens))),
    ])  # fmt: skip
    run, tokenizer, policy = (
        RunDir(cfg),
        Tokenizer(cfg.model.path, chat=True),
        rloop.load_policy(cfg),
    )
    tokenizer.stop_ids = set()
    optimizer = rloop.new_optimizer(policy, cfg)
    problems = [
        Problem(id=str(i), prompt=q, answer="1", kind="math") for i, q in enumerate(questions())
    ]
    steps = iter(range(10**6))

    def step() -> None:
        step = next(steps)
        groups, _ = rloop.respond(
            policy,
            tokenizer,
            problems,
            cfg,
            seed=step,
            place=(0, step),
            num_samples=8,
            temperature=1.0,
        )
        for trajectory in (t for group in groups for t in group):
            trajectory.reward = float(len(trajectory.response) % 2)
        rloop.update(policy, optimizer, None, groups, run)

    return step


def main() -> None:
    parser = options(__doc__)
    parser.add_argument(
        "--groups", type=int, default=2, help="groups of 8 in a micro-batch, ours and TRL's"
    )
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
                middle = time.perf_counter()
                step()
                seconds["trl.GRPOTrainer"].append(middle - self.start)
                seconds["ours"].append(time.perf_counter() - middle)
                print({name: round(values[-1], 2) for name, values in seconds.items()}, flush=True)

        settings = GRPOConfig(
            output_dir=f"{scratch}/trl", use_cpu=True, bf16=args.dtype == "bf16", max_steps=args.rounds + 1, disable_tqdm=True,
            per_device_train_batch_size=8 * args.groups, gradient_accumulation_steps=PROMPTS // args.groups, num_generations=8,
            temperature=1.0, max_completion_length=args.new_tokens, generation_kwargs={"min_new_tokens": args.new_tokens},
            beta=0.0, epsilon=0.2, epsilon_high=0.28, loss_type="dapo", learning_rate=1e-6, lr_scheduler_type="constant",
            report_to="none", save_strategy="no", gradient_checkpointing=False,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(
                args.model, dtype=torch.float32, attn_implementation="sdpa"
            ),
            reward_funcs=lambda completions, **_: [
                float(len(c[0]["content"]) % 2) for c in completions
            ],
            args=settings,
            train_dataset=Dataset.from_list(
                [{"prompt": [{"role": "user", "content": q}]} for q in questions()]
            ),
            processing_class=AutoTokenizer.from_pretrained(args.model),
            callbacks=[Alternate()],
        )
        trainer.train()
    rates = {name: 3600 / statistics.median(values[1:]) for name, values in seconds.items()}
    work = f"{PROMPTS} x 8 x {args.new_tokens} tokens, {args.groups} groups a micro-batch, {setting(args)}"
    report(
        f"RL step {args.model}, {work}",
        rates,
        "steps/h",
        median_s={n: round(3600 / r, 2) for n, r in rates.items()},
    )


if __name__ == "__main__":
    main()
