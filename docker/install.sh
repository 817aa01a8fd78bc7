#!/bin/sh
# install.sh VENV: makes the environment with what the package needs, beside what the image has.
# Reads TORCH (a requirement, for an image without torch), TORCH_INDEX (where it comes from) and EXTRAS.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
venv=$1

if ! python3 -c 'import ensurepip' 2> /dev/null; then
    apt-get update
    apt-get install --yes --no-install-recommends python3 python3-venv
    rm -rf /var/lib/apt/lists/*
fi
python3 -m venv --system-site-packages "$venv"
PATH=$venv/bin:$PATH
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# Some images pin for everybody who installs; pins.py pins what is there.
unset PIP_CONSTRAINT

if [ -n "${TORCH:-}" ]; then
    if python -c 'import torch' 2> /dev/null; then
        echo "install.sh: this image has a torch; leave TORCH empty" >&2
        exit 1
    fi
    python -m pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH"
fi
python "$here/pins.py" pins > "$here/pins.txt"
python "$here/pins.py" requirements "$here/pyproject.toml" "${EXTRAS:-}" > "$here/requirements.txt"
python -m pip install --constraint "$here/pins.txt" --requirement "$here/requirements.txt"
python "$here/pins.py" check "$here/pins.txt"
