"""RLoop with TRL: GRPOTrainer explores, SFTTrainer fine-tunes; the filter is this project's.

    pip install trl==1.16.0
    python -m ports.trl_rloop --config configs/smollm2-chain-sum.toml --run_dir runs/trl

The config is that of rloop.py. Writes RUN/trajectories, RUN/experts and RUN/policies, in the
formats of rloop.py, from one process. docs/adapters.md says where TRL computes something else.
"""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from config import Config, RLConfig, UserError, config_from_command_line
from data import Problem, load_data
from data.tokenizer import Tokenizer
from rloop import Trajectory, seed_of, select_experts
from verify import verify_many

LOSS_TYPES = {"token": "dapo", "sequence": "grpo", "constant": "dr_grpo"}  # of rl.aggregation


def explore(theta: str | Path, cfg: Config, iteration: int, problems: list[Problem]) -> list:
    """One RL phase from the policy directory theta. Returns EVERY sampled trajectory; the policy
    that RL ends with is dropped."""
    tokenizer = Tokenizer(theta, chat=cfg.data.chat_template)
    by_id, trajectories = {problem.id: problem for problem in problems}, []

    def reward(completion_ids, problem, trainer_state, **_) -> list[float]:
        """TRL calls this once for each batch of completions, before it trains on them."""
        texts = [tokenizer.decode(ids) for ids in completion_ids]
        verdicts = verify_many([by_id[id_] for id_ in problem], texts)
        step = trainer_state.global_step // cfg.rl.minibatches + 1
        for id_, ids, text, verdict in zip(problem, completion_ids, texts, verdicts, strict=True):
            p, finished = by_id[id_], ids[-1] in tokenizer.stop_ids
            prompt_ids = tokenizer.encode_prompt(p.prompt, cfg.data, p.context)
            place = {"problem": id_, "iteration": iteration, "step": step, "logps": []}
            outcome = {"response": text, "reason": verdict.reason, "reward": verdict.reward}
            tokens = {"prompt_ids": prompt_ids, "ids": ids, "finished": finished}
            trajectories.append(Trajectory(**place, **tokens, **outcome))
        return [verdict.reward for verdict in verdicts]

    args = GRPOConfig(
        **training_options(cfg, iteration),
        learning_rate=cfg.rl.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=cfg.rl.warmup_steps * cfg.rl.minibatches,
        max_steps=cfg.rl.steps * cfg.rl.minibatches,
        per_device_train_batch_size=cfg.rl.samples_per_problem,
        gradient_accumulation_steps=cfg.rl.problems_per_step // cfg.rl.minibatches,
        steps_per_generation=cfg.rl.problems_per_step,
        num_generations=cfg.rl.samples_per_problem,
        max_completion_length=cfg.sampling.max_new_tokens,
        temperature=cfg.sampling.temperature,
        epsilon=cfg.rl.clip_low,
        epsilon_high=cfg.rl.clip_high,
        beta=cfg.rl.kl_coef,
        loss_type=LOSS_TYPES[cfg.rl.aggregation],
        scale_rewards="group" if cfg.rl.normalize_std else "none",
    )
    prompts = Dataset.from_list([{"prompt": prompt(p, cfg), "problem": p.id} for p in problems])
    model, processor = load_policy(theta, tokenizer)
    GRPOTrainer(model, reward, args, prompts, processing_class=processor).train()
    return trajectories


def fine_tune(theta: str | Path, cfg: Config, iteration: int, experts: list, out: Path) -> None:
    """Fine-tune the policy in the directory theta on the experts' responses; write it to out.

    The rows hold the token ids as they were sampled, so that TRL tokenizes nothing; -100 is a token
    without a loss. max_length=None: TRL's default cuts at 1,024 tokens.
    """
    masked = [[-100] * len(e.prompt_ids) + e.ids for e in experts]
    ids = [e.prompt_ids + e.ids for e in experts]
    args = SFTConfig(
        **training_options(cfg, iteration),
        learning_rate=cfg.rft.lr,
        lr_scheduler_type="linear",
        warmup_steps=cfg.rft.warmup_steps,
        num_train_epochs=cfg.rft.epochs,
        per_device_train_batch_size=cfg.rft.batch_size,
        max_length=None,
    )
    model, processor = load_policy(theta, Tokenizer(theta, chat=cfg.data.chat_template))
    rows = Dataset.from_dict({"input_ids": ids, "labels": masked})
    SFTTrainer(model, args, train_dataset=rows, processing_class=processor).train()
    temporary = out.with_name("saving.tmp")
    model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    os.replace(temporary, out)


def training_options(cfg: Config, iteration: int) -> dict:
    """What both trainers share."""
    return {
        "output_dir": cfg.run_dir,
        "seed": seed_of(cfg.seed, iteration, 0, 0) % 2**32,  # another one for each phase
        "bf16": cfg.compute.dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": cfg.compute.checkpoint_activations,
        "weight_decay": cfg.optimizer.weight_decay,
        "max_grad_norm": cfg.optimizer.grad_clip,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
    }


def load_policy(theta: str | Path, tokenizer: Tokenizer) -> tuple:
    """The policy in float32 and its tokenizer. TRL stops at the ids of generation_config; those of
    a chat template may not be among them."""
    model = AutoModelForCausalLM.from_pretrained(theta, dtype=torch.float32)
    model.generation_config.eos_token_id = sorted(tokenizer.stop_ids)
    return model, AutoTokenizer.from_pretrained(theta)


def prompt(problem: Problem, cfg: Config) -> str | list[dict]:
    """The prompt as TRL takes it: messages, or plain text."""
    messages = [{"role": role, "content": content} for role, content in problem.context]
    question = cfg.data.prompt.replace("{problem}", problem.prompt)
    messages.append({"role": "user", "content": question})
    return messages if cfg.data.chat_template else "\n\n".join(m["content"] for m in messages)


def write_lines(file: Path, trajectories: list) -> None:
    temporary = file.with_suffix(".tmp")
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text("".join(json.dumps(vars(t)) + "\n" for t in trajectories))
    os.replace(temporary, file)


def run(cfg: Config) -> None:
    """The loop. Every trainer loads theta_i from its directory, so RFT cannot start from phi."""
    names = ("max_sampling_rounds", "overlong_buffer", "importance_cap", "favor_hard")
    if any(vars(cfg.rl)[name] != vars(RLConfig())[name] for name in names):
        raise UserError(f"TRL lacks rl.{', rl.'.join(names)}: they must keep their defaults")
    if cfg.rl.problems_per_step % cfg.rl.minibatches:
        raise UserError("with TRL rl.problems_per_step must be a multiple of rl.minibatches")
    run_dir, theta = Path(cfg.run_dir), cfg.model.path
    if (run_dir / "policies").exists():
        raise UserError(f"{run_dir} holds a run, and runs of TRL are not continued")
    (run_dir / "policies").mkdir(parents=True)
    torch.set_num_threads(cfg.compute.threads)
    problems, _ = load_data(cfg, Tokenizer(theta, chat=cfg.data.chat_template))
    for i in range(cfg.iterations):
        trajectories = explore(theta, cfg, i, problems)
        experts = select_experts(trajectories, **vars(cfg.select))
        write_lines(run_dir / f"trajectories/iteration_{i + 1}.jsonl", trajectories)
        write_lines(run_dir / f"experts/iteration_{i + 1}.jsonl", experts)
        counts = f"{len(experts)} experts of {len(trajectories)} trajectories"
        print(f"iteration {i + 1}: {counts}", flush=True)
        if experts:
            fine_tune(theta, cfg, i, experts, run_dir / f"policies/theta_{i + 1}")
            theta = run_dir / f"policies/theta_{i + 1}"


if __name__ == "__main__":
    try:
        run(config_from_command_line(sys.argv[1:])[0])
    except UserError as error:
        sys.exit(f"error: {error}")
