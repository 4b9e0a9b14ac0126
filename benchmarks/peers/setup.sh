#!/usr/bin/env bash
# Builds the peers' virtual environments under .bench/ (git-ignored). Safe to run again: pip then has nothing to do.
# One environment that fails is said clearly and does not stop the other; the exit status is then 1.
set -u
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
bench="$(cd "$here/../.." && pwd)/.bench"
python="${PYTHON:-python3}"
status=0

build() { # build VENV REQUIREMENTS
  if { [ -x "$1/bin/python" ] || "$python" -m venv "$1"; } \
    && "$1/bin/python" -m pip install --quiet --requirement "$2"; then
    echo "peers: $1 is ready"
  else
    echo "peers: FAILED to build $1 from $2; its peers will not run" >&2
    status=1
  fi
}

mkdir -p "$bench"
build "$bench/venv" "$here/requirements.txt"
build "$bench/venv-arq" "$here/requirements-arq.txt"
build "$bench/venv-ray" "$here/requirements-ray.txt"
exit "$status"
