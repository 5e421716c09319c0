#!/usr/bin/env bash
# The tests of what we export and import, with the oldest and the newest transformers that requirements.txt allows:
#     tests/transformers_versions.sh
#     tests/transformers_versions.sh ==5.8.1
# Each version gets an environment that takes all other packages from .venv. This needs the network: `make test` does not.
set -euo pipefail
cd "$(dirname "$0")/.."
range=$(sed -n 's/^transformers\([^ ]*\).*/\1/p' requirements.txt)  # ">=5.6,<5.40"
[ $# -gt 0 ] || set -- "==$(sed 's/>=\([0-9.]*\).*/\1/' <<<"$range").*" "$range"
packages=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
status=0 number=0
for version in "$@"; do
    python="$folder/$((++number))/bin/python"
    .venv/bin/python -m venv "$folder/$number"
    echo "$packages" > "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/others.pth"
    "$python" -m pip install --quiet --upgrade "transformers$version"
    "$python" -c 'import transformers; print("transformers", transformers.__version__)'
    "$python" -m pytest tests/test_convert.py tests/test_published.py tests/test_chat.py tests/test_model.py || status=1
done
exit $status
