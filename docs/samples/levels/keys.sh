# Who may ask: makes .run/keys.yaml, which holds hashes only, and a file with each key for whoever gets it.
# Run it at the top of the checkout: sh docs/samples/levels/keys.sh
set -eu
umask 077
mkdir -p .run && rm -f .run/keys.yaml   # anew each time
.venv/bin/aim-runtime keys new --file .run/keys.yaml --id console --tenant product --class high --models chat --expires 90d > .run/console.key
.venv/bin/aim-runtime keys new --file .run/keys.yaml --id notebooks --tenant research --class medium --expires 90d > .run/notebooks.key
.venv/bin/aim-runtime keys new --file .run/keys.yaml --id nightly --tenant research --class low --models draft --expires 90d > .run/nightly.key
.venv/bin/aim-runtime keys new --file .run/keys.yaml --id ops --tenant platform --scopes admin,metrics --expires 30d > .run/ops.key
