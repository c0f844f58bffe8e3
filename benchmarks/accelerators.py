"""Grok-1 on GPUs and TPUs that are not here, as their compilers make it: memory, kernels, traffic.

    python -m benchmarks.accelerators h200x1 h200x8 v5e-8
    python -m benchmarks.accelerators h200x1 --full

Nothing runs. Few layers are compiled and the others extrapolated, as `run.py --plan` does; --full
compiles all 64 as well, which takes minutes, and prints how far the two are apart.
"""

import argparse
import math

import jax

import aot
import model
import runners


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("devices", nargs="+", help="as for run.py --plan")
    parser.add_argument("--weights", default="ternary", choices=model.PRECISIONS)
    parser.add_argument("--full", action="store_true", help="compile all layers, too")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")

    config = model.PRESETS["grok-1"]
    formats = model.formats_of(model.abstract_params(config), model.precision_table(args.weights))
    print(
        f"Grok-1, {args.weights}, {config.activations} activations, one request of "
        f"{config.sequence_len} tokens, jax {jax.__version__}; GB on each device"
    )
    row = "{:<8}{:>9}{:>9}{:>9}{:>8}{:>7}{:>10}{:>13}{:>9}{:>10}".format
    titles = ("devices", "kept", "decode", "prefill", "total", "of")
    print(row(*titles, "ops/layer", "collectives", "sends", "at best"))
    for text in args.devices:
        name, count = aot.parse_devices(text)
        heads = math.gcd(count, config.num_kv_heads)
        runner = runners.ModelRunner(config, aot.described_mesh(name, count // heads, heads))
        slots = runner.mesh.shape["data"]
        plan = aot.make_plan(runner, formats, name, slots)
        decode, prefill = plan.steps["decode"], plan.steps["prefill"]
        total, kept = (
            sum(plan.memory.values()),
            sum(plan.memory.values()) - plan.memory["activations"],
        )
        gigabytes = (f"{size / 1e9:.3f}" for size in (kept, decode.added, prefill.added, total))
        print(
            row(
                text,
                *gigabytes,
                f"{plan.limit / 1e9:.0f}",
                f"{decode.operations / config.num_layers:.1f}",
                sum(decode.collectives.values()),
                f"{decode.collective_bytes / 1e6:.1f} MB",
                f"{1000 * plan.token_bytes / plan.device.bandwidth:.2f} ms",
            ),
            flush=True,
        )
        if args.full:
            steps = aot.compiled_steps(config, formats, runner.mesh, slots)
            for step, compiled in steps.items():
                found, planned = aot.Compiled.of(compiled), plan.steps[step]
                of, at = (x.arguments + x.added + x.code for x in (found, planned))
                print(
                    f"  {step}, all layers compiled: {of / 1e9:.3f} GB, planned {at / 1e9:.3f}, "
                    f"{at / of - 1:+.2%}; operations {found.operations:,}, planned "
                    f"{planned.operations:,}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
