#!/usr/bin/env bash
# Writes run.txt, test.txt, dev.txt, fuzz.txt and plot.txt: every package with its version and the hashes of its files.
# Needs pip-tools (python -m pip install pip-tools) on the oldest supported Python, 3.11.
# test.txt and plot.txt contain run.txt, dev.txt and fuzz.txt contain test.txt, with equal versions: each is constrained by one before.
# Index and mirror settings of this machine stay out of the files.
# Arguments go to pip-compile, for instance: requirements/lock.sh --upgrade
set -euo pipefail
cd "$(dirname "$0")/.."

compile() { # output, constraint ("" for none), extras...
    local output=$1 constraint=$2
    shift 2
    local options=()
    [[ -n $constraint ]] && options+=(--constraint "$constraint")
    for extra in "$@"; do options+=(--extra "$extra"); done
    python -m piptools compile pyproject.toml --output-file "$output" "${options[@]}" "${PASS[@]}" \
        --generate-hashes --strip-extras --quiet --no-header --annotation-style line \
        --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-emit-options
}

PASS=("$@")
compile requirements/run.txt ""
compile requirements/test.txt requirements/run.txt test
compile requirements/dev.txt requirements/test.txt test dev
compile requirements/fuzz.txt requirements/test.txt test fuzz
# With the versions of test.txt where both have a package: the two may be installed into one environment.
compile requirements/plot.txt requirements/test.txt plot
