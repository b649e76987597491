#!/usr/bin/env bash
# Gradescope runs this once, when it builds the machine's image.
set -euo pipefail
cd "${AUTOGRADER:-/autograder}/source"
apt-get update -qq && apt-get install -y -qq python3 python3-venv
python3 -m venv .venv
.venv/bin/pip install -q -r requirements.txt
