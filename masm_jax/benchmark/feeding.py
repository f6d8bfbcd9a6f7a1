"""What ``benchmark input`` measures, each in a process of its own (workers.call)."""

import itertools
import time

from masm_jax.benchmark import loaders, workers

_AHEAD = 2  # steps that train.py lets the host be ahead of the device (metric_log.py)


def throughput(*, way, seconds, warm=4, **loader):
    """Crops per second of a way to load.

    Args:
      way: a key of ``loaders.WAYS``.
      seconds: how long to count.
      warm: batches before that; the volumes are read, the processes started.
      **loader: of ``loaders.batches``.

    Returns:
      {"crops", "seconds", "cpu_seconds", "memory_mb": of all its processes, without mapped files}.
    """
    if way == "masm_jax":  # as train.py does
        from masm_jax import runtime

        runtime.start(cache=False)
    stream = loaders.batches(way, **loader)
    for _ in itertools.islice(stream, warm):
        pass
    family = workers.family()
    used, began, crops = workers.cpu_seconds(family), time.perf_counter(), 0
    while (elapsed := time.perf_counter() - began) < seconds:
        crops += len(next(stream)["image"])
    used = workers.cpu_seconds(family) - used
    held = [workers.memory(pid).get("share", 0) for pid in family]
    return {
        "crops": crops,
        "seconds": elapsed,
        "cpu_seconds": used,
        "memory_mb": sum(held) / 1024,
    }


def flat(*, records, patch, foreground, crops, processes):
    """Memory of the processes that load, while they hand out ``crops`` crops.

    Args:
      records, patch, foreground: of ``loaders.batches``.
      crops: how many.
      processes: workers; 0: the process itself.

    Returns:
      A dict per process: "process", "crops": those handed out at each sample, "own" and "rss" in kB
      at them (workers.memory).
    """
    from masm_jax import runtime

    runtime.start(cache=False)
    batch = 2
    stream = loaders.batches(
        "masm_jax", records=records, patch=patch, batch=batch, foreground=foreground,
        workers=processes,
    )  # fmt: skip
    next(stream)
    pids = [pid for pid in workers.family() if "resource_tracker" not in workers.words(pid)]
    # With workers the first process hands on what the others have read.
    names = ["training process", *(f"worker {number}" for number in range(1, len(pids)))]
    found = [{"process": name, "crops": [], "own": [], "rss": []} for name in names]
    every = max(batch, crops // 100)
    for done in range(batch, crops + batch, batch):
        next(stream)
        if done % every >= batch:
            continue
        for pid, samples in zip(pids, found):
            held = workers.memory(pid)
            if held:
                samples["crops"].append(done)
                samples["own"].append(held["own"])
                samples["rss"].append(held["rss"])
    return found


def waiting(*, records, patch, batch, foreground, rate, seconds):
    """The input of train.py's loop against a device that takes batch / rate s for a step.

    The stream is the one of train.py: read, batched, transferred one ahead. The device is a clock:
    a step begins when it was asked for and the one before is done. As there, the host may be
    two steps ahead and waits for the device otherwise.

    Args:
      records, patch, batch, foreground: of ``pipeline.batches``.
      rate: crops per second of the device.
      seconds: how long to run.

    Returns:
      {"steps", "seconds", "waited": s in ``next``, "idle": s in which the device had nothing to
      do}, all from the arrival of the first batch on.
    """
    import jax

    from masm_jax import runtime, sharding
    from masm_jax.data import pipeline
    from masm_jax.data.records import Records

    runtime.start(cache=False)
    found, mesh = Records(records), sharding.make_mesh(jax.local_devices()[:1])
    host = pipeline.batches(
        found, loaders.visits(found.cases), seed=0, batch_size=batch, patch=patch,
        foreground=foreground, rows=sharding.rows_here(mesh, batch),
    )  # fmt: skip
    stream = sharding.transferred(host, mesh, batch)
    jax.block_until_ready(next(stream))
    began, length, waited = time.perf_counter(), batch / rate, 0.0
    ends = [began + length]  # of the steps: the first has begun
    while time.perf_counter() - began < seconds:
        asked = time.perf_counter()
        arrived = next(stream)
        waited += time.perf_counter() - asked
        jax.block_until_ready(arrived)  # the device would: its step needs the voxels
        del arrived  # as there
        ends.append(max(time.perf_counter(), ends[-1]) + length)
        if len(ends) > _AHEAD:
            time.sleep(max(0.0, ends[-1 - _AHEAD] - time.perf_counter()))
    steps, elapsed = len(ends), ends[-1] - began
    return {
        "steps": steps,
        "seconds": elapsed,
        "waited": waited,
        "idle": max(0.0, elapsed - steps * length),
    }
