#!/bin/sh
# run.sh PYTHON: tests against real services that they start themselves: SLURM, MLflow's server, Postgres, a browser.
# Installs with apt what is missing. What cannot be had is said, and its tests are skipped; under CI=true they fail.
set -eu
python=$1
cd "$(dirname "$0")/../.."
PATH=$PATH:/usr/sbin:/sbin

missing=
lacks() { command -v "$1" >/dev/null 2>&1 || missing="$missing $2"; }
lacks slurmctld slurm-wlm
lacks munged munge
lacks slurmdbd slurmdbd
lacks mariadbd mariadb-server
lacks setpriv util-linux
# Debian keeps it off the path.
ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || lacks postgres postgresql
command -v google-chrome >/dev/null 2>&1 || lacks chromium chromium

if [ -n "$missing" ]; then
  as_root=
  [ "$(id -u)" = 0 ] || as_root="sudo -n"
  echo "installing with apt, once, about 2 minutes:$missing"
  # shellcheck disable=SC2086
  if ! { $as_root apt-get -qq update &&
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $missing; } >/dev/null; then
    echo "apt could not install$missing: the tests that need it are skipped" >&2
    [ "${CI:-}" != true ] || exit 1
  fi
fi
# One thread a process: the cluster's nodes are all this machine.
OMP_NUM_THREADS=1 exec "$python" -m pytest -m cluster --durations=5 tests/cluster
