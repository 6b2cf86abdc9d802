"""Train the bundled model on one CPU thread, or its float twin (`--float`): same network, tokens, seed and schedule.

The recipe follows BitNet's training FAQ: AdamW, a learning rate far above that of float models, weight decay in the
first half only. The rate warms up, then falls along a cosine. A batch is 16 windows of 256 tokens at random places.

Checkpoints go to the cache folder every few minutes; the same command resumes from there (`--fresh` starts anew).
Batches depend on (seed, step) alone, so a resumed run sees what an uninterrupted one would have seen.

    python models/train/train.py --tokens 20e6
"""

import argparse
import math
import sys
import time

import corpus
import numpy as np
import torch
from network import Arithmetic, LanguageModel, Shape
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokens import batch_at, token_stream, tokenizer_of, windows
from torch.nn import functional as F


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--float", action="store_true", help="train the float twin")
    parser.add_argument("--tokens", type=float, default=20e6, help="budget; sizes the schedule")
    parser.add_argument("--minutes", type=float, help="size the schedule by wall time instead (speed measured first)")
    parser.add_argument("--stop", type=int, help="leave off after this step; the schedule still spans the budget")
    parser.add_argument("--batch", type=int, default=16, help="windows a step")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--decay", type=float, default=0.1, help="weight decay of the first half")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", help="of the checkpoint in the cache (default: ternary or float)")
    parser.add_argument("--fresh", action="store_true", help="ignore an older checkpoint")
    parser.add_argument("--no-compile", action="store_true", help="slower, but needs no C++ compiler")
    return parser.parse_args()


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    shape = Shape()
    length = shape.max_position_embeddings
    passages, held_out = corpus.load()
    tokenizer = tokenizer_of(passages, shape.vocab_size)
    stream = token_stream(tokenizer, passages)
    check = [part[:48] for part in windows(token_stream(tokenizer, held_out), length)]

    arithmetic = Arithmetic(not args.float, not args.float, torch.bfloat16)
    network = LanguageModel(shape, arithmetic)
    matrices = [parameter for parameter in network.parameters() if parameter.dim() == 2]
    norms = [parameter for parameter in network.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=args.decay, fused=True)

    def score(hidden, targets):
        return F.cross_entropy(network.head(hidden).flatten(0, 1), targets.flatten())

    if not args.no_compile:  # the layers one by one: they are alike, so that one compilation serves them all
        score = torch.compile(score, dynamic=False)
        for layer in network.model.layers:
            layer.compile(dynamic=False)

    def train_step(step, rate):
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens, targets = batch_at(stream, step, args.seed, args.batch, length)
        loss = score(network.model(tokens), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    @torch.no_grad()
    def held_out_loss():
        pairs = zip(check[0].split(args.batch), check[1].split(args.batch), strict=True)
        return float(np.mean([score(network.model(tokens), targets).item() for tokens, targets in pairs]))

    path = corpus.CACHE / f"{args.name or ('float' if args.float else 'ternary')}.pt"
    state = {"step": 0, "seconds": 0.0, "log": []}
    if path.exists() and not args.fresh:
        state = torch.load(path, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
    steps = int(args.tokens) // (args.batch * length)
    if args.minutes and "steps" in state:
        steps = state["steps"]
    elif args.minutes:
        for _ in range(3):  # a rate of 0 leaves the weights alone
            train_step(0, 0.0)
        start = time.monotonic()
        for step in range(20):
            train_step(step, 0.0)
        steps = int(args.minutes * 60 / ((time.monotonic() - start) / 20))
        optimizer.state.clear()

    def save(step):
        log = state["log"] + [(step, smooth, held_out_loss())]
        seconds = time.monotonic() - started + state["seconds"]
        state.update(step=step, steps=steps, log=log, arguments=vars(args))
        whole = state | {"seconds": seconds, "network": network.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(whole, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
        rate = args.batch * length * step / seconds
        losses = f"loss {smooth:.3f}  held-out {log[-1][2]:.3f}"
        bar.console.print(f"step {step}/{steps}  {losses}  {rate:.0f} tokens/s", highlight=False)

    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(f"{parameters} parameters, {len(stream)} training tokens, {steps} steps", file=sys.stderr)
    started = time.monotonic()
    smooth = state["log"][-1][1] if state["log"] else math.log(shape.vocab_size)
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("loss", total=steps, completed=state["step"])
        last = min(steps, args.stop or steps)
        for step in range(state["step"], last):
            optimizer.param_groups[0]["weight_decay"] = args.decay if step < steps // 2 else 0.0
            loss = train_step(step, learning_rate(step, steps, args.rate, args.warmup))
            smooth += (loss - smooth) * 0.05
            bar.update(task, advance=1, description=f"loss {smooth:.3f}")
            if (step + 1) % 250 == 0 or step + 1 == last:
                save(step + 1)


if __name__ == "__main__":
    try:
        main()
    except corpus.CorpusError as error:
        sys.exit(f"error: {error}")
