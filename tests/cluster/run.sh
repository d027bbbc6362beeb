#!/bin/sh
# Tests against services that the tests start themselves. Usage: run.sh PYTHON
# Installs with apt what is missing and may be installed; what it cannot get is said and its tests are skipped.
set -eu
python=$1
cd "$(dirname "$0")/../.."

if ! command -v chromium >/dev/null 2>&1 && ! command -v google-chrome >/dev/null 2>&1; then
  if command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ]; then
    echo "installing a browser with apt, once: about 1 minute"
    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium; } \
      >/dev/null || echo "apt could not install chromium: the browser's tests are skipped" >&2
  else
    echo "no browser here and no right to install one: its tests are skipped" >&2
  fi
fi

echo "SLURM is not covered yet: no test here starts one. What runs: the tests marked 'cluster' (MLflow server, browser)."
code=0
"$python" -m pytest -m cluster || code=$?
if [ "$code" = 5 ]; then
  echo "no test is marked 'cluster' yet"
  exit 0
fi
exit "$code"
