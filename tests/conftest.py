"""Shared fixtures. Set before JAX starts: CPU only, eight devices, quick compilation."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
# Tests compile many programs and run each once or twice; tests/parity turns this off.
jax.config.update("jax_disable_most_optimizations", True)

import pytest  # noqa: E402

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data():
    """Folder of real scans: ``$MASM_REAL_DATA``, else ``../shared/data``, else skip."""
    named = os.environ.get("MASM_REAL_DATA")
    folder = pathlib.Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not (folder / "brats").is_dir():
        pytest.skip(f"no real scans: {folder}/brats is absent; set $MASM_REAL_DATA to a folder with it")
    return folder
