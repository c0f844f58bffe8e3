"""Two processes with four CPU devices each compute what one does."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import factories
import jax
import numpy as np
import pytest

import sharding
from model import make_model

pytestmark = pytest.mark.slow  # minutes on two cores, all of them

CONFIG = dataclasses.replace(factories.EVEN, num_layers=1)
LENGTH = 11


def logits_on_a_mesh():
    """Logits of a batch of four on a 2 x 4 mesh, on every device."""
    mesh = sharding.make_mesh(2, 4)
    params = jax.tree.map(np.asarray, factories.random_params(CONFIG, "ternary"))
    tokens = np.asarray(factories.random_tokens(CONFIG, 4, LENGTH))

    def place(array, where):  # each process gives what its devices hold
        return jax.make_array_from_callback(array.shape, where, lambda index: array[index])

    params = jax.tree.map(place, params, sharding.parameter_shardings(mesh, params))
    tokens = place(tokens, sharding.activation_sharding(mesh, ("batch", None), tokens.shape))
    with jax.set_mesh(mesh):
        apply = jax.jit(
            lambda *args: make_model(CONFIG).apply(*args).logits,
            out_shardings=sharding.activation_sharding(mesh),
        )
        return np.asarray(apply(params, None, tokens))


def work(address, process, file):
    """One of the two processes."""
    jax.distributed.initialize(address, num_processes=2, process_id=process)
    assert jax.process_count() == 2
    assert len(jax.devices()) == 8 and len(jax.local_devices()) == 4
    np.save(file, logits_on_a_mesh())


def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    tests = Path(__file__).parent
    processes = []
    for i in range(2):
        code = (
            "import jax, sys\n"
            f"sys.path[:0] = [{str(tests)!r}, {str(tests.parent)!r}]\n"
            "jax.config.update('jax_platforms', 'cpu')\n"
            "jax.config.update('jax_num_cpu_devices', 4)\n"
            "import test_distributed\n"
            f"test_distributed.work({address!r}, {i}, {str(tmp_path / f'{i}.npy')!r})\n"
        )
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", code],
                env=os.environ | {"XLA_FLAGS": ""},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, errors, strict=True):
        assert process.returncode == 0, text

    first, second = (np.load(tmp_path / f"{i}.npy") for i in range(2))
    assert np.array_equal(first, second)
    # Between processes sums are made in another order; logits have a standard deviation of 0.7.
    np.testing.assert_allclose(first, logits_on_a_mesh(), rtol=0, atol=2e-5)


ROOT = Path(__file__).parent.parent


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"localhost:{free.getsockname()[1]}"


def start(devices, *flags, **variables):
    """`run.py` on the demo, with so many CPU devices, on a mesh of four."""
    flag = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "run.py", "--prompt", "JULIET:", "--mesh", "2,2", *flags],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(*processes):
    """What each wrote to stdout and stderr, once all have ended."""
    try:
        return [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_the_command_on_two_hosts():
    """`run.py --distributed` on the demo: process 0 writes what one process does, 1 nothing.

    Where they are is given, or what SLURM says.
    """
    address = free_address()
    slurm = {"SLURM_JOB_ID": "4242", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    processes = [
        start(4, "--max-len", "12"),
        *(start(2, "--max-len", "12", "--distributed", f"{address},2,{i}") for i in range(2)),
        *(
            start(2, "--max-len", "12", "--distributed", **slurm, SLURM_PROCID=i, SLURM_LOCALID=i)
            for i in "01"
        ),
    ]
    alone, *hosts = ended(*processes)
    assert alone[0].startswith("JULIET:")
    for first, second in (hosts[:2], hosts[2:]):
        # JAX's collectives on CPU write to stdout too, before there is any text.
        assert first[0].endswith(alone[0]), first[1]
        assert "JULIET" not in second[0]


def test_all_hosts_end_where_one_has_no_checkpoint(tmp_path):
    address = free_address()
    flags = [(), ("--checkpoint", str(tmp_path / "nothing"))]
    processes = [start(2, "--distributed", f"{address},2,{i}", *flags[i]) for i in range(2)]
    for process, (_, errors) in zip(processes, ended(*processes), strict=True):
        assert process.returncode == 1
        assert "error: host 1, " in errors and "nothing: no checkpoint here" in errors


def test_a_host_that_dies():
    """The other one ends with a message."""
    address = free_address()
    first, second = (
        start(2, "--max-len", "250", "--distributed", f"{address},2,{i}") for i in "01"
    )
    try:
        for line in first.stderr:
            if line.startswith("load"):  # compiling comes next, and takes seconds
                break
        second.kill()
        _, errors = first.communicate(timeout=240)
        assert first.returncode == 1
        assert "error: another host ended, or cannot be reached" in errors
    finally:
        first.kill()
