"""Asks PyPI for known vulnerabilities of what requirements.lock pins (pip-audit).

    make audit

Exit codes: 0 none known, or PyPI could not be asked (said); 1 some are known, or pip-audit failed.
"""

import json
import pathlib
import subprocess
import sys

LOCK = pathlib.Path(__file__).resolve().parents[1] / "requirements.lock"


def main():
    """Exit code out."""
    words = [sys.executable, "-m", "pip_audit", "--disable-pip", "--require-hashes"]
    words += ["-r", str(LOCK), "--format=json", "--progress-spinner=off"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        packages = json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        print("audit: skipped, PyPI has not answered in five minutes")
        return 0
    except (ValueError, KeyError):
        last = done.stderr.strip().splitlines()[-1:]
        offline = "requests.exceptions" in done.stderr
        print(f"audit: {'skipped, no network' if offline else 'failed'}: {' '.join(last)}")
        return 0 if offline else 1
    asked = [package for package in packages if "skip_reason" not in package]
    if not asked:
        print(f"audit: skipped, PyPI tells nothing here ({packages[0]['skip_reason']})")
        return 0
    found = [(package, fault) for package in asked for fault in package["vulns"]]
    for package, fault in found:
        fixed = ", ".join(fault["fix_versions"]) or "no version"
        print(f"{package['name']} {package['version']}: {fault['id']}, mended in {fixed}")
    left = f"; {len(packages) - len(asked)} unknown to PyPI" if len(asked) < len(packages) else ""
    print(f"audit: {len(found)} known vulnerabilities in {len(asked)} packages{left}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
