"""The command `protoshard plan`."""

from __future__ import annotations

import argparse
from dataclasses import fields

from pipeline.commands import command, count

MANY = ("between", "latency", "step_ms", "gather_dtype", "compress", "log_every")  # options that count with --nodes alone


def add(commands: argparse._SubParsersAction) -> None:
    """Adds it to the commands of `protoshard`."""
    plan = command(
        commands,
        "plan",
        _plan,
        "predict the memory of a training step and the classifier's time, what will not fit, and the time of a step on many nodes",
        "protoshard plan --identities 10000000 --ranks 8 --batch 1024 --rate 0.1 --hardware h100-80gb",
    )
    plan.add_argument("--identities", type=count, required=True, metavar="N", help="classes of the whole job, such as 10000000, 1e7 or 10M")
    plan.add_argument("--width", type=count, default=512, metavar="D", help="features per sample (512)")
    plan.add_argument(
        "--batch", type=count, default=1024, metavar="N", help="samples per step, over all ranks; with --nodes of a node (1024)"
    )
    plan.add_argument("--ranks", type=count, default=1, metavar="N", help="processes, one a GPU; with --nodes those of a node (1)")
    plan.add_argument("--accumulation", type=count, default=1, metavar="N", help="micro-batches of a step (1)")
    plan.add_argument("--rate", type=float, default=1.0, metavar="R", help="share of the classes that take part in a step (1)")
    plan.add_argument("--optimizer", default="sgd", choices=("sgd", "adamw"), help="of the prototypes (sgd)")
    plan.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="of the products with prototypes (bfloat16)")
    plan.add_argument("--storage-dtype", default="float32", choices=("float32", "bfloat16"), help="of the prototypes (float32)")
    plan.add_argument("--synchronous", dest="asynchronous", action="store_false", help="saves keep no copy of what they write")
    plan.add_argument("--in-backward", action="store_true", help="prototypes are updated during backward: no gradient of all of them")
    plan.add_argument("--bank", action="store_true", help="with a bank of last features, for substitution_source=bank and losses that ask")
    plan.add_argument("--backbone", default="iresnet50", metavar="NAME", help="or none, for the classifier alone (iresnet50)")
    plan.add_argument("--checkpoint-activations", action="store_true", help="backward computes the inside of the backbone's blocks again")
    plan.add_argument("--image-size", type=count, default=112, metavar="PIXELS", help="side of an image (112)")
    plan.add_argument("--backbone-optimizer", default="sgd", choices=("sgd", "adamw"), help="of the backbone (sgd)")
    plan.add_argument("--frozen", type=_parts, default=(), metavar="PART,...", help="of the backbone, as optimizer.frozen (none)")
    plan.add_argument("--ema", action="store_true", help="with an average of the backbone's weights (run.ema)")
    plan.add_argument("--engine", default="ddp", choices=("ddp", "deepspeed"), help="of the backbone (ddp)")
    plan.add_argument("--zero-stage", type=int, default=1, choices=(1, 2, 3), help="of deepspeed (1)")
    plan.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the backbone's products (auto: bfloat16 where the hardware has it)",
    )
    plan.add_argument(
        "--hardware",
        default="here",
        metavar="NAME",
        help="of one rank: here, measured in a few seconds, or h100-80gb, h200, a100-80gb, a100-40gb, v100-32gb or rtx4090 (here)",
    )
    plan.add_argument(
        "--network",
        type=float,
        metavar="GB/S",
        help="the rate at which a rank sends to others, in 1e9 bytes a second: over the network where --ranks are on several machines, but "
        "inside a node with --nodes (that of the hardware)",
    )
    plan.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    many = plan.add_argument_group(
        "on many nodes",
        "--ranks and --batch are then of one node, and each rank keeps as many images on every number of nodes; the other options of this "
        "group count with --nodes alone",
    )
    many.add_argument("--nodes", type=_counts, metavar="N[,N...]", help="also say the time of a step on N nodes, such as 1,8,64,256")
    many.add_argument(
        "--between",
        type=float,
        metavar="GB/S",
        help="the rate at which a node sends to others, over all its links, in 1e9 bytes a second: 50 for 400 Gbit/s",
    )
    many.add_argument("--latency", metavar="TIME", help="of a message from node to node, such as 10us or 20ms (10us)")
    many.add_argument("--step-ms", type=float, metavar="MS", help="a measured step without communication (the least that the peaks allow)")
    many.add_argument("--gather-dtype", choices=("float32", "bfloat16"), help="of features between ranks (float32)")
    many.add_argument("--log-every", type=count, metavar="N", help="steps between lines of metrics, as run.log_every (20)")
    many.add_argument("--compress", action="store_true", default=None, help="the backbone's gradients travel in bfloat16 (engine.compress)")


def _plan(options: argparse.Namespace) -> None:
    from pipeline import plan

    scale = None
    if options.nodes is None:
        for name in MANY:
            if getattr(options, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} is about many nodes: say how many with --nodes, such as --nodes 1,8,64")
    else:
        rate, step_ms = options.between, options.step_ms
        others = {name: value for name in ("gather_dtype", "compress", "log_every") if (value := getattr(options, name)) is not None}
        scale = plan.Scale(
            options.nodes,
            None if rate is None else 1e9 * rate,
            plan.seconds_of(options.latency or "10us"),
            None if step_ms is None else step_ms / 1e3,
            **others,
        )
    job = plan.Job(**{field.name: getattr(options, field.name) for field in fields(plan.Job)})
    network = None if options.network is None else 1e9 * options.network
    made = plan.plan(job, plan.find_hardware(options.hardware, job, network), scale)
    print(plan.as_json(made) if options.json else plan.as_text(made))


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _counts(text: str) -> tuple[int, ...]:
    return tuple(count(part) for part in text.split(","))
